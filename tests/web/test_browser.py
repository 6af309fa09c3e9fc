"""The way through the web app in a browser: a folder of pictures, a plan, a run, a comparison, a file. While
the run goes on, server and browser are killed.

A real server, a real Chromium, the pocket base. Skipped where there is no Chromium.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from lorascope.adapters.files import load_adapter

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),
]
NUM_PICTURES = 40
SLOW_MS = 150_000
# What the form is told, so that the run takes seconds.
SHORTER = {
    "data.repeats": "1",
    "train.epochs": "2",
    "train.num_probe": "4",
    "sample.steps": "6",
    "diagnose.steps": "6",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`lorascope web` in a folder, and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lorascope", "web", str(folder), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HOME": str(folder.parent)},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                break
        yield process, found[0]  # type: ignore[index]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
        process.stdout.close()


@contextmanager
def window(browser: Browser, address: str) -> Iterator[Page]:
    """A page that is signed in; an error on its console fails the test."""
    context: BrowserContext = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None
    )
    page.goto(address)
    yield page
    context.close()
    assert wrong == []


def pocket_pictures(folder: Path, count: int) -> None:
    """Drawings of the package with their captions, in a folder."""
    source = resources.files("lorascope") / "pocket" / "cartoon" / "data" / "train-00000-of-00001.parquet"
    with resources.as_file(source) as path:
        rows = pq.read_table(path).slice(0, count).to_pylist()
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        (folder / f"{number:02d}.png").write_bytes(row["image"]["bytes"])
        (folder / f"{number:02d}.txt").write_text(row["text"], encoding="utf-8")


def test_from_a_folder_of_pictures_to_a_file(browser: Browser, tmp_path: Path) -> None:
    work, pictures = tmp_path / "work", tmp_path / "work" / "drawings"
    pocket_pictures(pictures, NUM_PICTURES)
    with server(work) as (process, address), window(browser, address) as page:
        assert "token" not in page.url

        # Pictures: the folder is found, a caption is changed, and stands beside its picture.
        page.get_by_role("link", name="Start with pictures").click()
        page.get_by_role("link", name="drawings", exact=True).click()
        page.get_by_role("link", name=re.compile("Use this folder")).or_(
            page.get_by_role("button", name="Use this folder")
        ).click()
        expect(page.get_by_role("heading", name=f"{NUM_PICTURES} pictures")).to_be_visible()
        caption = page.locator("textarea").first
        caption.fill("a green face that feels sick")
        caption.blur()
        expect(page.get_by_text("Saved", exact=False).first).to_be_visible()
        assert "feels sick" in (pictures / "00.txt").read_text(encoding="utf-8")

        # Plan: three answers make a study; it is tried, and started.
        page.get_by_role("link", name="Plan a study with these").click()
        page.get_by_label("At most").fill("1")
        page.get_by_label("Unit").select_option("minutes")
        page.get_by_role("button", name="Make the study").click()
        expect(page.locator("#live")).to_contain_text("Steps", timeout=SLOW_MS)
        for key, value in SHORTER.items():
            part = key.partition(".")[0]
            field = page.locator(f'input[name="{key}"]')
            if not field.is_visible():
                page.locator(f"#part-{part} > summary").click()
            field.fill(value)
            with page.expect_response(re.compile("/keys$")):
                field.blur()
        draft = tomllib.loads(next((work / "studies").glob("*.toml")).read_text(encoding="utf-8"))
        assert (draft["train"]["epochs"], draft["sample"]["steps"]) == (2, 6)
        page.get_by_role("button", name="Check that it runs").click()
        expect(page.locator("#checked")).to_contain_text("would run here", timeout=SLOW_MS)
        page.get_by_role("button", name="Start", exact=True).click()

        # Run: the server is killed, and the browser goes.
        expect(page.get_by_role("status").first).to_contain_text("Running", timeout=SLOW_MS)
        name = page.url.rpartition("/")[2]
        process.kill()
        process.wait()

    with server(work) as (_, address), window(browser, address) as page:
        # The run went on, and is found by its name.
        page.get_by_role("link", name=name, exact=True).first.click()
        expect(page.get_by_role("status").first).to_contain_text("Done", timeout=SLOW_MS)
        expect(page.locator("figure.live svg").first).to_be_visible()

        # Compare: the large view opens by keyboard and closes again.
        page.get_by_role("link", name="Compare", exact=True).click()
        page.locator("table button, table a").locator("img").first.wait_for()
        page.keyboard.press("Tab")
        page.locator("td a, td button").first.focus()
        page.keyboard.press("Enter")
        expect(page.locator("dialog[open]")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("dialog[open]")).to_have_count(0)

        # Result: the file is made, downloaded, and loads.
        page.get_by_role("link", name="Result", exact=True).click()
        page.get_by_role("button", name="Make the file").click()
        link = page.get_by_role("link", name=re.compile(r"Download")).first
        with page.expect_download(timeout=SLOW_MS) as download:
            link.click(timeout=SLOW_MS)
        download.value.save_as(tmp_path / "style.safetensors")
        assert download.value.suggested_filename.endswith(".safetensors")
        assert len(load_adapter(tmp_path / "style.safetensors").modules) > 10
        assert (work / "runs" / name / "report.html").is_file()
