"""PEFT's configuration of an adapter: read as PEFT reads it, refused where it means something else."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline

from adapter_files import pair, peft_folder, peft_pairs, write
from lorascope.adapters.files import load_adapter, save_adapter
from lorascope.adapters.peft_config import adapter_metadata
from lorascope.errors import AdapterError
from random_adapters import ATTENTION, load_pipeline


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> StableDiffusionPipeline:
    """The tiny pipeline; never change it."""
    return load_pipeline(pipeline_folder)


def test_a_peft_configuration_says_alpha(tmp_path: Path) -> None:
    config = {"rank_pattern": {"to_k": 3}, "alpha_pattern": {r"^.*": 1}, "use_rslora": True}
    with pytest.raises(AdapterError, match="alpha_pattern must map plain module names to numbers"):
        load_adapter(peft_folder(tmp_path / "regex", peft_pairs(), **config))
    adapter = load_adapter(
        peft_folder(tmp_path / "rs", peft_pairs(), **{**config, "alpha_pattern": {"attn1.to_k": 6}})
    )
    scales = {path.rpartition(".")[2]: module.scale for path, module in adapter.modules.items()}
    assert scales == pytest.approx({"to_q": 8 / 2**0.5, "to_k": 6 / 3**0.5})
    save_adapter(adapter, tmp_path / "plain", "peft", "fp32")  # the same strength without rsLoRA
    again = load_adapter(tmp_path / "plain")
    assert {path.rpartition(".")[2]: module.scale for path, module in again.modules.items()} == pytest.approx(
        scales
    )


def lokr_folder(folder: Path, whole: bool, **config: Any) -> Path:
    name = f"base_model.model.{ATTENTION}.to_q.lokr_"
    second = {"w2": torch.ones(3, 4)} if whole else {"w2_a": torch.ones(3, 2), "w2_b": torch.ones(2, 4)}
    tensors = {f"{name}{ending}": tensor for ending, tensor in {"w1": torch.ones(2, 2), **second}.items()}
    return peft_folder(folder, tensors, **{"peft_type": "LOKR", "lora_alpha": 99, "alpha": 6, **config})


@pytest.mark.parametrize("whole", [False, True])
def test_lokr_has_a_configuration_of_its_own(tmp_path: Path, whole: bool) -> None:
    """Its alpha is `alpha`, and PEFT's scale is alpha / r for whole factors too."""
    for number, (config, scale) in enumerate(
        (({}, 3.0), ({"alpha_pattern": {"to_q": 1}}, 0.5), ({"r": 9, "rank_pattern": {"to_q": 2}}, 3.0))
    ):
        (module,) = load_adapter(lokr_folder(tmp_path / str(number), whole, **config)).modules.values()
        assert float(module.update().max()) == pytest.approx(scale * (1 if whole else 2))
    for config, message in (
        ({"alpha": "six"}, "alpha = 'six' or a value of alpha_pattern is not a finite number"),
        ({"peft_type": "LORA"}, "states peft_type LORA, its tensors are LOKR: put the configuration there"),
    ):
        with pytest.raises(AdapterError, match=message):
            load_adapter(lokr_folder(tmp_path / message[:5], whole, **config))
    message = "rank 0, must be a whole number above 0" if whole else "rank 0, its tensors have rank 2"
    with pytest.raises(AdapterError, match=message):
        load_adapter(lokr_folder(tmp_path / "rank", whole, r=0))


def test_full_differences_have_no_configuration(tmp_path: Path) -> None:
    tensors = {f"base_model.model.{ATTENTION}.to_q.diff": torch.ones(6, 6)}
    with pytest.raises(AdapterError, match="states peft_type LORA, its tensors are a full difference: put"):
        load_adapter(peft_folder(tmp_path / "a", tensors))


def test_a_real_peft_adapter_with_patterns_is_read(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """PEFT's own save, with rank and alpha patterns and rsLoRA, gives the updates that PEFT merges."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "proj_in"],
        rank_pattern={"proj_in": 2},
        alpha_pattern={"proj_in": 3},
        use_rslora=True,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(copy.deepcopy(pipeline.unet), config)
    model.save_pretrained(str(tmp_path / "folder"))
    adapter = load_adapter(tmp_path / "folder")
    merged = model.merge_and_unload()
    assert len(adapter.modules) == sum(
        path.endswith(("to_q", "proj_in")) for path, _ in pipeline.unet.named_modules()
    )
    for path, module in adapter.modules.items():
        name = path.removeprefix("unet.")
        difference = merged.get_submodule(name).weight - pipeline.unet.get_submodule(name).weight
        # fp32: the difference of two weights about 1, each rounded at 6e-8
        torch.testing.assert_close(module.update(), difference.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "OFT"}, "peft_type = 'OFT': only LORA, LOHA and LOKR can be converted"),
        ({"peft_type": "LOHA"}, "to_k: its configuration states peft_type LOHA, its tensors are LORA: put"),
        (
            {"init_lora_weights": "pissa"},
            "'pissa' changes the base's weights: .*path_initial_model_for_weight_conversion",
        ),
        ({"lora_alpha": "eight"}, "is not a finite number"),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern must map"),
        ({"rank_pattern": ["to_q"]}, "rank_pattern is .'to_q'.: must map"),
        ({}, r"to_k: its configuration states rank 2, its tensors have rank 3: correct r or rank_pattern"),
        (
            {"r": 0, "rank_pattern": {"to_k": 3}},
            "to_q: its configuration states rank 0, its tensors have rank 2",
        ),
        ({"r": 3}, "to_q: its configuration states rank 3"),
        ({"rank_pattern": {"to_k": 3, "to_q": "2"}}, "to_q: its configuration states rank '2'"),
    ],
)
def test_a_peft_configuration_that_means_something_else_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(peft_folder(tmp_path / "folder", peft_pairs(), **config))


def test_alpha_that_a_peft_configuration_does_not_state_is_that_of_peft(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(pipeline.unet), config).save_pretrained(str(tmp_path))
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert text.pop("lora_alpha") == 8
    (tmp_path / "adapter_config.json").write_text(json.dumps(text))
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(pipeline.unet), str(tmp_path)).merge_and_unload()
    path, module = next(iter(load_adapter(tmp_path).modules.items()))
    assert module.alpha == 8
    name = path.removeprefix("unet.")
    difference = merged.get_submodule(name).weight - pipeline.unet.get_submodule(name).weight
    torch.testing.assert_close(module.update(), difference.detach(), rtol=1e-3, atol=1e-5)


def test_what_a_peft_configuration_promises_and_the_file_does_not_hold_is_noted(tmp_path: Path) -> None:
    config = {"rank_pattern": {"to_k": 3, "gone": 4}, "use_dora": True, "bias": "all"}
    adapter = load_adapter(peft_folder(tmp_path / "folder", peft_pairs(), **config))
    assert adapter.notes == (
        "use_dora is set but there are no magnitudes: it is taken for plain LoRA, "
        "and PEFT takes the base's own",
        "bias = 'all' but there are no biases: those trained with it are lost",
        "rank_pattern names 1 modules that the file does not have, such as gone",
    )
    assert save_adapter(adapter, tmp_path / "out.safetensors", "kohya").notes[:3] == adapter.notes


def test_a_peft_folder_without_its_configuration_is_refused_unless_the_file_says_alpha(
    tmp_path: Path,
) -> None:
    folder = peft_folder(tmp_path / "folder", peft_pairs())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(
        AdapterError, match=r"has no adapter_config.json, so alpha is unknown: put it there, or name"
    ):
        load_adapter(folder)
    adapter = load_adapter(folder / "adapter_model.safetensors")
    assert {module.alpha for module in adapter.modules.values()} == {None}
    save_adapter(
        replace(
            adapter, modules={path: replace(module, alpha=6.0) for path, module in adapter.modules.items()}
        ),
        own := tmp_path / "own",
        "peft",
    )
    (own / "adapter_config.json").unlink()
    assert {module.alpha for module in load_adapter(own).modules.values()} == {6.0}


def test_a_peft_folder_with_a_broken_configuration_is_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "folder", peft_pairs())
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(
        AdapterError, match="adapter_config.json: cannot be read .*without it alpha is unknown"
    ):
        load_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="must be a JSON object, is a list"):
        load_adapter(folder)
    with pytest.raises(AdapterError, match="holds no adapter_model.safetensors"):
        load_adapter(tmp_path)


def test_damaged_alpha_metadata_is_a_fault(tmp_path: Path) -> None:
    tensors = pair(f"unet.{ATTENTION}.to_q.lora_A.weight", f"unet.{ATTENTION}.to_q.lora_B.weight")
    with pytest.raises(AdapterError, match="lora_adapter_metadata is not a JSON object, so alpha is unknown"):
        load_adapter(write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": "[1"}))


def test_a_configuration_in_the_header_that_cannot_be_parsed_says_nothing() -> None:
    assert adapter_metadata({"lora_adapter_metadata": '{"unet.r": 4}'}) == {"unet.r": 4}
    for text in ("", "[1", "[]", "[" * 100_000):
        assert adapter_metadata({"lora_adapter_metadata": text}) == {}
    assert adapter_metadata({}) == {}
