"""The plan: counts without weights, network or files written."""

from pathlib import Path

import pytest
import torch

from lorascope.adapter import count_parameters, resolve_targets
from lorascope.base import load_base
from lorascope.config import REFERENCE_TARGETS, StudyConfig, load_study
from lorascope.plan import plan_study


def test_a_plan_counts_without_loading_weights(pipeline_folder: Path) -> None:
    config = StudyConfig.model_validate(
        {
            "base": {"model": str(pipeline_folder)},
            "data": {"num_train": 16, "resolution_px": 32},
            "arms": [{"rank": [4, 8]}],
            "train": {"epochs": 3},
            "sample": {"num_prompts": 3, "seeds": [0, 1]},
        }
    )
    plan = plan_study(config)
    targets = resolve_targets(load_base(config.base, torch.device("cpu")).unet, REFERENCE_TARGETS)
    assert (plan.steps, plan.pictures, plan.modules) == (12, 6 * 2 * 3, len(targets))
    assert [arm["parameters"] for arm in plan.arms] == [count_parameters(targets, arm) for arm in config.expand_arms()]
    assert plan.estimated_s is not None
    assert 0 < plan.estimated_s < 600
    assert plan.estimated_bytes > 0
    assert "12 steps" in plan.as_text()


@pytest.mark.parametrize("preset", ["paper", "recommended"])
def test_what_a_hub_id_would_tell_stays_unknown(preset: str) -> None:
    plan = plan_study(load_study(preset=preset, environment={}))
    assert plan.estimated_s is None
    assert plan.modules is None
    assert "known once" in plan.as_text()
