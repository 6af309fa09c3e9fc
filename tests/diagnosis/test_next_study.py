"""The next study loads, has what the diagnoses ask for, and says why."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorascope.arms import Arm
from lorascope.config import load_study
from lorascope.diagnosis.causes import decide_all
from lorascope.diagnosis.next_study import Proposal, propose
from lorascope.diagnosis.record import Keep, Record
from lorascope.diagnosis.signals import ArmSignals, make_signal
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.schema import StudyConfig
from studies import study
from synthetic_signals import (
    NO,
    a_point,
    an_arm,
    default_arm,
    diverged_arm,
    drifted_arm,
    healthy_arm,
    overfit_arm,
    short_arm,
    signals_of,
)


def pocket(*overrides: str) -> StudyConfig:
    """Two ranks on the pocket world, with the defaults of `[diagnose]`."""
    return study(
        "name=pocket",
        "arms=[{rank=[16, 64], alpha_per_rank=2, lr=5e-4}]",
        "sample.seeds=[0, 1]",
        *overrides,
        preset="pocket-full",
    )


def proposal_of(
    *arms: ArmSignals, keep: Keep | None = None, config: StudyConfig | None = None, **values: Any
) -> Proposal:
    record = Record(keep, decide_all(arms), Thresholds(), {})
    return propose(config or pocket(), record, **values)


def loaded(proposal: Proposal, tmp_path: Path) -> tuple[StudyConfig, list[Arm]]:
    path = tmp_path / "next.toml"
    path.write_text(proposal.toml, encoding="utf-8")
    config = load_study(path, environment={})
    arms = [arm for arm in config.expand_arms() if arm.seed == config.expand_arms()[0].seed]
    return config, arms


ARMS = [default_arm, diverged_arm, overfit_arm, drifted_arm, short_arm, healthy_arm]


@pytest.mark.parametrize("make", ARMS)
def test_every_arm_alone_gives_a_study_that_loads(make: Any, tmp_path: Path) -> None:
    proposal = proposal_of(make())
    config, arms = loaded(proposal, tmp_path)
    assert config.name == "pocket-next" and arms
    text = " ".join(line.removeprefix("#").strip() for line in proposal.toml.splitlines())
    for reason in proposal.reasons:
        assert " ".join(reason.split()) in text
    assert all(len(line) <= 110 for line in proposal.toml.splitlines() if line.startswith("#"))


def test_all_arms_together(tmp_path: Path) -> None:
    proposal = proposal_of(*(make() for make in ARMS), keep=Keep("r16", "last", 1.0, 0.3, 0.97))
    config, arms = loaded(proposal, tmp_path)
    anchor, lower, matched, *_ = arms
    assert (anchor.rank, anchor.alpha, anchor.lr) == (16, 32.0, 2e-4)
    assert (lower.rank, lower.lr) == (16, 1e-4)
    assert (matched.rank, matched.alpha) == (64, 128.0)
    assert matched.gain == pytest.approx(anchor.gain, rel=0.01)
    assert "r16 as it was, what is kept" in " ".join(proposal.reasons)
    assert {arm.seed for arm in config.expand_arms()} == {0, 1, 2}
    assert config.train.caption_dropout == 0.1  # asked for by the first arm that does
    assert any(reason.startswith("By hand, data.source") for reason in proposal.reasons)


def test_what_is_kept_at_a_lower_strength_is_tried_at_that_gain(tmp_path: Path) -> None:
    _, arms = loaded(proposal_of(default_arm(), keep=Keep("r64", "last", 0.5)), tmp_path)
    assert [(arm.rank, arm.lr) for arm in arms] == [(64, 5e-4), (64, 2.5e-4)]
    _, unkept = loaded(proposal_of(default_arm()), tmp_path)
    assert [arm.lr for arm in unkept] == [5e-4, 2.5e-4]


def test_arms_keep_their_kind_and_options(tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {"kind": "dora", "init": "gaussian"},
        {"kind": "tlora", "min_rank": 4, "mask_when": "training", "lr_ratio": 4.0},
        {},
    ]
    arms = []
    for index, update in enumerate(kinds):
        signals = healthy_arm()
        name = f"arm{index}"
        arms.append(replace(signals, arm=signals.arm.model_copy(update={**update, "name": name})))
    _, found = loaded(proposal_of(*arms, keep=Keep("arm0", "last", 1.0, 0.3, 0.97)), tmp_path)
    assert [arm.options for arm in found[:2]] == [kinds[0]] * 2
    assert [arm.options for arm in found[2:4]] == kinds[1:]
    assert {round(arm.gain / found[0].gain, 2) for arm in found[2:4]} == {1.0}


def test_the_study_keeps_its_own_keys(tmp_path: Path) -> None:
    own = pocket("train.epochs=7", "workers=2", "trackers=['wandb']", "data.num_train=40")
    arms = [healthy_arm(), replace(default_arm(), finite_training=make_signal("finite_training", NO))]
    config, _ = loaded(proposal_of(*arms, config=own), tmp_path)
    assert (config.train.epochs, config.workers, config.trackers, config.data.num_train) == (
        7,
        2,
        ("wandb",),
        40,
    )
    assert (config.train.max_grad_norm, config.train.precision) == (1.0, "fp32")
    assert config.sample == own.sample and config.diagnose == own.diagnose
    long = own.model_copy(update={"name": "n" * 64})
    assert len(loaded(proposal_of(*arms, config=long), tmp_path)[0].name) == 64


def test_an_open_question_gets_prompts_and_sampling_seeds(tmp_path: Path) -> None:
    open_arm = signals_of(None, a_point(1.0, 0.93, 0.3))  # 349 prompts instead of 24
    config, _ = loaded(proposal_of(open_arm, num_prompts=50), tmp_path)
    assert config.diagnose.num_prompts == 25 and config.diagnose.seeds == (0, 1, 2, 3)
    config, _ = loaded(proposal_of(open_arm, num_prompts=400), tmp_path)
    assert config.diagnose.num_prompts == 175 and config.diagnose.seeds == (0,)
    config, _ = loaded(proposal_of(open_arm), tmp_path)
    assert config.diagnose.num_prompts == 175


def test_an_arm_that_nothing_brings_back_is_drawn_at_less(tmp_path: Path) -> None:
    own = pocket("diagnose.swap_unconditional=false")
    lost = signals_of(None, a_point(1.0, 0.5, 0.4), a_point(0.25, 0.6, 0.2))
    config, arms = loaded(proposal_of(lost, config=own), tmp_path)
    assert config.diagnose.strengths == (0.125, 0.25, 0.5, 0.75, 1.0)
    assert config.diagnose.swap_unconditional is True
    assert [arm.lr for arm in arms] == [5e-4]


def test_training_seeds_follow_how_far_runs_differ(tmp_path: Path) -> None:
    def runs(*kept: float) -> list[ArmSignals]:
        return [
            replace(
                healthy_arm(),
                arm=an_arm(f"r16-s{n}", rank=16, lr=2e-4, seed=n),
                points=(a_point(1.0, k, 0.3),),
            )
            for n, k in enumerate(kept)
        ]

    close = proposal_of(*runs(0.97, 0.975))
    _, arms = loaded(close, tmp_path)
    assert [(arm.rank, arm.lr) for arm in arms] == [(16, 2e-4), (16, 1e-4)]
    assert any("runs of one setting differ by 0.4 %" in reason for reason in close.reasons)
    apart = loaded(proposal_of(*runs(0.99, 0.8)), tmp_path)[0]
    assert len({arm.seed for arm in apart.expand_arms()}) == 5
    last = replace(healthy_arm(), arm=an_arm(rank=16, lr=2e-4, seed=2**63 - 1))
    assert {arm.seed for arm in loaded(proposal_of(last), tmp_path)[0].expand_arms()} == {0, 1, 2}


def test_many_settings_are_cut_and_that_is_said(tmp_path: Path) -> None:
    arms = [replace(short_arm(), arm=an_arm(f"r{rank}", rank=rank, alpha=16.0)) for rank in range(1, 16)]
    proposal = proposal_of(*arms)
    assert len(loaded(proposal, tmp_path)[1]) == 12
    assert sum(reason.startswith("Left out") for reason in proposal.reasons) == 3


def test_without_diagnoses_the_arms_stay(tmp_path: Path) -> None:
    proposal = proposal_of()
    assert [arm.rank for arm in loaded(proposal, tmp_path)[1]] == [16, 64]
    assert tomllib.loads(proposal.toml)["name"] == "pocket-next"
