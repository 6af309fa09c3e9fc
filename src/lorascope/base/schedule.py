"""The noise schedule that a base was trained with, as its scheduler's configuration says, and diffusers'
scheduler for it.

Schedulers of diffusers take any configuration and pass over keys that they do not know. What one makes of a
base's is therefore held against the base's own schedule.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, SchedulerMixin, schedulers

from lorascope.base.configs import read_config
from lorascope.base.family import WANTED
from lorascope.console import log
from lorascope.errors import BaseModelError, first_line

_PREDICTION_TYPES = ("epsilon", "v_prediction")
_MAX_TIMESTEPS = 100_000
_TOLERANCE = 1e-6  # some schedulers put the smallest number in place of a zero at the end


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler's configuration in a folder; raises `BaseModelError` where the U-Net predicts neither
    noise nor v.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_config(path)
    if config.get("prediction_type", "epsilon") not in _PREDICTION_TYPES:
        raise BaseModelError(
            f"{path}: prediction_type = {str(config['prediction_type'])[:80]!r}: must be one of "
            f"{', '.join(_PREDICTION_TYPES)}"
        )
    if (name := str(config.get("_class_name"))).startswith("Flow") or config.get("use_flow_sigmas"):
        raise BaseModelError(
            f"{path}: {name[:80]!r} is for flow matching, which no Stable Diffusion v1 learned: {WANTED}"
        )
    return config


def noise_schedule(config: Mapping[str, Any]) -> torch.Tensor:
    """How much of a picture is left at each timestep, as diffusers' `alphas_cumprod`: float32 [T] in [0, 1],
    falling.

    As in diffusers, `trained_betas` go before the start and end of a schedule. Raises `BaseModelError` for a
    configuration that gives none, or that no picture can be drawn by.
    """
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 0 < steps <= _MAX_TIMESTEPS:
        raise BaseModelError(
            f"num_train_timesteps = {repr(steps)[:80]} of the scheduler: must be 1 to "
            f"{_MAX_TIMESTEPS:,}: {WANTED}"
        )
    try:
        alphas_cumprod = DDPMScheduler.from_config(config).alphas_cumprod.float()
    except Exception as error:  # the library raises anything on other types than it expects
        raise BaseModelError(
            f"the scheduler's configuration gives no noise schedule ({first_line(error)}): {WANTED}"
        ) from error
    if alphas_cumprod.shape != (steps,) or not alphas_cumprod.isfinite().all():
        raise BaseModelError(f"the scheduler's betas give no schedule of {steps} finite steps: {WANTED}")
    if alphas_cumprod[0] > 1 or alphas_cumprod[-1] < 0 or (alphas_cumprod.diff() > 0).any():
        raise BaseModelError(f"the scheduler's betas are not between 0 and 1: {WANTED}")
    try:
        DDIMScheduler.from_config(config).set_timesteps(1)
    except Exception as error:  # likewise
        raise BaseModelError(
            f"no picture can be drawn by the scheduler's configuration ({first_line(error)}): {WANTED}"
        ) from error
    if alphas_cumprod[-1] == 0 and config.get("prediction_type", "epsilon") == "epsilon":
        log.warning(
            "base     by its scheduler the last timestep is noise alone, where noise cannot be predicted: if "
            'it predicts v, set base.prediction_type = "v_prediction"'
        )
    return alphas_cumprod


def build_scheduler(config: Mapping[str, Any], alphas_cumprod: torch.Tensor) -> SchedulerMixin:
    """The scheduler that a configuration with this noise schedule names; where it names none PNDM, as SD
    v1.5's.

    Where diffusers has no such scheduler, or it would draw by another noise schedule or prediction than the
    base's, it is PNDM or, where that would too, DDIM; the log says so.
    """
    named = config.get("_class_name", "PNDMScheduler")
    kinds: list[Any] = [getattr(schedulers, str(named), None), PNDMScheduler]
    faults = []
    for kind in kinds:
        if (fault := _fault(kind, config, alphas_cumprod)) is None:
            break
        faults.append(fault)
    else:
        kind = DDIMScheduler  # `noise_schedule` has tried it
    if faults:
        text = "base     its scheduler %r %s: the pipeline gets %s"
        log.warning(text, str(named)[:80], faults[0], kind.__name__)
    return cast(SchedulerMixin, kind.from_config(config))


def _fault(kind: Any, config: Mapping[str, Any], alphas_cumprod: torch.Tensor) -> str | None:
    """Why a class of diffusers is no scheduler of a base with such a configuration, or None."""
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        return "is none that diffusers has"
    try:
        scheduler: Any = cast(Any, kind).from_config(config)
    except Exception as error:  # the library raises anything on other types than it expects
        return f"cannot be built ({first_line(error)})"
    found: Any = getattr(scheduler, "alphas_cumprod", None)
    is_tensor = isinstance(found, torch.Tensor) and found.shape == alphas_cumprod.shape
    if not is_tensor or (found.float() - alphas_cumprod).abs().max() > _TOLERANCE:
        return "has another noise schedule than the base"
    predicts = config.get("prediction_type", "epsilon")
    if predicts != "epsilon" and "prediction_type" not in inspect.signature(kind).parameters:
        return f"knows no prediction_type = {predicts!r}"
    return None
