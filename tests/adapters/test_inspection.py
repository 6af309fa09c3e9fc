"""What inspect says of files of all kinds: ours, strangers', damaged ones, and those that load and do
nothing.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.files import load_adapter, save_adapter
from lorascope.adapters.inspection import Inspection, inspect_adapter
from lorascope.adapters.inspection_text import as_text
from lorascope.adapters.metadata import kohya_metadata
from lorascope.adapters.modules import LoraModule
from lorascope.base.layers import stable_diffusion_layers
from lorascope.cli.app import main
from lorascope.errors import EXIT_DONE, EXIT_GATE_REJECTED, EXIT_INPUT, AdapterError, WeightsError
from lorascope.store import PEFT_CONFIG
from random_adapters import random_full, random_lokr

State = dict[str, torch.Tensor]
LAYERS = stable_diffusion_layers()
UNET = [path for path in LAYERS if path.startswith("unet.")]
TEXT = [path for path in LAYERS if path.startswith("text_encoder.")]
ATTENTION = [path for path in UNET if ".attn" in path]
FEED_FORWARD = [path for path in UNET if ".ff." in path]
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
DIFFUSERS = (".lora.down.weight", ".lora.up.weight")


def module(path: str, rank: int = 1, alpha: float | None = None, seed: int = 0) -> LoraModule:
    shape, draw = LAYERS[path], torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=draw) * 0.02
    return LoraModule(torch.randn(rank, *shape[1:], generator=draw) * 0.02, up, alpha)


def flat(path: str) -> str:
    part, _, rest = path.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + rest.replace(".", "_")


def state(
    paths: list[str], spelling: tuple[str, str], name: Callable[[str], str] = lambda path: path
) -> State:
    found = {}
    for path in paths:
        lora = module(path)
        found[name(path) + spelling[0]], found[name(path) + spelling[1]] = lora.down, lora.up
    return found


def kohya(paths: list[str]) -> State:
    return state(paths, KOHYA, flat) | {f"{flat(path)}.alpha": torch.tensor(1.0) for path in paths}


def write(
    folder: Path, tensors: State, metadata: dict[str, str] | None = None, name: str = "file.safetensors"
) -> Path:
    safetensors.torch.save_file(tensors, folder / name, metadata=metadata)
    return folder / name


def answers(inspection: Inspection) -> dict[str, str]:
    return {reading.reader: reading.verdict for reading in inspection.readings}


def check_text(inspection: Inspection) -> str:
    """The text, after looking whether it fits a terminal and holds nothing that moves its cursor."""
    text = as_text(inspection, list_modules=True)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert all(character.isprintable() for line in text.splitlines() for character in line)
    json.dumps(inspection.as_dict())
    return text


@pytest.fixture(scope="module")
def own_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as a study leaves it, with two ranks; never write into it."""
    path = tmp_path_factory.mktemp("own") / "my-style.safetensors"
    modules = {name: module(name, rank=4, alpha=2.0) for name in ATTENTION[:8]}
    modules |= {name: module(name, rank=8, alpha=8.0) for name in FEED_FORWARD[:2]}
    adapter = Adapter(modules, "kohya", {})
    training = {
        "ss_learning_rate": "0.0001",
        "ss_tag_frequency": {"10_cats": {"a cat": 3, "a dog": 1}, "5_more": {"a cat": 2}},
        "ss_training_started_at": "1700000000.5",
    }
    save_adapter(adapter, path, "kohya", "fp16", kohya_metadata(adapter, "my-style", training))
    return path


def test_a_file_of_ours(own_file: Path) -> None:
    found = inspect_adapter(own_file)
    assert found.what == "LoRA for Stable Diffusion v1: U-Net"
    assert (found.layout, found.dtypes, found.num_bytes) == ("kohya", {"fp16": 20}, own_file.stat().st_size)
    assert answers(found) == {name: "refuses" if name == "PEFT" else "yes" for name in answers(found)}
    assert set(found.hashes.values()) == {"matches"}
    assert len(found.hashes) == 3
    assert found.works_somewhere
    text = check_text(found)
    assert "Yes, all of it in WebUI, ComfyUI, Forge, diffusers and sd-scripts; refused by PEFT." in text
    assert "8 attention" in text
    assert "a cat (5), a dog (1)" in text
    assert "2023-11-14 22:13 UTC" in text
    rows = [
        line.split()
        for line in text.splitlines()
        if line.startswith("            ") and line.strip()[:1].isdigit()
    ]
    assert ["4", "2", "0.5", "8", "8", "attention"] in rows
    assert ["8", "8", "1", "2", "2", "feed-forward"] in rows


def test_large_files_have_their_legacy_hash_checked(tmp_path: Path) -> None:
    adapter = Adapter({name: module(name, rank=24, alpha=8.0) for name in UNET[200:212]}, "kohya", {})
    save_adapter(adapter, tmp_path / "big.safetensors", "kohya", "fp16", kohya_metadata(adapter, "big"))
    assert (tmp_path / "big.safetensors").stat().st_size > 0x110000
    assert inspect_adapter(tmp_path / "big.safetensors").hashes == dict.fromkeys(
        ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"), "matches"
    )


def test_a_changed_file_does_not_match_its_hash(tmp_path: Path) -> None:
    path = write(
        tmp_path, kohya(ATTENTION[:1]), {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "00000000"}
    )
    found = inspect_adapter(path)
    assert found.hashes["sshs_model_hash"].startswith("does not match: the weights give ")
    assert found.hashes["sshs_legacy_hash"].startswith("does not match")
    check_text(found)


def test_a_file_that_matches_by_half_is_told_apart(tmp_path: Path) -> None:
    """diffusers' own mixed save: attention as lora.down/up, feed forward and projections as lora_A/B."""
    mixed = dict(
        sorted(
            {
                **state(ATTENTION, DIFFUSERS),
                **state([p for p in UNET if "proj_in" in p] + FEED_FORWARD, PEFT),
            }.items()
        )
    )
    found = inspect_adapter(write(tmp_path, mixed))
    assert answers(found) == {
        "WebUI": "nothing",
        "ComfyUI": "in part",
        "Forge": "refuses",
        "diffusers": "in part",
        "PEFT": "refuses",
        "sd-scripts": "nothing",
    }
    assert found.works_somewhere
    text = check_text(found)
    assert (
        "Only in part in ComfyUI and diffusers; nothing in WebUI and sd-scripts; refused by Forge and PEFT."
        in text
    )
    assert "in part: 48 of 176 modules" in text
    assert "128 attention (such as" in text


def test_attention_by_kohya_and_feed_forward_by_diffusers(tmp_path: Path) -> None:
    found = inspect_adapter(write(tmp_path, {**kohya(ATTENTION[:8]), **state(FEED_FORWARD[:4], DIFFUSERS)}))
    taken = {reading.reader: len(reading.taken) for reading in found.readings}
    assert (taken["WebUI"], taken["ComfyUI"]) == (8, 12)
    assert found.layout == "kohya + diffusers lora.down/up"
    (ignored,) = [reading.ignored for reading in found.readings if reading.reader == "WebUI"]
    assert set(ignored) == set(FEED_FORWARD[:4])


# -- files that load and do nothing --------------------------------------------------------------------------


def test_webui_14866_trained_by_diffusers_and_loaded_in_webui_without_an_error(tmp_path: Path) -> None:
    """WebUI #14866: a LoRA of diffusers' DreamBooth script works there, in WebUI it "loads without any
    errors" and does nothing.

    The report is of an SDXL file and names no cause. What the script writes for SD v1.5 does the same,
    converted it does not.
    """
    path = write(tmp_path, state(ATTENTION, PEFT), {"format": "pt"})
    found = inspect_adapter(path)
    assert answers(found) == {
        "WebUI": "nothing",
        "ComfyUI": "nothing",
        "Forge": "refuses",
        "diffusers": "yes",
        "PEFT": "refuses",
        "sd-scripts": "nothing",
    }
    assert (
        "none of the 128 modules has a name and shape it looks for; passed over without a word"
        in " ".join(check_text(found).split())
    )
    save_adapter(load_adapter(path), tmp_path / "converted.safetensors", "kohya", "fp32", {})
    assert answers(inspect_adapter(tmp_path / "converted.safetensors")) == {
        name: "refuses" if name == "PEFT" else "yes" for name in answers(found)
    }


def test_diffusers_6399_weights_not_listed_by_webui_and_comfyui(tmp_path: Path) -> None:
    """diffusers #6399: pytorch_lora_weights.safetensors "is not visible" in WebUI and ComfyUI: its keys are
    diffusers' own.
    """
    found = inspect_adapter(
        write(tmp_path, state(ATTENTION, DIFFUSERS), name="pytorch_lora_weights.safetensors")
    )
    verdicts = answers(found)
    assert (verdicts["WebUI"], verdicts["ComfyUI"], verdicts["diffusers"]) == ("nothing", "nothing", "yes")
    (notes,) = [reading.notes for reading in found.readings if reading.reader == "WebUI"]
    assert notes == ("listed as Unknown, for want of metadata",)


def test_diffusers_6894_an_sdxl_file_in_names_that_fit(tmp_path: Path) -> None:
    """diffusers #6894: an SDXL LoRA converted to kohya's names loads and does nothing; here its widths tell
    it from SD v1.5's.
    """
    tensors = kohya(ATTENTION)
    for key in [key for key in tensors if "attn2_to_k.lora_down" in key or "attn2_to_v.lora_down" in key]:
        tensors[key] = torch.ones(1, 2048)
    found = inspect_adapter(write(tmp_path, tensors))
    assert (found.family, found.readings, found.works_somewhere) == ("SDXL", (), False)
    assert "No: it is made for SDXL" in check_text(found)


def test_comfyui_6381_ia3(tmp_path: Path) -> None:
    """ComfyUI #6381 and #6397: "lora key not loaded" for every on_input and weight: it knows no IA3, WebUI
    does.
    """
    tensors = {
        f"{flat(path)}{ending}": torch.ones(320)
        for path in ATTENTION[:2]
        for ending in (".weight", ".on_input")
    }
    verdicts = answers(inspect_adapter(write(tmp_path, tensors)))
    assert (verdicts["WebUI"], verdicts["ComfyUI"], verdicts["sd-scripts"]) == ("yes", "nothing", "nothing")


def test_comfyui_9753_lokr_of_peft(tmp_path: Path) -> None:
    """ComfyUI #9753: "lora key not loaded" for every base_model.model...lokr_w1."""
    names = [path.replace("unet.", "base_model.model.") for path in ATTENTION]
    found = inspect_adapter(
        write(tmp_path, {f"{name}.lokr_w{n}": torch.ones(2, 2) for name in names for n in (1, 2)})
    )
    assert answers(found)["ComfyUI"] == "nothing"
    assert not found.works_somewhere


def test_onetrainer_885_kohya_endings_on_dotted_names(tmp_path: Path) -> None:
    """OneTrainer #885: unet.output_blocks...lora_up.weight: no key loaded in ComfyUI, "LoRA version mismatch"
    in Forge.
    """
    found = inspect_adapter(write(tmp_path, state(ATTENTION, KOHYA)))
    assert (answers(found)["WebUI"], answers(found)["Forge"]) == ("nothing", "refuses")
    dotted = [path.replace("unet.", "unet.output_blocks.5.1.") for path in ATTENTION[:8]]
    tensors = {f"{name}{ending}": torch.ones(2, 2) for name in dotted for ending in KOHYA}
    found = inspect_adapter(write(tmp_path, tensors))
    assert "No: " in check_text(found)
    assert not found.works_somewhere


def test_an_adapter_that_was_never_trained(tmp_path: Path) -> None:
    tensors = {
        key: torch.zeros_like(value) if "lora_up" in key else value
        for key, value in kohya(ATTENTION[:4]).items()
    }
    found = inspect_adapter(write(tmp_path, tensors))
    assert set(answers(found).values()) == {"yes", "refuses"}
    assert not found.works_somewhere
    text = check_text(found)
    assert (
        "No: B is zero in every module, as before the first training step: it was trained for no step."
        in text
    )
    assert "4 of 4 modules (100%), 4 of them exactly zero" in text


def test_an_alpha_of_zero(tmp_path: Path) -> None:
    tensors = {
        key: torch.tensor(0.0) if key.endswith("alpha") else value
        for key, value in kohya(ATTENTION[:2]).items()
    }
    assert "alpha is zero in every module" in check_text(inspect_adapter(write(tmp_path, tensors)))


def test_updates_that_half_precision_rounds_away(tmp_path: Path) -> None:
    tensors = kohya(ATTENTION[:2])
    tensors[f"{flat(ATTENTION[0])}.lora_up.weight"] *= 1e-5
    found = inspect_adapter(write(tmp_path, tensors))
    assert [facts.is_near_zero for facts in found.modules].count(True) == 1
    assert found.works_somewhere
    tensors[f"{flat(ATTENTION[1])}.lora_up.weight"] *= 1e-5
    assert "near zero" in (inspect_adapter(write(tmp_path, tensors)).dead_because or "")


def test_nan_and_infinite_values(tmp_path: Path) -> None:
    tensors = kohya(ATTENTION[:3])
    tensors[f"{flat(ATTENTION[1])}.lora_up.weight"][:2] = torch.tensor([[torch.nan], [torch.inf]])
    found = inspect_adapter(write(tmp_path, tensors))
    assert "1 of 3 modules hold NaN or infinite values" in (found.dead_because or "")
    assert "2 values in 1 modules" in check_text(found)


def test_alpha_in_the_configuration_is_read_by_diffusers_alone(tmp_path: Path) -> None:
    """diffusers' save_lora_weights keeps alpha in lora_adapter_metadata, which ComfyUI does not know: another
    strength.
    """
    adapter = Adapter({name: module(name, alpha=4.0) for name in FEED_FORWARD}, "diffusers", {})
    save_adapter(adapter, tmp_path / "file.safetensors", "diffusers", "fp32", {})
    found = inspect_adapter(tmp_path / "file.safetensors")
    notes = {reading.reader: " ".join(reading.notes) for reading in found.readings}
    assert "its strength is 1 instead of 4" in notes["ComfyUI"]
    assert notes["diffusers"] == ""
    assert "lora_alpha = 4" in check_text(found)


# -- other kinds of files ------------------------------------------------------------------------------------

FIRST = flat(ATTENTION[0])
KINDS: dict[str, tuple[State, str]] = {
    "text encoder too": (
        kohya([*ATTENTION[:1], *TEXT]),
        "LoRA for Stable Diffusion v1: U-Net + text encoder",
    ),
    "LoCon": (
        kohya([*ATTENTION, *(path for path in UNET if "conv1" in path)]),
        "LoCon (LoRA with convolutions) for Stable Diffusion v1: U-Net",
    ),
    "DoRA": (
        {**kohya(ATTENTION[4:7]), f"{flat(ATTENTION[5])}.dora_scale": torch.ones(320, 1)},
        "DoRA (LoRA with magnitudes) for Stable Diffusion v1: U-Net",
    ),
    "LoHa": (
        {
            f"{FIRST}.hada_w{n}_{side}": torch.ones((320, 2) if side == "a" else (2, 320))
            for n in (1, 2)
            for side in "ab"
        },
        "LoHa for Stable Diffusion v1 or v2, whose layers in it are alike: U-Net",
    ),
    "LoKr": (
        {f"{FIRST}.lokr_w1": torch.ones(4, 4), f"{FIRST}.lokr_w2": torch.ones(80, 80)},
        "LoKr for Stable Diffusion v1 or v2, whose layers in it are alike: U-Net",
    ),
    "SD 2": (
        {
            f"{flat(ATTENTION[6])}.lora_down.weight": torch.ones(1, 1024),
            f"{flat(ATTENTION[6])}.lora_up.weight": torch.ones(320, 1),
        },
        "LoRA for Stable Diffusion v2: U-Net",
    ),
    "SDXL by its second text encoder": (
        {f"lora_te2_text_model_encoder_layers_0_mlp_fc1{end}": torch.ones(2, 2) for end in KOHYA},
        "LoRA for SDXL: text encoder",
    ),
    "checkpoint": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, 4, 3, 3),
            "first_stage_model.encoder.conv_in.weight": torch.ones(1),
            "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": torch.ones(1),
        },
        "a full checkpoint of Stable Diffusion v1, not an adapter",
    ),
    "VAE": (
        {"encoder.conv_in.weight": torch.ones(1), "decoder.conv_in.weight": torch.ones(1)},
        "an autoencoder (VAE) alone, not an adapter",
    ),
    "textual inversion": ({"emb_params": torch.ones(1, 768)}, "a textual inversion, not an adapter"),
    "named textual inversion": (
        {"<cat-toy>": torch.ones(768)},
        "a textual inversion embedding, not an adapter",
    ),
    "half an adapter": (
        {f"{FIRST}.lora_down.weight": torch.ones(1, 320)},
        "an incomplete adapter: no module has both of its factors",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_is(kind: str, tmp_path: Path) -> None:
    tensors, what = KINDS[kind]
    found = inspect_adapter(write(tmp_path, tensors))
    assert found.what == what
    assert found.works_somewhere == (
        what.partition(" for ")[2].startswith(("Stable Diffusion v1", "a model"))
    )
    check_text(found)


def test_dora_in_diffusers_is_said(tmp_path: Path) -> None:
    assert "the DoRA magnitudes of 1 modules are dropped" in " ".join(
        check_text(inspect_adapter(write(tmp_path, KINDS["DoRA"][0]))).split()
    )


def test_a_peft_folder_and_what_is_wrong_with_one(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    save_adapter(
        Adapter({name: module(name, 2, 4.0) for name in ATTENTION[:6]}, "peft", {}), folder, "peft", "fp32"
    )
    found = inspect_adapter(folder)
    assert (found.layout, answers(found)["PEFT"], found.modules[0].scale) == ("PEFT folder", "yes", 2.0)
    assert "Yes, all of it in PEFT" in check_text(found)
    (folder / "adapter_config.json").write_text("[]")
    assert "is no JSON object" in inspect_adapter(folder).what
    (folder / "adapter_config.json").write_text("{")
    assert "cannot be read" in inspect_adapter(folder).what
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")
    assert "without adapter_model.safetensors" in inspect_adapter(folder).what
    (folder / "adapter_config.json").unlink()
    with pytest.raises(WeightsError, match=r"is no adapter but holds some: inspect .*other\.safetensors"):
        inspect_adapter(folder)


def test_other_kinds_are_told_with_their_readers(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    path, norm = ATTENTION[0], "unet.down_blocks.0.resnets.0.norm1"
    lokr = Adapter({path: random_lokr(LAYERS[path], 2, 1.0, draw)}, "kohya", {})
    save_adapter(lokr, tmp_path / "k.safetensors", "kohya", "fp32")
    found = inspect_adapter(tmp_path / "k.safetensors")
    said = check_text(found)
    assert found.what.startswith("LoKr for Stable Diffusion v1") and found.layout == "kohya"
    assert answers(found) == {
        "WebUI": "yes",
        "ComfyUI": "yes",
        "Forge": "yes",
        "diffusers": "refuses",
        "PEFT": "refuses",
        "sd-scripts": "nothing",
    }
    assert "Frobenius norm of the update" in said and "2, alpha 1, so the scale alpha / rank is 0.5" in said
    save_adapter(lokr, tmp_path / "p", "peft", "fp32")
    found = inspect_adapter(tmp_path / "p")
    assert (found.layout, answers(found)["PEFT"], found.modules[0].scale) == ("PEFT folder", "yes", 0.5)
    full = Adapter({path: random_full(LAYERS[path], draw), norm: random_full((320,), draw)}, "kohya", {})
    save_adapter(full, tmp_path / "f.safetensors", "kohya", "fp32")
    found = inspect_adapter(tmp_path / "f.safetensors")
    assert found.what.startswith("full difference and norm difference for Stable Diffusion v1")
    assert answers(found)["WebUI"] == "yes" and "1 attention, 1 norm" in check_text(found)
    save_adapter(full, tmp_path / "f", "peft", "fp32")
    found = inspect_adapter(tmp_path / "f")
    assert found.layout == "PEFT" and not found.works_somewhere
    assert found.remarks[0].startswith("full differences in a folder, which lorascope alone reads")
    zero = Adapter({path: random_full(LAYERS[path], draw).at_strength(0)}, "kohya", {})
    save_adapter(zero, tmp_path / "z.safetensors", "kohya", "fp32")
    because = str(inspect_adapter(tmp_path / "z.safetensors").dead_because)
    assert because.startswith("the update is zero in every module, as before the first training step")


def test_a_peft_configuration_that_does_not_fit_its_tensors(tmp_path: Path) -> None:
    adapter = Adapter({name: module(name, 2, 4.0) for name in ATTENTION[:6]}, "peft", {})
    save_adapter(adapter, folder := tmp_path / "peft", "peft", "fp32")
    path = folder / PEFT_CONFIG
    sound = json.loads(path.read_text())
    for change, refusal in (
        ({"r": 0}, "ValueError"),
        ({"r": 3}, "RuntimeError"),
        ({"rank_pattern": {"to_q": 9}}, "RuntimeError"),
    ):
        path.write_text(json.dumps({**sound, **change}))
        reading = next(item for item in inspect_adapter(folder).readings if item.reader == "PEFT")
        assert (reading.refusal or "").startswith(refusal)
    path.write_text(json.dumps({**sound, "use_dora": True, "bias": "all", "alpha_pattern": {"gone": 1}}))
    text = " ".join(check_text(inspect_adapter(folder)).split())
    for note in ("use_dora is set but there are no magnitudes", "there are no biases", "such as gone"):
        assert note in text
    path.write_text(json.dumps({key: value for key, value in sound.items() if key != "lora_alpha"}))
    assert inspect_adapter(folder).modules[0].scale == 4.0, "8, PEFT's default, over a rank of 2"


def test_an_alpha_of_two_numbers_works_nowhere(tmp_path: Path) -> None:
    for alpha in (torch.ones(2), torch.ones(0)):
        tensors = {
            key: alpha.clone() if key.endswith(".alpha") else value for key, value in kohya(ATTENTION).items()
        }
        found = inspect_adapter(write(tmp_path, tensors))
        assert set(answers(found).values()) == {"refuses"} and not found.works_somewhere
        assert "alpha must be one finite number" in check_text(found)


def test_metadata_that_contradict_the_tensors_are_told(tmp_path: Path) -> None:
    sound = {
        "ss_network_dim": "1",
        "ss_network_alpha": "1.0",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
    }
    assert inspect_adapter(write(tmp_path, kohya(ATTENTION), sound)).remarks == ()
    dynamic = {"ss_network_dim": "Dynamic", "ss_network_alpha": "nan"}
    assert inspect_adapter(write(tmp_path, kohya(ATTENTION), dynamic)).remarks == ()
    for change, remark in (
        ({"ss_network_dim": "32"}, "its metadata say rank 32 (ss_network_dim), the tensors have 1"),
        ({"ss_network_alpha": "16"}, "its metadata say alpha 16 (ss_network_alpha), the tensors have 1"),
        (
            {"ss_v2": "True"},
            "say that it is for Stable Diffusion v2, its layers are those of Stable Diffusion v1",
        ),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "say that it is for SDXL, its layers are those of"),
    ):
        (found,) = inspect_adapter(write(tmp_path, kohya(ATTENTION), {**sound, **change})).remarks
        assert remark in found


def test_a_folder_of_two_peft_folders(tmp_path: Path) -> None:
    paths = [*ATTENTION[:2], *TEXT[:2]]
    save_adapter(Adapter({name: module(name) for name in paths}, "peft", {}), tmp_path, "peft", "fp32")
    with pytest.raises(
        WeightsError, match=r"is no adapter but holds some: inspect .*/unet or .*/text_encoder"
    ):
        inspect_adapter(tmp_path)
    for part in ("unet", "text_encoder"):
        assert answers(inspect_adapter(tmp_path / part))["PEFT"] == "yes"


def test_a_pipeline_folder(pipeline_folder: Path) -> None:
    assert inspect_adapter(pipeline_folder).what.startswith("a pipeline folder")


class Trap:
    """Its pickle would write a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("page.safetensors", b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (
            "pointer.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a Git LFS pointer",
        ),
        ("empty.safetensors", b"", "empty"),
        ("trap.pt", pickle.dumps(Trap()), "a Python pickle"),
        ("trap.safetensors", pickle.dumps(Trap()), "a Python pickle"),
        ("short.safetensors", (10**9).to_bytes(8, "little") + b"{}", "truncated"),
        ("noise.safetensors", bytes(range(1, 250)), "truncated or no safetensors file"),
        ("header.safetensors", (2).to_bytes(8, "little") + b"[]", "its safetensors header is damaged"),
    ],
)
def test_files_that_are_no_weights(
    name: str, content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    found = inspect_adapter(tmp_path / name)
    assert said in found.what
    assert not found.works_somewhere
    assert "No: " in check_text(found)
    assert not (tmp_path / "executed").exists()


def test_torch_archives_are_read_as_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(kohya(ATTENTION[:8]), tmp_path / "old.pt")
    found = inspect_adapter(tmp_path / "old.pt")
    assert (found.what, answers(found)["WebUI"]) == ("LoRA for Stable Diffusion v1: U-Net", "yes")
    torch.save({"a": Trap()}, tmp_path / "trap.pt")
    assert "could run code; nothing was run" in inspect_adapter(tmp_path / "trap.pt").what
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_two_gigabytes_is_told_from_its_header(tmp_path: Path) -> None:
    names = [
        *(f"model.diffusion_model.x{index}" for index in range(2)),
        "first_stage_model.x",
        "cond_stage_model.transformer.x",
    ]
    each = 2**29
    header = {
        name: {"dtype": "F16", "shape": [each // 2], "data_offsets": [index * each, (index + 1) * each]}
        for index, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    path = tmp_path / "v1-5.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + len(names) * each)  # sparse: its data take no room
    found = inspect_adapter(path)
    assert found.what == "a full checkpoint of Stable Diffusion v1, not an adapter"
    assert "2.0 GiB" in check_text(found)


def test_an_oversized_module_is_not_loaded(tmp_path: Path) -> None:
    size = 2**29
    header = {
        f"{FIRST}{ending}": {
            "dtype": "F16",
            "shape": [1, size],
            "data_offsets": [index * 2 * size, (index + 1) * 2 * size],
        }
        for index, ending in enumerate(KOHYA)
    }
    text = json.dumps(header).encode()
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * size)
    found = inspect_adapter(tmp_path / "huge.safetensors")
    assert "too large or too many" in str(found.modules[0].fault)
    check_text(found)


def test_strange_names_and_metadata_cannot_move_the_cursor(tmp_path: Path) -> None:
    tensors = {
        **kohya(ATTENTION[:1]),
        "\x1b[2Jevil\n" + "x" * 500: torch.ones(1),
        f"lora_unet_\x07{'y' * 300}.alpha": torch.ones(1),
    }
    metadata = {
        "ss_output_name": "\x1b]0;owned\x07 name",
        "ss_training_comment": "line\r\nnext",
        "ss_tag_frequency": "[1]",
        "ss_resolution": "z" * 9000,
    }
    metadata |= {"lora_adapter_metadata": "{", "ss_training_started_at": "1e400"}
    found = inspect_adapter(write(tmp_path, tensors, metadata))
    assert len(check_text(found)) < 5000


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        inspect_adapter(tmp_path / "nothing.safetensors")
    for name in ("unreadable.safetensors", "unreadable.pt"):
        (tmp_path / name).symlink_to("/proc/self/mem")  # it opens, and reading it fails
        with pytest.raises(WeightsError, match="cannot be read"):
            inspect_adapter(tmp_path / name)


def test_a_named_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(WeightsError, match="is a named pipe, where a file is needed"):
        inspect_adapter(tmp_path / "pipe.safetensors")
    save_adapter(
        Adapter({"unet.conv_in": module("unet.conv_in")}, "peft", {}), folder := tmp_path / "peft", "peft"
    )
    (folder / PEFT_CONFIG).unlink()
    os.mkfifo(folder / PEFT_CONFIG)
    assert "adapter_config.json: is a named pipe" in inspect_adapter(folder).what
    with pytest.raises(AdapterError, match=r"adapter_config.json: is a named pipe, where a file is needed"):
        load_adapter(folder)


def test_exit_codes_of_inspect(own_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(own_file), "--json"]) == EXIT_DONE
    content = json.loads(capsys.readouterr().out)
    assert content["works_somewhere"] is True
    assert content["readers"]["WebUI"]["answer"] == "yes"
    assert main(["inspect", str(own_file), "--modules"]) == EXIT_DONE
    assert capsys.readouterr().out.count("down_blocks.") >= 8
    (tmp_path / "page.safetensors").write_text("<html></html>")
    assert main(["inspect", str(tmp_path / "page.safetensors")]) == EXIT_GATE_REJECTED
    assert main(["inspect", str(tmp_path / "none.safetensors")]) == EXIT_INPUT
    assert "no such file" in capsys.readouterr().err
