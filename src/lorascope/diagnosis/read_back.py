"""Whether an arm's files for other programs hold the adapter that was trained."""

import math
from pathlib import Path

import torch

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.files import load_adapter
from lorascope.adapters.modules import FullModule, LoraModule, Module
from lorascope.arms import Arm
from lorascope.errors import AdapterError, WeightsError
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.store import export_name

# An update in a file differs from the arm's by the rounding of two factors, each of at most half a unit in
# its last place of 24, 11 or 8 bits; 4 times the sum of both, for updates whose terms cancel. LoHa has four.
_TOLERANCE = {"fp32": 2.0**-21, "fp16": 2.0**-8, "bf16": 2.0**-5}


def read_back(run: RunDir, config: StudyConfig, arm: Arm, adapter: Adapter) -> tuple[bool | None, str]:
    """Whether every file of `[export]` beside the arm, read again, is `adapter`, and what was found.

    None where there is no file, as of an adapter that a format cannot hold.
    """
    folder = run.adapters_dir / arm.name
    names = [export_name(f"{config.name}-{arm.name}", layout) for layout in config.export.formats]
    found = [_compare(folder / name, adapter, config.export.dtype) for name in names]
    told = [item for item in found if item is not None]
    if not told:
        return None, "the arm has no file for other programs"
    wrong = [sentence for is_right, sentence in told if not is_right]
    return not wrong, wrong[0] if wrong else "; ".join(sentence for _, sentence in told)


def _compare(path: Path, adapter: Adapter, dtype: str) -> tuple[bool, str] | None:
    """Whether a file holds the adapter, and a sentence; None where it is not there."""
    if not path.exists():
        return None
    try:
        other = load_adapter(path)
    except (AdapterError, WeightsError) as error:
        return False, str(error)
    if missing := sorted(set(adapter.modules) ^ set(other.modules)):
        return False, f"{path.name}: {len(missing)} layers differ, the first is {missing[0]}"
    errors = {name: relative_error(module, other.modules[name]) for name, module in adapter.modules.items()}
    worst = max(errors, key=lambda name: errors[name])
    said = f"{path.name}: updates differ by at most {errors[worst]:.2g} of their size, in {worst}"
    allowed = _TOLERANCE[dtype] * (2 if "loha" in adapter.kinds else 1)
    return errors[worst] <= allowed, said


def relative_error(module: Module, other: Module) -> float:
    """Frobenius norm of the difference of two updates over that of the first; infinite where only the other
    is not 0, or their shapes differ. A bias counts as a column of the update.

    Of LoRA by the factors alone, in float64: with U1 D1 - U2 D2 = [U1, -U2] [D1; D2], the norm is that of two
    small triangular matrices' product.
    """
    if not isinstance(module, LoraModule) or not isinstance(other, LoraModule):
        return _dense_error(module, other)
    if module.weight_shape != other.weight_shape:
        return math.inf
    parts = [(_up(item), item.full_down().double().flatten(1)) for item in (module, other)]
    (up, down), (other_up, other_down) = parts
    return _ratio(_norm(torch.cat([up, -other_up], dim=1), torch.cat([down, other_down])), _norm(up, down))


def _dense_error(module: Module, other: Module) -> float:
    updates = [
        torch.cat([item.update().double().flatten(), bias.double()])
        if isinstance(item, FullModule) and (bias := item.bias) is not None
        else item.update().double().flatten()
        for item in (module, other)
    ]
    if module.matrix_shape != other.matrix_shape or updates[0].shape != updates[1].shape:
        return math.inf
    return _ratio(float((updates[0] - updates[1]).norm()), float(updates[0].norm()))


def _ratio(difference: float, size: float) -> float:
    return difference / size if size else (math.inf if difference else 0.0)


def _up(module: LoraModule) -> torch.Tensor:
    return module.up.double().flatten(1) * module.scale


def _norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """Frobenius norm of up @ down."""
    left, right = torch.linalg.qr(up, mode="r").R, torch.linalg.qr(down.mT, mode="r").R
    return float((left @ right.mT).norm())
