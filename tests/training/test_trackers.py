"""Trackers: what they were sent is read back by their own readers; a missing or failing one never costs a
training.
"""

import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorascope.training.trackers
from lorascope.errors import ConfigError
from lorascope.training.trackers import Trackers, open_trackers, require_trackers

ARMS = ("r4", "r16")
CONFIG = {"name": "study", "train": {"lr": 1e-4, "epochs": 2, "seed": None}, "arms": [4, 16]}
PIXELS = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)


def track(name: str, run_dir: Path, steps: range, config: Mapping[str, Any] = CONFIG) -> None:
    """Send a curve for each arm, and a picture after the last step."""
    with open_trackers([name], run_dir, "study", ARMS, config) as trackers:
        for step in steps:
            for number, arm in enumerate(ARMS):
                trackers.log(arm, step, {"train/loss": step + number / 2, "lr": 1e-4})
        trackers.log_image("r16", steps[-1], "a cat, drawn", PIXELS)
        assert trackers.runs, "it failed"


def expected(number: int, *steps: int) -> list[tuple[int, float]]:
    """The curve of one arm."""
    return [(step, step + number / 2) for step in steps]


def test_no_tracker_does_nothing_and_imports_nothing(tmp_path: Path) -> None:
    with open_trackers([], tmp_path, "study", ARMS, CONFIG) as trackers:
        trackers.log("r4", 1, {"loss": 1.0})
        trackers.log_image("r4", 1, "a cat", PIXELS)
    assert list(tmp_path.iterdir()) == []
    code = (
        "import sys; from pathlib import Path; from lorascope.training.trackers import open_trackers\n"
        "open_trackers([], Path('.'), 's', ['a'], {}).close()\n"
        "print([n for n in ('accelerate', 'torch', 'tensorboard', 'wandb', 'mlflow', 'trackio') if n in "
        "sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_tensorboard_shows_the_arms_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    track("tensorboard", tmp_path, range(1, 4))
    track("tensorboard", tmp_path, range(3, 6))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for number, arm in enumerate(ARMS):
        events = EventAccumulator(str(tmp_path / "tensorboard" / arm)).Reload()
        found = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert sorted(set(found)) == expected(number, 1, 2, 3, 4, 5)
        assert events.Scalars("lr")[0].value == pytest.approx(1e-4)
        (text,) = events.Tensors("config/text_summary")
        assert b"train.lr = 0.0001" in text.tensor_proto.string_val[0]
    image = events.Images("a cat, drawn")[0]
    assert (image.width, image.height, image.step) == (6, 8, 3)
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == sorted(ARMS)


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, of which a Weights & Biases file is one after 7 bytes of its own."""
    part, place = b"", 7
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:  # no header fits before the end of a block
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def test_wandb_writes_one_run_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track("wandb", tmp_path, range(1, 4))
    from wandb.proto.wandb_internal_pb2 import Record

    def records(path: Path) -> list[Any]:
        """All records, once the last is there: the package's own process writes them."""
        deadline = time.monotonic() + 20
        found: list[Any] = []
        while not (found and found[-1].WhichOneof("record_type") == "exit") and time.monotonic() < deadline:
            found = [Record.FromString(data) for data in leveldb_records(path.read_bytes())]
        return found

    names = {}
    for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb"):
        steps, run = [], None
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                run = record.run
            elif record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): item.value_json for item in record.history.item
                }
                steps += [(int(items["_step"]), float(items["train/loss"]))] if "train/loss" in items else []
        assert run is not None
        names[run.display_name] = (run.project, run.run_group, run.run_id, steps)
    assert set(names) == set(ARMS)
    for number, arm in enumerate(ARMS):
        project, group, run_id, steps = names[arm]
        assert project == "study" and group.startswith("study-") and run_id.endswith(f"-{arm}")
        assert steps == expected(number, 1, 2, 3)


@pytest.mark.filterwarnings("default")  # the package's own, on its database
def test_mlflow_goes_on_with_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track("mlflow", tmp_path, range(1, 4))
    track("mlflow", tmp_path, range(3, 6))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted(ARMS)
    for run in runs:
        points = {
            (metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")
        }
        assert sorted(points) == expected(ARMS.index(run.info.run_name), 1, 2, 3, 4, 5)
        assert run.data.params["train.lr"] == "0.0001" and run.info.status == "FINISHED"
        if run.info.run_name == "r16":
            assert [
                path
                for path in (tmp_path / "mlflow" / "artifacts").rglob("*.png")
                if "a cat_ drawn" in path.name
            ]
    assert mlflow.active_run() is None


def test_trackio_goes_on_with_its_runs(tmp_path: Path) -> None:
    """In a process of its own: the package fixes its folder as it is imported."""
    pytest.importorskip("trackio")
    code = (
        "import os, sys\n"
        "sys.path[:0] = ['tests', 'tests/training']\n"
        "from pathlib import Path\n"
        "from test_trackers import *\n"
        "folder = Path(os.environ['TRACKIO_DIR']).parent\n"
        "track('trackio', folder, range(1, 4)); track('trackio', folder, range(3, 6))\n"
        "import trackio\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "for run in trackio.Api().runs('study'):\n"
        "    logs = [row for row in SQLiteStorage.get_logs('study', run.name) if 'train/loss' in row]\n"
        "    print(run.name, sorted({(row['step'], row['train/loss']) for row in logs}))\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(" ", 1) for line in sorted(result.stdout.splitlines()))
    assert {name.rpartition("-")[0] for name in lines} == set(ARMS)
    for name, points in lines.items():
        assert points == str(expected(ARMS.index(name.rpartition("-")[0]), 1, 2, 3, 4, 5))


@pytest.mark.parametrize(
    ("name", "extra"),
    [("tensorboard", "trackers"), ("wandb", "wandb"), ("mlflow", "mlflow"), ("trackio", "trackio")],
)
def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    message = (
        rf"trackers = \[\"{name}\"\]: needs accelerate and {name}, not installed: "
        rf"pip install 'lorascope\[{extra}\]', or leave it out"
    )
    with pytest.raises(ConfigError, match=message):
        require_trackers([name])
    with pytest.raises(ConfigError, match=message):
        open_trackers([name], tmp_path, "study", ARMS, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_start_says_so(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(
        ConfigError,
        match=r"trackers = ..tensorboard..: cannot start .*: check that the run folder can be written, or",
    ):
        open_trackers(["tensorboard"], tmp_path, "study", ARMS, CONFIG)


def test_a_tracker_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = open_trackers(["tensorboard"], tmp_path, "study", ARMS, CONFIG)

    def gone(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("the network is gone\nand more")

    tracker = trackers.runs["tensorboard"]["r4"]
    monkeypatch.setattr(tracker._tracker.writer, "add_scalar", gone)
    caplog.set_level(logging.WARNING, "lorascope")
    for step in range(1, 4):
        trackers.log("r4", step, {"loss": 1.0})
        trackers.log_image("r16", step, "a cat", PIXELS)
    trackers.close()
    assert [record.getMessage() for record in caplog.records if record.name == "lorascope"] == [
        (
            "tracker tensorboard failed (ConnectionError: the network is gone): the study goes on, and "
            "sends it nothing more"
        )
    ]


def test_a_failing_end_is_a_warning_too(caplog: pytest.LogCaptureFixture) -> None:
    class Tracker:
        def finish(self) -> None:
            raise OSError("no")

    ended = []
    trackers = Trackers()
    run = lorascope.training.trackers._Run
    trackers.runs = {
        "wandb": {"r4": run(Tracker(), print), "r16": run(Tracker(), print, lambda: ended.append("r16"))}
    }
    trackers.close()
    assert ended == ["r16"] and "tracker wandb failed (OSError: no)" in caplog.text


def test_what_a_tracker_prints_stays_off_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers = open_trackers(["tensorboard"], tmp_path, "study", ["r4"], CONFIG)
    run = trackers.runs["tensorboard"]["r4"]
    monkeypatch.setattr(run._tracker.writer, "add_scalar", lambda *arguments, **options: print("View at ..."))
    trackers.log("r4", 1, {"loss": 1.0})
    trackers.close()
    assert capsys.readouterr().out == ""


def test_the_same_run_folder_keeps_its_runs_and_another_has_its_own(tmp_path: Path) -> None:
    for folder in ("a", "b", "a"):
        track("tensorboard", tmp_path / folder, range(1, 2))
    ids = [
        lorascope.training.trackers.read_json(tmp_path / folder / "trackers.json")["id"]
        for folder in ("a", "b")
    ]
    assert ids[0] != ids[1]
