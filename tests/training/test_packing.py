"""Plans of trial groups: what shares a pass, how many passes run side by side, and the plan as it is kept."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorascope.arms import Arm, ArmGrid
from lorascope.errors import StorageError
from lorascope.schema import StudyConfig
from lorascope.sections import TrainSection
from lorascope.training.packing import (
    ArmGroup,
    Packing,
    describe_passes,
    most_workers,
    pack_arms,
    plan_groups,
)


def arms_of(count: int, epochs: int = 10, batch_size: int = 4, first: int = 0) -> list[Arm]:
    return [
        Arm(name=f"a{n}", rank=4 + n * 7 % 5, alpha=1, lr=1e-3, seed=n, epochs=epochs, batch_size=batch_size)
        for n in range(first, first + count)
    ]


def sizes(arms: Sequence[Arm], num_workers: int, max_stacked: int = 4, fit: int = 99) -> list[int]:
    return [
        len(group) for group in plan_groups(arms, num_workers, max_stacked, lambda group: len(group) <= fit)
    ]


@pytest.mark.parametrize(
    ("count", "num_workers", "expected"),
    [
        (1, 1, [1]),
        (2, 1, [2]),
        (2, 2, [1, 1]),
        (3, 2, [2, 1]),
        (5, 1, [3, 2]),
        (9, 2, [3, 2, 2, 2]),
        (24, 2, [4] * 6),
        (24, 24, [1] * 24),
    ],
)
def test_groups_are_as_large_as_may_be_while_every_worker_has_work(
    count: int, num_workers: int, expected: list[int]
) -> None:
    assert sizes(arms_of(count), num_workers) == expected


def test_on_a_large_device_all_that_fits_shares_a_pass() -> None:
    assert sizes(arms_of(24), 1, 24) == [24]
    assert sizes(arms_of(24), 1, 24, fit=10) == [8, 8, 8]
    assert sizes(arms_of(24), 8, 24) == [3] * 8
    assert sizes(arms_of(3), 1, 24, fit=0) == [1, 1, 1]


def test_long_and_short_kinds_are_cut_so_that_workers_end_together() -> None:
    arms = arms_of(4) + arms_of(4, epochs=40, first=4)
    groups = plan_groups(arms, 2, 4, lambda group: True)
    assert [(group[0].epochs, len(group)) for group in groups] == [(40, 2), (40, 2), (10, 4)]


KINDS = st.lists(
    st.tuples(st.sampled_from([1, 4, 128]), st.sampled_from([2, 4]), st.sampled_from([1, 10])),
    min_size=1,
    max_size=12,
)


@given(KINDS, st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_every_arm_is_in_one_group_that_fits_and_is_of_one_kind(
    kinds: list[tuple[int, int, int]], num_workers: int, max_stacked: int, fit: int
) -> None:
    arms = [
        Arm(name=f"a{n}", rank=rank, alpha=1, lr=1e-3, seed=n, batch_size=batch, epochs=epochs)
        for n, (rank, batch, epochs) in enumerate(kinds)
    ]
    groups = plan_groups(arms, num_workers, max_stacked, lambda group: len(group) <= fit)
    assert sorted(arm.name for group in groups for arm in group) == sorted(arm.name for arm in arms)
    for group in groups:
        assert (
            len(group) <= min(max_stacked, fit) and len({(arm.batch_size, arm.epochs) for arm in group}) == 1
        )
        assert [arm.rank for arm in group] == sorted(arm.rank for arm in group)
    if len(groups) < min(num_workers, len(arms)) and len({arm.epochs for arm in arms}) == 1:
        counts = Counter(
            arm.batch_size for arm in arms
        ).values()  # a worker may idle only where it could not shorten the whole
        assert max(map(len, groups)) == next(
            n for n in range(1, 13) if sum(-(-count // n) for count in counts) <= num_workers
        )
    for one, other in itertools.combinations(groups, 2):  # neighbours in rank stand together
        if (one[0].batch_size, one[0].epochs) == (other[0].batch_size, other[0].epochs):
            assert one[-1].rank <= other[0].rank or other[-1].rank <= one[0].rank
    assert groups == plan_groups(arms, num_workers, max_stacked, lambda group: len(group) <= fit)


def study_of(count: int = 8, workers: int | None = None, **train: int) -> StudyConfig:
    return StudyConfig(
        arms=(ArmGrid(seed=tuple(range(count))),), workers=workers, train=TrainSection(**train)
    )


def test_a_small_study_stays_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorascope.training.packing.num_cores", lambda: 8)
    monkeypatch.setattr("lorascope.machine.workers.num_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert most_workers(study_of(), "cpu", 0, 1e9, 10) == 3  # 1.7e12 FLOPs, 5e11 each
    assert most_workers(study_of(), "cpu", 0, 1e9, 1) == 1
    assert most_workers(study_of(workers=2), "cpu", 0, 1e9, 1) == 2
    assert [most_workers(study_of(count), "cpu", 0, 1e12, 1000) for count in (1, 2, 3, 4, 7)] == [
        1,
        1,
        1,
        2,
        3,
    ]  # two arms each
    assert most_workers(study_of(), "cpu", 0, 1e12, 1000) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert most_workers(study_of(), "cpu", 0, 1e12, 1000) == 2


def test_there_is_a_worker_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_workers(study_of(), "cuda", 1, 8e11, 1500) == 1
    assert most_workers(study_of(), "cuda", 4, 8e11, 1500) == 4
    assert most_workers(study_of(workers=2), "cuda", 4, 8e11, 1500) == 2
    assert most_workers(study_of(workers=16), "cuda", 4, 8e11, 1500) == 4
    assert most_workers(study_of(2, epochs=1), "cuda", 4, 8e11, 10) == 1


def test_there_are_fewer_workers_where_memory_is_short() -> None:
    def fits(arms: Sequence[Arm], num_workers: int) -> bool:
        return 3 * len(arms) * num_workers <= 8

    plan = pack_arms(study_of(4), "cpu", 4, fits)
    assert plan.num_workers == 2 and [len(group.arms) for group in plan.groups] == [1, 1, 1, 1]
    nothing = pack_arms(study_of(4), "cuda", 4, lambda arms, num_workers: False)
    assert nothing.num_workers == 1 and len(nothing.groups) == 4
    assert len(pack_arms(study_of(8), "cuda", 1, lambda arms, num_workers: True).groups) == 1
    assert len(pack_arms(study_of(8), "cpu", 1, lambda arms, num_workers: True).groups) == 2
    assert (
        len(pack_arms(study_of(8, max_stacked_arms=8), "cpu", 1, lambda arms, num_workers: True).groups) == 1
    )


def test_a_plan_is_kept_and_a_halved_group_takes_its_place(tmp_path: Path) -> None:
    arms, path = arms_of(5), tmp_path / "groups.json"
    plan = Packing((ArmGroup(tuple(arms[:3])), ArmGroup(tuple(arms[3:]), gradient_checkpointing=True)), 2)
    assert Packing.load(path, "x", arms) is None
    plan.save(path, "x")
    assert Packing.load(path, "x", arms) == plan and Packing.load(path, "y", arms) is None
    halves = plan.groups[0].halves()
    assert [half.names for half in halves] == [["a0", "a1"], ["a2"]]
    halved = plan.split(plan.groups[0], halves)
    assert halved.groups == (*halves, plan.groups[1]) and halved.num_workers == 2
    assert len({group.key for group in (*plan.groups, *halved.groups)}) == 4
    assert [group.label for group in halved.groups] == ["a0 +1", "a2", "a3 +1"]


WHOLE = {"arms": ["a0", "a1"], "gradient_checkpointing": False}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"groups": [{**WHOLE, "arms": ["a0"]}]}, "it does not hold every arm of this study once"),
        ({"groups": [{**WHOLE, "arms": ["a0", "a9"]}]}, "it does not hold every arm of this study once"),
        ({"groups": 3}, "no `groups`, or not of its type"),
        ({"groups": [[]]}, r"no `groups\[0\]`, or"),
        ({"groups": [WHOLE, {**WHOLE, "arms": []}]}, "it does not hold every arm of this study once"),
        ({"groups": [{**WHOLE, "arms": [[]]}]}, r"no `groups\[0\].arms\[0\]`, or"),
        (
            {"groups": [{**WHOLE, "gradient_checkpointing": 0}]},
            r"no `groups\[0\].gradient_checkpointing`",
        ),
        ({"groups": [{"arms": ["a0", "a1"]}]}, r"no `groups\[0\].gradient_checkpointing`"),
        ({"workers": True}, "no `workers`, or not of its type"),
        ({"workers": 0}, "`workers` is 0, must be from 1 to 1"),
        ({"workers": 2}, "`workers` is 2, must be from 1 to 1"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    arms, path = arms_of(2), tmp_path / "groups.json"
    Packing((ArmGroup(tuple(arms)),), 1).save(path, "x")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(
        StorageError,
        match=rf"groups.json: damaged \({reason}.*\): delete it and run the same command again",
    ):
        Packing.load(path, "x", arms)


def test_a_plan_of_arms_that_cannot_share_a_pass_or_without_a_key_is_refused(tmp_path: Path) -> None:
    arms, path = arms_of(2), tmp_path / "groups.json"
    Packing((ArmGroup(tuple(arms)),), 1).save(path, "x")
    longer = [arms[0], arms[1].model_copy(update={"epochs": arms[0].epochs + 1})]
    with pytest.raises(StorageError, match=r"\(arms of several batch sizes, .* share a group\): delete it"):
        Packing.load(path, "x", longer)
    path.write_text('{"inputs": "x", "workers": 1}')
    with pytest.raises(StorageError, match=r"\(no `groups`, or not of its type\): delete it"):
        Packing.load(path, "x", arms)


def test_a_plan_in_words() -> None:
    assert describe_passes([["r4"]], 1) == ["r4 alone"]
    assert describe_passes([["r4", "r8"]], 1) == ["r4, r8 in one pass"]
    assert describe_passes([["r4", "r8"], ["r16"]], 1)[-1] == "2 passes, one after another"
    assert describe_passes([["r4"], ["r8"]], 2) == [
        "pass 1: r4",
        "pass 2: r8",
        "2 passes, 2 side by side, each in a process of its own",
    ]
