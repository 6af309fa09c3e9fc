"""Adapters of any shapes, dtypes, ranks and alphas, sound and damaged: each is merged and written as its
tensors say, or refused in one line.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.files import DTYPES, Layout, load_adapter, save_adapter
from lorascope.adapters.merge import merge_weights
from lorascope.errors import LorascopeError
from lorascope.store import PEFT_CONFIG, PEFT_WEIGHTS
from random_adapters import ATTENTION

QUICK = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Layers by path: a square and a wide Linear, a 3x3 and a 1x1 convolution.
LAYERS: dict[str, tuple[int, ...]] = {
    f"{ATTENTION}.to_q": (5, 5),
    f"{ATTENTION}.to_k": (6, 4),
    "down_blocks.0.resnets.0.conv1": (6, 4, 3, 3),
    "down_blocks.0.attentions.0.proj_in": (4, 4, 1, 1),
}
ENDINGS = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
ALPHAS = st.sampled_from([0.0, 1.0, 2.5, -3.0, 1e-6, 64.0, 1e6]) | st.integers(0, 9)
Tensors = dict[str, torch.Tensor]


def numbers(draw: st.DrawFn, shape: tuple[int, ...], least: float | None = None) -> torch.Tensor:
    """Random numbers of some size and dtype; with `least`, none below it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 1.0, 10.0]))
    values = values if least is None else values.abs() + least
    return values.to(draw(st.sampled_from(FLOATS)))


@st.composite
def kohya_modules(draw: st.DrawFn) -> dict[str, Tensors]:
    """The tensors of some layers by path and field, all sound."""
    modules = {}
    for path in draw(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=3, unique=True)):
        out, inputs, *kernel = LAYERS[path]
        rank = draw(st.integers(1, 3))
        core = bool(kernel) and draw(st.booleans())
        ones = [1] * len(kernel)
        found = {
            "down": numbers(draw, (rank, inputs, *(ones if core else kernel))),
            "up": numbers(draw, (out, rank, *ones)),
        }
        if core:
            found["mid"] = numbers(draw, (rank, rank, *kernel))
        if draw(st.booleans()):
            alpha = draw(ALPHAS)
            found["alpha"] = torch.tensor(alpha).reshape(draw(st.sampled_from([(), (1,)])))
        if draw(st.sampled_from([False, False, True])):
            shapes = [(out,), (out, 1, *ones), (1, inputs, *ones), (out, 1), (1, inputs)]
            found["dora_scale"] = numbers(draw, draw(st.sampled_from(shapes)), least=0.5)
        modules[path] = found
    return modules


def damage(draw: st.DrawFn, modules: dict[str, Tensors]) -> None:
    """One thing wrong with one tensor: it is gone, or of another shape, dtype or value."""
    found = modules[draw(st.sampled_from(sorted(modules)))]
    field = draw(st.sampled_from(sorted(found)))
    tensor = found[field]
    match draw(st.sampled_from(["gone", "shape", "dtype", "value", "alpha", "kernel", "none"])):
        case "gone":
            del found[field]
        case "shape":
            found[field] = torch.ones(draw(st.lists(st.integers(0, 6), max_size=5).map(tuple)))
        case "kernel":
            found[field] = torch.ones(
                *tensor.shape[:2], *draw(st.sampled_from([(9, 1), (1, 9), (1, 1), (3, 1)]))
            )
        case "dtype":
            found[field] = tensor.to(
                draw(st.sampled_from([torch.int8, torch.bool, torch.complex64, torch.int64]))
            )
        case "value":
            values = tensor.double().flatten()
            values[:1] = draw(st.sampled_from([math.nan, math.inf, 1e300, 1e30, 7e4, 0.0]))
            found[field] = values.reshape(tensor.shape).to(
                draw(st.sampled_from([tensor.dtype, torch.float64]))
            )
        case "alpha":
            values = draw(st.sampled_from([math.nan, -math.inf, 1e39, 3e38, 1e-46, 0.0]))
            found["alpha"] = torch.full((draw(st.integers(0, 2)),), values, dtype=torch.float64)


def kohya_file(modules: Mapping[str, Tensors], path: Path) -> Path:
    tensors = {
        f"lora_unet_{name.replace('.', '_')}.{ENDINGS.get(field, field)}": tensor
        for name, found in modules.items()
        for field, tensor in found.items()
    }
    safetensors.torch.save_file(tensors, path)
    return path


def update_of(found: Tensors, alpha: float | None) -> torch.Tensor:
    """alpha / r * up @ down in float64, [out, in(, kh, kw)]; a core stands between."""
    down, up = found["down"].double(), found["up"].double()
    rank = down.shape[0]
    if "mid" in found:
        update = torch.einsum("oa,abhw,bi->oihw", up.flatten(1), found["mid"].double(), down.flatten(1))
    else:
        update = torch.tensordot(up.flatten(1), down, dims=1)
    return update * (1.0 if alpha is None else alpha / rank)


def merged_weight(
    weight: torch.Tensor, update: torch.Tensor, magnitudes: torch.Tensor | None
) -> torch.Tensor:
    """W + U, normalised by DoRA's magnitudes: over outputs where the first dimension is theirs, as ComfyUI
    decides, else over inputs.
    """
    adapted = weight.double() + update.reshape(weight.shape)
    if magnitudes is None:
        return adapted
    axis = 0 if magnitudes.shape[0] == weight.shape[0] else 1
    norms = adapted.transpose(0, axis).flatten(1).norm(dim=1)
    shape = [-1 if place == axis else 1 for place in range(weight.ndim)]
    return adapted * (magnitudes.double().flatten() / norms).reshape(shape)


def refused(path: Path) -> LorascopeError | None:
    try:
        load_adapter(path)
    except LorascopeError as error:
        return error
    return None


def check_line(error: LorascopeError) -> None:
    message = str(error)
    assert message.isprintable() and 10 < len(message) < 1500, repr(message)
    event("refused")


def check_merge(adapter: Adapter, updates: dict[str, torch.Tensor], modules: Mapping[str, Tensors]) -> None:
    """Merged into fp32, fp16 and bf16 weights: what float64 gives, within that dtype's rounding."""
    generator = torch.Generator().manual_seed(0)
    state = {f"unet.{path}.weight": torch.randn(shape, generator=generator) for path, shape in LAYERS.items()}
    for dtype, rounding in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        try:
            merged, report = merge_weights(state, adapter, dtype=dtype)
        except LorascopeError as error:
            check_line(error)
            continue
        assert report.num_modules == len(updates) and math.isfinite(report.rounding)
        for path, update in updates.items():
            key = f"unet.{path}.weight"
            expected = merged_weight(state[key], update, modules[path].get("dora_scale"))
            # Products of a few numbers that cancel are exact to their largest, which the norm bounds.
            bound = rounding * float(expected.abs().max() + update.abs().max() + 1)
            assert float((merged[key].double() - expected).abs().max()) <= bound, path


def check_written(draw: st.DrawFn, adapter: Adapter, updates: dict[str, torch.Tensor], folder: Path) -> None:
    """Written in a layout and a dtype and read again: the same updates, within that dtype's rounding."""
    layout = draw(st.sampled_from(get_args(Layout)))
    dtype, rounding = draw(st.sampled_from([("fp32", 1e-5), ("fp16", 1e-2), ("bf16", 5e-2)]))
    path = folder / ("folder" if layout == "peft" else "written.safetensors")
    try:
        save_adapter(adapter, path, layout, dtype)
    except LorascopeError as error:
        check_line(error)
        return
    again = load_adapter(path)  # what we write, we read
    assert {f"unet.{name}" for name in updates} == set(again.modules)
    for name, update in updates.items():
        module = again.modules[f"unet.{name}"]
        up, down = module.up.double(), module.full_down().double()
        size = float(torch.linalg.vector_norm(up) * torch.linalg.vector_norm(down)) * abs(module.scale)
        assert module.down.dtype == DTYPES[dtype]
        difference = update_of(module.tensors(), module.alpha).reshape(update.shape) - update
        assert float(difference.abs().max()) <= rounding * size + 1e-12, (name, layout, dtype)


@settings(QUICK, max_examples=100)
@given(data=st.data())
def test_kohya_files_are_merged_and_written_as_their_tensors_say_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("kohya")
    modules = data.draw(kohya_modules())
    sound = data.draw(st.booleans())
    if not sound:
        damage(data.draw, modules)
    path = kohya_file(modules, folder / "a.safetensors")
    if not sound and (error := refused(path)):
        check_line(error)
        return
    adapter = load_adapter(path)
    updates = {
        path: update_of(found, float(found["alpha"].double()) if "alpha" in found else None)
        for path, found in modules.items()
        if found
    }
    check_merge(adapter, updates, modules)
    check_written(data.draw, adapter, updates, folder)


ALPHA_OF_A_CONFIG = ALPHAS | st.sampled_from(
    [3e38, 1e39, 1e308, -1e300, 1e-300, 10**400, math.nan, math.inf, "4", None, True, [1]]
)


@st.composite
def peft_configs(draw: st.DrawFn) -> dict[str, Any]:
    """PEFT's configuration, of rank 2 where it is not damaged."""
    config: dict[str, Any] = {"peft_type": "LORA", "r": draw(st.sampled_from([2, 2, 2, 3, 0, "2", None]))}
    if draw(st.booleans()):
        config["lora_alpha"] = draw(ALPHA_OF_A_CONFIG)
    if draw(st.booleans()):
        names = ["to_q", "attn1.to_k", "^down_blocks.0.resnets.0.conv1$", "q", ".*", "(", "to_q\n"]
        config["alpha_pattern"] = draw(st.dictionaries(st.sampled_from(names), ALPHA_OF_A_CONFIG, max_size=2))
    if draw(st.booleans()):
        config["use_rslora"] = draw(st.booleans())
    return config


def alpha_by_peft(config: Mapping[str, Any], path: str) -> float:
    """alpha of a module of rank 2 by PEFT's own matching; with rsLoRA what gives alpha / sqrt(r)."""
    pattern = config.get("alpha_pattern", {})
    alpha = pattern.get(get_pattern_key(pattern.keys(), path), config.get("lora_alpha", 8))
    return float(alpha) * (2**0.5 if config.get("use_rslora") else 1.0)


@settings(QUICK, max_examples=100)
@given(data=st.data(), config=peft_configs(), as_folder=st.booleans())
def test_alphas_of_any_configuration_are_those_of_peft_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, config: dict[str, Any], as_folder: bool
) -> None:
    folder = tmp_path_factory.mktemp("config")
    prefix = "base_model.model." if as_folder else "unet."
    modules = {
        path: {
            "down": numbers(data.draw, (2, *shape[1:])),
            "up": numbers(data.draw, (shape[0], 2, *[1] * (len(shape) - 2))),
        }
        for path, shape in LAYERS.items()
    }
    tensors = {
        f"{prefix}{path}.{ending}.weight": found[field]
        for path, found in modules.items()
        for field, ending in (("down", "lora_A"), ("up", "lora_B"))
    }
    packed = {f"unet.{key}": value for key, value in config.items()}
    metadata = {} if as_folder else {"lora_adapter_metadata": json.dumps(packed)}
    safetensors.torch.save_file(tensors, file := folder / PEFT_WEIGHTS, metadata)
    if as_folder:
        (folder / PEFT_CONFIG).write_text(json.dumps(config))
    source = folder if as_folder else file.rename(folder / "file.safetensors")
    if error := refused(source):
        check_line(error)
        return
    adapter = load_adapter(source)
    updates = {path: update_of(found, alpha_by_peft(config, path)) for path, found in modules.items()}
    check_merge(adapter, updates, modules)
    check_written(data.draw, adapter, updates, folder)
