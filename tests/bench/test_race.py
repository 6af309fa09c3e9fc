"""Which entries run side by side."""

from dataclasses import replace

import pytest

from lorascope.bench.entries import Conditions, Entry
from lorascope.bench.race import side_by_side


def test_entries_runside_by_side_as_the_gpu_holds_their_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 100 * 2**30, "cuda": 25 * 2**30}  # a GPU that holds four adapters of SD v1.5
    monkeypatch.setattr("lorascope.bench.race.free_bytes", lambda device: free[device.type])
    plain = Entry("O1", "", "ours", (16,))
    entries = [plain, replace(plain, ranks=(16,) * 2), plain, plain, replace(plain, ranks=(16,) * 8), plain]
    conditions = Conditions("sd15", 512, 4, "cuda:0", 1, "")
    groups = [[len(entry.ranks) for entry in group] for group in side_by_side(entries, conditions)]
    assert groups == [[1, 2, 1], [1], [8], [1]]
    on_cpu = side_by_side(entries, replace(conditions, device="cpu"))
    assert [len(group) for group in on_cpu] == [6]
