"""Figures of a file's modules: held against the whole update, bounded in time, and faults one by one."""

import math
from pathlib import Path

import pytest
import torch

from adapter_files import KOHYA_ATTENTION, Tensors, kohya, write
from lorascope.adapters.adapter import Adapter
from lorascope.adapters.file_content import open_content
from lorascope.adapters.file_modules import file_modules
from lorascope.adapters.files import save_adapter
from lorascope.adapters.inspection import inspect_adapter
from lorascope.adapters.inspection_text import as_text
from lorascope.adapters.measuring import measure_modules
from lorascope.adapters.modules import Module
from lorascope.adapters.recognition import ModuleFacts
from random_adapters import ATTENTION, random_full, random_loha, random_lokr

ENDINGS = (".lora_down.weight", ".lora_up.weight")


def measured(path: Path) -> dict[str, ModuleFacts]:
    content = open_content(path)
    modules, _ = file_modules(content.shapes)
    return {facts.name: facts for facts in measure_modules(modules, content)}


@pytest.mark.parametrize(("rank", "alpha"), [(4, 2.0), (8, None)])
def test_norms_are_those_of_the_whole_update(rank: int, alpha: float | None, tmp_path: Path) -> None:
    name = f"{KOHYA_ATTENTION}_to_q"
    extra = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    tensors = kohya(name, rank, **extra)
    (facts,) = measured(write(tmp_path / "file.safetensors", tensors)).values()
    scale = 1.0 if alpha is None else alpha / rank
    update = scale * (tensors[name + ENDINGS[1]] @ tensors[name + ENDINGS[0]]).double()
    assert (facts.rank, facts.alpha, facts.scale) == (rank, alpha, scale)
    assert facts.norm == pytest.approx(float(update.norm()))
    assert facts.rms == pytest.approx(float(update.square().mean().sqrt()))
    squares = torch.linalg.svdvals(update).square()
    assert facts.rank_used == int((squares.cumsum(0) < 0.95 * squares.sum()).sum()) + 1
    assert facts.fault is None and not facts.is_near_zero


def kohya_tensors(module: Module, folder: Path) -> Path:
    """A file of one module of to_q."""
    file = folder / "file.safetensors"
    save_adapter(Adapter({f"unet.{ATTENTION}.to_q": module}, "kohya", {}), file, "kohya", "fp32")
    return file


def test_norms_of_other_kinds_are_those_of_the_update(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    for module in (
        random_loha((6, 8), 2, 3.0, draw),
        random_loha((6, 8, 3, 3), 2, None, draw, core=True),
        random_lokr((6, 8), 1, 3.0, draw),
        random_lokr((6, 8, 3, 3), None, 3.0, draw),
        random_full((6, 8), draw, bias=False),
    ):
        (facts,) = measured(kohya_tensors(module, tmp_path)).values()
        update = module.update().double()
        assert facts.norm == pytest.approx(float(update.norm()), rel=1e-6)
        assert facts.rms == pytest.approx(float(update.square().mean().sqrt()), rel=1e-6)
        stated = (
            (module.rank, module.effective_alpha, module.scale) if module.has_scale else (None, None, None)
        )
        assert (facts.rank, facts.alpha, facts.scale) == stated
        assert facts.fault is None and not facts.is_zero
        zero = module.with_tensors({name: part * 0 for name, part in module.tensors().items()})
        (facts,) = measured(kohya_tensors(zero, tmp_path)).values()
        assert facts.is_zero and facts.norm == 0
    full = random_full((6,), draw)
    assert full.bias is not None
    (facts,) = measured(kohya_tensors(full, tmp_path)).values()
    assert facts.norm == pytest.approx(float(torch.cat([full.weight, full.bias]).double().norm()), rel=1e-6)


def test_modules_of_other_kinds_that_make_no_sense_are_reported(tmp_path: Path) -> None:
    """NaN, ranks that disagree, a name of another model, and a few numbers that mean a huge matrix."""
    tensors = {
        f"{name}.hada_{factor}": torch.full(shape, value)
        for name, value in (("lora_unet_elsewhere", 1.0), ("lora_unet_odd", 1.0), ("lora_unet_nan", math.nan))
        for factor, shape in (("w1_a", (6, 2)), ("w1_b", (2, 8)), ("w2_a", (6, 2)), ("w2_b", (2, 8)))
    }
    tensors["lora_unet_odd.hada_w2_a"] = torch.ones(6, 3)
    tensors |= {f"lora_unet_huge.hada_w{n}_a": torch.ones(2**14, 1) for n in (1, 2)}
    tensors |= {f"lora_unet_huge.hada_w{n}_b": torch.ones(1, 2**14) for n in (1, 2)}
    core = {"w2_a": (2, 2**13), "w2_b": (2, 1), "t2": (2, 2, 64, 64)}
    tensors |= {f"lora_unet_core.lokr_{name}": torch.ones(shape) for name, shape in core.items()}
    tensors["lora_unet_core.lokr_w1"] = torch.ones(1, 1)
    facts = measured(write(tmp_path / "file.safetensors", tensors))
    assert facts["lora_unet_elsewhere"].norm == pytest.approx(4 * 48**0.5)
    assert facts["lora_unet_nan"].norm is None and facts["lora_unet_nan"].num_not_finite == 56
    assert str(facts["lora_unet_odd"].fault).startswith("its tensors make no LoHa: hada_w1_a")
    for name in ("huge", "core"):
        assert facts[f"lora_unet_{name}"].fault == "too large or too many for an adapter: not measured"


def test_time_is_bounded_for_endless_lists_of_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorascope.adapters.measuring._MAX_MODULES", 20)
    tensors = {f"lora_unet_x{index}{ending}": torch.ones(1, 1) for index in range(30) for ending in ENDINGS}
    path = write(tmp_path / "file.safetensors", tensors)
    assert sum(facts.fault is not None for facts in measured(path).values()) == 10
    assert "10 modules could not be measured" in as_text(inspect_adapter(path), list_modules=True)


def test_few_modules_at_a_time_give_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: Tensors = {}
    for projection in ("q", "k", "v"):
        tensors |= kohya(f"{KOHYA_ATTENTION}_to_{projection}")
    path = write(tmp_path / "file.safetensors", tensors)
    expected = measured(path)
    one_module = sum(tensor.numel() for tensor in tensors.values()) // 3
    monkeypatch.setattr("lorascope.adapters.measuring._NUMBERS_AT_ONCE", one_module)
    assert measured(path) == expected
    assert len(expected) == 3


def test_modules_that_make_no_sense_are_reported_one_by_one(tmp_path: Path) -> None:
    tensors = {
        **kohya(),
        "lora_unet_elsewhere.lora_down.weight": torch.ones(3, 8),
        "lora_unet_elsewhere.lora_up.weight": torch.ones(8, 5),
        "lora_unet_vector.lora_down.weight": torch.ones(3),
        "lora_unet_vector.lora_up.weight": torch.ones(3),
        "lora_unet_foreign.lora_down.weight": torch.full((2, 8), 0.5),
        "lora_unet_foreign.lora_up.weight": torch.full((4, 2), 0.5),
    }
    facts = measured(write(tmp_path / "file.safetensors", tensors))
    assert "do not fit together" in str(facts["lora_unet_elsewhere"].fault)
    assert facts["lora_unet_vector"].fault is not None
    assert facts["lora_unet_foreign"].norm == pytest.approx(0.5 * 32**0.5)
