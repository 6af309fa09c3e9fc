"""What leaves a run: metadata, files of a run, conversion, merged models."""

import datetime
import json
import math
import shutil
from pathlib import Path
from typing import get_args

import peft
import pytest
import safetensors.torch
import torch

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.export import (
    convert,
    export_arm,
    plain_name,
    require_free,
    write_study_files,
)
from lorascope.adapters.files import Layout, load_adapter, save_adapter
from lorascope.adapters.inspection import inspect_adapter
from lorascope.adapters.inspection_text import as_text
from lorascope.adapters.modules import LoraModule
from lorascope.adapters.targets import resolve_section
from lorascope.arms import Arm
from lorascope.base.loading import Base, load_base
from lorascope.base.weights import read_header
from lorascope.config import load_study
from lorascope.errors import AdapterError, ConfigError
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import Job, draw_pictures, initial_noise
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.sections import AdapterSection, BaseSection, SampleSection
from lorascope.store import write_json
from random_adapters import (
    ATTENTION,
    layers_of,
    load_pipeline,
    sd15_adapter,
)

STARTED = datetime.datetime(2026, 5, 4, 3, 2, 1, tzinfo=datetime.UTC)


def header_of(path: Path) -> dict[str, str]:
    return read_header(path).metadata


# -- metadata ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\nb", "x" * 101, ".hidden", "a<b>"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--name .*use letters"):
        plain_name(name)


# -- files of a run ------------------------------------------------------------------------------------------


@pytest.fixture
def run(base: Base, pipeline_folder: Path, tmp_path: Path) -> tuple[RunDir, StudyConfig]:
    """A run folder with a trained arm r4 and its best adapter, and an arm r8 that failed."""
    export = '[export]\nformats=["kohya","diffusers"]\ndtype="fp32"\n'
    text = f'name="cats"\nbase.model="{pipeline_folder}"\n[[arms]]\nrank=[4,8]\nalpha=2\n{export}'
    (tmp_path / "cats.toml").write_text(text)
    config = load_study(tmp_path / "cats.toml", environment={})
    run_dir = RunDir(tmp_path / "run")
    bank = AdapterBank(
        base.components, resolve_section(base.components, AdapterSection()), config.expand_arms()[:1]
    )
    bank.parameters.normal_(generator=torch.Generator().manual_seed(0))
    folder = run_dir.adapters_dir / "r4"
    save_adapter(bank.adapter(0), folder, "peft", "fp32")
    bank.parameters.mul_(2)
    save_adapter(bank.adapter(0), folder / "best", "peft", "fp32")
    write_json(folder / "training.json", {"steps": 12, "epochs": 3, "failed": None})
    captions = {"a": "a cat", "b": "a cat, red"}
    rows = [{"id": name, "caption": caption, "digest": ""} for name, caption in captions.items()]
    counts = {"resolution_px": 64, "num_rows": 2, "num_train": 2}
    lists: dict[str, list[object]] = {"heldout": [], "refused": [], "treated": [], "duplicates": []}
    write_json(run_dir.data_json, {"source": "pictures", "fingerprint": "", "train": rows, **counts, **lists})
    write_json(
        run_dir.manifest_json, {"started": STARTED.isoformat(), "base": {"prediction_type": "epsilon"}}
    )
    return run_dir, config


def test_a_study_leaves_its_files_beside_the_adapter(run: tuple[RunDir, StudyConfig]) -> None:
    run_dir, config = run
    written = write_study_files(run_dir, config, config.expand_arms()[0])
    folder = run_dir.adapters_dir / "r4"
    assert [item.path for item in written] == [
        folder / "cats-r4.safetensors",
        folder / "cats-r4-diffusers.safetensors",
    ]
    metadata = header_of(written[0].path)
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "cats-r4"
    assert (
        metadata["ss_num_train_images"] == "2"
        and metadata["ss_max_train_steps"] == "12"
        and metadata["ss_learning_rate"] == "0.0001"
    )
    assert json.loads(metadata["ss_tag_frequency"]) == {"pocket": {"a cat": 2, "red": 1}}
    assert float(metadata["ss_training_started_at"]) == STARTED.timestamp() and "sshs_model_hash" in metadata
    source = load_adapter(folder)
    for item in written:
        loaded = load_adapter(item.path)
        assert loaded.modules.keys() == source.modules.keys() and {
            module.alpha for module in loaded.modules.values()
        } == {2.0}
    before = written[0].path.read_bytes()
    write_study_files(run_dir, config, config.expand_arms()[0])
    assert written[0].path.read_bytes() == before


def test_a_format_that_cannot_hold_the_adapter_is_only_a_warning(
    run: tuple[RunDir, StudyConfig], caplog: pytest.LogCaptureFixture
) -> None:
    run_dir, config = run
    adapter = Adapter(
        {"unet.class_embedding.linear_1": LoraModule(torch.ones(1, 2), torch.ones(2, 1), None)}, "peft", {}
    )
    save_adapter(adapter, run_dir.adapters_dir / "r4", "peft", "fp32")
    written = write_study_files(run_dir, config, config.expand_arms()[0])
    assert [item.path.name for item in written] == ["cats-r4-diffusers.safetensors"]
    assert (
        "export   r4: no kohya file: 'unet.class_embedding.linear_1': no layer of a Stable Diffusion v1 model"
        in caplog.text
    )


def test_an_arm_is_exported_by_name_and_checkpoint(run: tuple[RunDir, StudyConfig], tmp_path: Path) -> None:
    run_dir, config = run
    last = export_arm(run_dir, config, "r4", "kohya", tmp_path / "last.safetensors", "fp32")
    best = export_arm(
        run_dir, config, "r4", "kohya", tmp_path / "best.safetensors", "fp32", checkpoint="best"
    )
    assert header_of(best.path)["ss_output_name"] == "cats-r4-best"
    for path, module in load_adapter(last.path).modules.items():
        assert torch.equal(load_adapter(best.path).modules[path].down, 2 * module.down)
    assert any("do not fit Stable Diffusion v1.5" in note for note in last.notes)
    with pytest.raises(ConfigError, match="--arm 'r9': not an arm of this run: choose one of r4, r8"):
        export_arm(run_dir, config, "r9", "kohya")
    with pytest.raises(
        ConfigError, match="no last adapter of arm 'r8' here: train it, or choose one that did not fail"
    ):
        export_arm(run_dir, config, "r8", "kohya")
    with pytest.raises(ConfigError, match="no best adapter of arm 'r8' here .train.keep_best keeps it"):
        export_arm(run_dir, config, "r8", "kohya", checkpoint="best")


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT 0.21 with transformers 5
@pytest.mark.parametrize("layout", get_args(Layout))
def test_a_strength_is_in_the_file_for_every_loader(
    run: tuple[RunDir, StudyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    """Our loader, diffusers and PEFT take from the file what the arm adds, times the strength."""
    run_dir, config = run
    monkeypatch.chdir(tmp_path)
    written = export_arm(run_dir, config, "r4", layout, dtype="fp32", strength=0.6)
    endings = {"kohya": ".safetensors", "diffusers": "-diffusers.safetensors", "peft": "-peft"}
    assert written.path == Path(f"cats-r4-strength-0.6{endings[layout]}")
    trained = load_adapter(run_dir.adapters_dir / "r4").modules
    loaded = load_adapter(written.path)
    assert loaded.metadata["lorascope_strength"] == "0.6" and not loaded.leftover
    for path, module in loaded.modules.items():
        torch.testing.assert_close(module.update(), 0.6 * trained[path].update())
        assert torch.equal(module.down, trained[path].down) and module.alpha == pytest.approx(1.2)
    pipeline, plain = load_pipeline(Path(config.base.model)), load_pipeline(Path(config.base.model))
    if layout == "peft":
        unet = peft.PeftModel.from_pretrained(pipeline.unet, str(written.path)).merge_and_unload()
    else:
        pipeline.load_lora_weights(str(written.path))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        unet = pipeline.unet
    for path, module in trained.items():
        name = path.removeprefix("unet.")
        difference = unet.get_submodule(name).weight - plain.unet.get_submodule(name).weight
        # fp32: the difference of two weights about 1, each rounded at 6e-8
        torch.testing.assert_close(difference.detach(), 0.6 * module.update(), rtol=1e-4, atol=1e-6)


def test_a_strength_changes_nothing_else(run: tuple[RunDir, StudyConfig], tmp_path: Path) -> None:
    """Readers take the file as before, inspect shows the strength, conversion keeps it, 1 leaves no trace."""
    run_dir, config = run
    plain = export_arm(run_dir, config, "r4", "kohya", tmp_path / "plain.safetensors", name="a")
    one = export_arm(run_dir, config, "r4", "kohya", tmp_path / "one.safetensors", name="a", strength=1.0)
    assert plain.path.read_bytes() == one.path.read_bytes()
    half = export_arm(
        run_dir, config, "r4", "kohya", tmp_path / "half.safetensors", strength=0.5, checkpoint="best"
    )
    found = inspect_adapter(half.path)
    assert found.metadata["ss_output_name"] == "cats-r4-best-strength-0.5"
    assert found.metadata["ss_network_alpha"] == "1.0" and not any("say" in text for text in found.remarks)
    assert set(found.hashes.values()) == {"matches"}
    assert [reading.verdict for reading in found.readings] == [
        reading.verdict for reading in inspect_adapter(plain.path).readings
    ]
    assert "strength in alpha           0.5" in as_text(found)
    for layout in ("kohya", "diffusers", "peft"):
        again = convert(half.path, tmp_path / f"again-{layout}.safetensors", layout)
        assert load_adapter(again.path).metadata["lorascope_strength"] == "0.5"


@pytest.mark.parametrize("strength", [0.0, -0.5, 2.1, math.inf, math.nan])
def test_a_strength_out_of_range_is_refused(run: tuple[RunDir, StudyConfig], strength: float) -> None:
    run_dir, config = run
    with pytest.raises(ConfigError, match=r"--strength \S+: must be above 0 and at most 2: give the weight"):
        export_arm(run_dir, config, "r4", "kohya", strength=strength)


def test_a_merged_model_holds_as_much_of_the_update(run: tuple[RunDir, StudyConfig], tmp_path: Path) -> None:
    run_dir, config = run
    module = load_adapter(run_dir.adapters_dir / "r4").modules[f"unet.{ATTENTION}.to_q"]
    weight = load_pipeline(Path(config.base.model)).unet.get_submodule(f"{ATTENTION}.to_q").weight
    expected = weight + 0.25 * module.update()
    folder = export_arm(
        run_dir, config, "r4", "merged-diffusers", tmp_path / "model", "fp32", strength=0.25
    ).path
    merged = load_pipeline(folder).unet.get_submodule(f"{ATTENTION}.to_q").weight
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert json.loads((folder / "lorascope.json").read_text())["strength"] == 0.25
    file = export_arm(
        run_dir, config, "r4", "merged-ldm", tmp_path / "m.safetensors", "fp32", strength=0.25
    ).path
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(safetensors.torch.load_file(file)[name], expected, rtol=1e-5, atol=1e-5)
    assert header_of(file)["lorascope_strength"] == "0.25"
    with pytest.raises(AdapterError, match="has this adapter merged in already"):
        convert(run_dir.adapters_dir / "r4", tmp_path / "twice", "merged-diffusers", base=str(folder))


def test_nothing_is_overwritten_unasked(run: tuple[RunDir, StudyConfig], tmp_path: Path) -> None:
    run_dir, config = run
    out = tmp_path / "a.safetensors"
    out.write_text("precious")
    with pytest.raises(ConfigError, match="exists: name another path, or replace it with --force"):
        export_arm(run_dir, config, "r4", "kohya", out)
    assert out.read_text() == "precious"
    export_arm(run_dir, config, "r4", "kohya", out, force=True)
    load_adapter(out)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("precious")
    with pytest.raises(
        ConfigError, match="is a folder without a model or an adapter in it, which --force does not replace"
    ):
        export_arm(run_dir, config, "r4", "merged-diffusers", tmp_path / "folder", force=True)
    require_free(run_dir.adapters_dir / "r4", force=True)
    shutil.copytree(run_dir.adapters_dir / "r4", tmp_path / "full")
    (tmp_path / "full" / "adapter_config.json").unlink()  # as full differences, which have none
    require_free(tmp_path / "full", force=True)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("alpha", [2.0, 4.0, 8.0], ids=["below", "equal", "above"])
def test_diffusers_draws_from_our_file_what_we_draw_from_the_bank(
    base: Base, tmp_path: Path, layout: Layout, alpha: float
) -> None:
    """The bank's own picture, guidance and scheduler included, for alpha below, at and above the rank."""
    arm = Arm(name="r4", rank=4, alpha=alpha, lr=1e-3, seed=0)
    bank = AdapterBank(base.components, resolve_section(base.components, AdapterSection()), [arm])
    bank.parameters.normal_(generator=torch.Generator().manual_seed(3)).mul_(0.1)
    save_adapter(bank.adapter(0), tmp_path / "a.safetensors", layout, "fp32")
    job, section, shape = (
        Job(Prompt("normal", 0, "a red house"), 5),
        SampleSection(steps=3, guidance=5.0),
        (4, 8, 8),
    )
    bank.attach()
    try:
        _, ours = draw_pictures(base, bank, [Slice(0)], [job], shape, section)
    finally:
        bank.detach()
    pipeline = load_pipeline(base.folder)
    pipeline.load_lora_weights(str(tmp_path / "a.safetensors"))
    theirs = pipeline(
        "a red house",
        num_inference_steps=3,
        guidance_scale=5.0,
        latents=initial_noise(job, shape)[None],
        output_type="latent",
        height=32,
        width=32,
    ).images
    # fp32: 1.2e-7 * sqrt(300) products summed in another order, through 12 layers, times guidance 5, 4e-5
    torch.testing.assert_close(ours.flatten(0, -4), theirs, rtol=1e-3, atol=1e-3)


# -- conversion ----------------------------------------------------------------------------------------------


def test_conversion_keeps_training_metadata_and_takes_a_new_name(tmp_path: Path) -> None:
    metadata = {
        "ss_output_name": "theirs",
        "ss_tag_frequency": "{}",
        "sshs_model_hash": "stale",
        "modelspec.author": "someone",
        "x": "y",
    }
    save_adapter(sd15_adapter(), tmp_path / "a.safetensors", "diffusers", "fp32", metadata)
    written = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", "fp32", name="mine")
    found = header_of(written.path)
    assert found["ss_output_name"] == found["modelspec.title"] == "mine"
    assert (
        found["ss_tag_frequency"] == "{}"
        and found["modelspec.author"] == "someone"
        and found["sshs_model_hash"] != "stale"
    )
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora" and not written.notes
    assert "lora_adapter_metadata" not in found  # beside alpha tensors it makes diffusers raise
    convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "kohya")
    assert header_of(tmp_path / "c.safetensors")["ss_output_name"] == "theirs"
    save_adapter(
        sd15_adapter(), tmp_path / "odd.safetensors", "kohya", "fp32", {"ss_output_name": "../a<b>\x1b[31m."}
    )
    convert(tmp_path / "odd.safetensors", tmp_path / "e.safetensors", "kohya")
    assert plain_name(header_of(tmp_path / "e.safetensors")["ss_output_name"]) == "_a_b_31m_"
    with pytest.raises(ConfigError, match="--format merged-ldm: needs the model to merge into: give --base"):
        convert(tmp_path / "a.safetensors", tmp_path / "d.safetensors", "merged-ldm")


# -- merging -------------------------------------------------------------------------------------------------


def test_whole_models_hold_the_adapter_and_refuse_it_a_second_time(
    run: tuple[RunDir, StudyConfig], pipeline_folder: Path, tmp_path: Path
) -> None:
    run_dir, config = run
    written = export_arm(run_dir, config, "r4", "merged-diffusers", tmp_path / "model", "fp32")
    assert "modules merged in float32" in written.notes[0] and len(written.notes) == 1
    pipeline, plain = load_pipeline(tmp_path / "model"), load_pipeline(pipeline_folder)
    adapter = load_adapter(run_dir.adapters_dir / "r4")
    ours, theirs = layers_of(plain), layers_of(pipeline)
    for path, module in adapter.modules.items():
        torch.testing.assert_close(
            theirs[path].weight, ours[path].weight + module.update(), rtol=1e-5, atol=1e-5
        )
    save_adapter(adapter, tmp_path / "a.safetensors", "diffusers", "fp32")
    with pytest.raises(
        AdapterError, match="has this adapter merged in already: merge into the model it was trained on"
    ):
        convert(
            tmp_path / "a.safetensors", tmp_path / "twice", "merged-diffusers", base=str(tmp_path / "model")
        )
    export_arm(run_dir, config, "r4", "merged-diffusers", tmp_path / "model", "fp16", force=True)
    assert (
        load_pipeline(tmp_path / "model").unet.dtype == torch.float32
    )  # diffusers' default, whatever the file's
    tensors = safetensors.torch.load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_one_checkpoint_file_holds_the_merged_model(run: tuple[RunDir, StudyConfig], tmp_path: Path) -> None:
    run_dir, config = run
    written = export_arm(run_dir, config, "r4", "merged-ldm", tmp_path / "model.safetensors", "fp32")
    tensors = safetensors.torch.load_file(written.path)
    metadata = header_of(written.path)
    assert (
        metadata["modelspec.architecture"] == "other" and "only lorascope reads this file" in written.notes[1]
    )  # tiny, not v1.5
    assert len(json.loads(metadata["lorascope_merged"])) == 1
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    pipeline = load_pipeline(Path(config.base.model))
    module = load_adapter(run_dir.adapters_dir / "r4").modules[f"unet.{ATTENTION}.to_q"]
    layer = pipeline.unet.get_submodule(f"{ATTENTION}.to_q")
    torch.testing.assert_close(tensors[name], layer.weight + module.update(), rtol=1e-5, atol=1e-5)
    assert {key.split(".")[0] for key in tensors} == {"model", "first_stage_model", "cond_stage_model"}
    base = load_base(BaseSection(model=str(written.path)), torch.device("cpu"))
    torch.testing.assert_close(
        base.unet.get_submodule(f"{ATTENTION}.to_q").weight, tensors[name], rtol=0, atol=0
    )
    save_adapter(load_adapter(run_dir.adapters_dir / "r4"), tmp_path / "a.safetensors", "kohya", "fp16")
    with pytest.raises(AdapterError, match="has this adapter merged in already"):
        convert(
            tmp_path / "a.safetensors", tmp_path / "twice.safetensors", "merged-ldm", base=str(written.path)
        )
