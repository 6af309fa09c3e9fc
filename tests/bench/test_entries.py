"""The entries of the tables, and how they are chosen; ours do without what is wrong on the device."""

import pytest
import torch

from lorascope.bench.entries import choose_entries, plan_entries
from lorascope.errors import ConfigError
from lorascope.machine.fast_paths import ALL_PATHS, FastPaths

CPU = torch.device("cpu")


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


def test_our_entries_do_without_what_is_barred() -> None:
    entries = {entry.name: entry for entry in plan_entries("sd15", torch.device("cuda"), True)}
    wrong = FastPaths(frozenset({"cudnn", "sdpa"}), channels_last=False, recorded_step=False)
    assert [entry.within(ALL_PATHS) for entry in entries.values()] == list(entries.values())
    assert entries["P4"].within(wrong) == entries["P4"]
    assert entries["O1"].within(wrong).barred == ("attention sdpa",)
    graph = entries["O4"].within(wrong)
    assert graph.barred == ("attention sdpa", "attention cudnn", "channels_last", "CUDA graph")
    assert not graph.channels_last and not graph.cuda_graph and graph.key == entries["O4"].key
