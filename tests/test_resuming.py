"""A study that is stopped, killed or loses a worker goes on and ends in the same bytes."""

import importlib
import itertools
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorascope.study
from conftest import digests, make_study, run_unreported, train_only
from forked import Forked, run_forked
from lorascope import store
from lorascope.base.loading import Base
from lorascope.cli.app import main
from lorascope.config import load_study
from lorascope.errors import RunError
from lorascope.machine.workers import Answer
from lorascope.run_folder import RunDir
from lorascope.store import read_json
from lorascope.study import Study
from lorascope.training import group
from lorascope.training.feed import Batch, Feed
from lorascope.training.packing import ArmGroup

_KILL_AT = {
    "before the first checkpoint": ("lorascope.training.feed.Feed.load", 2),
    "between checkpoints": ("lorascope.training.feed.Feed.load", 7),
    "while adapters are written": ("lorascope.training.group.Group._finish_arm", 2),
    "before an arm's files for other programs": ("lorascope.training.stage.write_study_files", 2),
    "in the middle of sampling": ("lorascope.evaluation.sampling.save_picture", 13),
    "while scoring": ("lorascope.evaluation.scoring.write_scores", 1),
    "while it draws at several strengths": ("lorascope.evaluation.sampling.save_picture", 37),
}


def _study_killed_at(name: str, call: int, study_file: Path, run: Path, cache: Path) -> None:
    """Run a study until the function `name` is called for this time, and be ended by SIGKILL then."""
    owner, _, name = name.rpartition(".")
    try:
        holder: object = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, kind = owner.rpartition(".")
        holder = getattr(importlib.import_module(module), kind)
    original, calls = getattr(holder, name), itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(holder, name, counted)
    Study(load_study(study_file, environment={}), run, cache_dir=cache).run()


@pytest.mark.parametrize("point", _KILL_AT)
def test_a_killed_run_started_again_ends_in_the_same_bytes(
    study_file: Path, finished: Path, tmp_path: Path, point: str
) -> None:
    name, count = _KILL_AT[point]
    run = tmp_path / "run"
    killed = run_forked(_study_killed_at, name, count, study_file, run, study_file.parent / "cache")
    assert killed.exit_code == -signal.SIGKILL, killed.stderr[-2000:]
    run_unreported(make_study(study_file, run))
    assert digests(run) == digests(finished)
    assert sorted(path.name for path in run.glob("adapters/*/tiny-*")) == [
        "tiny-r4.safetensors",
        "tiny-r8.safetensors",
    ]
    assert not list((run / "checkpoints").iterdir())


def _study_ended_by_sigterm(study_file: Path, run: Path) -> int:
    original = Feed.load

    def load(self: Feed, number: int) -> Batch:
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, number)

    Feed.load = load  # type: ignore[method-assign]
    return main(["study", str(study_file), "--run-dir", str(run)])


def test_sigterm_ends_the_step_writes_a_checkpoint_and_exits_130(
    study_file: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    stopped = run_forked(_study_ended_by_sigterm, study_file, run, environment=environment)
    assert stopped.exit_code == 130, stopped.stderr
    assert "stopped after step 7" in stopped.stderr and "interrupted" in stopped.stderr.splitlines()[-1]
    run_unreported(make_study(study_file, run))
    assert "going on from step 7" in (run / "lorascope.log").read_text()
    assert digests(run) == digests(finished)


def _study_killed_at_its_first_step(study_file: Path, run: Path, cache: Path) -> None:
    """Say before the first step how often what takes long was called, and which heavy modules are there."""
    store._KEPT_FROM_BYTES, store._SETTLED_NS = 0, -1  # as if the weights were large and old
    counts: dict[str, int] = {}

    def count(owner: object, name: str) -> None:
        original, counts[name] = getattr(owner, name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    for owner, name in (
        (store, "digest_file"),
        (Base, "encode_pixels"),
        (Base, "encode_text"),
        (group, "probe_losses"),
        (lorascope.study, "load_tokenizer"),
        (lorascope.study, "load_encoder"),
    ):
        count(owner, name)

    def begin(self: Feed, number: int) -> Batch:
        heavy = [name for name in ("matplotlib", "tensorboard") if name in sys.modules]
        print(sum(counts.values()), counts, heavy, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    Feed.load = begin  # type: ignore[method-assign]
    Study(load_study(study_file, environment={}), run, cache_dir=cache).run()


def test_a_second_start_encodes_digests_and_measures_nothing_before_the_first_step(
    study_file: Path, tmp_path: Path
) -> None:
    """Its time is left to imports and to loading the base; EXPERIMENTS.md has the seconds."""
    folders = tmp_path / "run", tmp_path / "encoded"
    starts = [run_forked(_study_killed_at_its_first_step, study_file, *folders) for _ in range(2)]
    assert [start.exit_code for start in starts] == [-signal.SIGKILL] * 2, starts[1].stderr[-2000:]
    assert int(starts[0].stdout.split()[0]) > 10
    assert starts[1].stdout.startswith("0 ") and starts[1].stdout.endswith(" []\n")


WIDE = (
    "arms.0.init=orthogonal",
    "arms.0.lr_ratio=4",
    "arms.0.max_weight_norm=0.5",
    "train.precision=bf16",
    "adapter.targets=['to_q', 'to_v']",
    (
        "adapter.groups=[{targets=['proj_in', '*.conv1'], rank=2, lr=5e-4}, {component='text_encoder', "
        "targets=['q_proj', 'fc1'], alpha=4}]"
    ),
    "data.buckets=true",
    "data.bucket_step_px=8",
    "data.flip=true",
    "data.repeats=2",
    "data.shuffle_tags=true",
    "train.optimizer='RAdam'",
    "train.schedule='cosine'",
    "train.min_snr_gamma=5",
    "train.noise_offset=0.05",
    "train.loss='huber'",
    "train.accumulation_steps=2",
    "train.gradient_checkpointing=true",
    "sample.preview_every_epochs=2",
    "sample.num_previews=2",
    "train.epochs=2",
)


def test_a_study_with_every_choice_runs_and_resumes_bit_for_bit(study_file: Path, tmp_path: Path) -> None:
    whole = make_study(study_file, tmp_path / "whole", *WIDE)
    run_unreported(whole)
    frozen = tmp_path / "whole" / "study.toml"
    point = ("lorascope.training.feed.Feed.load", 11)
    folders = tmp_path / "parts", study_file.parent / "cache"
    killed = run_forked(_study_killed_at, *point, frozen, *folders)
    assert killed.exit_code == -signal.SIGKILL, killed.stderr[-2000:]
    again = Study(whole.config, tmp_path / "parts", cache_dir=study_file.parent / "cache")
    run_unreported(again)
    assert "going on from step" in (tmp_path / "parts" / "lorascope.log").read_text()
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    previews = {
        path.relative_to(tmp_path / "whole" / "previews").as_posix()
        for path in (tmp_path / "whole" / "previews").rglob("*.png")
    }
    epochs = {"base": "epoch-0000", "r4": "epoch-0002", "r8": "epoch-0002"}
    assert previews == {
        f"{arm}/{epoch}/{name}-000-0.png" for arm, epoch in epochs.items() for name in ("normal", "abstract")
    }
    assert all(result["ok"] for result in read_json(tmp_path / "whole" / "merge_check.json").values()), (
        "in fp32 whatever the base is held in"
    )


def test_a_worker_that_dies_again_with_the_same_arm_ends_the_study(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(tasks: deque[ArmGroup], *rest: object) -> Iterator[tuple[ArmGroup, Answer]]:
        while tasks:
            yield tasks.popleft(), Answer(death="was ended by SIGKILL")

    monkeypatch.setattr("lorascope.training.stage.run_side_by_side", die)
    study = make_study(study_file, tmp_path / "run", "workers=2", "arms=[{rank=[2, 4, 6]}]")
    with pytest.raises(
        RunError,
        match=r"^the process that trained r2 was ended by SIGKILL again: if memory is short, set workers = 1",
    ):
        train_only(study)
    assert [group["arms"] for group in read_json(tmp_path / "run" / "groups.json")["groups"]] == [
        ["r2"],
        ["r4"],
        ["r6"],
    ]
    assert (
        "out of memory (its process was ended by SIGKILL): going on"
        in (tmp_path / "run" / "lorascope.log").read_text()
    )


SIDE_BY_SIDE = (
    "train.max_stacked_arms=1",
    "train.epochs=8",
    "train.checkpoint_every_steps=2",
    "sample.preview_every_epochs=8",
)


def test_groups_side_by_side_killed_and_gone_on_with_end_in_the_same_bytes_as_one_after_another(
    study_file: Path, tmp_path: Path
) -> None:
    alone = train_only(make_study(study_file, tmp_path / "alone", *SIDE_BY_SIDE))
    run = tmp_path / "beside"
    config = load_study(study_file, overrides=[*SIDE_BY_SIDE, "workers=2"], environment={})
    (tmp_path / "beside.toml").write_text(config.to_toml())
    command = ["study", str(tmp_path / "beside.toml"), "--run-dir", str(run)]
    parts = [run / "metrics" / f"{arm}.jsonl" for arm in ("r4", "r8")]
    with Forked(main, command, environment={"XDG_CACHE_HOME": str(tmp_path / "xdg")}) as parent:
        give_up = time.monotonic() + 120
        while not all(path.exists() and path.stat().st_size for path in parts):
            assert parent.exit_code is None and time.monotonic() < give_up
            time.sleep(0.01)
        parent.kill()
    with RunDir(run).lock():  # waits for the workers, which end with it
        sizes = [path.stat().st_size for path in parts]
        time.sleep(0.3)
        assert sizes == [path.stat().st_size for path in parts], parent.stderr
    study = Study(config, run, cache_dir=study_file.parent / "cache")
    train_only(study)
    said_again = (run / "lorascope.log").read_text()
    assert (
        re.search(r"\[r[48]\] train    going on from step \d+", said_again)
        and "2 passes, 2 side by side" in said_again
    )
    assert digests(run) == digests(alone)
    assert not (run / "metrics").exists() and not list((run / "checkpoints").iterdir())
    facts = {arm: read_json(run / "adapters" / arm / "training.json") for arm in ("r4", "r8")}
    assert all(item["side_by_side"] == 2 and item["group"] == [arm] for arm, item in facts.items())
