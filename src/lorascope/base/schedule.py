"""The noise schedule that a base was trained with, as its scheduler's configuration says."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler

from lorascope.base.configs import read_config
from lorascope.base.family import WANTED
from lorascope.errors import BaseModelError, first_line

_PREDICTION_TYPES = ("epsilon", "v_prediction")
_MAX_TIMESTEPS = 100_000


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
    return config


def noise_schedule(config: dict[str, Any]) -> torch.Tensor:
    """The noise schedule of the base, by diffusers' own scheduler: float32 [T]; raises `BaseModelError` for
    one that is none.
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
    return alphas_cumprod
