"""The diagnose stage: draws and measures a finished training, and finds why each arm wins or fails."""

from collections.abc import Mapping
from typing import Any

from lorascope.console import track
from lorascope.diagnosis.causes import DEFAULT_THRESHOLDS, Diagnosis, decide_all
from lorascope.diagnosis.finished import Finished
from lorascope.diagnosis.measuring import at_full_strength, compare_arms, measure_arms, measure_likeness
from lorascope.diagnosis.nearest import keep_nearest
from lorascope.diagnosis.record import Keep, write_diagnosis
from lorascope.diagnosis.signals import trace_fronts
from lorascope.diagnosis.strengths import draw, score
from lorascope.evaluation.choice import Choice, choose_by_arm, choose_point


def diagnose(
    finished: Finished, encoder: Any, versions: Mapping[str, str], style_encoder: Any = None
) -> dict[str, Diagnosis]:
    """Why each arm wins or fails, by name; writes `sweep/`, `sweep.parquet`, `copying/`,
    `copying.json` and `diagnosis.json`.

    `encoder` is a `features.ClipEncoder`; style is measured in its features, or in those of `style_encoder`,
    a `features.StyleEncoder`, where there is one. `versions` go into the record. Pictures of the sweep that
    are there already are not drawn again. Raises as drawing, scoring and reading the run folder do.
    """
    with track("diagnose", sum(part.num_pictures for part in finished.parts), "pictures") as task:
        draw(finished, task.advance)
    sweep = score(finished, encoder, style_encoder)
    price = finished.config.verdict.max_prompt_loss
    thresholds = DEFAULT_THRESHOLDS.with_values({"prompt_loss": price}, DEFAULT_THRESHOLDS.prompt_loss.source)
    settings = {arm.name: arm.but_seed for arm in finished.arms}
    fronts = trace_fronts(sweep, finished.config.score.resamples, settings)
    resamples = finished.config.score.resamples
    choice = choose_point(fronts.own, price, settings, resamples)
    chosen = choose_by_arm(fronts.own, choice, price, settings, resamples)
    compared = compare_arms(finished, sweep)
    alike = measure_likeness(finished, sweep, encoder)
    found = decide_all(measure_arms(finished, sweep, fronts, chosen, compared, alike), thresholds)
    drawings = {arm: at_full_strength(sweep, arm) for arm in compared}
    keep_nearest(finished.run, drawings, compared, finished.train_pictures, finished.heldout_pictures)
    write_diagnosis(finished.run, found, _keep(choice), thresholds, versions)
    return found


def _keep(choice: Choice) -> Keep | None:
    """What the study's rule keeps."""
    point = choice.point
    if point is None:
        return None
    return Keep(point.arm, point.epoch, point.strength, point.style.value, point.retention.value)
