"""An entry in a process of its own, and what it is set up with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench_entries import RIGHT
from lorascope.base.attention import barred_kernels
from lorascope.bench.entries import Conditions, Entry
from lorascope.bench.entry import Lane, LaneError, build_runner
from lorascope.machine.fast_paths import FastPaths


@pytest.mark.parametrize("entry", [RIGHT[6], replace(RIGHT[6], name="O3", best_attention=True)])
def test_barred_kernels_are_barred_in_the_benchmark(
    entry: Entry, conditions: Conditions, workload: Path
) -> None:
    barred = replace(conditions, fast_paths=FastPaths(frozenset({"sdpa"})))
    runner: Any = build_runner(entry, barred, workload)
    assert barred_kernels(runner.trainer.base.unet) == {"sdpa"}


@pytest.mark.usefixtures("forked_lanes")
def test_a_lane_that_dies_says_so(conditions: Conditions, workload: Path) -> None:
    lane = Lane(RIGHT[3], conditions, workload)
    assert lane.ask("ready") == 1
    with pytest.raises(LaneError, match="IndexError"):
        lane.ask("race", 1)
    lane._process.kill()
    with pytest.raises(LaneError, match="its process ended with code -9"):
        lane.ask("build")
    lane.close()
