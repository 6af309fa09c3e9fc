"""The noise schedule of a base, from configurations sound and odd."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from bases import change_json, load
from lorascope.base.configs import SD15_DIR
from lorascope.base.schedule import build_scheduler, noise_schedule, read_scheduler
from lorascope.errors import BaseModelError

SD15 = read_scheduler(SD15_DIR)
BETAS = torch.linspace(1e-4, 0.02, 1000).tolist()


def test_unknown_or_broken_schedules_are_refused(own_copy: Path) -> None:
    path = own_copy / "scheduler" / "scheduler_config.json"
    change_json(path, prediction_type="sample")
    with pytest.raises(
        BaseModelError, match="prediction_type = 'sample': must be one of epsilon, v_prediction"
    ):
        load(own_copy)
    for odd in ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"use_flow_sigmas": True}):
        path.write_text(json.dumps({**SD15, **odd}))
        with pytest.raises(BaseModelError, match="is for flow matching, which no Stable Diffusion"):
            load(own_copy)
    path.write_text("{")
    with pytest.raises(BaseModelError, match="cannot be read"):
        load(own_copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_train_timesteps", 10**12, "num_train_timesteps = 10+ of the scheduler: must be 1 to 100,000"),
        ("beta_start", "low", "gives no noise schedule"),
        ("trained_betas", [0.1, 0.2], "give no schedule of 1000 finite steps"),
        ("trained_betas", [float("nan")] * 1000, "give no schedule of 1000 finite steps"),
        ("trained_betas", [0.001] * 999 + [1.5], "betas are not between 0 and 1"),
        ("trained_betas", [0.001] * 999 + [-0.5], "betas are not between 0 and 1"),
        ("trained_betas", [-1e-4] * 1000, "betas are not between 0 and 1"),
        ("beta_schedule", "sigmoid", r"no picture can be drawn .* \(sigmoid is not implemented"),
        ("timestep_spacing", "odd", "no picture can be drawn"),
        ("steps_offset", "1", "no picture can be drawn"),
    ],
)
def test_numbers_that_give_no_schedule_are_refused(
    own_copy: Path, key: str, value: object, message: str
) -> None:
    change_json(own_copy / "scheduler" / "scheduler_config.json", **{key: value})
    with pytest.raises(BaseModelError, match=message):
        noise_schedule(read_scheduler(own_copy))


def test_trained_betas_go_before_start_and_end_as_in_diffusers() -> None:
    """Their number goes by `num_train_timesteps`, by default 1000."""
    config = {**SD15, "trained_betas": BETAS, "beta_start": 0.5, "beta_end": 0.6}
    expected = torch.cumprod(1 - torch.tensor(BETAS), dim=0)
    for given in (config, {"trained_betas": BETAS}):
        assert torch.equal(noise_schedule(given), expected)
        scheduler: Any = build_scheduler(given, expected)
        assert type(scheduler).__name__ == "PNDMScheduler" and torch.equal(scheduler.alphas_cumprod, expected)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({}, "PNDMScheduler", ""),
        ({"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler", ""),
        (
            {"_class_name": "UniPCMultistepScheduler", "solver_order": 3},
            "UniPCMultistepScheduler",
            "",
        ),
        ({"prediction_type": "v_prediction"}, "PNDMScheduler", ""),
        ({"_class_name": "Mine"}, "PNDMScheduler", "its scheduler 'Mine' is none that diffusers has"),
        ({"_class_name": "SchedulerMixin"}, "PNDMScheduler", "'SchedulerMixin' "),
        ({"_class_name": "KarrasVeScheduler"}, "PNDMScheduler", "has another noise schedule than the base"),
        ({"_class_name": "RePaintScheduler", "trained_betas": BETAS}, "PNDMScheduler", "cannot be built"),
        (
            {"_class_name": "RePaintScheduler", "prediction_type": "v_prediction"},
            "PNDMScheduler",
            "knows no prediction_type = 'v_prediction'",
        ),
        # PNDM takes no zero at the end, DDIM does.
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            "DDIMScheduler",
            "'PNDMScheduler' has another noise schedule than the base: the pipeline gets DDIMScheduler",
        ),
    ],
)
def test_the_pipelines_scheduler_is_the_one_named_unless_it_is_not_the_bases(
    change: dict[str, Any], kind: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**SD15, **change}
    alphas_cumprod = noise_schedule(config)
    with caplog.at_level("WARNING", "lorascope"):
        scheduler: Any = build_scheduler(config, alphas_cumprod)
    assert type(scheduler).__name__ == kind
    assert said in caplog.text and bool(said) == bool(caplog.text)
    torch.testing.assert_close(scheduler.alphas_cumprod, alphas_cumprod, rtol=0, atol=1e-6)
    assert scheduler.config.get("prediction_type", "epsilon") == config["prediction_type"]


def test_noise_that_is_predicted_where_all_is_noise_is_told(caplog: pytest.LogCaptureFixture) -> None:
    config = {**SD15, "rescale_betas_zero_snr": True}
    with caplog.at_level("WARNING", "lorascope"):
        assert noise_schedule({**config, "prediction_type": "v_prediction"})[-1] == 0 and not caplog.text
        assert noise_schedule(config)[-1] == 0
    assert 'set base.prediction_type = "v_prediction"' in caplog.text


def test_a_pipeline_of_a_base_that_predicts_v_is_saved_as_one(own_copy: Path, tmp_path: Path) -> None:
    change_json(own_copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    load(own_copy).build_pipeline().save_pretrained(tmp_path / "pipeline")
    again = load(tmp_path / "pipeline")
    assert again.prediction_type == "v_prediction"
    assert type(again.build_pipeline().scheduler) is DDIMScheduler
