"""The plan: counts without weights, network or files written."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lorascope.adapters.targets import count_parameters, resolve_targets
from lorascope.base.loading import load_base
from lorascope.config import load_study
from lorascope.errors import ConfigError, DataError
from lorascope.evaluation.statistics import smallest_detectable_effect
from lorascope.plan import Plan, plan_study
from lorascope.schema import StudyConfig
from lorascope.sections import MAX_ARMS, REFERENCE_TARGETS
from lorascope.training.passes import count_models
from samples import write_pictures


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
    assert [arm["parameters"] for arm in plan.arms] == [
        count_parameters(targets, arm) for arm in config.expand_arms()
    ]
    assert plan.estimated_s is not None
    assert 0 < plan.estimated_s < 600
    assert plan.estimated_bytes > 0
    assert "12 steps" in plan.as_text()
    # Of 6 prompts: the base and 2 arms of 2 epochs at 4 strengths, 3 models at 2 other guidance scales, and
    # as interventions the base's branch and scaled intruders of both arms, and the cut of one.
    assert plan.diagnosis_pictures == 6 * (1 + 2 * 2 * 4 + 2 * 3 + 2 + 2 + 1)
    few = StudyConfig.model_validate({**config.model_dump(), "diagnose": {"num_intervention_prompts": 1}})
    assert plan_study(few).diagnosis_pictures == 6 * (1 + 2 * 2 * 4 + 2 * 3) + 2 * (2 + 2 + 1)


def test_a_plan_tells_what_share_of_the_time_the_diagnosis_takes(pipeline_folder: Path) -> None:
    def plan_of(*overrides: str) -> Plan:
        base = (f"base.model={pipeline_folder}", "data.resolution_px=32")
        return plan_study(load_study(preset="smoke", overrides=[*base, *overrides], environment={}))

    plan = plan_of()
    assert plan.diagnosis_share is not None and 0 < plan.diagnosis_share < 1
    assert f"and losses: {100 * plan.diagnosis_share:.0f} % of the time below" in plan.as_text()
    longer = plan_of("train.epochs=20").diagnosis_share
    more = plan_of("diagnose.strengths=[0.25, 0.5, 0.75, 1.0]").diagnosis_share
    assert longer is not None and more is not None and longer < plan.diagnosis_share < more
    without = plan_of("diagnose.enabled=false")
    assert without.diagnosis_share == 0 and "diagnosis" not in without.as_text()


def test_losses_are_counted_on_as_many_pictures_as_are_held_out(pipeline_folder: Path) -> None:
    def share(*overrides: str) -> float:
        base = f"base.model={pipeline_folder}"
        plan = plan_study(load_study(preset="smoke", overrides=[base, *overrides], environment={}))
        assert plan.diagnosis_share is not None
        return plan.diagnosis_share

    assert share("data.num_heldout=8") < share("data.num_heldout=100") == share("data.num_heldout=")


def test_a_plan_of_as_many_arms_as_there_may_be_answers_soon(pipeline_folder: Path) -> None:
    config = StudyConfig.model_validate(
        {
            "base": {"model": str(pipeline_folder)},
            "data": {"resolution_px": 32},
            "arms": [{"rank": [4, 8, 16, 32], "seed": list(range(MAX_ARMS // 4))}],
        }
    )
    begun = time.process_time()
    plan = plan_study(config)
    assert len(plan.arms) == sum(map(len, plan.passes)) == MAX_ARMS
    assert time.process_time() - begun < 20, "7 s; 130 s when every pass was counted by itself"


@pytest.mark.parametrize(
    ("preset", "modules", "steps"), [("paper", 160, 3750), ("paper-as-run", 144, 3750), ("style", 160, None)]
)
def test_a_hub_id_is_taken_for_stable_diffusion_v1_5(preset: str, modules: int, steps: int | None) -> None:
    plan = plan_study(load_study(preset=preset, environment={}))
    assert (plan.modules, plan.steps) == (modules, steps)
    assert (plan.estimated_s is None) == (plan.diagnosis_share is None) == (steps is None)
    assert (steps is None) == ("known once the data is read" in plan.as_text())
    if preset == "paper":
        assert [arm["parameters"] for arm in plan.arms] == [5_984_256, 23_937_024]


def test_repeats_accumulation_previews_and_copies_are_counted(pipeline_folder: Path) -> None:
    def plan_of(*overrides: str) -> Plan:
        base = ("base.model=" + str(pipeline_folder), "data.num_train=16", "data.resolution_px=32")
        return plan_study(load_study(preset="smoke", overrides=[*base, *overrides], environment={}))

    plain = plan_of()
    assert plain.steps == 8
    assert plan_of("data.repeats=3").steps == 24
    assert (
        plan_of("train.accumulation_steps=2").steps == 4
        and "batch 4 x 2: 4 steps" in plan_of("train.accumulation_steps=2").as_text()
    )
    for more in (
        "sample.preview_every_epochs=1",
        'export.formats=["kohya", "diffusers"]',
        'export.dtype="fp32"',
        "data.flip=true",
    ):
        assert plan_of(more).estimated_bytes > plain.estimated_bytes, more
    assert plan_of("train.keep_best=false").estimated_bytes < plain.estimated_bytes


def test_a_plan_tells_the_repeats_of_a_folder(pipeline_folder: Path, tmp_path: Path) -> None:
    def text_of(source: Path) -> str:
        overrides = [f"base.model={pipeline_folder}", f"data.source={source}", "data.resolution_px=32"]
        return plan_study(load_study(preset="smoke", overrides=overrides, environment={})).as_text()

    write_pictures(tmp_path, ["10_cat/1.png", "10_cat/2.png", "2024_x/3.png"])
    (tmp_path / "2024_x/3.txt").write_text("three")
    text = text_of(tmp_path)
    assert "repeats    an epoch shows 1 once, 2 pictures 10 times" in text
    assert "data       names of folders that begin with a number that is no number of repeats" in text
    assert "repeats  " not in text_of(tmp_path / "2024_x")
    without = (f"data.source={tmp_path}", f"base.model={pipeline_folder}", "data.num_train=")
    plan = plan_study(load_study(preset="smoke", overrides=without, environment={}))
    assert (plan.num_train, plan.steps) == (3, 11)  # 21 an epoch, 2 epochs, batch 4: names alone tell it
    assert plan.estimated_s is not None
    assert plan.sampling_share is not None and 0 < plan.sampling_share < 1
    fewer = plan_study(
        load_study(preset="smoke", overrides=[*without[:2], "data.num_train=2"], environment={})
    )
    assert (fewer.num_train, fewer.steps) == (2, 7)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Parquet or tar files in it"):
        text_of(tmp_path / "empty")


def test_a_plan_tells_what_its_prompts_and_seeds_could_show(pipeline_folder: Path) -> None:
    def plan_of(*overrides: str) -> Plan:
        base = (f"base.model={pipeline_folder}", "data.resolution_px=32")
        return plan_study(load_study(preset="pocket", overrides=[*base, *overrides], environment={}))

    one = plan_of("sample.seeds=[0]", 'arms=[{rank=[4, 8]}, {rank=8, match_gain="r4", seed=[0, 1]}]')
    assert one.power.smallest_difference == pytest.approx(2.8 * 21 / 50**0.5)
    assert (one.power.num_prompts, one.power.num_training_seeds) == (50, 1)
    assert "one training seed: rank cannot be separated from luck" in one.as_text()
    assert "between these very files differences of 8.3 CLIP points or more would be seen" in one.as_text()
    assert one.arms[2]["gain"] == one.arms[0]["gain"] and "gain 0.0002" in one.as_text()
    three = plan_of("sample.seeds=[0]", 'arms=[{rank=[4, 8], seed=[0, 1, 2], scaling="rslora"}]')
    expected = smallest_detectable_effect(21, 50, 2, 3)
    assert three.power.smallest_difference == expected > one.power.smallest_difference
    text = three.as_text()
    assert (
        f"differences of {expected:.1f} CLIP points or more would be seen in 50 prompts and 3 training"
        in text
    )
    assert "assumed is a spread of 21 points between prompts, 2 between seeds" in text
    assert "as measured on the pocket world" in text
    assert "luck" not in text and "rslora" in text
    assert plan_of("sample.seeds=[0, 1]").power.prompt_std == 15
    assert json.loads(json.dumps(asdict(three)))["power"]["seed_std"] == 2
    other = plan_of("score.model=openai/clip-vit-large-patch14")
    assert (
        other.power.source
        == "between prompts as published for SD v1.5, between seeds in the pocket world's proportion"
    )


def test_a_study_that_could_not_start_is_not_planned() -> None:
    with pytest.raises(
        ConfigError, match=r"^train.optimizer = 'prodigi': must be adamw, prodigy or a torch.optim class"
    ):
        plan_study(load_study(preset="smoke", overrides=["train.optimizer=prodigi"], environment={}))
    for key in ("sample.prompt_prefix", "data.caption_prefix", "data.trigger_word"):
        with pytest.raises(DataError, match=rf"^{key} = '<\|endoftext\|>' holds <\|endoftext\|>, which CLIP"):
            plan_study(load_study(preset="smoke", overrides=[f"{key}=<|endoftext|>"], environment={}))


def test_a_plan_tells_the_memory_and_stacks_what_fits(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_with(free_bytes: float, *overrides: str) -> Plan:
        for module in ("plan", "training.passes"):
            monkeypatch.setattr(f"lorascope.{module}.free_bytes", lambda device: int(free_bytes))
        own = [
            f"base.model={pipeline_folder}",
            "data.resolution_px=32",
            "arms=[{rank=[4, 8], seed=[0, 1]}]",
            "workers=1",
        ]
        return plan_study(load_study(preset="smoke", overrides=[*own, *overrides], environment={}))

    plan = plan_with(100e9)
    assert (
        [len(names) for names in plan.passes] == [4]
        and plan.memory.num_arms == 4
        and not plan.memory.checkpointing
    )
    assert (
        plan.memory_bytes == plan.memory.total_bytes == plan.memory.weights_bytes + plan.memory.training_bytes
    )
    assert "are free; the base takes" in plan.as_text() and "will probably not fit" not in plan.as_text()
    room = plan.memory.weights_bytes + plan.memory.training_bytes * 0.6
    assert [len(names) for names in plan_with(room / 0.9).passes] == [2, 2]
    least = plan_with(plan.memory.weights_bytes)
    assert [len(names) for names in least.passes] == [1] * 4 and least.memory.checkpointing
    assert "will probably not fit: lower batch_size" in least.as_text()
    assert not plan_with(1, "train.gradient_checkpointing=false").memory.checkpointing


def test_encoding_text_and_decoding_take_time_too(pipeline_folder: Path) -> None:
    counts = count_models(
        load_study(preset="smoke", overrides=[f"base.model={pipeline_folder}"], environment={})
    )
    assert set(counts.flops) == {"encode", "text", "unet", "decode"} and all(counts.flops.values())
    assert counts.latent_shape == (4, 16, 16)
