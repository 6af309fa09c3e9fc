"""The readers' rules: those of diffusers and PEFT held against the packages, the others against what their
sources say.
"""

import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lorascope.adapters.readers import _CONFIG_KEYS, Reading, listed_version, read_by_all
from lorascope.base.layers import stable_diffusion_layers

State = dict[str, torch.Tensor]
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
DIFFUSERS = (".lora.down.weight", ".lora.up.weight")
TRANSFORMERS = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")

FULL = stable_diffusion_layers()
THIN = stable_diffusion_layers(channels=(8, 8, 16, 16), text_width=8, text_hidden=16)
UNET = [path for path in THIN if path.startswith("unet.")]
TEXT = [path for path in THIN if path.startswith("text_encoder.")]
ATTENTION = [path for path in UNET if ".attn" in path]
FEED_FORWARD = [path for path in UNET if ".ff." in path]
PROJECTION = [path for path in UNET if path.endswith(("proj_in", "proj_out"))]
CORE = ATTENTION + FEED_FORWARD + PROJECTION


def factors(shape: tuple[int, ...], rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a layer, both nonzero."""
    ones = tuple(1 for _ in shape[2:])
    return torch.full((rank, *shape[1:]), 0.1), torch.full((shape[0], rank, *ones), 0.1)


def adapter(
    paths: list[str],
    spelling: tuple[str, str],
    name: Callable[[str], str] = lambda path: path,
    alpha: float | None = None,
) -> State:
    """A state dict of modules at `paths` of the thin model, under the names that `name` makes of them."""
    state = {}
    for path in paths:
        for ending, tensor in zip(spelling, factors(THIN[path]), strict=True):
            state[name(path) + ending] = tensor
        if alpha is not None:
            state[name(path) + ".alpha"] = torch.tensor(alpha)
    return state


def flat(path: str) -> str:
    """kohya's name of a layer."""
    part, _, rest = path.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + rest.replace(".", "_")


def kohya(paths: list[str], alpha: float | None = 1.0) -> State:
    """A file of kohya's layout."""
    return adapter(paths, KOHYA, flat, alpha)


def processors(paths: list[str]) -> State:
    """A file of diffusers' attention processors, of before version 0.25."""
    return adapter(
        paths,
        ("_lora.down.weight", "_lora.up.weight"),
        lambda path: path.replace(".to_", ".processor.to_").removesuffix(".0"),
    )


def renamed(state: State, old: str, new: str) -> State:
    """The same tensors with part of their names replaced."""
    return {key.replace(old, new): tensor for key, tensor in state.items()}


def without(state: State, *keys: str) -> State:
    """All but some tensors."""
    return {key: tensor for key, tensor in state.items() if key not in keys}


def mixed_save(paths: list[str]) -> State:
    """What diffusers itself saves: attention as lora.down/up, other layers as lora_A/B, sorted by name."""
    others = [path for path in paths if path not in ATTENTION]
    state = {**adapter([path for path in paths if path in ATTENTION], DIFFUSERS), **adapter(others, PEFT)}
    return dict(sorted(state.items()))


def as_2d(state: State) -> State:
    """1x1 convolutions written as matrices."""
    return {key: tensor.flatten(1) if tensor.ndim == 4 else tensor for key, tensor in state.items()}


FIRST = flat(ATTENTION[0])
NORM = "lora_unet_down_blocks_0_resnets_0_norm1"
TEXT_NORM = "lora_te_text_model_encoder_layers_0_layer_norm1"


def rank_zero(name: str, spelling: tuple[str, str]) -> State:
    """A module without any rank."""
    return {name + spelling[0]: torch.zeros(0, 8), name + spelling[1]: torch.zeros(8, 0)}


def metadata_with(
    text_encoder: dict[str, Any] | None = None, other: dict[str, Any] | None = None, **changes: Any
) -> dict[str, str]:
    """diffusers' metadata of rank 2 for all attention, with changes; None leaves one out. `text_encoder` is
    stated of that, `other` of no part.
    """
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet = {"r": 2, "lora_alpha": 4, "target_modules": targets} | changes
    text = {} if text_encoder is None else {"r": 2, "target_modules": TEXT_LAYERS} | text_encoder
    stated = {f"unet.{key}": value for key, value in unet.items() if value is not None}
    stated |= {f"text_encoder.{key}": value for key, value in text.items()}
    return {"lora_adapter_metadata": json.dumps(stated | (other or {}))}


TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
ADAPTER_METADATA = metadata_with(target_modules=["to_q"])
VARIANTS: dict[str, tuple[State, dict[str, str]]] = {
    "kohya": (kohya(CORE), {}),
    "kohya with text encoder": (kohya(CORE + TEXT), {}),
    "kohya, text encoder named by transformers 5": (
        {**kohya(ATTENTION), **renamed(kohya(TEXT), "lora_te_text_model_", "lora_te_")},
        {},
    ),
    "kohya, lora_te1": (renamed(kohya(TEXT), "lora_te_", "lora_te1_"), {}),
    "kohya, lora_te2": ({**kohya(ATTENTION), **renamed(kohya(TEXT), "lora_te_", "lora_te2_")}, {}),
    "kohya, queries of the text encoder alone": (kohya([path for path in TEXT if "q_proj" in path]), {}),
    "kohya without alpha": (kohya(CORE, alpha=None), {}),
    "LoCon": (kohya(UNET), {}),
    "kohya in the original model's names": (
        {**renamed(kohya(ATTENTION), "down_blocks_0_attentions_0", "input_blocks_1_1")},
        {},
    ),
    "the original model's names alone": (
        renamed(kohya(ATTENTION[:8]), "down_blocks_0_attentions_0", "input_blocks_1_1"),
        {},
    ),
    "DoRA": ({**kohya(ATTENTION), f"{FIRST}.dora_scale": torch.ones(8, 1)}, {}),
    "Tucker": ({**kohya(["unet.conv_in"]), "lora_unet_conv_in.lora_mid.weight": torch.ones(2, 2, 3, 3)}, {}),
    "LoHa": ({f"{FIRST}.hada_w{n}_{side}": torch.ones(8, 8) for n in (1, 2) for side in "ab"}, {}),
    "LoKr": ({f"{FIRST}.lokr_w{n}": torch.ones(2, 2) for n in (1, 2)}, {}),
    "full difference": ({f"{FIRST}.diff": torch.ones(8, 8), f"{NORM}.w_norm": torch.ones(8)}, {}),
    "norms": ({f"{NORM}.w_norm": torch.ones(8), f"{NORM}.b_norm": torch.ones(8)}, {}),
    "norms of the text encoder": (
        {f"{TEXT_NORM}.w_norm": torch.ones(8), f"{TEXT_NORM}.b_norm": torch.ones(8)},
        {},
    ),
    "kohya with a stray kohya key": ({**kohya(ATTENTION), "lora_unet_x.foo": torch.ones(8)}, {}),
    "kohya with a stray key": ({**kohya(ATTENTION), "stray": torch.ones(8)}, {}),
    "kohya with a stray lora key": ({**kohya(ATTENTION), "stray.lora": torch.ones(8)}, {}),
    "kohya without one lora_up": (without(kohya(ATTENTION), f"{FIRST}.lora_up.weight"), {}),
    "kohya, to_out without its index": (renamed(kohya(ATTENTION), "to_out_0", "to_out"), {}),
    "kohya, projections as matrices": (as_2d(kohya(CORE)), {}),
    "kohya with adapter metadata": (kohya(ATTENTION), ADAPTER_METADATA),
    "diffusers": (adapter(CORE, DIFFUSERS), {}),
    "diffusers' mixed save": (mixed_save(CORE), {}),
    "diffusers' mixed save without projections": (mixed_save(ATTENTION + FEED_FORWARD), {}),
    "kohya attention, diffusers feed forward": ({**kohya(ATTENTION), **adapter(FEED_FORWARD, DIFFUSERS)}, {}),
    "attention processors": (processors(ATTENTION), {}),
    "diffusers in PEFT's spelling": (adapter(CORE + TEXT, PEFT), {}),
    "diffusers with adapter metadata": (adapter(ATTENTION, PEFT), ADAPTER_METADATA),
    "diffusers with a stray alpha": (
        {**adapter(ATTENTION, PEFT), f"{ATTENTION[0]}.alpha": torch.tensor(1.0)},
        {},
    ),
    "diffusers with an unknown module": (
        {**adapter(ATTENTION, PEFT), **renamed(adapter(ATTENTION[:1], PEFT), "attn", "attx")},
        {},
    ),
    "diffusers, projections as matrices": (as_2d(adapter(CORE, PEFT)), {}),
    "diffusers, to_out without its index": (renamed(adapter(ATTENTION, PEFT), "to_out.0", "to_out"), {}),
    "unknown modules alone": (renamed(adapter(ATTENTION[:4], PEFT), "attn", "attx"), {}),
    "text encoder of diffusers": (adapter(TEXT, TRANSFORMERS), {}),
    "text encoder in the U-Net's spelling": (adapter(TEXT, DIFFUSERS), {}),
    "MLPs of the text encoder in PEFT's spelling": (
        adapter([path for path in TEXT if "mlp" in path], PEFT),
        {},
    ),
    "OneTrainer's dotted names": (adapter(ATTENTION, KOHYA), {}),
    "without a prefix": (renamed(adapter(ATTENTION, PEFT), "unet.", ""), {}),
    "PEFT": (renamed(adapter(ATTENTION, PEFT), "unet.", "base_model.model."), {}),
    "an alpha of two numbers": ({**kohya(ATTENTION), f"{FIRST}.alpha": torch.ones(2)}, {}),
    "an alpha without a number": ({**kohya(ATTENTION), f"{FIRST}.alpha": torch.ones(0)}, {}),
    "an alpha of two numbers of an unknown module": (
        {
            **kohya(ATTENTION),
            **renamed({**kohya(ATTENTION[:1]), f"{FIRST}.alpha": torch.ones(2)}, "attn", "attx"),
        },
        {},
    ),
    "alphas in a row of one": ({**kohya(ATTENTION), f"{FIRST}.alpha": torch.ones(1)}, {}),
    "alphas in int64": ({**kohya(ATTENTION), f"{FIRST}.alpha": torch.tensor(1)}, {}),
    "rank 0": ({**kohya(ATTENTION), **rank_zero(FIRST, KOHYA)}, {}),
    "rank 0 throughout": (rank_zero(FIRST, KOHYA), {}),
    "diffusers, rank 0": ({**adapter(ATTENTION, PEFT), **rank_zero(ATTENTION[0], PEFT)}, {}),
    "a shape of no layer": (
        {**kohya(ATTENTION), **dict(zip([FIRST + end for end in KOHYA], factors((16, 16)), strict=True))},
        {},
    ),
    "an up of a shape of no layer": ({**kohya(ATTENTION), f"{FIRST}.lora_up.weight": torch.ones(9, 2)}, {}),
    "metadata of another rank": (adapter(ATTENTION, PEFT), metadata_with(r=3)),
    "metadata without a rank": (adapter(ATTENTION, PEFT), metadata_with(r=None)),
    "metadata of rank 0": (adapter(ATTENTION, PEFT), metadata_with(r=0)),
    "metadata of a rank below 0": (adapter(ATTENTION, PEFT), metadata_with(r=-1)),
    "metadata of a rank in quotes": (adapter(ATTENTION, PEFT), metadata_with(r="2")),
    "metadata with a rank pattern": (
        adapter(ATTENTION, PEFT),
        metadata_with(r=3, rank_pattern={path.removeprefix("unet."): 2 for path in ATTENTION}),
    ),
    "metadata with a rank pattern of another rank": (
        adapter(ATTENTION, PEFT),
        metadata_with(rank_pattern={ATTENTION[0].removeprefix("unet."): 3}),
    ),
    "metadata with fewer targets": (adapter(ATTENTION, PEFT), metadata_with(target_modules=["to_q"])),
    "metadata of the U-Net alone": (adapter(ATTENTION + TEXT, PEFT), metadata_with()),
    "metadata with a key that PEFT does not know": (adapter(ATTENTION, PEFT), metadata_with(lora_magic=1)),
    "metadata of both parts": (adapter(ATTENTION + TEXT, PEFT), metadata_with(text_encoder={})),
    "metadata with such a key of the text encoder": (
        adapter(ATTENTION + TEXT, PEFT),
        metadata_with(text_encoder={"lora_magic": 1}),
    ),
    "metadata with such a key of a part that the file has not": (
        adapter(ATTENTION, PEFT),
        metadata_with(text_encoder={"lora_magic": 1}),
    ),
    "metadata with such a key of no part": (
        adapter(ATTENTION, PEFT),
        metadata_with(other={"lora_magic": 1}),
    ),
    "metadata of nothing": (adapter(ATTENTION, PEFT), {"lora_adapter_metadata": "{}"}),
    "metadata that are no JSON": (adapter(ATTENTION, PEFT), {"lora_adapter_metadata": "{"}),
    "metadata that are a list": (adapter(ATTENTION, PEFT), {"lora_adapter_metadata": "[]"}),
}


class Pipeline(StableDiffusionLoraLoaderMixin):
    """What the loader needs of a pipeline."""

    hf_device_map = None

    def __init__(self) -> None:
        self.components: dict[str, Any] = {}
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            block_out_channels=(8, 8, 16, 16),
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=4,
            sample_size=8,
        )
        text = {
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 12,
            "num_attention_heads": 2,
            "vocab_size": 32,
        }
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(**text, bos_token_id=30, eos_token_id=31, pad_token_id=31)
        )


def weights_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weight shapes of a model's Linear layers and convolutions."""
    return {
        name: tuple(m.weight.shape)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }


def changed_layers(model: nn.Module, prefix: str) -> set[str]:
    """The layers whose adapter is not zero."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and any(bool(up.weight.any()) for up in module.lora_B.values()):
            found.add(prefix + name.removeprefix("text_model."))
    return found


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)  # the packages warn of what is tested here
    with warnings.catch_warnings(action="ignore"):
        yield
    logging.disable(logging.NOTSET)


def reading(
    reader: str, state: State, metadata: dict[str, str] | None = None, config: dict[str, Any] | None = None
) -> Reading:
    """What our rule of one reader says about a file for the thin model."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    return next(item for item in read_by_all(shapes, metadata or {}, config, THIN) if item.reader == reader)


assert (len(ATTENTION), len(FEED_FORWARD), len(PROJECTION), len(TEXT)) == (128, 32, 32, 72)


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_rule_is_what_diffusers_does(variant: str, tmp_path: Path) -> None:
    state, metadata = VARIANTS[variant]
    pipeline = Pipeline()
    error = None
    try:
        if metadata:
            safetensors.torch.save_file(state, tmp_path / "adapter.safetensors", metadata=metadata)
            pipeline.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
        else:
            pipeline.load_lora_weights(dict(state))
    except Exception as raised:
        error = type(raised).__name__
    ours = reading("diffusers", state, metadata)
    assert (ours.refusal.partition(":")[0] if ours.refusal else None) == error
    if error is None:
        real = changed_layers(pipeline.unet, "unet.") | changed_layers(
            pipeline.text_encoder, "text_encoder.text_model."
        )
        assert ours.taken == real


def test_a_key_of_the_metadata_that_peft_does_not_know_is_named() -> None:
    state = adapter(ATTENTION, PEFT)
    refusal = reading("diffusers", state, metadata_with(lora_magic=1, zeal=2)).refusal or ""
    assert refusal.endswith("states unet.lora_magic and 1 more, which PEFT 0.21 does not know")
    known = set(inspect.signature(peft.LoraConfig).parameters)
    stated = metadata_with(**dict.fromkeys(known - {"r", "target_modules"}, 1))
    assert reading("diffusers", state, stated).refusal is None
    if peft.__version__.startswith("0.21."):
        assert known == _CONFIG_KEYS


def test_diffusers_loads_a_third_of_its_own_mixed_save_once_a_projection_is_in_it() -> None:
    whole = reading("diffusers", mixed_save(CORE))
    assert whole.refusal is None
    assert len(whole.taken) == 64
    assert set(whole.ignored) == set(ATTENTION)
    assert len(reading("diffusers", mixed_save(ATTENTION + FEED_FORWARD)).taken) == 160


def test_dora_in_diffusers_is_noted() -> None:
    (note,) = reading("diffusers", *VARIANTS["DoRA"]).notes
    assert "magnitudes of 1 modules are dropped" in note
    assert reading("diffusers", kohya(ATTENTION)).notes == ()


PEFT_CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
}
PEFT_STATE = VARIANTS["PEFT"][0]
PEFT_VARIANTS: dict[str, tuple[State, dict[str, Any]]] = {
    "whole": (PEFT_STATE, {}),
    "fewer targets than tensors": (PEFT_STATE, {"target_modules": ["attn2.to_q"]}),
    "targets by pattern": (PEFT_STATE, {"target_modules": r".*\.to_(q|k|v|out\.0)"}),
    "another rank": (PEFT_STATE, {"r": 3}),
    "a rank of its own": (
        {
            **PEFT_STATE,
            **renamed(
                dict(zip([ATTENTION[0] + end for end in PEFT], factors(THIN[ATTENTION[0]], 3), strict=True)),
                "unet.",
                "base_model.model.",
            ),
        },
        {"rank_pattern": {ATTENTION[0].removeprefix("unet."): 3}},
    ),
    "without the prefix": (renamed(PEFT_STATE, "base_model.model.", ""), {}),
    "rank 0": (PEFT_STATE, {"r": 0}),
    "a rank below 0": (PEFT_STATE, {"r": -1}),
    "a rank in quotes": (PEFT_STATE, {"r": "2"}),
    "no rank": (PEFT_STATE, {"r": None}),
    "a rank that is not stated": (PEFT_STATE, {"r": ...}),
    "rank 8 that is not stated": (
        renamed(
            {
                path + end: tensor
                for path in ATTENTION
                for end, tensor in zip(PEFT, factors(THIN[path], 8), strict=True)
            },
            "unet.",
            "base_model.model.",
        ),
        {"r": ...},
    ),
    "no alpha": (PEFT_STATE, {"lora_alpha": ...}),
    "a key that PEFT does not know": (PEFT_STATE, {"lora_magic": 1}),
    "a rank of 0 of its own": (PEFT_STATE, {"rank_pattern": {ATTENTION[0].removeprefix("unet."): 0}}),
    "another rank of its own": (PEFT_STATE, {"rank_pattern": {"attn1.to_q": 3}}),
    "DoRA without magnitudes": (PEFT_STATE, {"use_dora": True}),
    "biases that are not there": (PEFT_STATE, {"bias": "all"}),
    "projections as matrices": (
        as_2d(renamed(adapter(PROJECTION, PEFT), "unet.", "base_model.model.")),
        {"target_modules": ["proj_in", "proj_out"]},
    ),
}


def lycoris_state(kind: str, **options: Any) -> State:
    """What PEFT saves of a LoHa or LoKr of the thin U-Net whose factors are all ones."""
    config = {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}[kind](
        **{key: value for key, value in {**LYCORIS_CONFIG, **options}.items() if key != "peft_type"}
    )
    model = peft.get_peft_model(Pipeline().unet, config)
    saved = peft.get_peft_model_state_dict(model)
    return {key: torch.ones_like(tensor) for key, tensor in saved.items()}


LYCORIS_CONFIG: dict[str, Any] = {
    "r": 2,
    "alpha": 4,
    "target_modules": ["to_q", "conv1", "proj_in", "ff.net.2"],
}
LYCORIS_OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "LoHa": ("LOHA", {}, {}),
    "LoHa with cores": ("LOHA", {"use_effective_conv2d": True}, {}),
    "LoHa with fewer targets": ("LOHA", {}, {"target_modules": ["to_q"]}),
    "LoHa of another rank": ("LOHA", {}, {"r": 3}),
    "LoHa of rank 0": ("LOHA", {}, {"r": 0}),
    "LoHa with cores that are not stated": (
        "LOHA",
        {"use_effective_conv2d": True},
        {"use_effective_conv2d": False},
    ),
    "LoKr": ("LOKR", {"r": 1}, {}),
    "LoKr with cores": ("LOKR", {"r": 1, "use_effective_conv2d": True}, {}),
    "LoKr, whole": ("LOKR", {"r": 64}, {}),
    "LoKr with a factor": ("LOKR", {"r": 1, "decompose_factor": 2}, {}),
    "LoKr, both products": ("LOKR", {"r": 1, "decompose_both": True}, {}),
    "LoKr with another factor": ("LOKR", {"r": 1, "decompose_factor": 2}, {"decompose_factor": 4}),
    "LoKr under LoHa's name": ("LOKR", {"r": 1}, {"peft_type": "LOHA"}),
}


def loaded_by_peft(
    folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[Any, str | None]:
    """A U-Net that PEFT itself was told to load an adapter into, and the error that it raised."""
    safetensors.torch.save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = Pipeline().unet
    try:
        peft.PeftModel.from_pretrained(model, str(folder))
    except Exception as raised:
        return model, type(raised).__name__
    return model, None


@pytest.mark.parametrize("variant", LYCORIS_OPTIONS)
def test_peft_rule_of_loha_and_lokr_is_what_peft_does(variant: str, tmp_path: Path) -> None:
    kind, options, changes = LYCORIS_OPTIONS[variant]
    state = lycoris_state(kind, **options)
    config = {**LYCORIS_CONFIG, "peft_type": kind, **options, **changes}
    model, error = loaded_by_peft(tmp_path, state, config)
    ours = reading("PEFT", state, config=config)
    assert (ours.refusal.partition(":")[0] if ours.refusal else None) == error
    if error is None:
        changed = {
            f"unet.{name}"
            for name, layer in model.named_modules()
            if isinstance(layer, LycorisLayer) and layer.get_delta_weight("default").any()
        }
        assert ours.taken == changed and bool(changed) == (config["peft_type"] == kind)


def test_a_factor_that_peft_does_not_build_is_not_taken() -> None:
    """PEFT leaves its own, random, in its place."""
    state = lycoris_state("LOKR", r=64)
    found = reading("PEFT", state, config={**LYCORIS_CONFIG, "peft_type": "LOKR", "r": 1})
    assert found.refusal is None and len(found.taken) < len(found.ignored)


@pytest.mark.parametrize("variant", PEFT_VARIANTS)
def test_peft_rule_is_what_peft_does(variant: str, tmp_path: Path) -> None:
    state, changes = PEFT_VARIANTS[variant]
    config = {key: value for key, value in {**PEFT_CONFIG, **changes}.items() if value is not ...}
    model, error = loaded_by_peft(tmp_path, state, config)
    ours = reading("PEFT", state, config=config)
    assert (ours.refusal.partition(":")[0] if ours.refusal else None) == error
    if error is None:
        assert ours.taken == changed_layers(model, "unet.")


def test_peft_refuses_what_is_no_folder_or_no_lora() -> None:
    assert "adapter_config.json" in (reading("PEFT", PEFT_STATE).refusal or "")
    refusal = reading("PEFT", PEFT_STATE, config={"peft_type": "OFT"}).refusal or ""
    assert refusal == "peft_type is 'OFT', not LORA, LOHA or LOKR"


@pytest.mark.parametrize(
    ("variant", "taken"),
    [
        ("kohya", {"WebUI": 192, "ComfyUI": 192, "Forge": 192, "sd-scripts": 192}),
        ("kohya with text encoder", {"WebUI": 264, "ComfyUI": 264, "Forge": 264, "sd-scripts": 264}),
        (
            "kohya, text encoder named by transformers 5",
            {"WebUI": 128, "ComfyUI": 128, "Forge": None, "sd-scripts": 128},
        ),
        ("kohya, lora_te1", {"WebUI": 72, "ComfyUI": 72, "Forge": 72, "sd-scripts": 0}),
        ("LoCon", {"WebUI": 281, "ComfyUI": 281, "Forge": 281, "sd-scripts": 277}),
        (
            "kohya in the original model's names",
            {"WebUI": 128, "ComfyUI": 128, "Forge": 128, "sd-scripts": 120},
        ),
        ("kohya, to_out without its index", {"WebUI": None, "ComfyUI": 96, "Forge": None, "sd-scripts": 96}),
        ("kohya, projections as matrices", {"WebUI": 192, "ComfyUI": 192, "Forge": 192, "sd-scripts": None}),
        ("LoHa", {"WebUI": 1, "ComfyUI": 1, "Forge": 1, "sd-scripts": 0}),
        ("LoKr", {"WebUI": 1, "ComfyUI": 1, "Forge": 1, "sd-scripts": 0}),
        ("full difference", {"WebUI": None, "ComfyUI": 2, "Forge": 2, "sd-scripts": 0}),
        ("norms", {"WebUI": 1, "ComfyUI": 1, "Forge": 1, "sd-scripts": 0}),
        ("norms of the text encoder", {"WebUI": 1, "ComfyUI": 0, "Forge": 0, "sd-scripts": 0}),
        ("kohya without one lora_up", {"WebUI": None, "ComfyUI": 127, "Forge": 127, "sd-scripts": 127}),
        # diffusers-style saves: FIELD notes, tried with the programs themselves
        ("diffusers", {"WebUI": 0, "ComfyUI": 64, "Forge": None, "sd-scripts": 0}),
        (
            "diffusers' mixed save without projections",
            {"WebUI": 0, "ComfyUI": 32, "Forge": None, "sd-scripts": 0},
        ),
        ("attention processors", {"WebUI": 0, "ComfyUI": 128, "Forge": 128, "sd-scripts": 0}),
        (
            "kohya attention, diffusers feed forward",
            {"WebUI": 128, "ComfyUI": 160, "Forge": 160, "sd-scripts": 128},
        ),
        ("text encoder of diffusers", {"WebUI": 0, "ComfyUI": 72, "Forge": 72, "sd-scripts": 0}),
        ("PEFT", {"WebUI": 0, "ComfyUI": 0, "Forge": None, "sd-scripts": 0}),
    ],
)
def test_the_rules_of_the_programs_that_cannot_be_installed(
    variant: str, taken: dict[str, int | None]
) -> None:
    found = {name: reading(name, *VARIANTS[variant]) for name in taken}
    assert {name: None if item.refusal else len(item.taken) for name, item in found.items()} == taken


def test_what_is_not_taken_is_named() -> None:
    found = reading("ComfyUI", mixed_save(ATTENTION + FEED_FORWARD))
    assert set(found.ignored) == set(ATTENTION)
    assert found.refusal is None


def test_oft_is_read_by_what_knows_it() -> None:
    blocks, diagonal = (
        {f"{FIRST}.oft_blocks": torch.ones(2, 4, 4)},
        {f"{FIRST}.oft_diag": torch.ones(2, 4, 4)},
    )
    taken = [
        [len(reading(name, state).taken) for name in ("WebUI", "ComfyUI", "Forge")]
        for state in (blocks, diagonal)
    ]
    assert taken == [[1, 1, 0], [1, 0, 0]]


def test_forge_puts_up_with_twelve_keys() -> None:
    stray = {f"stray.{index}": torch.ones(1) for index in range(13)}
    assert "13 keys" in (reading("Forge", {**kohya(CORE), **stray}).refusal or "")
    assert reading("Forge", without({**kohya(CORE), **stray}, "stray.0")).refusal is None


def test_webui_stops_at_names_of_containers_and_at_incomplete_modules() -> None:
    assert "lacks the _0" in (reading("WebUI", renamed(kohya(ATTENTION), "to_out_0", "to_out")).refusal or "")
    assert "unsupported type" in (
        reading("WebUI", renamed(kohya(FEED_FORWARD), "ff_net_0_proj", "ff_net_0")).refusal or ""
    )
    assert "module type" in (reading("WebUI", {f"{FIRST}.alpha": torch.tensor(1.0)}).refusal or "")
    assert "module type" in (
        reading("WebUI", {**kohya(ATTENTION), f"{FIRST}.foo": torch.ones(1)}).refusal or ""
    )


def test_shapes_of_another_model() -> None:
    state = {**kohya(ATTENTION), **dict(zip([FIRST + end for end in KOHYA], factors((16, 16)), strict=True))}
    assert FIRST in reading("WebUI", state).ignored
    assert FIRST in reading("ComfyUI", state).ignored
    assert "shape" in (reading("Forge", state).refusal or "")
    assert "size mismatch" in (reading("sd-scripts", state).refusal or "")


@pytest.mark.parametrize("reader", ["WebUI", "ComfyUI", "Forge", "sd-scripts"])
def test_an_alpha_that_is_no_single_number_and_a_rank_of_0_work_nowhere(reader: str) -> None:
    for variant in ("an alpha of two numbers", "an alpha without a number"):
        assert ".alpha has " in (reading(reader, *VARIANTS[variant]).refusal or "")
    assert reading(reader, *VARIANTS["alphas in a row of one"]).verdict == "yes"
    assert reading(reader, *VARIANTS["rank 0 throughout"]).verdict != "yes"
    assert not reading(reader, *VARIANTS["rank 0 throughout"]).taken


def test_comfyui_and_forge_raise_for_half_a_module() -> None:
    state = without(kohya(ATTENTION), f"{FIRST}.lora_down.weight")
    assert (reading("ComfyUI", state).refusal or "").startswith("KeyError")
    assert (reading("Forge", state).refusal or "").startswith("KeyError")


@pytest.mark.parametrize(
    ("metadata", "webui", "forge"),
    [
        ({}, "Unknown", "Unknown"),
        ({"format": "pt"}, "SD1", "Unknown"),
        ({"ss_v2": "True"}, "SD2", "SD2"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL", "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SD1", "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora", "ss_v2": "False"}, "SD1", "SD1"),
    ],
)
def test_the_version_a_file_is_listed_under(metadata: dict[str, str], webui: str, forge: str) -> None:
    assert (listed_version(metadata, "WebUI"), listed_version(metadata, "Forge")) == (webui, forge)
    expected = {"SD1": (), "Unknown": ("listed as Unknown, for want of metadata",)}.get(
        forge, (f"listed as {forge}",)
    )
    assert reading("Forge", kohya(CORE), metadata).notes == expected
