"""What would be kept at other prices: the rule's own choices, for the page's slider."""

import html
import json
import re
from pathlib import Path

import pytest

from lorascope.evaluation.choice import choose_point
from lorascope.report.evidence import Facts
from lorascope.report.page import build_report
from lorascope.report.price import MAX_PERCENT, price_choices
from lorascope.run_folder import RunDir
from synthetic_run import make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "two", num_prompts=8, num_steps=8, side_px=16)


def test_every_price_has_the_choice_of_the_rule(run: RunDir) -> None:
    facts = Facts(run)
    prices = price_choices(facts)
    assert prices is not None and facts.verdict is not None
    assert (prices.study, prices.start, len(prices.places)) == (10, 10, MAX_PERCENT + 1)
    assert prices.answer == prices.answers[prices.places[10]]
    assert prices.answer[0] == facts.verdict.headline
    seen = []
    for percent in (0, 3, 10, 20, 50):
        point = choose_point(facts.front, percent / 100, facts.alike, 500).point
        headline = prices.answers[prices.places[percent]][0]
        seen.append(headline)
        expected = "Keep the base" if point is None else f"Keep {point.arm} at strength {point.strength:g},"
        assert headline.startswith(expected)
    assert len(set(seen)) >= 3


def test_the_page_holds_choices_and_the_default_without_a_script(run: RunDir) -> None:
    text = build_report(run).html_path.read_text(encoding="utf-8")
    prices = price_choices(Facts(run))
    assert prices is not None
    (data,) = re.findall(r'id="price" data-choices="([^"]*)"', text)
    held = json.loads(html.unescape(data))
    assert held == {"answers": [list(answer) for answer in prices.answers], "places": list(prices.places)}
    assert f'id="price-answer">{prices.answer[0]}</p>' in text
    assert '<div id="price-control" hidden><label for="price-range">' in text  # a script shows it
    assert re.search(r'<input type="range" id="price-range" min="0" max="50" step="1" value="10"', text)


def test_the_figure_names_what_the_slider_moves(run: RunDir) -> None:
    text = build_report(run).html_path.read_text(encoding="utf-8")
    for part in ("area", "line", "label"):
        assert text.count(f'id="front-price-{part}"') == 1
    (numbers,) = re.findall(r'<svg [^>]*data-low="([^"]*)" data-least="([^"]*)" data-high="([^"]*)"', text)
    low, least, high = map(float, numbers)
    assert least == 90 and low < least < high
    # The area is drawn from the axis's upper end to the line, both without a clip that would move with them.
    (area,) = re.findall(r'id="front-price-area">(.*?)</g>', text, re.DOTALL)
    (line,) = re.findall(r'id="front-price-line">(.*?)</g>', text, re.DOTALL)
    assert "clip-path" not in area + line
    heights = {float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", area)}
    assert {float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", line)} == {max(heights)}
    # Whatever the reader's price, the words under the figure and the table's head name whose price is meant.
    assert (
        "Grey is what costs at most the price that is written at its edge; the study&#39;s own is 10 %"
        in text
    )
    assert "costs at most 10 %, the study&#39;s own price" in text


@pytest.mark.parametrize(("price", "start", "shown"), [("0.125", 12, "12.5 %"), ("0.8", 50, "80 %")])
def test_a_price_that_the_slider_lacks_is_shown_as_it_is(
    run: RunDir, price: str, start: int, shown: str
) -> None:
    text = run.study_toml.read_text(encoding="utf-8")
    run.study_toml.write_text(text.replace("max_prompt_loss = 0.1", f"max_prompt_loss = {price}"))
    prices = price_choices(Facts(run))
    assert prices is not None and (prices.start, f"{prices.study:g} %") == (start, shown)
    assert f"The study&#39;s own price is {shown}." in build_report(run).html_path.read_text(
        encoding="utf-8"
    ).replace("The study's", "The study&#39;s")


def test_without_a_sweep_there_is_no_price_to_move(run: RunDir) -> None:
    run.sweep_parquet.unlink()
    assert price_choices(Facts(run)) is None
    report = build_report(run)
    assert 'id="price"' not in report.html_path.read_text(encoding="utf-8")
    markdown = report.md_path.read_text(encoding="utf-8")
    assert "## 3 What style costs\n\nNot measured: run \\`lorascope diagnose RUN\\`." in markdown
