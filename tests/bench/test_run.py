"""The benchmark on tiny models: the gate lets right arms through and no wrong one; rows, files, resumption,
skips, scaling.
"""

import hashlib
import json
import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.fetch_peers import fetch
from benchmarks.update_docs import ROOT

import lorascope.bench.run
from conftest import needs_bf16_attention
from lorascope.base.attention import barred_kernels
from lorascope.base.configs import read_configs
from lorascope.bench.entry import (
    Conditions,
    Entry,
    Lane,
    LaneError,
    Runner,
    Trajectory,
    build_runner,
    prepare_workload,
)
from lorascope.bench.peers import KOHYA_COMMIT, KOHYA_FILES, Recipe, missing_for
from lorascope.bench.run import (
    Protocol,
    _side_by_side,
    choose_entries,
    compare,
    plan_entries,
    plan_scaling,
    run_alone,
    run_bench,
    verdict,
)
from lorascope.bench.table import as_markdown, draw_scaling, update_document
from lorascope.cli.app import main
from lorascope.cli.more import _fast_paths
from lorascope.doctor.findings import Examination, Finding, remember
from lorascope.errors import ConfigError, HubError, RunError
from lorascope.machine.fast_paths import ALL_PATHS, FastPaths
from lorascope.schema import BaseSection
from lorascope.store import digest_json, read_json

CPU = torch.device("cpu")
PEERS_DIR = ROOT / "benchmarks" / "peers"
SHORT = Protocol(num_warm_ups=1, num_blocks=2, num_steps=2)
CACHED = Recipe(cached=True, channels_last=True, fused=True)
REFERENCE = Entry("R", "plain", "reference", (4,))
RIGHT = [
    Entry("P1", "as shipped", "peft", (4,), recipe=Recipe(cached=False, clips=False), max_grad_norm=0.0),
    Entry("P2", "repaired", "peft", (4,), recipe=Recipe(cached=False)),
    Entry("P3", "kohya", "kohya", (4,)),
    Entry("P4", "cached", "peft", (4,), recipe=CACHED),
    Entry("P4b", "cached", "peft", (4,), "bf16", recipe=CACHED, tolerance="bf16"),
    Entry(
        "PX",
        "autocast, bf16 adapters",
        "peft",
        (4,),
        "bf16",
        Recipe(cached=False, autocast=True, fp32_adapters=False),
        "bf16 adapters",
    ),
    Entry("O1", "ours", "ours", (4,)),
    Entry("O1b", "ours", "ours", (4,), "bf16", tolerance="bf16"),
    Entry("O6", "ours, stacked", "ours", (4, 8, 4)),
]


@pytest.fixture(autouse=True)
def _import_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are forked from one that has the libraries: many are started here, and peak memory is of no
    account.
    """
    monkeypatch.setattr("lorascope.bench.entry._START_METHOD", "forkserver")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["lorascope.bench.entry"])


@pytest.fixture(scope="module")
def conditions(pipeline_folder: Path) -> Conditions:
    return Conditions(str(pipeline_folder), 64, 4, "cpu", 1, str(PEERS_DIR))


@pytest.fixture(scope="module")
def workload(conditions: Conditions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workload")
    prepare_workload(conditions, folder)
    return folder


@pytest.fixture(scope="module")
def references(
    conditions: Conditions, workload: Path
) -> dict[tuple[int, float], tuple[dict[str, torch.Tensor], Trajectory]]:
    """The weights before the first step and the first 20 steps, by rank and clipping."""
    found = {}
    for key in ((4, 0.0), (4, 1.0), (8, 1.0)):
        runner = build_runner(replace(REFERENCE, ranks=key[:1], max_grad_norm=key[1]), conditions, workload)
        found[key] = (runner.weights(), take(runner))
    return found


def take(runner: Runner) -> Trajectory:
    losses, norms = runner.take(20)
    return Trajectory(losses, norms, runner.weights())


def errors_of(entry: Entry, runner: Runner, references: Any) -> dict[str, float]:
    known = [references[rank, entry.max_grad_norm] for rank in entry.ranks]
    return compare([steps for _, steps in known], [start for start, _ in known], take(runner))


# The gate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry.name, marks=[needs_bf16_attention] * (entry.precision == "bf16"))
        for entry in RIGHT
    ],
)
def test_the_gate_lets_every_right_arm_through(
    entry: Entry, conditions: Conditions, workload: Path, references: Any
) -> None:
    if reason := missing_for(entry.kind, PEERS_DIR, "pocket"):
        pytest.skip(reason)
    runner = build_runner(entry, conditions, workload)
    errors = errors_of(entry, runner, references)
    assert verdict(errors, entry.tolerance) is None, errors
    if entry.precision == "fp32":
        assert errors["loss"] < 1e-5


def test_the_gate_stops_an_arm_with_another_alpha(
    conditions: Conditions, workload: Path, references: Any
) -> None:
    entry = RIGHT[3]
    runner: Any = build_runner(entry, conditions, workload)
    for module in runner.step.unet.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 2
    reason = verdict(errors_of(entry, runner, references), entry.tolerance)
    assert (
        reason is not None
        and reason.startswith("not the reference's steps: ")
        and "norm 1 (at most 0.01)" in reason
    )


def test_the_gate_stops_an_arm_that_sees_other_noise(
    conditions: Conditions, workload: Path, references: Any
) -> None:
    entry = RIGHT[3]
    runner: Any = build_runner(entry, conditions, workload)
    runner.batches = [replace(batch, noise=batch.noise.flip(0)) for batch in runner.batches]
    assert "loss" in str(verdict(errors_of(entry, runner, references), "bf16"))


def test_the_gate_stops_one_wrong_adapter_among_stacked_ones(
    conditions: Conditions, workload: Path, references: Any
) -> None:
    entry = RIGHT[-1]
    runner: Any = build_runner(entry, conditions, workload)
    for layer in runner.bank.layers.values():
        layer.down.data[1] *= 1.1
    assert verdict(errors_of(entry, runner, references), "fp32") is not None


def test_the_gate_stops_what_is_not_finite() -> None:
    weights = {"a.down": torch.ones(1, 2, 3)}
    true = Trajectory(np.ones((20, 1)), np.ones((20, 1)), weights)
    start = {"a.down": torch.zeros(1, 2, 3)}
    assert verdict(compare([true], [start], true), "fp32") is None
    assert (
        verdict(compare([true], [start], true._replace(losses=np.full((20, 1), np.nan))), "bf16 adapters")
        is not None
    )


# What is wrong on the device ------------------------------------------------------------------------------


def test_our_entries_do_without_what_is_barred() -> None:
    entries = {entry.name: entry for entry in plan_entries("sd15", torch.device("cuda"), True)}
    wrong = FastPaths(frozenset({"cudnn", "sdpa"}), channels_last=False, recorded_step=False)
    assert [entry.within(ALL_PATHS) for entry in entries.values()] == list(entries.values())
    assert entries["P4"].within(wrong) == entries["P4"]
    assert entries["O1"].within(wrong).barred == ("attention sdpa",)
    graph = entries["O4"].within(wrong)
    assert graph.barred == ("attention sdpa", "attention cudnn", "channels_last", "CUDA graph")
    assert not graph.channels_last and not graph.cuda_graph and graph.key == entries["O4"].key


@pytest.mark.parametrize("entry", [RIGHT[6], replace(RIGHT[6], name="O3", best_attention=True)])
def test_barred_kernels_are_barred_in_the_benchmark(
    entry: Entry, conditions: Conditions, workload: Path
) -> None:
    barred = replace(conditions, fast_paths=FastPaths(frozenset({"sdpa"})))
    runner: Any = build_runner(entry, barred, workload)
    assert barred_kernels(runner.trainer.base.unet) == {"sdpa"}


@pytest.mark.usefixtures("small")
def test_a_row_says_what_was_barred_and_is_measured_again_when_that_changes(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    run = partial(run_bench, str(pipeline_folder), "cpu", names=["O1"], protocol=SHORT, out=tmp_path)
    free, again = run()["entries"]["O1-r4"], run()["entries"]["O1-r4"]
    assert free == again and free["barred"] == []
    barred = run(fast_paths=FastPaths(frozenset({"sdpa"})))["entries"]["O1-r4"]
    assert barred["status"] == "measured" and barred["barred"] == ["attention sdpa"]
    assert barred["block_ms"] != free["block_ms"]
    assert "| ours (not used here: attention sdpa) |" in (tmp_path / "bench.md").read_text()


def test_the_command_asks_what_the_doctor_found(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lorascope.base.loading.choose_device", torch.device)
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


# The whole --------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer entries of a low rank, in place of the table's."""
    monkeypatch.setattr(
        lorascope.bench.run, "plan_entries", lambda base, device, quick: RIGHT[2:4] + RIGHT[6:7] + [SIDE]
    )
    monkeypatch.setattr(
        lorascope.bench.run, "plan_scaling", lambda device: [POINTS[0], POINTS[1], POINTS[-1]]
    )


SIDE = Entry("O7", "side by side", "ours", (4, 8), num_processes=2)
POINTS = plan_scaling(CPU)


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
        lorascope.bench.run, "TOLERANCES", {"fp32": {"loss": 1e-12, "norm": 1e-12, "weights": 1e-12}}
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

    monkeypatch.setattr(lorascope.bench.run._References, "run", fail)
    with pytest.raises(RunError, match="the reference cannot be run: out of memory"):
        run_bench(str(pipeline_folder), "cpu", quick=True, names=["O1"], out=tmp_path)


def test_an_arm_alone_in_its_process(pipeline_folder: Path, tmp_path: Path) -> None:
    facts = run_alone(str(pipeline_folder), "cpu", "O1", 3, tmp_path)
    assert facts["num_steps"] == 3 and 0 < facts["arm_step_ms"] < 1e4 and facts["peak_memory_kind"] == "rss"
    with pytest.raises(ConfigError, match="--arms P3: .*fetch_peers"):
        run_alone(str(pipeline_folder), "cpu", "P3", 3, tmp_path)


def test_the_arms_of_the_tables() -> None:
    quick, full = plan_entries("pocket", CPU, True), plan_entries("pocket", CPU, False)
    gpu = plan_entries("sd15", torch.device("cuda"), False)
    assert [entry.name for entry in quick] == ["P1", "P4", "P4b", "O1", "O3", "O6x2", "O6x4", "O7"]
    assert {"P1", "P2", "P3", "P4", "O1", "O2", "O3", "O4", "O5", "O6x2", "O6x4", "O6x8", "O6"} <= {
        entry.name for entry in gpu
    }
    assert len({entry.key for entry in full}) == len(full) and len({entry.key for entry in gpu}) == len(gpu)
    assert [entry.key for entry in choose_entries(gpu, ["O4", "P1-r64", "O6"])] == [
        "O4-r16",
        "P1-r64",
        "O4-r64",
        "O6-r16+r64",
    ]
    with pytest.raises(ConfigError, match="--arms O9: no such arm here: choose from P1, P4"):
        choose_entries(quick, ["O9"])


def test_scaling_goes_over_adapters_rank_and_batch() -> None:
    assert [(what, value) for what, value, *_ in POINTS if what != "batch"] == [
        *(("adapters", count) for count in (1, 2, 4, 8)),
        *(("rank", rank) for rank in (4, 16, 64, 128)),
    ]
    points = [
        {"what": "adapters", "value": 1, "step_ms": 5.0, "memory_bytes": 2**30},
        {"what": "rank", "value": 4, "reason": "full"},
    ]
    assert b"adapters in one pass" in draw_scaling(points).file_svg


def test_what_a_peer_lacks_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_for("ours", tmp_path, "sd15") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_for("peft", tmp_path, "pocket") == 'peft is not installed: pip install "lorascope[bench]"'
    assert missing_for("kohya", tmp_path, "sd15") == 'einops is not installed: pip install "lorascope[bench]"'


def test_a_lane_that_dies_says_so(conditions: Conditions, workload: Path) -> None:
    lane = Lane(RIGHT[3], conditions, workload)
    assert lane.ask("ready") == 1
    with pytest.raises(LaneError, match="IndexError"):
        lane.ask("race", 1)
    lane._process.kill()
    with pytest.raises(LaneError, match="its process ended with code -9"):
        lane.ask("build")
    lane.close()


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


# Fetching ---------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server of the files of `tmp_path`/there."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "there" / "networks").mkdir(parents=True)
    (tmp_path / "there" / "networks" / "lora.py").write_bytes(b"a = 1\n")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "there")))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_peers_are_fetched_once_and_checked(server: str, tmp_path: Path) -> None:
    files, target = {"networks/lora.py": hashlib.sha256(b"a = 1\n").hexdigest()}, tmp_path / "peers"
    assert fetch(server, files, target) == [target / "networks" / "lora.py"]
    assert (target / "networks" / "lora.py").read_bytes() == b"a = 1\n"
    assert fetch("http://127.0.0.1:9", files, target) == []
    with pytest.raises(HubError, match="has SHA-256 .*, expected 00: not written"):
        fetch(server, {"networks/lora.py": "00"}, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(HubError, match="gone.py: cannot be fetched"):
        fetch(server, {"gone.py": "00"}, target)
    assert len(KOHYA_COMMIT) == 40 and all(len(digest) == 64 for digest in KOHYA_FILES.values())


def test_entries_run_side_by_side_as_the_gpu_holds_their_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 100 * 2**30, "cuda": 25 * 2**30}  # a GPU that holds four adapters of SD v1.5
    monkeypatch.setattr("lorascope.bench.run.free_bytes", lambda device: free[device.type])
    plain = Entry("O1", "", "ours", (16,))
    entries = [plain, replace(plain, ranks=(16,) * 2), plain, plain, replace(plain, ranks=(16,) * 8), plain]
    conditions = Conditions("sd15", 512, 4, "cuda:0", 1, "")
    groups = [[len(entry.ranks) for entry in group] for group in _side_by_side(entries, conditions)]
    assert groups == [[1, 2, 1], [1], [8], [1]]
    on_cpu = _side_by_side(entries, replace(conditions, device="cpu"))
    assert [len(group) for group in on_cpu] == [6]
