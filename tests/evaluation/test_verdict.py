"""Which arm is kept at which strength, and the sentences that say why."""

import json
import math
from typing import Any

import pytest

from lorascope.evaluation.choice import NO_SWEEP, rule_text
from lorascope.evaluation.contrast import GainContrast
from lorascope.evaluation.front import trace_front
from lorascope.evaluation.score_text import scores_as_dict, scores_as_markdown, verdict_as_dict
from lorascope.evaluation.scores import BASE, Scores, paired_differences
from lorascope.evaluation.sweep_rows import Discrepancy, StyleFacts, Sweep
from lorascope.evaluation.verdict import Verdict, reach_verdict, read_heldout_losses
from synthetic_scores import SCORER, probe, shifted
from synthetic_sweeps import make_sweep, simple_sweep

GOOD = {
    ("r16", 0.5): (0.95, 0.3),
    ("r16", 1.0): (0.7, 0.6),
    ("r64", 0.5): (0.97, 0.2),
    ("r64", 1.0): (0.6, 0.5),
}
SCORES = shifted(r16=-3, r64=-6)


def judge(points: Any = None, scores: Scores | None = SCORES, **values: Any) -> Verdict:
    names = ("probes", "failed", "study", "max_prompt_loss", "settings")
    sweep = simple_sweep(points or GOOD, **{k: v for k, v in values.items() if k not in names})
    return reach_verdict(scores, trace_front(sweep), **{k: v for k, v in values.items() if k in names})


def judge_sweep(sweep: Sweep) -> Verdict:
    return reach_verdict(SCORES, trace_front(sweep))


def test_why_an_arm_fails_stands_in_the_summary() -> None:
    contrast = GainContrast(
        ("r64",), ("r64-gain-r16",), ("r16",), "strength", "At strength 1 r64 keeps little."
    )
    front = trace_front(simple_sweep({("r16", 0.5): (0.97, 0.4), ("r64", 0.5): (0.95, 0.3)}))
    for verdict in (
        reach_verdict(SCORES, front, contrast=contrast),
        reach_verdict(SCORES, None, contrast=contrast),
    ):
        assert contrast.sentence in verdict.sentences and not any(
            sentence.startswith("Runner-up") for sentence in verdict.sentences
        )


def test_the_answer_is_an_arm_an_epoch_and_a_strength() -> None:
    verdict = judge(study="paper")
    assert (verdict.decision, verdict.headline) == ("keep", "Keep r16 at strength 0.5, last epoch")
    assert (verdict.keep, verdict.epoch, verdict.strength) == ("r16", "last", 0.5)
    assert verdict.tag == "<lora:paper-r16:0.5>"
    assert verdict.is_shown and verdict.point is not None
    assert (verdict.retention, verdict.style) == (verdict.point.retention, verdict.point.style)
    assert verdict.runner_up is not None and verdict.runner_up.arm == "r64"
    assert (verdict.num_prompts, verdict.num_seeds, verdict.num_training_seeds) == (24, 1, 1)
    assert verdict.rule == rule_text(0.1) and verdict.max_prompt_loss == 0.1
    assert verdict.sentences == (
        "r16 at strength 0.5 keeps 95 % of the base's prompt fidelity and lies 0.30 nearer to the style "
        "than the "
        "base (95 % intervals 93 to 97 % and +0.28 to +0.32; 24 prompts, 1 training run).",
        "In a prompt: <lora:paper-r16:0.5>.",
        "Runner-up: r64 at strength 0.5 keeps 97 % of the base's prompt fidelity and lies 0.20 nearer "
        "to the style "
        "than the base (95 % intervals 94 to 100 % and +0.18 to +0.22; 24 prompts, 1 training run).",
    )
    assert verdict.against_base == paired_differences(SCORES, "r16")
    assert verdict.reasons[-1].startswith("At full strength r16 scores 3.0 below base (95 % interval ")
    assert verdict.undecided == ("One training run per rank cannot separate rank from luck.",)


def test_the_file_of_an_earlier_epoch_has_its_own_name() -> None:
    verdict = judge({("r16", 0.75): (0.95, 0.3)}, epochs={("r16", 0.75): "best"})
    assert verdict.headline == "Keep r16 at strength 0.75, the epoch of its lowest held-out loss"
    assert (verdict.epoch, verdict.tag) == ("best", "<lora:study-r16-best:0.75>")


def test_a_tie_is_said_with_what_decided_it() -> None:
    verdict = judge({("r16", 0.5): (0.95, 0.2), ("r64", 0.5): (0.97, 0.201)})
    assert (verdict.keep, verdict.runner_up and verdict.runner_up.arm) == ("r16", "r64")
    assert verdict.reasons[1].startswith(
        "r64 at strength 0.5 has the most style, but no difference to it is shown (difference +0.00, 95 "
        "% interval -"
    )
    assert verdict.reasons[1].endswith("So the lower rank is kept: its file is smaller.")
    assert verdict.undecided[0].startswith(
        "No difference in style shown between r16 at strength 0.5 and r64 at strength 0.5; under 0.0"
    )
    epochs = {("r16", 0.75): "best"}
    points = {("r16", 0.5): (0.95, 0.2), ("r16", 0.75): (0.97, 0.201)}
    assert judge(points, None, epochs=epochs).reasons[1].endswith("So the last epoch is kept.")
    kept = judge({("r16", 0.5): (0.95, 0.2), ("r16", 0.75): (0.92, 0.201)}, None)
    assert kept.reasons[1].endswith("So the one that keeps more of the prompts is kept.")
    several = judge({("r16", 0.5): (0.95, 0.2), ("r64", 0.5): (0.95, 0.2), ("r64", 0.75): (0.92, 0.2)})
    assert "r64 at strength 0.5 and 1 more point; under" in several.undecided[0]


def test_a_wide_interval_leaves_the_price_open_with_the_number_that_would_decide() -> None:
    verdict = judge({("r16", 0.5): (0.92, 0.3)}, clip_std=2.0)
    assert verdict.keep == "r16" and not verdict.is_shown
    assert verdict.undecided[0].startswith(
        "Whether r16 at strength 0.5 costs at most 10 % of the base's prompt fidelity: the interval of "
        "what it "
        "keeps reaches down to 8"
    )
    assert verdict.undecided[0].endswith(" prompts would decide it.")
    assert verdict.sentences[2] == verdict.undecided[0]  # there is no runner-up


def test_the_base_is_kept_where_nothing_gains_style_at_the_price() -> None:
    verdict = judge({("r16", 0.25): (0.99, 0.0), ("r16", 1.0): (0.7, 0.6), ("r64", 1.0): (0.99, -0.1)})
    assert (verdict.decision, verdict.headline, verdict.keep) == ("keep_base", "Keep the base", None)
    assert (verdict.tag, verdict.strength, verdict.style, verdict.against_base) == (None, None, None, None)
    assert not verdict.is_shown
    assert verdict.reasons[0] == (
        "r16 costs too much where it gains style: at the least, r16 at strength 1 keeps 70 % of the "
        "base's prompt "
        "fidelity."
    )
    assert verdict.reasons[1].startswith(
        "r64 was not shown to gain style at any strength: r64 at strength 1 keeps 99 % of the base's "
        "prompt fidelity "
        "and lies 0.10 further from the style than the base"
    )
    assert verdict.reasons[2] == verdict.sentences[0]
    assert verdict.sentences[0] == (
        "No arm was shown to gain style at a cost of at most 10 % of the base's prompt fidelity, at any "
        "strength "
        "that was drawn: keep the base."
    )
    assert verdict.sentences[1].startswith("At full strength r16 scores 3.0 below base")
    assert verdict.undecided[0].startswith("Whether r16 at strength 0.25 gains style: under 0.0")


def test_what_might_count_with_more_prompts_is_open() -> None:
    unclear = judge({("r16", 0.5): (0.99, 0.02)}, style_std=0.1)
    assert unclear.decision == "keep_base"
    assert unclear.undecided[0].startswith(
        "Whether r16 at strength 0.5 gains style: under 0.05 could not have been"
    )
    assert unclear.undecided[0].endswith("About 140 prompts would decide it.")
    wild = judge({("r16", 0.5): (0.99, 0.1)}, base_style_std=1.0)
    assert wild.undecided[0].startswith(
        "Whether r16 at strength 0.5 gains style: it lies +0.10 from the base, whose own drawings vary by 0."
    )
    assert wild.undecided[0].endswith(" times as many prompts that could be told.")
    near = judge({("r16", 0.5): (0.89, 0.3)}, clip_std=2.0)
    assert near.decision == "keep_base"
    assert near.undecided[0].startswith(
        "Whether r16 at strength 0.5 costs more than 10 %: the interval of what it"
    )


def test_many_arms_that_do_not_count_are_summed_up() -> None:
    verdict = judge({("r2", 0.5): (0.95, 0.3), **{(f"r{n}", 1.0): (0.5, 0.3) for n in range(4, 13)}})
    assert sum("costs too much where" in reason for reason in verdict.reasons) == 6
    assert "No point of 3 more arms counts." in verdict.reasons


def test_without_a_sweep_nothing_can_be_told() -> None:
    verdict = reach_verdict(SCORES, None, [probe("r16", -0.01)])
    assert (verdict.decision, verdict.headline) == ("cannot_tell", "Cannot tell which arm to keep")
    assert (verdict.keep, verdict.num_prompts, verdict.num_training_seeds) == (None, 0, 1)
    assert verdict.sentences[0] == "Not measured: run `lorascope diagnose RUN`."
    assert verdict.sentences[1].startswith("At full strength r16 scores 3.0 below base")
    assert verdict.undecided[0] == f"Which arm to keep: {NO_SWEEP}."
    assert verdict.reasons[1].startswith(
        "r16: its held-out loss is 0.01 below the base's (95 % interval -0.012 to"
    )
    assert reach_verdict(None, None).sentences == ("Not measured: run `lorascope diagnose RUN`.",)


def test_where_style_was_not_measured_nothing_can_be_told() -> None:
    sweep = simple_sweep(GOOD, style=StyleFacts(reason="no real pictures"))
    verdict = judge_sweep(sweep)
    assert (verdict.decision, verdict.sentences[0]) == ("cannot_tell", "No real pictures.")


def test_held_out_loss_is_told_as_a_fact() -> None:
    probes = [probe("r16", -0.01), probe("r64", 0.001), probe("r4", math.nan)]
    reasons = judge(probes=probes).reasons
    assert (
        "r16: its held-out loss is 0.01 below the base's (95 % interval -0.012 to -0.008; 32 pictures, "
        "1 training "
        "run)."
    ) in reasons
    assert any(
        "0.001 above the base's (no difference shown; 95 % interval -0.001 to" in text for text in reasons
    )
    assert "r4 failed: it has no pictures, so it was not compared." in reasons
    broken = judge(probes=[probe("r16", math.nan)]).reasons
    assert "r16: its held-out loss is not finite." in broken


def test_arms_that_could_not_be_compared_are_named() -> None:
    verdict = judge(failed=["r32"], scores=shifted(r16=-3, r64=-6, r128=-1))
    assert "r32 failed: it has no pictures, so it was not compared." in verdict.reasons
    assert "r128 was not drawn at several strengths, so it was not compared." in verdict.reasons
    unscored = judge(scores=Scores.from_rows([], SCORER))
    assert "No arm has pictures of the score stage: there is nothing to compare." in unscored.reasons
    baseless = Scores.from_rows([row for row in SCORES.rows if row.arm != BASE], SCORER)
    said = "The base has no pictures: the difference to it at full strength was not measured."
    assert said in judge(scores=baseless).reasons
    assert judge(scores=None).keep == "r16" and judge(scores=None).against_base is None


def test_a_second_measure_that_speaks_against_the_point_is_told() -> None:
    sweep = simple_sweep(GOOD)
    told = "A second measure speaks against it: the squared MMD of its pictures to real ones is 70, the "
    for value, is_told in ((70.0, True), (50.0, False)):
        found = {
            "r16/last-s0.50-g7.5": Discrepancy(value, 0.0),
            "base/last-s0.00-g7.5": Discrepancy(60.0, 0.0),
        }
        verdict = judge_sweep(make_sweep(sweep.rows, discrepancies=found))
        assert any(reason.startswith(told) for reason in verdict.reasons) == is_told


def test_training_seeds_of_a_setting_are_pooled_and_counted() -> None:
    seeds = {("r16", 0.5): (0.97, 0.3), ("r16-s1", 0.5): (0.8, 0.3)}
    verdict = judge(seeds, scores=None)
    assert verdict.keep == "r16" and verdict.num_training_seeds == 2
    assert any(
        text.startswith("Over 2 training runs, r16 and r16-s1 at strength 0.5") for text in verdict.reasons
    )
    assert not any("luck" in text for text in verdict.undecided)
    assert verdict.undecided[-1].startswith(
        "Whether another training run of this setting costs at most 10 %: over 2 runs the interval "
        "reaches down to "
    )
    assert "training runs would decide it" in verdict.undecided[-1]
    apart = judge(seeds, scores=None, settings={"r16": "a", "r16-s1": "b"})
    assert apart.undecided[-1] == "One training run per setting cannot separate setting from luck."
    alone = judge({("r16", 0.5): (0.97, 0.3)}, scores=None)
    assert alone.undecided == (
        "One training run cannot say how another seed of the same setting would score.",
    )


@pytest.mark.parametrize("points", [None, {("r16", 1.0): (0.7, 0.6)}, {("r16", 0.5): (0.99, 0.01)}])
def test_no_sentence_says_significant_or_best(points: Any) -> None:
    verdict = judge(points, epochs={("r16", 0.5): "best"})
    text = scores_as_markdown(SCORES, verdict) + verdict.rule + " ".join(verdict.sentences)
    assert "significant" not in text.lower() and " best" not in text.lower()


def test_a_verdict_is_json() -> None:
    for verdict in (judge(), reach_verdict(SCORES, None), judge({("r16", 1.0): (0.7, 0.6)}, num_prompts=2)):
        json.dumps(scores_as_dict(SCORES, verdict), allow_nan=False)
    values = verdict_as_dict(judge())
    assert (values["keep"], values["strength"], values["epoch"]) == ("r16", 0.5, "last")
    assert values["retention"]["value"] == pytest.approx(0.95)
    assert (values["runner_up"]["arm"], values["runner_up"]["strength"]) == ("r64", 0.5)
    assert "per_prompt" not in values["point"] and values["point"]["sentence"] == values["sentences"][0]


def test_held_out_loss_is_read_from_the_last_held_out_record_of_all_bands() -> None:
    records = [
        probe("r4", -0.5, epoch=2),
        probe("r4", 0.3, epoch=3),
        probe("r4", -0.1, epoch=1),
        probe("r4", -9, epoch=9, band="0-250"),
        probe("r4", -9, epoch=9, split="train"),
        probe("r4", -9, epoch=9, conditional=False),
        probe("base", 0, epoch=0),
        {"kind": "train", "arm": "r8", "step": 1},
    ]
    losses = read_heldout_losses(records)
    assert list(losses) == ["r4"]
    assert losses["r4"].difference == 0.3
    assert math.isnan(read_heldout_losses([probe("r4", -0.01, difference_high=None)])["r4"].high)
