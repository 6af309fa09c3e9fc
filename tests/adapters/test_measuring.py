"""Figures of a file's modules: held against the whole update, bounded in time, and faults one by one."""

from pathlib import Path

import pytest
import torch

from adapter_files import KOHYA_ATTENTION, Tensors, kohya, write
from lorascope.adapters.file_content import open_content
from lorascope.adapters.file_modules import file_modules
from lorascope.adapters.inspection import inspect_adapter
from lorascope.adapters.inspection_text import as_text
from lorascope.adapters.measuring import measure_modules
from lorascope.adapters.recognition import ModuleFacts

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
