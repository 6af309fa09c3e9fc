"""The report's album: prompts by rule, pictures of the run folder alone, and no more than the budget."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import Job, save_picture
from lorascope.evaluation.scores import BASE, paired_differences, read_scores
from lorascope.evaluation.sweep_rows import SCALED_INTRUDERS, read_sweep, write_sweep
from lorascope.report.album import Album, _embed
from lorascope.report.evidence import Facts
from lorascope.report.why import arms_in_focus
from lorascope.run_folder import RunDir
from lorascope.sections import SampleSection
from synthetic_run import ABSTRACT, NORMAL, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("runs") / "two", num_prompts=8, sample_seeds=(0, 1), num_steps=80)


def test_prompts_are_chosen_by_rule(run: RunDir) -> None:
    album = Album(Facts(run))
    first = [("normal", 0), ("normal", 1), ("abstract", 0), ("abstract", 1)]
    effect = paired_differences(read_scores(run), "r16", resamples=500)
    rest = sorted(
        (item for item in effect.per_prompt if (item.category, item.prompt_index) not in first),
        key=lambda item: item.difference,
        reverse=True,
    )
    extremes = [(item.category, item.prompt_index) for item in (*rest[:2], rest[-1], rest[-2])]
    assert list(album.chosen) == [*first, *extremes]


def test_pictures_are_taken_in_blocks_until_the_budget_is_used(run: RunDir) -> None:
    album = Album(Facts(run))
    everything = album.fill(10**9)
    scored = [path for path in everything if path.startswith("images/")]
    assert len(scored) == 96  # 16 prompts, 2 seeds, the base and two arms
    strips = {picture.path for _, _, rows in album.strips for _, row in rows for picture in row}
    pairs = {picture.path for _, row in album.pairs for *_, picture in row}
    assert everything == {*scored, *strips, *pairs} and 4 < len(pairs) <= 12
    assert len(strips) == 27  # three prompts by the base and both arms at four strengths
    first = {picture.path for picture in album.blocks()[0]}
    assert len(first) == 24  # the eight chosen prompts of the base and both arms, of the first seed
    assert album.fill(album.size(first)) == first
    assert album.fill(album.size(first) - 1) == set()
    assert album.fill(album.size(everything)) == everything


def test_three_prompts_are_shown_from_strength_to_strength(run: RunDir) -> None:
    facts = Facts(run)
    album = Album(facts)
    strips = album.shown_strips(album.fill(10**9))
    assert [strip.prompt for strip in strips[:2]] == [NORMAL[0], ABSTRACT[0]]
    assert facts.front is not None
    (full,) = [point for point in facts.front.of("r16") if point.strength == 1]
    worst = min(full.per_prompt, key=lambda item: item.difference or 0.0)
    if (worst.category, worst.prompt_index) not in (("normal", 0), ("abstract", 0)):
        assert strips[2].prompt == worst.prompt
    assert "among r16's largest losses" in strips[2].note
    for strip in strips:
        assert [arm for arm, _ in strip.rows] == ["r16", "r64"]
        for arm, pictures in strip.rows:
            assert [picture.arm for picture in pictures] == ["base", "0.25", "0.5", "0.75", "1"]
            assert pictures[0].alt == f"base: {strip.prompt} (seed 0)"
            assert pictures[2].alt == f"{arm} at strength 0.5: {strip.prompt} (seed 0)"
            assert all(picture.source and picture.score for picture in pictures)
            assert pictures[4].path.startswith(f"sweep/{arm}/last-s1.00-g7.5/")


def test_strips_leave_out_other_epochs_guidances_and_arms_out_of_focus(tmp_path: Path) -> None:
    many = make_run(
        tmp_path / "many", ranks=(4, 16, 64), lrs=(5e-4, 1e-3), num_prompts=5, num_steps=4, side_px=16
    )
    sweep = read_sweep(many)
    extra = [row for row in sweep.rows if row.kind == "point" and row.strength == 1]
    changes = ({"epoch": "best"}, {"guidance": 3.0}, {"weights": SCALED_INTRUDERS})
    others = [replace(row, **change) for row in extra for change in changes]
    write_sweep(many, replace(sweep, rows=(*sweep.rows, *others)))
    album = Album(Facts(many))
    focus = arms_in_focus(Facts(many))
    assert 1 < len(focus) <= 3
    for strip in album.shown_strips(set()):
        assert tuple(arm for arm, _ in strip.rows) == focus
        assert {len(pictures) for _, pictures in strip.rows} == {5}
    assert f"Of 6 arms these are shown: {', '.join(focus)}." in album.strip_rule
    many.sweep_parquet.unlink()
    assert Album(Facts(many)).shown_strips(set()) == []


def test_previews_count_as_the_pictures_that_they_are(run: RunDir, tmp_path: Path) -> None:
    copied = RunDir(Path(shutil.copytree(run.path, tmp_path / "copy")))
    job = Job(Prompt("normal", 0, "a rocket"), 0)
    for arm, epoch in ((BASE, 0), ("r16", 1)):
        pixels = np.full((64, 64, 3), 20 * epoch, np.uint8)
        save_picture(copied.preview_path(arm, epoch, job.file_name), pixels, job, arm, SampleSection())
    album = Album(Facts(copied))
    everything = album.fill(10**9)
    assert any(path.startswith("previews/") for path in everything)
    assert album.fill(album.size(everything)) == everything


def test_large_pictures_are_scaled_down(tmp_path: Path) -> None:
    run = make_run(tmp_path / "large", num_prompts=1, side_px=512, num_steps=8)
    uri, side = _embed(run.images_dir / "base" / "normal-000-0.png")
    assert side == 256
    assert uri.startswith("data:image/webp;base64,")
    assert len(uri) < 20_000


def test_picture_outside_the_run_folder_is_not_embedded(run: RunDir, tmp_path: Path) -> None:
    copied = RunDir(Path(shutil.copytree(run.path, tmp_path / "copy")))
    picture = run.images_dir / "r16" / "normal-000-0.png"
    (copied.images_dir / "r16" / "normal-000-0.png").unlink()
    (copied.images_dir / "r16" / "normal-000-0.png").symlink_to(picture)
    album = Album(Facts(copied))
    assert album.embedded(album.by_place["r16", "normal", 0, 0]) == ("", 0)
    assert album.embedded(album.by_place["r64", "normal", 0, 0])[1] == 64
