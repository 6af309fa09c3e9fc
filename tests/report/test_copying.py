"""The kept arm's nearest pairs in the report, and what it says where there are none."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lorascope.diagnosis.nearest import Nearest
from lorascope.report.copying import caption_of, copying_texts, nearest_of_kept, say_pair
from lorascope.report.evidence import Facts
from lorascope.report.page import build_report
from lorascope.run_folder import RunDir
from synthetic_run import make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "two", num_prompts=8, num_steps=8, side_px=16)


def copying_section(page: str) -> str:
    return page.split('<section id="copying"')[1].split("</section>")[0]


def test_the_kept_arms_pairs_stand_in_page_and_markdown(run: RunDir) -> None:
    facts = Facts(run)
    found = nearest_of_kept(facts)
    assert found is not None and len(found.pairs) == 4
    report = build_report(run)
    section = copying_section(report.html_path.read_text(encoding="utf-8"))
    assert "r16 drew 16 pictures at full strength. Each was compared with 10 of the 100 training" in section
    assert re.search(
        r"By that \d+ % of the drawings copy a training picture, and \d+ % a held-out one", section
    )
    assert section.count("<img") == 12 and section.count("data:image/webp") == 12
    assert "data-arm" not in section  # they are not among what the viewer compares
    markdown = report.md_path.read_text(encoding="utf-8")
    for pair in found.pairs:
        assert say_pair(pair) in section
        assert f'alt="r16 at full strength: {pair.prompt} (seed 0)"' in section
        caption = caption_of(facts, pair.training.id)
        assert caption and f'alt="training picture {pair.training.id}: {caption}"' in section
        assert f'alt="held-out picture {pair.heldout.id}: ' in section
        assert all(
            f"]({path})" in markdown for path in (pair.drawing, pair.training.picture, pair.heldout.picture)
        )


def test_a_pair_says_what_its_ratio_makes_of_it(run: RunDir) -> None:
    found = nearest_of_kept(Facts(run))
    assert found is not None
    pair = found.pairs[0]
    words = "a copy" if pair.training.ratio < 1 / 3 else "no copy"
    assert f"ratio {pair.training.ratio:.2f}, {words}." in say_pair(pair)


def test_a_run_diagnosed_before_pairs_were_kept_says_how_to_get_them(run: RunDir) -> None:
    run.copying_json.unlink()
    section = copying_section(build_report(run).html_path.read_text(encoding="utf-8"))
    assert "<img" not in section
    assert (
        "Not shown: the version that diagnosed this run did not keep which pictures are nearest." in section
    )


def test_a_run_that_was_not_diagnosed_says_what_to_run(tmp_path: Path) -> None:
    stages = ("data", "encode", "train", "sample", "score")
    facts = Facts(make_run(tmp_path / "two", num_prompts=4, num_steps=8, side_px=16, stages=stages))
    assert copying_texts(facts) == ("Not measured: run `lorascope diagnose RUN`.",)


def test_without_a_kept_arm_or_a_comparison_the_reason_is_said(run: RunDir) -> None:
    facts = Facts(run)
    assert facts.nearest is not None
    facts.nearest = {"r16": Nearest(16, reason="nothing was drawn at full strength")}
    assert copying_texts(facts) == ("Not measured: nothing was drawn at full strength.",)
    facts.nearest = {}
    assert copying_texts(facts) == ("Not measured: copying.json has nothing of r16.",)
    assert facts.verdict is not None
    facts.verdict = replace(facts.verdict, keep=None)
    assert copying_texts(facts)[0].startswith("No arm is kept") and nearest_of_kept(facts) is None


def test_a_lost_picture_is_linked_to_nothing_and_the_rest_stays(run: RunDir) -> None:
    found = nearest_of_kept(Facts(run))
    assert found is not None
    (run.path / found.pairs[0].training.picture).unlink()
    section = copying_section(build_report(run).html_path.read_text(encoding="utf-8"))
    assert "no picture" in section and section.count("<img") < 12
