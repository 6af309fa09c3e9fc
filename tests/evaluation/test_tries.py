"""Prompts of one's own: drawn as the sample stage draws, in a folder of their own, refused in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import make_study
from lorascope.cli.app import main
from lorascope.errors import EXIT_DONE, EXIT_INPUT, ConfigError, StorageError
from lorascope.evaluation.tries import (
    Drawn,
    Try,
    checked_prompt,
    checked_settings,
    note_try,
    plan_pictures,
    read_tries,
)
from lorascope.run_folder import RunDir
from lorascope.sections import SampleSection
from lorascope.study import Study


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), np.int16)


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("tries") / "run"))


def test_strength_1_is_the_sample_stages_picture_and_0_the_bases(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = (run / "manifest.json").read_bytes()
    command = ["draw", str(run), "--prompt", "red", "--seed", "1", "--arm", "r8", "--strength", "1", "--json"]
    with RunDir(run).lock():  # as while another stage works in the folder
        assert main([*command, "--strength", "0", "--strength", "0.5"]) == EXIT_DONE
    made = json.loads(capsys.readouterr().out)
    folder = Path(made["folder"])
    assert folder.parent == run / "tries"
    names = ["base.png", "r8-last-s1.png", "r8-last-s0.png", "r8-last-s0.5.png"]
    assert [picture["picture"] for picture in made["pictures"]] == names
    base, full, none, half = (pixels(folder / name) for name in names)
    # Batches of another size round otherwise: by one level of 255 at most.
    assert abs(base - pixels(run / "images" / "base" / "normal-001-1.png")).max() <= 1
    assert abs(full - pixels(run / "images" / "r8" / "normal-001-1.png")).max() <= 1
    assert (none == base).all()
    assert abs(full - base).max() > 1 and abs(half - base).sum() < abs(full - base).sum()
    assert (run / "manifest.json").read_bytes() == manifest


def test_later_pictures_of_a_prompt_join_those_that_are_there(run: Path) -> None:
    study = Study.open(run)
    first = study.draw("blue dots", ["r4"])
    folder = run / "tries" / first.folder
    before = (folder / "base.png").stat().st_mtime_ns
    second = study.draw(" blue dots ", ["r8"], epoch="best")
    assert second.folder == first.folder and (folder / "base.png").stat().st_mtime_ns == before
    assert [drawn.name for drawn in second.pictures] == ["base", "r4 at 1", "r8 at 1, best epoch"]
    assert study.draw("blue dots", ["r8"], steps=3).folder != first.folder
    tries, faults = read_tries(RunDir(run))
    assert {item.prompt for item in tries} >= {"blue dots"} and faults == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "red", "--arm", "r5"], "--arm r5: is no arm of this study: name one of r4, r8"),
        (["--prompt", " , "], "holds no words"),
        (["--prompt", "a\tb\0"], "control character"),
        (["--prompt", "red", "--strength", "3"], "--strength 3: must be from 0"),
        (["--prompt", "red", "--strength", "-1"], "--strength -1: must be"),
        (["--prompt", "red", "--steps", "0"], "--steps 0: must be from 1"),
        (["--prompt", "red", "--guidance", "101"], "--guidance 101: must be"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["draw", str(run), *arguments]) == EXIT_INPUT
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lorascope:")]
    assert len(lines) == 1 and words in lines[0]


def test_before_training_and_with_a_failed_arm_there_is_nothing_to_draw(
    study_file: Path, run: Path, tmp_path: Path
) -> None:
    study = make_study(study_file, tmp_path / "new")
    with study.working("test"):
        study.prepare_data()
    with pytest.raises(ConfigError, match="no training has ended here: run `lorascope train"):
        study.draw("red")
    copy = Path(shutil.copytree(run, tmp_path / "failed"))
    for arm, key, value in (("r4", "failed", "diverged"), ("r8", "best", None)):
        path = copy / "adapters" / arm / "training.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ConfigError, match=r"--arm r4: its training failed \(diverged\)"):
        Study.open(copy).draw("red", ["r4"])
    with pytest.raises(ConfigError, match="--checkpoint best: r8 has none"):
        Study.open(copy).draw("red", epoch="best")


def test_the_checks_by_themselves() -> None:
    assert checked_prompt(" a fox ") == "a fox"
    assert checked_settings(SampleSection(), 3, None).steps == 3
    assert [drawn.picture for drawn in plan_pictures(["a", "a"], "best", [1.0, 1.0])] == [
        "base.png",
        "a-best-s1.png",
    ]
    for call in (
        lambda: checked_prompt(""),
        lambda: plan_pictures(["a"], "last", [float("nan")]),
        lambda: checked_settings(SampleSection(), 3, -1.0),
    ):
        with pytest.raises(ConfigError):
            call()


def test_a_damaged_or_later_try_is_told_and_does_not_hide_others(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    picture = Drawn("base", "last", 0.0, "base.png")
    good = Try("good", "red", 0, 2, 7.5, "2026-01-01T00:00:00+00:00", (picture,))
    note_try(run.tries_dir / "good", good)
    for name, text in (
        ("bad", "{"),
        ("later", json.dumps({**json.loads((run.tries_dir / "good" / "try.json").read_text()), "format": 9})),
    ):
        (run.tries_dir / name).mkdir()
        (run.tries_dir / name / "try.json").write_text(text)
    tries, faults = read_tries(run)
    assert tries == [good] and len(faults) == 2
    with pytest.raises(StorageError, match="later version"):
        note_try(run.tries_dir / "later", good)
