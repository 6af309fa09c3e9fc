"""The study in its run folder: stages, resuming after a kill, failed arms, bad run folders."""

import itertools
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from safetensors import safe_open

from conftest import digests, make_pictures, make_study, train_only, write_parquet
from lorascope.adapters.adapter import Adapter
from lorascope.adapters.files import load_adapter
from lorascope.adapters.merge import merged_into
from lorascope.base.loading import Base
from lorascope.console import log
from lorascope.errors import ConfigError, DataError, RunError, StorageError
from lorascope.run_folder import RunDir
from lorascope.store import read_json
from lorascope.study import Study
from lorascope.training.feed import Batch
from lorascope.training.step import Step

# What rounding makes of AdamW's steps in fp32 is in weights that losses hardly feel: 1e-6 of a loss.
SAME_LOSS = 1e-4


def test_a_run_holds_what_architecture_md_says(finished: Path) -> None:
    for name in (
        "study.toml",
        "manifest.json",
        "data.json",
        "metrics.jsonl",
        "merge_check.json",
        "features.safetensors",
        "scores.parquet",
        "sweep.parquet",
        "copying.json",
        "diagnosis.json",
    ):
        assert (finished / name).is_file(), name
    adapters = ("adapters/r4/adapter_model.safetensors", "adapters/r4/tiny-r4.safetensors")
    for name in ("report.html", "report.md", "lorascope.log", *adapters, "images/base/normal-000-0.png"):
        assert (finished / name).is_file(), name
    manifest = read_json(finished / "manifest.json")
    stages = {"data", "encode", "train", "sample", "merge_check", "score", "diagnose", "report"}
    assert set(manifest["stages"]) == stages
    assert manifest["base"]["prediction_type"] == "epsilon" and manifest["versions"]["torch"]
    assert not list(finished.rglob("*.partial*")) and not list((finished / "checkpoints").iterdir())


def test_metrics_hold_every_step_and_probe(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [(record["step"], record["arm"]) for record in records if record["kind"] == "train"]
    assert steps == [(step, arm) for step in range(1, 13) for arm in ("r4", "r8")]
    probes = {
        (r["step"], r["arm"], r["split"], r["conditional"], r["band"])
        for r in records
        if r["kind"] == "probe"
    }
    expected_models = {(0, "base")} | {(step, arm) for step in (4, 8, 12) for arm in ("r4", "r8")}
    assert {probe[:2] for probe in probes} == expected_models
    assert len(probes) == len(expected_models) * 2 * 2 * 5


def test_the_best_epoch_by_held_out_loss_is_kept_beside_the_last(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for arm in ("r4", "r8"):
        losses = {
            record["epoch"]: record["loss"]
            for record in records
            if record["kind"] == "probe"
            and record["arm"] == arm
            and record["split"] == "heldout"
            and record["conditional"]
            and record["band"] == "all"
        }
        best = read_json(finished / "adapters" / arm / "training.json")["best"]
        assert best["epoch"] == min(losses, key=losses.__getitem__) and best["heldout_loss"] == pytest.approx(
            losses[best["epoch"]]
        )
        last, kept = (load_adapter(finished / "adapters" / arm / part).modules for part in ("", "best"))
        assert all(torch.equal(last[name].up, kept[name].up) for name in last) == (best["epoch"] == 3)


def test_scores_have_one_row_a_picture_with_the_base_among_them(finished: Path) -> None:
    rows = pq.read_table(finished / "scores.parquet").to_pylist()
    arms = [row for row in rows if row["kind"] == "arm"]
    assert {row["arm"] for row in arms} == {"base", "r4", "r8"} and len(arms) == 5 * 2 * 3
    assert {"arm", "rank", "category", "prompt", "seed", "clip_score", "image"} <= set(rows[0])
    assert all((finished / row["image"]).is_file() for row in arms)
    assert {row["arm"] for row in rows if row["kind"] == "calibration"} == {
        "shuffled prompts",
        "noise",
        "real held-out",
    }


def test_training_facts_match_the_files(finished: Path) -> None:
    facts = read_json(finished / "adapters" / "r8" / "training.json")
    assert facts["file_bytes"] == (finished / "adapters" / "r8" / "adapter_model.safetensors").stat().st_size
    assert (facts["rank"], facts["alpha"], facts["scale"], facts["steps"]) == (8, 16, 2, 12)
    assert facts["group"] == ["r4", "r8"] and facts["run_time_s"] > 0 and facts["peak_memory_bytes"] > 0
    assert not facts["gradient_checkpointing"]


@pytest.mark.figures
def test_the_memory_that_was_expected_is_what_was_taken(finished: Path) -> None:
    facts = read_json(finished / "adapters" / "r8" / "training.json")
    assert facts["expected_memory_bytes"] == pytest.approx(facts["peak_memory_bytes"], rel=0.3), (
        "little beside the libraries themselves"
    )


def test_the_same_command_again_does_nothing(
    study_file: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = digests(run)
    for name in (
        "training.stage.Group",
        "study.draw_all",
        "study.compare_merged",
        "study.load_encoder",
        "study.prepare_data",
    ):
        monkeypatch.setattr(f"lorascope.{name}", None)
    make_study(study_file, run).run()
    assert digests(run) == before


def test_stages_one_by_one_give_the_same_run(study_file: Path, finished: Path, tmp_path: Path) -> None:
    stages = ("prepare_data", "encode", "train", "sample", "check_merge", "score", "diagnose", "report")
    for stage in stages:
        study = make_study(study_file, tmp_path / "run")
        with study.working("test"):
            getattr(study, stage)()
    assert digests(tmp_path / "run") == digests(finished)


def test_arms_of_several_batch_sizes_and_epochs_in_one_study(
    study_file: Path, finished: Path, tmp_path: Path
) -> None:
    study = make_study(
        study_file,
        tmp_path / "run",
        "arms=[{rank=4, alpha=8, lr=1e-3, batch_size=[4, 8]}, {rank=8, lr=1e-3, epochs=2}]",
    )
    study.run()
    facts = {
        arm: read_json(tmp_path / "run" / "adapters" / arm / "training.json")
        for arm in ("r4-b4", "r4-b8", "r8-b4")
    }
    assert {arm: (item["steps"], item["batch_size"], item["epochs"]) for arm, item in facts.items()} == {
        "r4-b4": (12, 4, 3),
        "r4-b8": (6, 8, 3),
        "r8-b4": (8, 4, 2),
    }
    assert [item["group"] for item in facts.values()] == [["r4-b4"], ["r4-b8"], ["r8-b4"]]
    records = RunDir(tmp_path / "run").read_metrics(facts)
    assert [record["arm"] for record in records if record["kind"] == "train" and record["step"] == 7] == [
        "r4-b4",
        "r8-b4",
    ]
    ends = {
        (record["arm"], record["epoch"]): record["step"] for record in records if record["kind"] == "probe"
    }
    assert (ends["r4-b8", 1], ends["r4-b8", 3], ends["r8-b4", 2]) == (2, 6, 8) and ("r8-b4", 3) not in ends
    losses = {
        arm: [record["loss"] for record in records if record["kind"] == "train" and record["arm"] == arm]
        for arm in facts
    }
    first = [
        record["loss"]
        for record in RunDir(finished).read_metrics(["r4", "r8"])
        if record["kind"] == "train" and record["arm"] == "r4"
    ]
    assert losses["r4-b4"] == pytest.approx(first, rel=SAME_LOSS)
    # From the same pictures and noise: the first batch of 8 is the first two of 4 (the adapter hardly moves
    # in a step, whose 0.1 % of the loss is all that differs)
    assert losses["r4-b8"][0] == pytest.approx(sum(losses["r4-b4"][:2]) / 2, rel=1e-3)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "batch size" in text and "r8-b4 8 steps of 4 pictures" in text
    with safe_open(tmp_path / "run" / "adapters" / "r4-b8" / "tiny-r4-b8.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_batch_size_per_device"], metadata["ss_num_epochs"], metadata["ss_steps"]) == (
        "8",
        "3",
        "6",
    )


def test_a_group_that_runs_out_of_memory_goes_on_as_two_and_loses_nothing(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third step of 8 arms the allocator is asked for more than any machine has; of 4 arms it is not.

    A process that is short of memory in earnest may also end where libraries do not look at what they were
    given.
    """
    add_batch, batches = Step.add_batch, itertools.count(1)

    def add_batch_of_few(step: Step, batch: Batch) -> None:
        if len(step.bank.arms) > 4 and next(batches) == 3:
            torch.empty(2**50)
        add_batch(step, batch)

    monkeypatch.setattr(Step, "add_batch", add_batch_of_few)
    choices = (
        "train.batch_size=4",
        "train.epochs=2",
        "train.max_stacked_arms=8",
        "train.checkpoint_every_steps=2",
        "train.optimizer=SGD",  # whose steps are the gradients, 1e-7 apart in fp32
    )
    run = tmp_path / "run"
    train_only(make_study(study_file, run, *choices, "arms=[{rank=4, lr=1.0, seed=[0,1,2,3,4,5,6,7]}]"))
    log = (run / "lorascope.log").read_text()
    assert re.search(
        r"WARNING train    out of memory \(.+\): going on from the last checkpoint in passes of r4-s0, "
        r".* and r4-s4, ",
        log,
    )
    assert "train    going on from step 2" in log and not list((run / "checkpoints").iterdir())
    groups = [group["arms"] for group in read_json(run / "groups.json")["groups"]]
    arms = [f"r4-s{seed}" for seed in range(8)]
    assert len(groups) == 2 and sorted(itertools.chain(*groups)) == arms
    few = train_only(
        make_study(study_file, tmp_path / "few", *choices, "arms=[{rank=4, lr=1.0, seed=[0,7]}]")
    )
    for arm in ("r4-s0", "r4-s7"):
        found, expected = (load_adapter(folder / "adapters" / arm) for folder in (run, few))
        for name, module in found.modules.items():
            up = expected.modules[name].up
            assert (module.up - up).norm() <= 1e-3 * up.norm()  # fp32, 8 steps whose errors add up
        records = [
            [
                (record["step"], record["loss"])
                for record in RunDir(folder).read_metrics(arms)
                if record["arm"] == arm
            ]
            for folder in (run, few)
        ]
        assert (
            records[0] == [(step, pytest.approx(loss, rel=SAME_LOSS)) for step, loss in records[1]]
            and len(records[0]) == 8 + 2 * 20
        )
    assert {record["arm"] for record in RunDir(run).read_metrics(arms) if record["step"] == 0} == {"base"}


def test_arms_trained_in_separate_groups_see_the_same_as_in_one(
    study_file: Path, finished: Path, tmp_path: Path
) -> None:
    train_only(make_study(study_file, tmp_path / "run", "train.max_stacked_arms=1"))

    def losses(run: Path, arm: str) -> list[float]:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [record["loss"] for record in records if record["kind"] == "train" and record["arm"] == arm]

    for arm in ("r4", "r8"):
        assert losses(tmp_path / "run", arm) == pytest.approx(losses(finished, arm), rel=SAME_LOSS)


def test_a_folder_of_before_there_were_some_keys_opens_and_goes_on(
    study_file: Path, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    frozen = tomllib.loads((run / "study.toml").read_text())
    for key in (
        "buckets",
        "bucket_step_px",
        "bucket_max_ratio",
        "flip",
        "repeats",
        "shuffle_tags",
        "keep_tags",
    ):
        del frozen["data"][key]
    for key in ("optimizer", "optimizer_args", "accumulation_steps", "loss", "noise_offset", "keep_best"):
        del frozen["train"][key]
    del frozen["trackers"], frozen["export"], frozen["adapter"], frozen["sample"]["num_previews"]
    (run / "study.toml").write_text(tomli_w.dumps(frozen))
    manifest = read_json(run / "manifest.json")
    for stage in ("data", "sample", "score"):
        del manifest["stages"][stage]
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "images" / "r8" / "normal-001-0.png").unlink()
    Study.open(run, cache_dir=study_file.parent / "cache").run()
    make_study(study_file, run).run()
    assert digests(run) == digests(finished)


def test_a_failed_arm_is_reported_and_the_rest_is_kept(study_file: Path, tmp_path: Path) -> None:
    study = make_study(
        study_file, tmp_path / "run", 'arms=[{rank=4, lr=1e-3}, {name="wild", rank=4, alpha=1e20, lr=1e20}]'
    )
    with pytest.raises(RunError, match=r"arm wild failed: loss or gradient is not finite at step"):
        study.run()
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "images" / "wild").exists()
    assert "wild" in (tmp_path / "run" / "report.md").read_text()


def test_a_merge_beyond_tolerance_is_a_fault_of_the_run(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def wrong_merge(base: Base, adapter: Adapter) -> Iterator[None]:
        weight, own = base.unet.conv_in.weight, base.unet.conv_in.weight.data
        with merged_into(base, adapter):
            weight.data = own * 1.5
            yield
        weight.data = own

    monkeypatch.setattr("lorascope.evaluation.merging.merged_into", wrong_merge)
    with pytest.raises(RunError, match=r"arm r4: merged output differs by"):
        make_study(study_file, tmp_path / "run").run()
    assert (tmp_path / "run" / "report.html").is_file()


def test_another_configuration_in_the_folder_is_refused(study_file: Path, finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.epochs was 3, now 4"):
        make_study(study_file, finished, "train.epochs=4").run()


def test_prompts_that_are_cut_are_told_before_training(
    study_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    (tmp_path / "prompts.txt").write_text(f"[normal]\na cat\n{'a ' * 70}\n")
    prompts = f"sample.prompts={json.dumps(str(tmp_path / 'prompts.txt'))}"
    make_study(study_file, tmp_path / "run", prompts).check_inputs()
    assert "are cut there" not in caplog.text
    make_study(
        study_file, tmp_path / "run", prompts, f"sample.prompt_prefix={json.dumps('a ' * 9)}"
    ).check_inputs()
    assert (
        "prompts  1 of 2 are longer than 77 tokens and are cut there, the longest, of 81: 'a a a"
        in caplog.text
    )


def test_a_prefix_that_would_end_every_prompt_is_told_before_training(
    study_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"^sample.prompt_prefix = '<\|endoftext\|>' holds <\|endoftext\|>"):
        make_study(study_file, tmp_path / "run", "sample.prompt_prefix=<|endoftext|>").check_inputs()


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no study.toml here"):
        Study.open(tmp_path)


def test_a_stage_before_its_input_is_refused(study_file: Path, tmp_path: Path) -> None:
    study = make_study(study_file, tmp_path / "run")
    with (
        study.working("test"),
        pytest.raises(StorageError, match=r"data.json: not there: run the stage that writes it first"),
    ):
        study.train()


def test_a_lost_data_json_is_made_again_if_the_data_is_the_same(
    study_file: Path, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "data.json").unlink()
    make_study(study_file, run).run()
    assert digests(run) == digests(finished)
    source = write_parquet(tmp_path / "pictures.parquet", make_pictures(20))
    other = make_study(study_file, tmp_path / "other", f'data.source="{source}"')
    with other.working("test"):
        other.prepare_data()
    write_parquet(source, make_pictures(21))
    (tmp_path / "other" / "data.json").unlink()
    with (
        other.working("test"),
        pytest.raises(
            StorageError, match=r"data.json: lost, and pictures or captions of .* have changed since"
        ),
    ):
        other.prepare_data()
    assert not (tmp_path / "other" / "data.json").exists()


@pytest.mark.parametrize(
    "lost", ["merge_check.json", "scores.parquet", "images/r8/normal-001-0.png", "features.safetensors"]
)
def test_what_was_lost_of_a_finished_run_is_made_again(
    lost: str, study_file: Path, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / lost).unlink()
    study = make_study(study_file, run)
    with study.working("test"):
        for stage in (study.sample, study.check_merge, study.score):
            stage()
    assert digests(run) == digests(finished)
    assert (run / lost).exists() is (lost != "features.safetensors")  # which nothing needs any more


def test_a_missing_picture_is_named_before_scoring(study_file: Path, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    manifest = read_json(run / "manifest.json")
    del manifest["stages"]["score"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "images" / "r8" / "normal-001-0.png").unlink()
    study = make_study(study_file, run)
    with (
        study.working("test"),
        pytest.raises(StorageError, match=r"normal-001-0.png: not there: run `lorascope sample"),
    ):
        study.score()


def test_two_processes_cannot_work_in_one_folder(study_file: Path, tmp_path: Path) -> None:
    study = make_study(study_file, tmp_path / "run")
    with study.working("test"), pytest.raises(StorageError, match="another lorascope process"):
        make_study(study_file, tmp_path / "run").run()
