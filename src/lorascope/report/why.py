"""Why each arm wins or fails, as the report tells it: a row an arm, with what decided and what to do."""

from collections.abc import Iterator
from dataclasses import dataclass

from lorascope.diagnosis.causes import Diagnosis
from lorascope.diagnosis.interventions import tell_interventions
from lorascope.diagnosis.remedies import UNUSABLE, Change
from lorascope.diagnosis.words import WORDS, Cause
from lorascope.evaluation.choice import NO_SWEEP
from lorascope.evaluation.scores import ALL
from lorascope.evaluation.sentences import EPOCHS
from lorascope.evaluation.sweep_rows import Epoch
from lorascope.report.conditions import SIGNS
from lorascope.report.evidence import MAX_DETAILED, NOT_MEASURED, Facts

_NUM_SIGNALS = 2  # sentences of evidence in a row; `lorascope diagnose RUN` prints all
# From the worst to the best, for the arm of many that is shown beside the kept one and the runner-up.
_WORST_FIRST: tuple[Cause, ...] = (
    "numerical",
    "diverged",
    "file_fault",
    "overfit",
    "unconditional_drift",
    "too_strong",
    "not_learned",
    "cannot_tell",
    "healthy",
)


@dataclass(frozen=True)
class Why:
    """One arm: its cause in words, the signals that decided, what speaks against it, and the remedy.

    `state` is yes, caution, no or not measured, as of a condition. `tried` says what interventions on the
    trained adapter change, `now` how to use the arm, `changes`
    what the next study should change.
    """

    arm: str
    role: str
    state: str
    cause: str
    confidence: str
    contributing: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()
    now: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def css(self) -> str:
        """The state as the page's style sheet names it."""
        return self.state.replace(" ", "-")

    @property
    def sign(self) -> str:
        """The state as a character, so that it is not told by colour alone."""
        return SIGNS[self.state]

    @property
    def evidence_name(self) -> str:
        """What the evidence is called: it stands for a cause, or says what is open."""
        return "What is open" if self.state == NOT_MEASURED else "For it"

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """What the next study should change: each as a line of a study file, empty where there is none, and
        why.
        """
        return tuple(
            ("" if change.value is None else f"{change.key} = {_value(change.value)}", change.reason)
            for change in self.changes
        )


def explain_arms(facts: Facts) -> list[Why]:
    """A row for every arm of the study; none where the run was not diagnosed."""
    if facts.diagnosis is None:
        return []
    found = facts.diagnosis.arms
    return [
        _explain(facts, arm, found[arm])
        if arm in found
        else Why(arm, facts.role(arm), NOT_MEASURED, NO_SWEEP, "")
        for arm in facts.settings
    ]


def arms_in_focus(facts: Facts) -> tuple[str, ...]:
    """All arms of a few; of many the kept one, the runner-up and the one with the worst cause."""
    if len(facts.arms) <= MAX_DETAILED:
        return facts.arms
    keep = facts.verdict.keep if facts.verdict else None
    picked = [arm for arm in (keep, facts.runner_up, _worst(facts)) if arm is not None]
    return tuple(dict.fromkeys(picked)) or facts.detailed


def _worst(facts: Facts) -> str | None:
    """The finished arm with the worst cause, of several the one that keeps the least of the prompts."""
    found = facts.diagnosis.arms if facts.diagnosis else {}
    diagnosed = [arm for arm in facts.arms if arm in found]
    if not diagnosed:
        return next((arm for arm in reversed(facts.ranked) if (arm, ALL) in facts.summary), None)

    def badness(arm: str) -> tuple[int, float]:
        kept = found[arm].signals.full.retention.value
        return _WORST_FIRST.index(found[arm].cause), 1.0 if kept is None else kept

    return min(diagnosed, key=badness)


def _explain(facts: Facts, arm: str, found: Diagnosis) -> Why:
    remedy = found.remedy
    return Why(
        arm=arm,
        role=facts.role(arm),
        state=_state(found),
        cause=WORDS[found.cause],
        confidence=found.confidence,
        contributing=tuple(WORDS[cause] for cause in found.contributing),
        evidence=found.evidence_for[:_NUM_SIGNALS],
        against=found.evidence_against,
        tried=tuple(tell_interventions(found.signals)),
        now=tuple(_say_now(facts, arm, found)),
        changes=remedy.changes,
    )


def _say_now(facts: Facts, arm: str, found: Diagnosis) -> Iterator[str]:
    """How to use the arm now: the kept one as the verdict has it, whichever version diagnosed it."""
    remedy, evidence = found.remedy, " ".join(found.evidence_for[:_NUM_SIGNALS])
    use = None if remedy.strength is None else _use(remedy.strength, remedy.epoch or "last")
    point = facts.verdict.point if facts.verdict else None
    if point is not None and point.arm == arm and found.cause not in UNUSABLE:
        kept = _use(point.strength, point.epoch)
        yield f"Use it at {kept}, as the verdict does."
        is_told = kept == use
    else:
        is_told = True
        if use is not None:
            yield f"Use it at {use}."
    numbers = remedy.reason.partition(": ")[2].rstrip(".")
    if remedy.reason and is_told and not (numbers and numbers in evidence):
        yield remedy.reason
    if remedy.prompts is not None and f"About {remedy.prompts:,} prompts" not in evidence:
        yield f"At least {remedy.prompts:,} prompts would decide what is open."


def _use(strength: float, epoch: Epoch) -> str:
    return f"strength {strength:g}, {EPOCHS[epoch]}"


def _state(found: Diagnosis) -> str:
    """A fault that a strength gets around calls for caution; one without a way is a no."""
    if found.cause in ("healthy", "cannot_tell"):
        return "yes" if found.cause == "healthy" else NOT_MEASURED
    return "no" if found.remedy.strength is None else "caution"


def _value(value: float | int | str) -> str:
    """A value as a study file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}"
