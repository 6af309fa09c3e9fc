"""Curves as they grow: files that are cut back, joined or damaged, and long ones made short."""

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from lorascope.run_folder import JsonLines, RunDir
from lorascope.web.metrics import MAX_POINTS, MetricsReader, draw_chart, shortened


def train(step: int, arm: str = "r4", loss: Any = 0.5) -> dict[str, Any]:
    return {"kind": "train", "step": step, "epoch": step / 10, "arm": arm, "loss": loss}


def probe(epoch: float, arm: str = "r4", **changes: Any) -> dict[str, Any]:
    known = {"kind": "probe", "split": "heldout", "band": "all", "conditional": True, "difference": -0.1}
    return {**known, "epoch": epoch, "arm": arm, **changes}


def write(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


@pytest.fixture
def reader(run: RunDir) -> MetricsReader:
    return MetricsReader(run)


def steps(reader: MetricsReader, arm: str = "r4") -> list[float]:
    return [step for step, _ in reader.update()[arm].loss]


def test_what_is_added_is_read_once(run: RunDir, reader: MetricsReader) -> None:
    assert reader.update() == {}
    write(run.metrics_jsonl, train(1), probe(0, "base"), probe(1), probe(1, split="train"))
    write(run.metrics_jsonl, probe(1, band="0-250"), probe(1, conditional=False))
    found = reader.update()
    assert list(found) == ["r4"]
    assert (found["r4"].loss, found["r4"].heldout) == ([(1.0, 0.5)], [(1.0, -0.1)])
    write(run.metrics_jsonl, train(2, loss=None), train(3))
    assert steps(reader) == steps(reader) == [1, 3]
    assert (reader.update()["r4"].step, reader.update()["r4"].epoch) == (3, 0.3)


def test_half_a_line_waits_for_the_rest(run: RunDir, reader: MetricsReader) -> None:
    write(run.metrics_jsonl, train(1))
    line = json.dumps(train(2)) + "\n"
    for piece in (line[:10], line[10:20], line[20:]):
        assert steps(reader) == [1]
        with run.metrics_jsonl.open("a") as file:
            file.write(piece)
    assert steps(reader) == [1, 2]


def test_a_run_that_goes_on_cuts_its_file_back(run: RunDir, reader: MetricsReader) -> None:
    log = JsonLines(run.metrics_dir / "r4.jsonl")
    log.append(train(1))
    length = log.sync()
    for step in (2, 3):
        log.append(train(step))
    log.sync()
    assert steps(reader) == [1, 2, 3]
    log.rewind(length)
    assert steps(reader) == [1]
    for step in (2, 3):
        log.append(train(step))
    log.sync()
    assert steps(reader) == [1, 2, 3]
    # Cut back and beyond between two looks: losses of a GPU differ a little.
    log.rewind(length)
    for step in (2, 3, 4, 5):
        log.append(train(step, loss=0.5000001))
    log.close()
    assert steps(reader) == [1, 2, 3, 4, 5]


def test_parts_are_joined_at_the_end(run: RunDir, reader: MetricsReader) -> None:
    write(run.metrics_dir / "r4.jsonl", train(1), train(2))
    write(run.metrics_dir / "r8.jsonl", train(1, "r8"))
    assert (steps(reader), steps(reader, "r8")) == ([1, 2], [1])
    write(run.metrics_jsonl, train(1), train(1, "r8"), train(2), train(2, "r8"))
    assert (steps(reader), steps(reader, "r8")) == ([1, 2], [1, 2])
    for path in run.metrics_dir.iterdir():
        path.unlink()
    run.metrics_dir.rmdir()
    assert steps(reader) == [1, 2]
    run.metrics_jsonl.unlink()  # begun anew
    assert reader.update() == {}


@pytest.mark.parametrize(
    "line",
    [
        *("", "{", "[]", "3", '"r4"', "null", "{}", '{"arm": "r4"}', '{"arm": "r4", "kind": "probe"}', "\0"),
        *('{"arm": "r4", "kind": "train", "step": "x", "epoch": 1, "loss": 1}', "[" * 100_000),
        *('{"arm": "r4", "kind": "train", "step": 1e999, "epoch": 1, "loss": 1}', "9" * 5000),
        *('{"arm": ["r4"]}', "\x85\u2028", '{"arm": "r4", "kind": "train", "step": NaN}'),
        '{"arm": "r4", "kind": "train", "step": 2, "epoch": 1, "loss": [1]}',
    ],
)
def test_damaged_lines_are_left_out(run: RunDir, reader: MetricsReader, line: str) -> None:
    write(run.metrics_jsonl, train(1))
    with run.metrics_jsonl.open("a") as file:
        file.write(line + "\n")
    write(run.metrics_jsonl, train(3))
    assert steps(reader) == [1, 3]


def test_a_loss_that_is_no_number_is_kept_but_not_drawn(run: RunDir, reader: MetricsReader) -> None:
    write(run.metrics_jsonl, train(1), train(2, loss=math.nan), train(3, loss=math.inf), train(4))
    assert steps(reader) == [1, 2, 3, 4]
    chart = draw_chart("Loss", "step", {"r4": reader.update()["r4"].loss}, ["r4"])
    assert chart is not None and len(chart.lines[0].points.split()) == 2
    assert draw_chart("Loss", "step", {"r4": [(1, math.nan)]}, ["r4"]) is None


def test_what_is_no_file_is_left_alone(run: RunDir, reader: MetricsReader) -> None:
    run.metrics_dir.mkdir()
    os.mkfifo(run.metrics_dir / "a.jsonl")
    (run.metrics_dir / "b.jsonl").mkdir()
    (run.metrics_dir / "c.jsonl").symlink_to("nowhere")
    write(run.metrics_dir / "r4.jsonl", train(1))
    assert steps(reader) == [1]


def test_many_threads_see_every_record_once(run: RunDir, reader: MetricsReader) -> None:
    faults: list[BaseException] = []

    def look() -> None:
        try:
            for _ in range(60):
                for arm, curves in reader.update().items():
                    draw_chart("Loss", "step", {arm: curves.loss}, [arm])
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(300):
        write(run.metrics_jsonl, train(step, f"r{step % 30}"))
    for thread in threads:
        thread.join()
    assert faults == []
    assert sorted(step for arm in reader.update() for step in steps(reader, arm)) == list(range(300))


def test_many_points_become_few_and_keep_their_ends() -> None:
    points = [(float(step), math.sin(step / 500)) for step in range(50_000)]
    short = shortened(points)
    assert len(short) == MAX_POINTS
    assert (short[0], short[-1]) == (points[0], points[-1])
    assert [x for x, _ in short] == sorted(x for x, _ in short)
    assert all(abs(y - math.sin(x / 500)) < 0.25 for x, y in short)
    for count in (0, 1, MAX_POINTS - 1, MAX_POINTS, MAX_POINTS + 1, MAX_POINTS + 2, 2 * MAX_POINTS):
        assert len(shortened(points[:count])) == min(count, MAX_POINTS)
        assert shortened(points[:count])[-1:] == points[:count][-1:]


def test_charts_hold_what_they_are_given() -> None:
    assert draw_chart("Loss", "step", {"r4": []}, ["r4"]) is None
    one = draw_chart("Loss", "step", {"r4": [(1, 2)]}, ["r4"])
    assert one is not None and one.zero is None and "nan" not in one.lines[0].points
    chart = draw_chart(
        "Loss", "step", {"r8": [(0, 1), (5, -1)], "r4": [(0, 0)], "new": [(1, 1)]}, ["r4", "r8"]
    )
    assert chart is not None and chart.zero is not None
    assert [(line.name, line.index) for line in chart.lines] == [("r4", 0), ("r8", 1), ("new", 0)]
    assert chart.lines[1].last == -1 and "r8 -1.0000" in chart.alt
    for line in chart.lines:
        for point in line.points.split():
            x, y = map(float, point.split(","))
            assert 44 <= x <= 470 and 10 <= y <= 172
