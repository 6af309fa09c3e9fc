"""The benchmark on tiny models, from gate to table: rows, files, resumption, skips, scaling; the command."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import lorascope.bench.gate
import lorascope.bench.run
import lorascope.bench.scaling
from bench_entries import CACHED, RIGHT, SHORT
from lorascope.base.configs import read_configs
from lorascope.bench.entries import Entry
from lorascope.bench.entry import LaneError
from lorascope.bench.race import Protocol
from lorascope.bench.run import _is_measured, run_alone, run_bench
from lorascope.bench.scaling import plan_scaling
from lorascope.bench.table import as_markdown, update_document
from lorascope.cli.app import main
from lorascope.cli.more import _fast_paths
from lorascope.doctor.findings import Examination, Finding, remember
from lorascope.errors import ConfigError, RunError
from lorascope.machine.fast_paths import ALL_PATHS, FastPaths
from lorascope.sections import BaseSection
from lorascope.store import digest_json, read_json

pytestmark = pytest.mark.usefixtures("forked_lanes")
SIDE = Entry("O7", "side by side", "ours", (4, 8), num_processes=2)
POINTS = plan_scaling(torch.device("cpu"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer entries of a low rank, in place of the table's."""
    monkeypatch.setattr(
        lorascope.bench.run, "plan_entries", lambda base, device, quick: RIGHT[2:4] + RIGHT[6:7] + [SIDE]
    )
    monkeypatch.setattr(
        lorascope.bench.scaling, "plan_scaling", lambda device: [POINTS[0], POINTS[1], POINTS[-1]]
    )


@pytest.mark.usefixtures("small")
def test_a_benchmark_from_gate_to_table(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = partial(
        run_bench, str(pipeline_folder), "cpu", protocol=SHORT, out=tmp_path / "tiny", peers_dir=tmp_path
    )
    result = run(names=["P3", "P4-r4"], scaling=True)
    assert result == read_json(tmp_path / "tiny" / "bench.json")
    assert {key: row["status"] for key, row in result["entries"].items()} == {
        "P3-r4": "skipped",
        "P4-r4": "measured",
    }
    assert "run python benchmarks/fetch_peers.py" in result["entries"]["P3-r4"]["reason"]
    row = result["entries"]["P4-r4"]
    assert len(row["block_ms"]) == 2 and min(row["block_ms"]) <= row["arm_step_ms"] <= max(row["block_ms"])
    assert row["images_per_s"] == pytest.approx(4 * row["steps_per_s"]) and row["gate"]["loss"] < 1e-5
    assert (
        row["total_s"] > 3750 * row["step_ms"] / 1e3
        and row["peak_memory_bytes"] > 1e8
        and row["peak_memory_kind"] == "rss"
    )
    assert 0 < row["limit_fraction"] < 1 and result["flops"]["r4"] > 1e6
    assert [point["value"] for point in result["scaling"]] == [1, 2, 16] and all(
        point["step_ms"] > 0 for point in result["scaling"]
    )
    assert (tmp_path / "tiny" / "scaling.png").stat().st_size > 1000

    # The rest is added; what was measured stays.
    more = run()
    assert more["entries"]["P4-r4"] == row and more["scaling"] == result["scaling"]
    assert [more["entries"][key]["status"] for key in ("O1-r4", "O7-r4+r8")] == ["measured"] * 2
    side = more["entries"]["O7-r4+r8"]
    assert side["arm_step_ms"] == pytest.approx(side["step_ms"] / 4)
    table = as_markdown(more)
    assert table == (tmp_path / "tiny" / "bench.md").read_text()
    assert f"| {row['arm_step_ms'] / more['entries']['O1-r4']['arm_step_ms']:.2f} |" in table
    assert "skipped: " in table and "| adapters in one pass | 2 |" in table
    assert {line.count("|") for line in table.splitlines() if line.startswith(("| P", "| O"))} == {14}

    with pytest.raises(
        ConfigError, match=r"was measured with protocol = .*: give --out another folder, or --again"
    ):
        run(names=["P4-r4"], scaling=False, again=False, protocol=Protocol())

    # Into the document.
    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- bench tiny -->\nold\n<!-- end -->\nafter\n")
    update_document(document, [tmp_path / "tiny" / "bench.json"])
    text = document.read_text()
    assert (
        table in text
        and "old" not in text
        and text.startswith("before\n")
        and text.endswith("<!-- end -->\nafter\n")
    )
    assert (
        "![Time and memory of a step](scaling-tiny.png)" in text and (tmp_path / "scaling-tiny.png").exists()
    )
    document.write_text("no markers")
    with pytest.raises(ConfigError, match="has no lines <!-- bench tiny -->"):
        update_document(document, [tmp_path / "tiny" / "bench.json"])


def test_an_arm_that_fails_the_gate_is_reported_and_not_timed(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(
        RIGHT[3], name="P9", max_grad_norm=1.0, recipe=replace(CACHED, clips=False)
    )  # its gradients are not clipped
    broken = replace(RIGHT[3], name="P8", recipe=None)
    monkeypatch.setattr(lorascope.bench.run, "plan_entries", lambda *_: [wrong, broken])
    monkeypatch.setattr(
        lorascope.bench.gate, "TOLERANCES", {"fp32": {"loss": 1e-12, "norm": 1e-12, "weights": 1e-12}}
    )
    rows = run_bench(str(pipeline_folder), "cpu", protocol=SHORT, out=tmp_path)["entries"]
    assert rows["P9-r4"]["status"] == "failed" and "not the reference's steps" in rows["P9-r4"]["reason"]
    assert rows["P8-r4"]["reason"] == "AssertionError: AssertionError" and "block_ms" not in {
        **rows["P8-r4"],
        **rows["P9-r4"],
    }


def test_a_reference_that_cannot_run_ends_the_benchmark(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LaneError("out of memory", True)

    monkeypatch.setattr(lorascope.bench.gate.References, "run", fail)
    with pytest.raises(RunError, match="the reference cannot be run: out of memory"):
        run_bench(str(pipeline_folder), "cpu", quick=True, names=["O1"], out=tmp_path)


def test_an_arm_alone_in_its_process(pipeline_folder: Path, tmp_path: Path) -> None:
    facts = run_alone(str(pipeline_folder), "cpu", "O1", 3, tmp_path)
    assert facts["num_steps"] == 3 and 0 < facts["arm_step_ms"] < 1e4 and facts["peak_memory_kind"] == "rss"
    with pytest.raises(ConfigError, match="--arms P3: .*fetch_peers"):
        run_alone(str(pipeline_folder), "cpu", "P3", 3, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--alone"], "--arms names 0"), (["--alone", "--arms", "P1,P4"], "--arms names 2")],
)
def test_alone_takes_one_arm(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_the_command(pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--base",
        str(pipeline_folder),
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--threads",
        "1",
        "--peers",
        str(tmp_path),
    ]
    assert main(["bench", "--arms", "P3", "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["entries"]["P3-r4"]["status"] == "skipped"
    assert main(["bench", "--arms", "O1", "--alone", "--steps", "2", *options]) == 0
    assert json.loads(capsys.readouterr().out)["entry"] == "O1-r4"


@pytest.mark.usefixtures("small")
def test_a_row_says_what_was_barred_and_counts_only_where_that_is_so(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    wrong, entry = FastPaths(frozenset({"sdpa"})), RIGHT[6]
    result = run_bench(
        str(pipeline_folder), "cpu", names=["O1"], protocol=SHORT, out=tmp_path, fast_paths=wrong
    )
    row = result["entries"]["O1-r4"]
    assert row["status"] == "measured" and row["barred"] == ["attention sdpa"]
    assert "| ours (not used here: attention sdpa) |" in (tmp_path / "bench.md").read_text()
    assert _is_measured(entry.within(wrong), row) and not _is_measured(entry, row)
    del row["barred"]  # as older results are
    assert _is_measured(entry, row)


def test_the_command_asks_what_the_doctor_found(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lorascope.machine.device.choose_device", torch.device)
    monkeypatch.setattr("lorascope.doctor.examination.versions", lambda device: {"device": str(device)})
    caplog.set_level("INFO", "lorascope")
    base, models = str(pipeline_folder), digest_json(read_configs(BaseSection(model=str(pipeline_folder))))
    assert _fast_paths(base, "cpu") == _fast_paths(base, "cuda") == ALL_PATHS
    assert caplog.text.count("fast paths were not checked here") == 1
    wrong = Finding("attention cudnn", "wrong", "gradient of key", 0.3, 0.02)
    remember(Examination(base, {"device": "cuda"}, (wrong,)), models, "bf16")
    assert _fast_paths(base, "cuda") == FastPaths(frozenset({"cudnn"}))
    assert f"{wrong.as_line()}: not used in this benchmark" in caplog.text
    assert _fast_paths("sd15", "cuda") == ALL_PATHS  # of other models
