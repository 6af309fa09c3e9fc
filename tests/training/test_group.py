"""Groups of arms in a run folder: trackers and previews of each group, the order of previews, and arms that
fail.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import make_study
from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.base.loading import Base
from lorascope.errors import RunError, StorageError
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import draw_pictures
from lorascope.store import read_json
from lorascope.study import Study
from lorascope.training.group import Group, preview_jobs
from lorascope.training.trainer import StepRecord


def train_only(study: Study) -> None:
    with study.working("test"):
        for stage in (study.prepare_data, study.encode, study.train):
            stage()


def test_tensorboard_gets_losses_and_previews_of_every_arm_of_every_group(
    study_file: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    choices = (
        "train.max_stacked_arms=1",
        "train.epochs=2",
        "sample.preview_every_epochs=1",
        "sample.num_previews=2",
    )
    study = make_study(study_file, run, 'trackers=["tensorboard"]', *choices)
    train_only(study)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {path.name for path in (run / "tensorboard").iterdir()} == {"r4", "r8"}
    for arm in ("r4", "r8"):
        events = EventAccumulator(str(run / "tensorboard" / arm)).Reload()
        for name in ("loss", "grad_norm", "lr"):
            expected = [
                (record["step"], record[name])
                for record in records
                if record["kind"] == "train" and record["arm"] == arm
            ]
            found = [(event.step, event.value) for event in events.Scalars(name)]
            assert len(found) == 8 and found == [(step, pytest.approx(value)) for step, value in expected]
        assert [event.step for event in events.Scalars("heldout_loss")] == [4, 8]
        for prompt, number in (("picture 1 of blocks", "normal-000"), ("luck", "abstract-000")):
            images = events.Images(prompt)
            assert len(images) == 2
            for epoch, image in enumerate(images, start=1):
                drawn = (run / "previews" / arm / f"epoch-{epoch:04}" / f"{number}-0.png").read_bytes()
                assert image.step == 4 * epoch
                assert (
                    Image.open(io.BytesIO(image.encoded_image_string)).tobytes()
                    == Image.open(io.BytesIO(drawn)).tobytes()
                )


def test_a_preview_that_cannot_be_drawn_is_a_warning_and_training_goes_on(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(base: Base, bank: AdapterBank, slices: list[Slice], *rest: Any) -> Any:
        if slices == [Slice(1)]:
            raise RunError("latents are not finite")
        return draw_pictures(base, bank, slices, *rest)

    monkeypatch.setattr("lorascope.training.group.draw_pictures", draw)
    run = tmp_path / "run"
    # 16 pictures in batches of 24: steps 1, 2 and 2 end epochs 1, 2 and 3
    study = make_study(
        study_file, run, "train.batch_size=24", "sample.preview_every_epochs=2", "sample.num_previews=1"
    )
    train_only(study)
    drawn = {path.relative_to(run / "previews").as_posix() for path in (run / "previews").rglob("*.png")}
    assert drawn == {"base/epoch-0000/normal-000-0.png", "r4/epoch-0003/normal-000-0.png"}
    assert "no preview of r8 after epoch 3: latents are not finite" in (run / "lorascope.log").read_text()
    assert read_json(run / "adapters" / "r8" / "training.json")["failed"] is None


def test_previews_take_prompts_of_all_categories_in_turn() -> None:
    prompts = [
        Prompt("normal", 0, "a"),
        Prompt("normal", 1, "b"),
        Prompt("normal", 2, "c"),
        Prompt("abstract", 0, "d"),
    ]
    assert [job.prompt.text for job in preview_jobs(prompts, 3)] == ["a", "d", "b"]
    assert [job.prompt.text for job in preview_jobs(prompts, 9)] == ["a", "d", "b", "c"]
    assert {job.seed for job in preview_jobs(prompts, 9)} == {0}


WILD = '{name="wild", rank=4, alpha=4, lr=1e20}'


def test_an_arm_that_fails_in_a_group_of_its_own_leaves_the_others_to_their_groups(
    study_file: Path, tmp_path: Path
) -> None:
    arms = f'arms=[{WILD}, {{name="r4", rank=4, lr=1e-3}}]'
    study = make_study(
        study_file, tmp_path / "run", arms, "train.max_stacked_arms=1", "sample.preview_every_epochs=1"
    )
    with pytest.raises(
        RunError, match=r"^arm wild failed: loss or gradient is not finite at step 2: lower its lr"
    ):
        study.run()
    facts = read_json(tmp_path / "run" / "adapters" / "wild" / "training.json")
    assert facts["steps"] == 2 and facts["best"] is None and "file_bytes" not in facts
    assert read_json(tmp_path / "run" / "adapters" / "r4" / "training.json")["steps"] == 12
    assert {path.name for path in (tmp_path / "run" / "previews").iterdir()} == {"base", "r4"}
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("stacked", [1, 2])
def test_a_study_of_which_no_arm_is_left_stops(study_file: Path, tmp_path: Path, stacked: int) -> None:
    arms = f"arms=[{WILD}, {WILD.replace('wild', 'worse').replace('rank=4', 'rank=2')}]"
    study = make_study(study_file, tmp_path / "run", arms, f"train.max_stacked_arms={stacked}")
    for _ in range(2):  # again from the last checkpoint
        with pytest.raises(
            RunError,
            match=(
                r"^no arm is left \(.*worse: loss or gradient is not finite at step 2\): lower "
                r"arms.lr, or "
                r"set"
            ),
        ):
            study.run()


def test_an_arm_that_breaks_in_the_last_step_of_an_epoch_is_not_probed_drawn_or_kept(
    study_file: Path, tmp_path: Path
) -> None:
    study = make_study(
        study_file, tmp_path / "run", (f'arms=[{{name="r4", rank=4, lr=1e-3}}, '
        f'{WILD}]'), "train.epochs=1", "train.batch_size=16",
        "sample.preview_every_epochs=1",
    )  # fmt: skip
    with pytest.raises(RunError, match="arm wild failed: loss is not finite after step 1:"):
        study.run()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {record["arm"] for record in records if record["kind"] == "probe"} == {"base", "r4"}
    assert {path.name for path in (tmp_path / "run" / "previews").iterdir()} == {"base", "r4"}
    assert [path.name for path in (tmp_path / "run" / "adapters" / "wild").iterdir()] == ["training.json"]


def test_a_damaged_checkpoint_is_one_line_and_deleting_it_trains_anew_to_the_same_adapters(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Group._record_step

    def stop_after_five(group: Group, record: StepRecord) -> None:
        original(group, record)
        if record.step == 5:
            raise RunError("stopped")

    train_only(make_study(study_file, tmp_path / "whole"))
    monkeypatch.setattr(Group, "_record_step", stop_after_five)
    with pytest.raises(RunError, match="stopped"):
        train_only(make_study(study_file, tmp_path / "run"))
    monkeypatch.undo()
    (path,) = (
        path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name != "base.safetensors"
    )
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"damaged checkpoint \(its content is not what was written"):
        train_only(make_study(study_file, tmp_path / "run"))
    path.unlink()
    train_only(make_study(study_file, tmp_path / "run"))
    for name in (
        "metrics.jsonl",
        "adapters/r4/adapter_model.safetensors",
        "adapters/r8/adapter_model.safetensors",
    ):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
