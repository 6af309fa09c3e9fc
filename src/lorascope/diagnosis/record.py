"""`diagnosis.json`: what was found of every arm, what is kept, and by which thresholds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from lorascope import __version__
from lorascope.arms import Arm, Init, Kind, MaskWhen, Scaling
from lorascope.diagnosis.causes import DEFAULT_THRESHOLDS, Confidence, Diagnosis
from lorascope.diagnosis.layers import LayerFigures
from lorascope.diagnosis.remedies import Change, Remedy
from lorascope.diagnosis.signals import ArmSignals, GuidanceSignal, PointSignals, Signal
from lorascope.diagnosis.thresholds import THRESHOLD_SHAPE, Threshold, Thresholds
from lorascope.diagnosis.words import CAUSES
from lorascope.errors import StorageError
from lorascope.evaluation.sweep_rows import Epoch
from lorascope.run_folder import RunDir
from lorascope.shapes import Each, Maybe, Number, Text, find_fault
from lorascope.store import digest_json, read_json, write_json

_FORMAT = 1  # grows where an earlier reader would misread a file; new keys alone do not count
_SIGNAL: Any = {
    "name": str,
    "value": Maybe(Number),
    "low": Maybe(Number),
    "high": Maybe(Number),
    "control": Maybe(Number),
    "unit": str,
    "note": Text,
    "count": int,
    "std": Maybe(Number),
}
_POINT: Any = {
    "epoch": str,
    "strength": Number,
    "retention": _SIGNAL,
    "style": _SIGNAL,
    "discrepancy": _SIGNAL,
}
_LAYER: Any = {
    "layer": str,
    "rank": int,
    "norm_ratio": Maybe(Number),
    "spectral_ratio": Maybe(Number),
    "stable_rank": Number,
    "rank_95": int,
    "num_directions": int,
    "num_intruders": int,
}
_KEYS = tuple(ArmSignals(Arm(name="", rank=1, alpha=1.0, lr=1.0, seed=0)).by_key())
_ARM: Any = {
    "cause": str,
    "contributing": [str],
    "confidence": str,
    "evidence_for": [str],
    "evidence_against": [str],
    "remedy": {
        "strength": Maybe(Number),
        "epoch": Text,
        "reason": str,
        "changes": [{"key": str, "value": Maybe(Number | str), "reason": str}],
        "prompts": Maybe(int),
    },
    "settings": {
        "name": str,
        "rank": int,
        "alpha": Number,
        "lr": Number,
        "seed": int,
        "batch_size": int,
        "epochs": int,
        "kind?": str,
        "min_rank?": Maybe(int),
        "mask_exponent?": Number,
        "mask_when?": str,
        "scaling?": str,
        "init?": str,
        "layers?": [str],
        "lr_ratio?": Number,
        "rank_dropout?": Number,
        "max_weight_norm?": Maybe(Number),
        "match_gain?": Text,
    },
    "best_epoch": Maybe(int),
    "num_train": Maybe(int),
    "caption_dropout": Maybe(Number),
    "points": [_POINT],
    "chosen?": Maybe({"epoch": str, "strength": Number}),
    "guidances": [{"guidance": Number, "retention": _SIGNAL}],
    "layers?": [_LAYER],
    "signals": {f"{key}?": _SIGNAL for key in _KEYS},
}
_SHAPE: Any = {
    "format": int,
    "keep": Maybe(
        {
            "arm": str,
            "epoch": str,
            "strength": Number,
            "style": Maybe(Number),
            "retention": Maybe(Number),
        }
    ),
    "arms": Each(_ARM),
    "thresholds": {f"{item.name}?": THRESHOLD_SHAPE for item in fields(Thresholds)},
    "versions": Each(str),
    "digest": str,
}


@dataclass(frozen=True)
class Keep:
    """What is kept: an arm's adapter of one epoch at one strength, with its style and retention."""

    arm: str
    epoch: Epoch
    strength: float
    style: float | None = None
    retention: float | None = None


@dataclass(frozen=True)
class Record:
    """All that `diagnosis.json` holds. `keep` is None where no arm is; diagnoses are by the arms' names."""

    keep: Keep | None
    arms: Mapping[str, Diagnosis]
    thresholds: Thresholds
    versions: Mapping[str, str]


def write_diagnosis(
    run: RunDir,
    diagnoses: Mapping[str, Diagnosis],
    keep: Keep | None = None,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Write `diagnosis.json` with a digest of what it holds; equal diagnoses give equal bytes."""
    values: dict[str, Any] = {
        "format": _FORMAT,
        "keep": None if keep is None else asdict(keep),
        "arms": {name: _as_json(found) for name, found in diagnoses.items()},
        "thresholds": {key: asdict(item) for key, item in thresholds.as_table().items()},
        "versions": dict(versions or {"lorascope": __version__}),
    }
    write_json(run.diagnosis_json, {**values, "digest": digest_json(values)})


def _as_json(found: Diagnosis) -> dict[str, Any]:
    signals = found.signals
    return {
        "cause": found.cause,
        "contributing": list(found.contributing),
        "confidence": found.confidence,
        "evidence_for": list(found.evidence_for),
        "evidence_against": list(found.evidence_against),
        "remedy": asdict(found.remedy),
        "settings": signals.arm.model_dump(mode="json"),
        "best_epoch": signals.best_epoch,
        "num_train": signals.num_train,
        "caption_dropout": signals.caption_dropout,
        "points": [asdict(point) for point in signals.points],
        "chosen": signals.chosen and dict(zip(("epoch", "strength"), signals.chosen, strict=True)),
        "guidances": [asdict(item) for item in signals.guidances],
        "layers": [asdict(layer) for layer in signals.layers],
        "signals": {key: asdict(signal) for key, signal in signals.by_key().items()},
    }


def read_diagnosis(run: RunDir) -> Record:
    """Read `diagnosis.json`; raise `StorageError` if it is missing, damaged, or of a later format."""
    path = run.diagnosis_json
    if not path.exists():
        raise StorageError(f"{path}: not there: run `lorascope diagnose {run.path}` first")
    values = read_json(path)
    if isinstance(values, dict) and isinstance(values.get("format"), int) and values["format"] > _FORMAT:
        raise StorageError(
            f"{path}: is of format {values['format']}, this version reads up to {_FORMAT}: update lorascope"
        )
    if reason := find_fault(values, _SHAPE) or _fault(values):
        raise StorageError(f"{path}: damaged ({reason}): delete it and diagnose this run again")
    keep = values["keep"]
    thresholds = {
        item.name: Threshold(**_known(Threshold, values["thresholds"][item.name]))
        for item in fields(Thresholds)
        if item.name in values["thresholds"]
    }
    return Record(
        None if keep is None else Keep(**_known(Keep, keep)),
        {name: _diagnosis(found) for name, found in values["arms"].items()},
        Thresholds(**thresholds),
        values["versions"],
    )


def _fault(values: Mapping[str, Any]) -> str | None:
    """What is wrong with a file of the right shape."""
    if values["digest"] != digest_json({key: item for key, item in values.items() if key != "digest"}):
        return "its content is not what was written, by its digest"
    arms = values["arms"].values()
    words = [
        *((word, CAUSES) for found in arms for word in (found["cause"], *found["contributing"])),
        *((found["confidence"], get_args(Confidence)) for found in arms),
        *((found["settings"].get("scaling", "alpha/r"), get_args(Scaling)) for found in arms),
        *((found["settings"].get("init", "kaiming"), get_args(Init)) for found in arms),
        *((found["settings"].get("kind", "lora"), get_args(Kind)) for found in arms),
        *((found["settings"].get("mask_when", "always"), get_args(MaskWhen)) for found in arms),
        *((point["epoch"], get_args(Epoch)) for found in arms for point in found["points"]),
        *((found["chosen"]["epoch"], get_args(Epoch)) for found in arms if found.get("chosen")),
    ]
    return next(
        (f"{word[:80]!r} is not one of {', '.join(known)}" for word, known in words if word not in known),
        None,
    )


def _diagnosis(found: Mapping[str, Any]) -> Diagnosis:
    remedy = found["remedy"]
    changes = tuple(Change(**_known(Change, change)) for change in remedy["changes"])
    points = tuple(
        PointSignals(
            point["epoch"],
            float(point["strength"]),
            *(_signal(point[key]) for key in ("retention", "style", "discrepancy")),
        )
        for point in found["points"]
    )
    guidances = tuple(
        GuidanceSignal(float(item["guidance"]), _signal(item["retention"])) for item in found["guidances"]
    )
    chosen = found.get("chosen")
    signals = ArmSignals(
        arm=Arm(**{key: value for key, value in found["settings"].items() if key in Arm.model_fields}),
        best_epoch=found["best_epoch"],
        num_train=found["num_train"],
        caption_dropout=found["caption_dropout"],
        points=points,
        chosen=(chosen["epoch"], float(chosen["strength"])) if chosen else None,
        guidances=guidances,
        layers=tuple(LayerFigures(**_known(LayerFigures, layer)) for layer in found.get("layers", ())),
        **{key: _signal(found["signals"][key]) for key in _KEYS if key in found["signals"]},
    )
    return Diagnosis(
        cause=found["cause"],
        contributing=tuple(found["contributing"]),
        confidence=found["confidence"],
        signals=signals,
        evidence_for=tuple(found["evidence_for"]),
        evidence_against=tuple(found["evidence_against"]),
        remedy=Remedy(**{**_known(Remedy, remedy), "changes": changes}),
    )


def _signal(values: Mapping[str, Any]) -> Signal:
    return Signal(**_known(Signal, values))


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields; what a later version added is left out."""
    return {item.name: values[item.name] for item in fields(kind) if item.name in values}
