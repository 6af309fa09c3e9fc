"""What went wrong in a run, from its files."""

from pathlib import Path

from lorascope.report.faults import find_faults
from lorascope.run_folder import RunDir
from lorascope.store import write_json


def test_failed_arms_and_wrong_merges_are_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for arm, failure in (("r4", None), ("r16", "loss is not finite at step 3")):
        write_json(run.adapters_dir / arm / "training.json", {"failed": failure})
    assert find_faults(run, ["r4"]) == []
    result = {"relative_error": 2e-6, "tolerance": 1e-3, "ok": True}
    write_json(run.merge_check_json, {"r4": result, "r16": {**result, "relative_error": 0.25, "ok": False}})
    assert find_faults(run, ["r4", "r16"]) == [
        "arm r16 failed: loss is not finite at step 3: lower its lr and run it in another folder",
        "arm r16: merged output differs by 0.25, tolerance 0.001",
    ]
