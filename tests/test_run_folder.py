"""A run folder has one owner; its log and its JSON files are read with suspicion."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import JSON, failing, make_device, make_folder, make_pipe, make_socket
from lorascope.errors import LorascopeError, StorageError
from lorascope.run_folder import JsonLines, RunDir
from lorascope.store import read_json, write_bytes, write_json, write_text
from synthetic_run import make_run

TRAIN = {"kind": "train", "step": 1, "epoch": 0.1, "arm": "r4", "loss": 0.5, "grad_norm": None, "lr": 1e-3}
PROBE = {
    "kind": "probe",
    "step": 1,
    "epoch": 1,
    "arm": "r4",
    "split": "heldout",
    "band": "all",
    "conditional": True,
}
PROBE |= {"loss": 0.5, "difference": 0.0, "difference_low": 0.0, "difference_high": 0.0, "count": 4}


LOGS = {
    "lines": lambda path: JsonLines(path).read(),
    "append": lambda path: JsonLines(path).append({}),
    "length": lambda path: JsonLines(path).sync(),
    "rewind": lambda path: JsonLines(path).rewind(0),
}


@pytest.mark.skipif(os.name != "posix", reason="needs named pipes and sockets with names")
@pytest.mark.parametrize("make", [make_pipe, make_socket, make_folder, make_device])
@pytest.mark.parametrize("read", LOGS)
def test_a_log_that_is_no_file_is_never_opened(
    make: Callable[[Path], str], read: str, tmp_path: Path
) -> None:
    path = tmp_path / "here"
    kind = make(path)
    with pytest.raises(StorageError, match=rf"here: is a {kind}, where a file is needed: name a file"):
        LOGS[read](path)


def test_a_pipe_in_the_place_of_the_lock_is_not_opened(tmp_path: Path) -> None:
    make_pipe(tmp_path / ".lock")
    with pytest.raises(StorageError, match=r"\.lock: is a named pipe"), RunDir(tmp_path).lock():
        pass


# -- lines ---------------------------------------------------------------------------------------------------
def test_records_come_back_in_order(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "new" / "metrics.jsonl")
    assert lines.read() == []
    assert lines.sync() == 0
    records = [{"step": step, "text": "ä\n"} for step in range(5)]
    for record in records:
        lines.append(record)
    assert lines.sync() == lines.path.stat().st_size
    assert lines.read() == records
    lines.close()
    lines.close()
    lines.append({"step": 5})
    lines.close()
    assert [record["step"] for record in lines.read()] == [0, 1, 2, 3, 4, 5]


def test_a_rewound_log_goes_on_as_if_nothing_had_followed(tmp_path: Path) -> None:
    lines, other = JsonLines(tmp_path / "a.jsonl"), JsonLines(tmp_path / "b.jsonl")
    lines.append({"step": 0})
    length = lines.sync()
    for step in (1, 2):
        lines.append({"step": step})
    lines.rewind(length)
    assert lines.read() == [{"step": 0}]
    lines.append({"step": 1, "again": True})
    for record in ({"step": 0}, {"step": 1, "again": True}):
        other.append(record)
    lines.close()
    other.close()
    assert lines.path.read_bytes() == other.path.read_bytes()


def test_a_log_can_be_rewound_to_nothing_and_to_its_own_length(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.rewind(0)
    assert not lines.path.exists()
    lines.append({})
    lines.rewind(3)
    assert lines.read() == [{}]
    lines.rewind(0)
    assert lines.read() == []


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a.jsonl")
    with pytest.raises(
        StorageError,
        match="has 0 bytes, but 9 were written before the checkpoint: start again in an empty run folder",
    ):
        lines.rewind(9)
    lines.append({})
    with pytest.raises(StorageError, match="has 3 bytes, but 9"):
        lines.rewind(9)
    assert lines.path.read_bytes() == b"{}\n"


@pytest.mark.parametrize("cut", [b'{"step": 1', b'{"step": 1}', b'{"text": "\xc3', b"{", b"1"])
def test_a_last_line_cut_by_a_crash_is_left_out_and_written_over(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 0}\n' + cut)
    lines = JsonLines(path)
    assert lines.read() == [{"step": 0}]
    lines.append({"step": 1})
    lines.close()
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n'


def test_a_log_of_nothing_but_a_cut_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"st')
    lines = JsonLines(path)
    lines.append({})
    lines.close()
    assert path.read_bytes() == b"{}\n"


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(StorageError, match="line 2 is damaged"):
        JsonLines(path).read()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JsonLines, "_open", lambda _: open("/dev/full", "ab"))  # noqa: SIM115
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.append({"step": 0})
    with pytest.raises(StorageError, match="log.jsonl: cannot be written: the disk is full"):
        lines.sync()
    with pytest.raises(StorageError, match="the disk is full"):
        lines.close()
    lines.close()


def test_a_log_whose_folder_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        JsonLines(tmp_path / "file" / "a.jsonl").append({})


# -- the run folder ------------------------------------------------------------------------------------------
def test_a_stage_is_finished_for_the_inputs_it_had(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.manifest() == {"stages": {}}
    assert not run.is_finished("data", "abc")
    run.finish("data", "abc", 1.23456, fingerprint="f")
    run.describe(commit=None, lorascope="1")
    run.finish("train", "def", 2)
    run.describe(lorascope="2")
    assert run.is_finished("data", "abc")
    assert not run.is_finished("data", "other")
    assert not run.is_finished("sample", "abc")
    stages = {
        "data": {"inputs": "abc", "seconds": 1.235, "fingerprint": "f"},
        "train": {"inputs": "def", "seconds": 2},
    }
    assert read_json(run.manifest_json) == {"stages": stages, "commit": None, "lorascope": "2"}


def test_a_manifest_without_stages_has_none_finished(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_json(run.manifest_json, {"commit": "c"})
    assert not run.is_finished("data", "abc")


def test_the_layout_is_that_of_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    listed = {
        line.split()[0] for line in text.partition("runs/<name>/\n")[2].partition("```")[0].splitlines()
    }
    names = {
        path.name
        for key, path in vars(RunDir(Path("run"))).items()
        if isinstance(path, Path) and key != "path"
    }
    known = {entry.rstrip("/,").split("/")[0] for entry in listed} | {"report.md"}
    assert names <= known


HOLD = """
import sys, time
from pathlib import Path
from lorascope.run_folder import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_folder_has_one_owner_until_that_process_dies(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(
                StorageError, match="another lorascope process is working in this run folder: wait for it"
            ),
            run.lock(),
        ):
            pass
        partial = run.images_dir / ".picture-1234.partial.png"
        partial.parent.mkdir()
        partial.write_bytes(b"half")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with run.lock():
            assert not partial.exists()  # left by the killed process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def test_a_lock_ends_with_its_block_even_on_an_error(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(FileNotFoundError), run.lock():
        raise FileNotFoundError("not the folder's")
    with (
        run.lock(),
        pytest.raises(LorascopeError, match="another lorascope process"),
        RunDir(tmp_path).lock(),
    ):
        pass
    with run.lock():
        pass


def test_a_folder_that_cannot_be_locked_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="a file stands where a folder is needed"),
        RunDir(tmp_path / "file").lock(),
    ):
        pass
    monkeypatch.setattr("fcntl.flock", failing(errno.ENOLCK))
    with (
        pytest.raises(StorageError, match="cannot be written: No locks available"),
        RunDir(tmp_path / "run").lock(),
    ):
        pass


def test_records_of_arms_are_read_in_order_and_joined_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for arm in ("r8", "r4"):  # the order of writing is of no account
        part = JsonLines(run.metrics_part(arm))
        for step in (1, 2):
            part.append({**TRAIN, "step": step, "arm": arm})
        part.append({**PROBE, "step": 2, "arm": arm})
        part.close()
    base = JsonLines(run.metrics_part("base"))
    base.append({**PROBE, "step": 0, "arm": "base"})
    base.close()
    expected = [(0, "probe", "base"), *((1, "train", arm) for arm in ("r4", "r8"))]
    expected += [(2, kind, arm) for kind in ("train", "probe") for arm in ("r4", "r8")]

    def found() -> list[tuple[int, str, str]]:
        return [(record["step"], record["kind"], record["arm"]) for record in run.read_metrics(["r4", "r8"])]

    assert found() == expected
    run.join_metrics(["r4", "r8"])
    assert found() == expected and run.metrics_jsonl.exists() and not run.metrics_dir.exists()
    base.append(
        {**PROBE, "step": 0, "arm": "base"}
    )  # as if the parts had not been removed when the process was killed
    base.close()
    run.join_metrics(["r4", "r8"])
    assert found() == expected and not run.metrics_dir.exists()


def test_a_manifest_that_says_so_already_is_not_written_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.describe(started="now", device={"name": "cpu"})
    before = run.manifest_json.stat()
    run.describe(device={"name": "cpu"})
    assert run.manifest_json.stat().st_ino == before.st_ino
    run.describe(device={"name": "gpu"})
    assert run.manifest() == {"stages": {}, "started": "now", "device": {"name": "gpu"}}


# -- what a run folder holds, damaged ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "not a JSON object"),
        ({}, "of no kind in train, probe"),
        ({**TRAIN, "kind": ["train"]}, "of no kind in train, probe"),
        ({**TRAIN, "arm": "r5"}, "arm 'r5' is not of this study"),
        ({**TRAIN, "arm": {}}, "arm '{}' is not of this study"),
        ({**TRAIN, "loss": "low"}, "no loss, or not of its type"),
        ({**TRAIN, "kind": "probe"}, "no difference, or not of its type"),
    ],
)
def test_a_damaged_record_is_named_with_its_line(record: Any, reason: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_text(run.metrics_jsonl, f"{json.dumps(TRAIN)}\n{json.dumps(record)}\n")
    with pytest.raises(StorageError, match=rf"metrics\.jsonl: line 2 is damaged \({reason}\): delete that"):
        run.read_metrics(["r4"])


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"stages": []}',
        '{"stages": {"data": 1}}',
        '{"stages": {"a": {}}}',
        '{"stages": {"a": {"inputs": "x"}}}',
        '{"stages": {}, "device": 3}',
        '{"stages": {}, "versions": {"torch": 2}}',
    ],
)
def test_a_manifest_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    write_text(RunDir(tmp_path).manifest_json, content)
    with pytest.raises(
        StorageError, match=r"manifest\.json: damaged \(.*\): delete it and run the same command"
    ):
        RunDir(tmp_path).is_finished("data", "inputs")


def test_an_adapter_that_changed_after_its_training_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json", "best/adapter_model.safetensors"):
        write_text(run.adapters_dir / "r4" / name, "weights")
    facts = run.adapters_dir / "r4" / "training.json"
    write_json(facts, {"failed": None})  # of a version before
    run.require_unchanged("r4")
    write_json(facts, {"failed": None, "digests": run.adapter_digests("r4")})
    run.require_unchanged("r4")
    assert len(run.training("r4")["digests"]) == 3
    best = run.adapters_dir / "r4" / "best" / "adapter_model.safetensors"
    write_text(best, "weight")
    with pytest.raises(
        StorageError, match=r"best.adapter_model\.safetensors: was changed or cut after training"
    ):
        run.require_unchanged("r4")
    best.unlink()
    with pytest.raises(StorageError, match="was removed after training"):
        run.require_unchanged("r4")
    write_json(facts, {})
    with pytest.raises(StorageError, match=r"training\.json: damaged \(no `failed`, or not of its type\)"):
        run.failure("r4")


MERGED = {"relative_error": 1e-6, "tolerance": 1e-3, "mean_pixel_difference": 0.0, "ok": True}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "not a JSON object"),
        ({"r8": MERGED}, "arm 'r8' is not of this study"),
        ({"r4": [1]}, "no `r4`, or not of its type"),
        ({"r4": {**MERGED, "relative_error": "1"}}, "no `r4.relative_error`, or not of its type"),
        ({"r4": {**MERGED, "tolerance": True}}, "no `r4.tolerance`, or not of its type"),
        ({"r4": {key: MERGED[key] for key in MERGED if key != "ok"}}, "no `r4.ok`, or not of its type"),
    ],
)
def test_a_merge_check_that_is_none_is_named(content: object, reason: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.merges(["r4"]) == {}
    write_json(run.merge_check_json, {"r4": MERGED})
    assert run.merges(["r4", "r16"]) == {"r4": MERGED}
    write_json(run.merge_check_json, content)
    with pytest.raises(StorageError) as error:
        run.merges(["r4", "r16"])
    assert str(error.value) == (
        f"{run.merge_check_json}: damaged ({reason}): delete it and run the same command again"
    )


def test_what_is_known_of_a_training_is_checked_and_after_its_end_not_made_again(tmp_path: Path) -> None:
    run, path = RunDir(tmp_path), tmp_path / "adapters" / "r4" / "training.json"
    with pytest.raises(StorageError, match=r"training\.json: not there: run the stage that writes it first"):
        run.training("r4")
    write_json(path, {"failed": None, "steps": 3})
    assert run.training("r4", "steps")["steps"] == 3
    with pytest.raises(StorageError, match=r"training\.json: damaged \(no `epochs`, or not of its type\)"):
        run.training("r4", "steps", "epochs")
    write_json(path, {"failed": None, "best": {"step": 3}})
    with pytest.raises(StorageError, match=r"training\.json: damaged \(no `best\.epoch`, or not"):
        run.training("r4")
    run.finish("train", "inputs", 1.0)
    lost = r"training\.json: lost or damaged after training: put the file back .* in another run folder$"
    with pytest.raises(StorageError, match=lost):
        run.training("r4")
    path.unlink()
    with pytest.raises(StorageError, match=lost):
        run.training("r4")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"train": [{"id": "a", "caption": "a"}]}, r"train\[0\]\.digest"),
        ({"heldout": {}}, "heldout"),
        ({"refused": [{"id": "a"}]}, r"refused\[0\]\.reason"),
        ({"duplicates": [{"ids": [1]}]}, r"duplicates\[0\]\.ids\[0\]"),
        ({"fingerprint": None}, "fingerprint"),
    ],
)
def test_a_data_json_that_is_none_is_named(change: dict[str, object], place: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=("data",))
    write_json(run.data_json, {**run.data(), **change})
    with pytest.raises(
        StorageError, match=rf"data\.json: damaged \(no `{place}`, or not of its type\): delete it and run"
    ):
        run.data()


@given(content=st.binary(max_size=40) | st.lists(JSON, max_size=3).map(
    lambda values: "".join(json.dumps(value) + "\n" for value in values).encode()
))  # fmt: skip
def test_any_content_of_a_run_folders_files_is_read_or_one_line(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = RunDir(tmp_path_factory.mktemp("run"))
    for path in (run.manifest_json, run.metrics_jsonl, run.adapters_dir / "r4" / "training.json"):
        write_bytes(path, content)
    readers: list[Callable[[], Any]] = [
        run.manifest,
        lambda: run.is_finished("train", ""),
        lambda: run.read_metrics(["r4"]),
        lambda: run.failure("r4"),
        lambda: run.require_unchanged("r4"),
    ]
    for read in readers:
        with contextlib.suppress(LorascopeError):
            read()
