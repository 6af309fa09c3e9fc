"""`diagnosis.json` comes back as it was written, and damage is one line."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lorascope.diagnosis.causes import decide_all
from lorascope.diagnosis.layers import LayerFigures
from lorascope.diagnosis.record import Keep, read_diagnosis, write_diagnosis
from lorascope.diagnosis.signals import ArmSignals, GuidanceSignal, make_signal
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.errors import StorageError
from lorascope.run_folder import RunDir
from lorascope.store import digest_json
from synthetic_signals import an_arm, default_arm, diverged_arm, healthy_arm, overfit_arm

KEEP = Keep("r16", "last", 1.0, 0.3, 0.97)
LAYERS = (
    LayerFigures("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 64, 0.2, 0.3, 4.5, 12, 10, 1),
    LayerFigures("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k", 64, None, None, 0.0, 0, 0, 0),
)
LEARNED = Thresholds().with_values({"train_gap": 0.03}, "planted faults")


def some_diagnoses() -> Any:
    guided = healthy_arm(guidances=(GuidanceSignal(3.0, make_signal("retention", 0.8)),))
    unknown = ArmSignals(an_arm("unknown"))
    default = replace(default_arm(), layers=LAYERS)
    return decide_all([guided, default, diverged_arm(), overfit_arm(), unknown], LEARNED)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    write_diagnosis(run, some_diagnoses(), KEEP, LEARNED, {"lorascope": "0.1.0", "torch": "2.7"})
    return run


def test_what_was_written_comes_back(run: RunDir) -> None:
    record = read_diagnosis(run)
    assert record.arms == some_diagnoses()
    assert (record.keep, record.thresholds) == (KEEP, LEARNED)
    assert record.versions == {"lorascope": "0.1.0", "torch": "2.7"}
    before = run.diagnosis_json.read_bytes()
    write_diagnosis(run, record.arms, record.keep, record.thresholds, record.versions)
    assert run.diagnosis_json.read_bytes() == before


def test_the_documented_keys_are_there(run: RunDir) -> None:
    values = json.loads(run.diagnosis_json.read_text())
    assert list(values) == ["format", "keep", "arms", "thresholds", "versions", "digest"]
    assert values["keep"] == {
        "arm": "r16",
        "epoch": "last",
        "strength": 1.0,
        "style": 0.3,
        "retention": 0.97,
    }
    text = " ".join((Path(__file__).parents[2] / "ARCHITECTURE.md").read_text(encoding="utf-8").split())
    described = text.split("`diagnosis.json`: `")[1].split("`scores.parquet` columns")[0]
    arm = values["arms"]["r64"]
    assert arm["layers"] == [asdict(layer) for layer in LAYERS]
    for key in (
        *values,
        *values["keep"],
        *arm,
        *arm["remedy"],
        *arm["points"][0],
        *arm["layers"][0],
        *arm["signals"],
        *arm["signals"]["heldout"],
    ):
        assert f"{key}`" in described, key


def test_nothing_kept_and_nothing_diagnosed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_diagnosis(run, {})
    record = read_diagnosis(run)
    assert (record.keep, record.arms, record.thresholds) == (None, {}, Thresholds())
    assert list(record.versions) == ["lorascope"]


def change(run: RunDir, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a file so that its digest fits again."""
    values = json.loads(run.diagnosis_json.read_text())
    edit(values)
    values.pop("digest")
    run.diagnosis_json.write_text(json.dumps({**values, "digest": digest_json(values)}))


def test_what_other_versions_left_out_or_added(run: RunDir) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["news"] = values["arms"]["r64"]["news"] = values["keep"]["news"] = 1
        values["arms"]["r64"]["signals"]["news"] = {}
        values["arms"]["r64"]["remedy"]["news"] = 1
        del values["arms"]["r64"]["signals"]["heldout"], values["arms"]["r64"]["layers"]
        del values["thresholds"]["black"]

    change(run, edit)
    record = read_diagnosis(run)
    assert record.arms["r64"].signals.heldout.note == "not measured"
    assert (record.thresholds, record.arms["r64"].signals.layers) == (LEARNED, ())


def set_cause(values: dict[str, Any]) -> None:
    values["arms"]["r64"]["cause"] = "gremlins"


def set_epoch(values: dict[str, Any]) -> None:
    values["arms"]["r64"]["points"][0]["epoch"] = "first"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_cause, "'gremlins' is not one of healthy, numerical"),
        (set_epoch, "'first' is not one of last, best"),
        (lambda values: values.pop("arms"), "no `arms`"),
        (lambda values: values["arms"]["r64"]["signals"]["rise"].update(value="high"), "`arms.r64.signals"),
        (lambda values: values.update(format=2), "of format 2, this version reads up to 1: update lorascope"),
    ],
)
def test_a_wrong_file_is_one_line(run: RunDir, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    change(run, edit)
    with pytest.raises(StorageError, match=message) as error:
        read_diagnosis(run)
    assert "\n" not in str(error.value)


def test_a_damaged_or_missing_file_is_one_line(run: RunDir) -> None:
    text = run.diagnosis_json.read_text()
    for damaged in (text.replace("0.97", "0.98", 1), text[:-20], "[]", ""):
        run.diagnosis_json.write_text(damaged)
        with pytest.raises(StorageError, match="damaged"):
            read_diagnosis(run)
    run.diagnosis_json.unlink()
    with pytest.raises(StorageError, match="not there: run `lorascope diagnose"):
        read_diagnosis(run)
