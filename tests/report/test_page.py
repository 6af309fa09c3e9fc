"""The report: complete, safe, offline, small, deterministic, and with the numbers that `score` gives."""

import base64
import hashlib
import html
import itertools
import os
import re
import shutil
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tomli_w

from lorascope.config import load_study
from lorascope.errors import StorageError
from lorascope.evaluation.contrast import GainContrast
from lorascope.evaluation.front import trace_front
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import Job, save_picture
from lorascope.evaluation.scores import (
    ALL,
    BASE,
    paired_differences,
    planned_contrasts,
    read_scores,
    summary_table,
    write_scores,
)
from lorascope.evaluation.sweep_rows import StyleFacts, read_sweep, write_sweep
from lorascope.evaluation.verdict import reach_verdict
from lorascope.report import page as report_module
from lorascope.report.album import Album
from lorascope.report.conditions import judge_conditions
from lorascope.report.evidence import NOT_MEASURED, Facts, list_warnings
from lorascope.report.figures import build_figures
from lorascope.report.page import Report, build_report, verdict_of
from lorascope.report.tables import Column, Table, build_arms_table, build_contrast_table
from lorascope.run_folder import JsonLines, RunDir
from lorascope.sections import SampleSection
from lorascope.store import read_json, write_json
from synthetic_run import ABSTRACT, NORMAL, make_run

ODD = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> | [a](javascript:1) `b` & {{ 7*7 }}"
VOID_ELEMENTS = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Elements of a page, with a check that every one of them is closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of <{tag}> stands twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID_ELEMENTS:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag, f"</{tag}> closes the wrong element"

    def handle_data(self, data: str) -> None:
        if self.stack and data.strip():
            self.texts.append((self.stack[-1], data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self) -> str:
        return " ".join(data.strip() for tag, data in self.texts if tag not in ("script", "style"))


@pytest.fixture(scope="module")
def two_arms(two_arm_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Report, Page]:
    run = RunDir(Path(shutil.copytree(two_arm_run.path, tmp_path_factory.mktemp("runs") / "two")))
    report = build_report(run)
    return run, report, Page(report.html_path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def many_arms(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Report, Page]:
    run = make_run(
        tmp_path_factory.mktemp("runs") / "many",
        ranks=(4, 8, 16, 32, 64, 128),
        lrs=(1e-4, 2e-4, 5e-4, 1e-3),
        num_prompts=6,
        num_steps=40,
    )
    report = build_report(run)
    return run, report, Page(report.html_path.read_text(encoding="utf-8"))


def state_of(run: RunDir, name: str) -> str:
    return next(condition.state for condition in judge_conditions(Facts(run)) if condition.name == name)


# The page ---------------------------------------------------------------------------------------------------


def test_page_has_all_sections_and_answers_first(two_arms: tuple[RunDir, Report, Page]) -> None:
    run, report, page = two_arms
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == [
        *("verdict", "fair", "trade", "why", "effect", "scale", "training", "look", "copying", "cost"),
        "reproduce",
    ]
    assert ("code", "lorascope next RUN") in page.texts and "`" not in page.text()
    front, probes = trace_front(read_sweep(run), resamples=500), JsonLines(run.metrics_jsonl).read()
    verdict = reach_verdict(read_scores(run), front, probes, study="two", resamples=500)
    assert report.keep == verdict.keep == "r16"
    assert (
        (report.verdict.epoch, report.verdict.strength) == (verdict.epoch, verdict.strength) == ("last", 0.75)
    )
    assert report.verdict.tag == "<lora:two-r16:0.75>"
    assert "Keep r16 at strength 0.75, last epoch" in page.text()
    assert report.answer.startswith("Keep r16 at strength 0.75, last epoch. r16 at strength 0.75 keeps ")
    assert "In a prompt: <lora:two-r16:0.75>." in page.text()
    assert "lorascope export two --arm r16 --strength 0.75" in page.text()
    assert page.all("h1")[0]["data-keep"] == "r16"
    assert "95 % interval" in report.answer
    assert verdict_of(run).answer == report.answer
    prose = " ".join(data for tag, data in page.texts if tag not in ("script", "style", "pre"))
    assert not re.search(r"[{}]|\bnan\b", prose)


def test_page_is_offline_and_guarded(two_arms: tuple[RunDir, Report, Page]) -> None:
    _, report, page = two_arms
    text = report.html_path.read_text(encoding="utf-8")
    assert report.html_path.stat().st_size < 5_000_000
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/webp;base64,", "adapters/", "images/")), (
                tag,
                name,
                value[:60],
            )
        assert not any(name.startswith("on") for name in attributes), f"<{tag}> has an inline handler"
    assert not re.search(r"(?:src|href)=[\"']?\s*(?:https?:)?//|@import|url\(\s*[\"']?(?!#)", text)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}'" in policy


def test_page_is_accessible(two_arms: tuple[RunDir, Report, Page]) -> None:
    _, _, page = two_arms
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(ids), (tag, attributes[name])
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
    assert all("alt" in attributes for attributes in page.all("img"))
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("type") == "button" for attributes in page.all("button"))


def test_every_figure_stands_in_page_markdown_and_folder(two_arms: tuple[RunDir, Report, Page]) -> None:
    run, report, page = two_arms
    keys = ["front", "effect", "scale", "loss", "probe-epochs", "probe-bands", "cost", "layers"]
    assert sorted(path.name for path in report.figure_paths) == sorted(
        f"{key}.{suffix}" for key in keys for suffix in ("svg", "png")
    )
    markdown = run.report_md.read_text(encoding="utf-8")
    for key in keys:
        svg = (run.figures_dir / f"{key}.svg").read_text(encoding="utf-8")
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert "currentColor" in svg
        assert "<text" in svg
        assert "<dc:date>" not in svg
        assert re.search(rf"!\[[^\n]+\]\(figures/{key}\.png\)", markdown)
        assert any(attributes.get("aria-labelledby") == f"figure-{key}" for attributes in page.all("figure"))
    assert len(page.all("svg")) == len(keys)
    assert page.text().count("Data of this figure as a table") == len(keys)
    assert "Figure 1 of the reference study" in page.text()
    assert "Figure 2 of the reference study" in page.text()


def test_equal_run_gives_equal_bytes(two_arms: tuple[RunDir, Report, Page], copied: RunDir) -> None:
    run, report, _ = two_arms
    build_report(copied)
    for path in (report.html_path, report.md_path, *report.figure_paths):
        assert path.read_bytes() == (copied.path / path.relative_to(run.path)).read_bytes(), path.name


def test_tables_hold_the_numbers_of_score(two_arms: tuple[RunDir, Report, Page]) -> None:
    run, _, page = two_arms
    facts, scores = Facts(run), read_scores(run)
    resamples = load_study(run.study_toml, environment={}).score.resamples
    summary = {(row.arm, row.category): row for row in summary_table(scores, resamples)}
    table = build_arms_table(facts)
    names = [column.name for column in table.columns]
    assert [row.cells[0].text for row in table.rows] == [BASE, "r16", "r64"]
    for row in table.rows:
        cells = dict(zip(names, row.cells, strict=True))
        arm = row.cells[0].text
        for category in ("normal", "abstract"):
            expected = summary[arm, category]
            assert cells[f"{category} (std)"].value == expected.mean
            assert cells[f"{category} (std)"].text == f"{expected.mean:.2f} ({expected.std:.2f})"
            assert cells[f"{category} (std)"].text in page.text()
        if arm != BASE:
            effect = paired_differences(scores, arm, resamples=resamples)
            assert cells["minus base"].value == effect.difference
            assert cells["95 % interval"].text == f"{effect.low:+.2f} to {effect.high:+.2f}".replace("-", "−")
    contrasts = build_contrast_table(facts)
    assert contrasts is not None
    for row, contrast in zip(contrasts.rows, planned_contrasts(scores, resamples), strict=True):
        assert [cell.value for cell in row.cells[1:]] == [
            contrast.difference.difference,
            contrast.difference.low,
            contrast.difference.high,
            contrast.p_value,
            contrast.p_adjusted,
        ]


def test_the_chosen_prompts_come_first_and_no_picture_is_left_out(
    two_arms: tuple[RunDir, Report, Page],
) -> None:
    page = two_arms[2]
    rows = [attributes for attributes in page.all("div") if "data-key" in attributes]
    assert [row["data-prompt"] for row in rows[:4]] == [NORMAL[0], NORMAL[1], ABSTRACT[0], ABSTRACT[1]]
    shown = {(row["data-key"]) for row in rows}
    assert len(shown) == 32  # 16 prompts x 2 seeds, every one on the page
    assert "two with the largest losses of r16" in page.text()


def test_many_arms_get_a_sortable_table_and_details_of_few(many_arms: tuple[RunDir, Report, Page]) -> None:
    run, report, page = many_arms
    facts = Facts(run)
    assert len(facts.arms) == 24
    assert report.html_path.stat().st_size < 5_000_000
    assert sum("data-sortable" in attributes for attributes in page.all("table")) == 1
    ranked = facts.ranked
    assert facts.detailed == tuple(dict.fromkeys((report.keep, facts.runner_up, ranked[-1])))  # type: ignore[union-attr]
    roles = {row.cells[0].text: row.cells[1].text for row in build_arms_table(facts).rows}
    assert roles[ranked[-1]] == "worst"
    assert list(roles.values()).count("") == 22
    assert (run.figures_dir / "gain.svg").exists()
    assert build_contrast_table(facts) is None
    assert len({attributes.get("data-arm") for attributes in page.all("img")} - {None}) == 25


def test_page_stays_under_the_limit_by_linking_pictures(
    two_arms: tuple[RunDir, Report, Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, report, page = two_arms
    full = len([a for a in page.all("img") if "data-arm" in a])
    limit = report.html_path.stat().st_size - 20_000
    monkeypatch.setattr(report_module, "MAX_HTML_BYTES", limit)
    facts = Facts(run)
    content = report_module._content(facts, verdict_of(run), build_figures(facts))
    text = report_module._render_page(facts, content)
    fewer = len([a for a in Page(text).all("img") if "data-arm" in a])
    assert len(text.encode()) <= limit
    assert 24 <= fewer < full  # the eight chosen prompts of base and two arms are always there
    assert f"{full - fewer} pictures are not embedded" in text


# Unusual runs -----------------------------------------------------------------------------------------------


def test_failed_arm_is_shown_as_failed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "failed", ranks=(16, 64, 128), failed=("r128",), num_prompts=2, num_steps=60)
    report = build_report(run)
    page = Page(report.html_path.read_text(encoding="utf-8"))
    table = build_arms_table(Facts(run))
    (failed,) = [row for row in table.rows if row.cells[0].text == "r128"]
    assert failed.cells[1].text == "failed"
    assert [cell.text for cell in failed.cells[-5:]] == [NOT_MEASURED] * 5
    assert all(cell.value is None and cell.void for cell in failed.cells[-5:])
    assert state_of(run, "Every planned arm was compared") == "caution"
    assert "Arm r128 failed: loss or gradient is not finite at step 41." in page.text()
    assert NOT_MEASURED in [
        cell.text for row in table.rows[1:3] for cell in row.cells
    ]  # four prompts give no interval


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "odd", ranks=(16,), odd_text=ODD, num_prompts=2, num_steps=20, with_probes=False
    )
    text = build_report(run).html_path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1
    assert "onerror" not in {name for _, attributes in page.elements for name in attributes}
    assert ODD in [attributes.get("data-prompt") for attributes in page.all("div")]
    assert f"r16: {ODD} (seed 0)" in [attributes["alt"] for attributes in page.all("img")]
    assert state_of(run, "Test prompts are not training captions") == "caution"
    markdown = run.report_md.read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert "[a](javascript" not in markdown


def test_without_probes_style_is_not_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "quiet", num_prompts=4, num_steps=20, with_probes=False)
    report = build_report(run)
    page = Page(report.html_path.read_text(encoding="utf-8"))
    assert not any("probe" in path.name for path in report.figure_paths)
    assert "Held-out loss: not measured." in page.text()
    assert {row.cells[-1].text for row in build_arms_table(Facts(run)).rows[1:]} == {NOT_MEASURED}


def test_trained_but_not_sampled_gives_a_partial_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "early", num_steps=20, stages=("data", "encode", "train"))
    report = build_report(run)
    page = Page(report.html_path.read_text(encoding="utf-8"))
    assert report.keep is None
    assert report.answer.startswith("No verdict yet. 2 arms trained; the score stage has not run")
    assert page.text().count("Not measured: the score stage has not run.") == 2
    assert "Not measured: the sample stage has not run." in page.text()
    assert not page.all("img")


def test_sampled_but_not_scored_shows_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorascope.report.evidence._pocket_quality", lambda: None)
    run = make_run(tmp_path / "unscored", num_prompts=3, num_steps=20, stages=("data", "train", "sample"))
    facts = Facts(run)
    content = report_module._content(facts, verdict_of(run), {})
    page = Page(report_module._render_page(facts, content))
    assert len([a for a in page.all("img") if "data-arm" in a]) == 18
    assert "scores were not measured" in page.text()
    assert state_of(run, "Merged weights draw the same pictures") == NOT_MEASURED
    assert state_of(run, "Same prompts and initial noise in the test") == NOT_MEASURED
    assert state_of(run, "The base follows its prompts") == NOT_MEASURED
    assert state_of(run, "The scorer tells captions apart") == NOT_MEASURED


@pytest.mark.parametrize(("recall", "state"), [(0.76, "yes"), (0.4, "caution")])
def test_the_shipped_scorers_quality_is_stated_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recall: float, state: str
) -> None:
    quality = {"scorer_r1": 0.3, "scorer_r5": recall, "base_r1": 0.59, "base_r5": 0.85}
    monkeypatch.setattr("lorascope.report.evidence._pocket_quality", lambda: quality)
    run = make_run(tmp_path / "unscored", num_prompts=3, num_steps=20, stages=("data", "train", "sample"))
    assert state_of(run, "The scorer tells captions apart") == state
    assert f"{recall:.0%}" in build_report(run).md_path.read_text()


def test_nothing_kept_keeps_the_base(copied: RunDir) -> None:
    sweep = read_sweep(copied)
    write_sweep(copied, replace(sweep, rows=tuple(replace(row, style=0.0) for row in sweep.rows)))
    report = build_report(copied)
    assert (report.keep, report.verdict.decision) == (None, "keep_base")
    assert report.answer.startswith("Keep the base. No arm was shown to gain style at a cost of at most 10 %")
    page = Page(report.html_path.read_text(encoding="utf-8"))
    assert page.all("h1")[0]["data-keep"] == "" and "Keep the base" in page.text()
    assert "Keeps of the prompts" not in page.text()


def test_a_run_that_was_not_diagnosed_says_what_to_run(copied: RunDir) -> None:
    copied.sweep_parquet.unlink()
    report = build_report(copied)
    assert (report.keep, report.verdict.decision, report.verdict.tag) == (None, "cannot_tell", None)
    assert report.answer.startswith(
        "Cannot tell which arm to keep. Not measured: run `lorascope diagnose RUN`. At full strength r16 "
    )
    markdown = copied.report_md.read_text(encoding="utf-8")
    assert markdown.startswith("# Cannot tell which arm to keep\n") and "not measured: run" in markdown


def test_where_style_was_not_measured_the_report_says_why(copied: RunDir) -> None:
    write_sweep(copied, replace(read_sweep(copied), style=StyleFacts(reason="no real pictures")))
    answer = verdict_of(copied)
    assert (answer.keep, answer.decision) == (None, "cannot_tell")
    assert answer.sentences[0] == "No real pictures."


def test_a_point_of_an_earlier_epoch_is_kept_with_how_to_export_it(copied: RunDir) -> None:
    sweep = read_sweep(copied)
    rows = [
        replace(row, epoch="best") if (row.arm, row.strength) == ("r16", 0.75) else row for row in sweep.rows
    ]
    write_sweep(copied, replace(sweep, rows=tuple(rows)))
    report = build_report(copied)
    assert report.answer.startswith("Keep r16 at strength 0.75, the epoch of its lowest held-out loss.")
    markdown = copied.report_md.read_text(encoding="utf-8")
    assert "lorascope export two --arm r16 --checkpoint best --strength 0.75" in markdown
    assert "For WebUI" not in markdown


def test_the_answers_pictures_are_of_the_chosen_strength(copied: RunDir) -> None:
    facts = Facts(copied)
    content = report_module._content(facts, verdict_of(copied), {})
    hero = content["verdict"]["hero"]
    assert [picture.arm for picture in hero] == ["base", "r16 at 0.75", "r16 at 1", "r64 at 0.5"]
    page = Page(report_module._render_page(facts, content))
    assert "r16 at 0.75: a man reading a newspaper (seed 0)" in [image["alt"] for image in page.all("img")]
    (copied.path / hero[1].path).unlink()
    left = Page(report_module._render_page(facts, content))
    assert not any(image["alt"].startswith("r16 at 0.75") for image in left.all("img"))


def test_an_arm_that_fails_at_full_strength_stands_in_the_answer(copied: RunDir) -> None:
    facts = Facts(copied)
    assert facts.verdict is not None
    contrast = GainContrast(
        ("r64",), ("r64-gain-r16",), ("r16",), "strength", "At strength 1 r64 keeps little."
    )
    facts.verdict = replace(facts.verdict, contrast=contrast)
    hero = report_module._content(facts, verdict_of(copied), {})["verdict"]["hero"]
    assert [picture.arm for picture in hero] == ["base", "r16 at 0.75", "r16 at 1", "r64 at 0.75"]


def test_missing_picture_is_said(copied: RunDir) -> None:
    (copied.images_dir / "r16" / "normal-000-0.png").unlink()
    facts = Facts(copied)
    page = Page(report_module._render_page(facts, report_module._content(facts, verdict_of(copied), {})))
    assert "no picture" in page.text()


# Fair test? -------------------------------------------------------------------------------------------------


def test_conditions_of_the_plain_run(two_arms: tuple[RunDir, Report, Page]) -> None:
    states = {condition.name: condition.state for condition in judge_conditions(Facts(two_arms[0]))}
    caution = {"Several training seeds", "Same strength of the update"}
    assert {name for name, state in states.items() if state == "caution"} == caution
    assert {state for name, state in states.items() if name not in caution} == {"yes"}


def test_near_duplicates_are_counted_and_named(two_arms: tuple[RunDir, Report, Page]) -> None:
    assert (
        "2 pictures in 1 group of near duplicates, kept on one side of the split: row-0003, row-0131. "
        "data.json lists them."
    ) in list_warnings(Facts(two_arms[0]))


def test_leaks_are_found(copied: RunDir) -> None:
    data = read_json(copied.data_json)
    data["duplicates"].append({"kind": "near", "ids": ["row-0001", "row-0101"], "action": "none"})
    write_json(copied.data_json, data)
    assert state_of(copied, "No training picture among the held-out ones") == "no"
    data["heldout"][0]["digest"] = data["train"][0]["digest"]
    data["duplicates"] = []
    data["train"][5]["caption"] = f"  {NORMAL[0].upper()}. "
    write_json(copied.data_json, data)
    assert state_of(copied, "No training picture among the held-out ones") == "no"
    assert state_of(copied, "Test prompts are not training captions") == "caution"
    copied.data_json.unlink()
    assert state_of(copied, "No training picture among the held-out ones") == NOT_MEASURED


def test_an_earlier_epoch_that_was_better_is_told_with_where_its_adapter_lies(copied: RunDir) -> None:
    path = copied.adapters_dir / "r64" / "training.json"
    last = Facts(copied).config.train.epochs
    for epoch, told in ((last, False), (2, True)):
        write_json(path, {**read_json(path), "best": {"step": 1, "epoch": epoch, "heldout_loss": 0.1}})
        facts = Facts(copied)
        assert (
            any("in r64 (epoch 2)" in warning and "best" in warning for warning in list_warnings(facts))
            == told
        )
        [column] = [
            index
            for index, column in enumerate(build_arms_table(facts).columns)
            if column.name == "best epoch"
        ]
        cells = {row.cells[0].text: row.cells[column].text for row in build_arms_table(facts).rows}
        assert (cells["r64"], cells["r16"], cells["base"]) == (str(epoch), NOT_MEASURED, "")


def test_previews_stand_in_the_page_by_epoch_and_stay_out_of_the_comparison(copied: RunDir) -> None:
    job = Job(Prompt("normal", 0, "a rocket"), 0)
    for arm, epochs in ((BASE, [0]), ("r16", range(1, 10)), ("r64", [1, 2])):
        for epoch in epochs:
            pixels = np.full((64, 64, 3), 20 * epoch, np.uint8)
            save_picture(copied.preview_path(arm, epoch, job.file_name), pixels, job, arm, SampleSection())
    rows = {row.key: row for row in Album(Facts(copied)).previews(set())}
    shown = {key: [picture.arm for picture in row.pictures] for key, row in rows.items()}
    assert shown == {
        "r16-normal-000": ["base", "epoch 2", "epoch 4", "epoch 5", "epoch 7", "epoch 9"],
        "r64-normal-000": ["base", "epoch 1", "epoch 2"],
    }
    page = build_report(copied).html_path.read_text()
    assert "During training: 2 rows of previews" in page and page.count('alt="r64, epoch 2: a rocket"') == 1
    assert not re.search(r'alt="r64, epoch 2: a rocket"[^>]*data-arm', page)


def test_merge_and_length_are_judged(copied: RunDir) -> None:
    write_json(
        copied.merge_check_json,
        {"r16": {"relative_error": 0.5, "tolerance": 1e-3, "mean_pixel_difference": 9.0, "ok": False}},
    )
    assert state_of(copied, "Merged weights draw the same pictures") == "no"
    assert any(
        "merged and unmerged outputs differ by 0.5" in warning for warning in list_warnings(Facts(copied))
    )
    write_json(
        copied.merge_check_json,
        {"r16": {"relative_error": 1e-7, "tolerance": 1e-3, "mean_pixel_difference": 0.0, "ok": True}},
    )
    assert state_of(copied, "Merged weights draw the same pictures") == "caution"
    path = copied.adapters_dir / "r64" / "training.json"
    write_json(path, {**read_json(path), "steps": 3})
    assert state_of(copied, "Same training length") == "no"


def test_batches_of_several_sizes_and_passes_side_by_side_are_told(copied: RunDir) -> None:
    frozen, arms = (
        tomllib.loads(copied.study_toml.read_text()),
        load_study(copied.study_toml, environment={}).expand_arms(),
    )
    frozen["arms"] = [
        {**arm.model_dump(exclude_none=True), "batch_size": 4 * (1 + number % 2)}
        for number, arm in enumerate(arms)
    ]
    copied.study_toml.write_text(tomli_w.dumps(frozen))
    for number, arm in enumerate(arms):
        path = copied.adapters_dir / arm.name / "training.json"
        write_json(path, {**read_json(path), "side_by_side": 2, "steps": 100 // (1 + number % 2)})
    facts = Facts(copied)
    condition = next(item for item in judge_conditions(facts) if item.name == "Same training length")
    assert (
        condition.state == "caution"
        and "Every arm saw the same pictures, but in batches of several sizes" in condition.text
    )
    assert Column("batch size") in build_arms_table(facts).columns


def test_seeds_are_judged(tmp_path: Path) -> None:
    several = make_run(
        tmp_path / "seeds", ranks=(16,), training_seeds=(0, 1, 2), num_steps=8, stages=("train",)
    )
    assert state_of(several, "Several training seeds") == "yes"
    assert state_of(several, "Same order, noise and timesteps in training") == "yes"
    assert state_of(several, "Same strength of the update") == "yes"
    uneven = make_run(
        tmp_path / "uneven",
        ranks=(16, 64),
        training_seeds=(0, 1),
        num_steps=8,
        stages=("train",),
        failed=("r16-s1",),
    )
    assert state_of(uneven, "Several training seeds") == "caution"
    assert state_of(uneven, "Same order, noise and timesteps in training") == "caution"
    lone = make_run(tmp_path / "lone", ranks=(16,), num_steps=8, stages=("train",))
    assert state_of(lone, "Same order, noise and timesteps in training") == NOT_MEASURED
    assert state_of(lone, "Same strength of the update") == NOT_MEASURED


def test_comparisons_at_equal_lr_and_at_matched_gain_are_told_apart(copied: RunDir) -> None:
    def judge(r16: dict[str, Any], r64: dict[str, Any]) -> tuple[str, str, Table]:
        frozen = tomllib.loads(copied.study_toml.read_text())
        frozen["arms"] = [{"name": "r16", "rank": 16, **r16}, {"name": "r64", "rank": 64, **r64}]
        copied.study_toml.write_text(tomli_w.dumps(frozen))
        facts = Facts(copied)
        name = "Same strength of the update"
        condition = next(item for item in judge_conditions(facts) if item.name == name)
        return condition.state, condition.text, build_arms_table(facts)

    state, text, table = judge({"lr": 1e-3}, {"lr": 1e-3})
    assert state == "caution" and text.startswith(
        "Gain matched: no. lr x scale x √rank goes from 0.004 (r16)"
    )
    assert "at matched gain" not in table.caption and "gain is lr x scale x √rank" in table.caption
    [column] = [index for index, column in enumerate(table.columns) if column.name == "gain"]
    assert [row.cells[column].text for row in table.rows] == ["", "0.004", "0.008"]
    state, text, table = judge({"lr": 1e-3}, {"match_gain": "r16", "scaling": "rslora"})
    assert (state, text) == ("yes", "Gain matched: yes. lr x scale x √rank is 0.004 for every arm.")
    assert "; at matched gain: r16 and r64" in table.caption and "gain 0.004 throughout" in table.caption
    assert "alpha is as in files: √rank times the study's with rsLoRA" in table.caption
    assert not {"init", "lr ratio"} & {column.name for column in table.columns}
    assert "kaiming" not in table.caption and "lr ratio" not in table.caption
    _, _, table = judge({"lr": 1e-3, "init": "gaussian"}, {"lr": 1e-3, "lr_ratio": 16, "init": "orthogonal"})
    names = [column.name for column in table.columns]
    rows = [[row.cells[names.index(name)].text for name in ("init", "lr ratio")] for row in table.rows]
    assert rows == [["", ""], ["gaussian", "1"], ["orthogonal", "16"]]
    assert "gain is lr x lr ratio x scale x √rank" in table.caption
    _, _, table = judge({"lr": 1e-3, "max_weight_norm": 2.5}, {"lr": 1e-3})
    column = [column.name for column in table.columns].index("max weight norm")
    assert [row.cells[column].text for row in table.rows] == ["", "2.5", "none"]
    _, _, table = judge({"lr": 1e-3, "lr_ratio": 16}, {"match_gain": "r16", "lr_ratio": 16})
    assert "lr ratio 16 throughout" in table.caption and "at matched gain: r16 and r64" in table.caption


def test_of_some_arms_at_matched_gain_the_others_are_named(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "some",
        ranks=(16, 64),
        lrs=(5e-4, 1e-3),
        training_seeds=(0, 1),
        num_steps=8,
        stages=("train",),
    )
    facts = Facts(run)
    condition = next(item for item in judge_conditions(facts) if item.name == "Same strength of the update")
    assert condition.state == "yes"
    assert condition.text == (
        "Gain matched: yes for r16-lr0.001 and r64-lr0.0005 (0.008); no for others: over all arms lr x scale "
        "x √rank goes from 0.004 (r16-lr0.0005-s0) to 0.016 (r64-lr0.001-s0), 4 times as much: what looks "
        "like rank may be strength. At equal lr, not at matched gain: r16-lr0.0005 and r64-lr0.0005; "
        "r16-lr0.001 and r64-lr0.001."
    )
    assert (
        "; at equal lr: r16-lr0.0005 and r64-lr0.0005; at equal lr: r16-lr0.001 and r64-lr0.001; "
        "at matched gain: r16-lr0.001 and r64-lr0.0005"
    ) in build_arms_table(facts).caption


def test_scorer_of_the_base_calls_for_caution(copied: RunDir) -> None:
    text = copied.study_toml.read_text()
    for model, state in (("openai/clip-vit-large-patch14", "caution"), ("someone/clip", NOT_MEASURED)):
        copied.study_toml.write_text(text.replace('[score]\nmodel = "pocket"', f'[score]\nmodel = "{model}"'))
        assert state_of(copied, "The scorer is not the base's own text encoder") == state


# Errors and small parts -------------------------------------------------------------------------------------


def test_folder_without_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no study\.toml here"):
        build_report(RunDir(tmp_path))


def test_folder_without_trained_arm_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "new", stages=("data",))
    with pytest.raises(StorageError, match=r"no arm has finished stage `train`"):
        build_report(run)


def test_scores_of_another_study_are_refused(copied: RunDir) -> None:
    text = copied.study_toml.read_text()
    copied.study_toml.write_text(text.replace("64,", "32,"))
    with pytest.raises(StorageError, match=r"merge_check.json: damaged \(arm 'r64' is not of this study\)"):
        build_report(copied)
    copied.merge_check_json.unlink()
    with pytest.raises(StorageError, match=r"line \d+ is damaged \(arm 'r64' is not of this study\): delete"):
        build_report(copied)
    copied.metrics_jsonl.unlink()
    with pytest.raises(StorageError, match=r"scores r64, not a finished arm of this study"):
        build_report(copied)
    scores = read_scores(copied)
    write_scores(copied, replace(scores, rows=tuple(row for row in scores.rows if row.arm != "r64")))
    with pytest.raises(StorageError, match=r"sweep.parquet: holds r64, not a finished arm of this study"):
        build_report(copied)
    copied.sweep_parquet.unlink()
    with pytest.raises(StorageError, match=r"diagnosis.json: diagnoses r64, not an arm of this study: del"):
        build_report(copied)


def test_damaged_picture_is_refused(copied: RunDir) -> None:
    (copied.images_dir / "r16" / "normal-000-0.png").write_bytes(b"no picture")
    with pytest.raises(StorageError, match=r"normal-000-0\.png: not a readable picture"):
        build_report(copied)


def test_a_trained_arm_without_its_costs_is_refused(copied: RunDir) -> None:
    path = copied.adapters_dir / "r16" / "training.json"
    facts = read_json(path)
    del facts["run_time_s"]
    write_json(path, facts)
    with pytest.raises(StorageError, match=r"training\.json: lost or damaged after training: put the file"):
        build_report(copied)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("place", ["images/r16/normal-000-0.png", "previews/r16/epoch-0001/normal-000-0.png"])
def test_a_pipe_in_the_place_of_a_picture_is_not_opened(place: str, copied: RunDir) -> None:
    copied.scores_parquet.unlink()  # pictures are then known by their files alone
    (copied.path / place).parent.mkdir(parents=True, exist_ok=True)
    (copied.path / place).unlink(missing_ok=True)
    os.mkfifo(copied.path / place)
    with pytest.raises(StorageError, match=r"normal-000-0\.png: is a named pipe, where a file is needed"):
        build_report(copied)


def test_report_shows_itself_in_a_notebook(two_arms: tuple[RunDir, Report, Page]) -> None:
    _, report, _ = two_arms
    frame = Page(report._repr_html_()).all("iframe")[0]
    assert frame["srcdoc"] == report.html_path.read_text(encoding="utf-8")
    assert "allow-same-origin" not in frame["sandbox"]
    assert html.escape(frame["srcdoc"], quote=True) in report._repr_html_()


def test_markdown_has_tables_links_and_images(two_arms: tuple[RunDir, Report, Page]) -> None:
    run, _, _ = two_arms
    markdown = run.report_md.read_text(encoding="utf-8")
    assert markdown.startswith("# Keep r16 at strength 0.75, last epoch\n")
    for heading in (
        "1 Verdict",
        "2 Was it a fair test?",
        "3 What style costs",
        "4 Why",
        "5 Effect",
        "6 Where",
        "7 Training",
        "8 How",
        "9 Does it copy",
        "10 What",
        "11 Reproduce",
    ):
        assert f"\n## {heading}" in markdown
    for path in re.findall(r"\]\(([^)]+)\)", markdown):
        assert (run.path / path).exists(), path
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_all_category_name_is_the_scores(two_arms: tuple[RunDir, Report, Page]) -> None:
    assert {category for _, category in Facts(two_arms[0]).effects} == {"normal", "abstract", ALL}
