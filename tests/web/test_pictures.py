"""The Pictures step as a browser meets it."""

import io
import re
import time
import zipfile
from html import escape
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from captioners import make_blip
from lorascope.errors import ConfigError
from lorascope.web.picture_set import PictureSet
from lorascope.web.pictures import View, _model, start_captions
from lorascope.web.services import Services
from lorascope.web.workspace import OutsideError
from web_client import make_services


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return make_services(tmp_path / "work")


@pytest.fixture
def art(services: Services) -> Path:
    folder = services.workspace.folder / "art"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 48), (index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a hat, number {index}")
    return folder


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    return buffer.getvalue()


def version_of(client: TestClient, name: str) -> str:
    text = client.get("/pictures/caption", params={"folder": "art", "name": name}).text
    found = re.search(r'name="version" value="(\w+)"', text)
    assert found is not None
    return found[1]


def test_a_folder_is_chosen(client: TestClient, art: Path) -> None:
    text = client.get("/pictures").text
    assert "/pictures?at=art" in text
    assert "3 pictures" in text
    assert client.get("/pictures/set?folder=art").status_code == 200
    assert '<a href="/pictures/set?folder=art">art</a>' in client.get("/pictures").text


@pytest.mark.parametrize(
    "path", ["..", "/etc", "\\\\host\\share", "//host/share", ".lorascope-web", "art/../.."]
)
def test_nothing_outside_is_shown(client: TestClient, art: Path, path: str) -> None:
    for address in ("/pictures", "/pictures/set", "/pictures/thumb"):
        answer = client.get(address, params={"at": path, "folder": path, "name": "0.png"})
        assert answer.status_code == 403, address
    assert client.get("/pictures/thumb", params={"folder": "art", "name": f"{path}/0.png"}).status_code == 403
    for address in ("caption", "change", "undo", "blip", "check"):
        values = {"folder": path, "name": "0.png", "text": "a", "trigger": "a"}
        assert client.post(f"/pictures/{address}", data=values).status_code == 403, address


def test_a_set_shows_pictures_captions_and_crops(client: TestClient, art: Path) -> None:
    text = client.get("/pictures/set?folder=art&resolution=64").text
    assert "a hat, number 2</textarea>" in text
    assert 'viewBox="0 0 64 48"' in text
    assert 'href="/plan?folder=art"' in text
    answer = client.get("/pictures/thumb?folder=art&name=0.png")
    assert answer.content[:4] == b"RIFF"
    assert "viewBox" not in client.get("/pictures/set?folder=art&resolution=0").text
    assert "multiple of 8" in client.get("/pictures/set?folder=art&resolution=100").text


def test_hostile_names_and_captions_are_text(client: TestClient, art: Path) -> None:
    name = '"><img src=x onerror=alert(1)>.png'
    (art / name).write_bytes(png())
    hostile = "</textarea><script>alert(1)</script>"
    (art / name).with_suffix(".txt").write_text(hostile)
    text = client.get("/pictures/set?folder=art").text
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert escape(hostile) in text
    values = {"folder": "art", "name": name, "text": "mine", "version": "old"}
    for headers in ({}, {"hx-request": "true"}):
        conflict = client.post("/pictures/caption", data=values, headers=headers).text
        assert escape(hostile) in conflict
        assert "<script>alert" not in conflict
    shown = client.post("/pictures/change", data={"folder": "art", "trigger": "<b>"}).text
    assert escape(hostile) in shown
    assert "<b>, " not in shown


def test_two_tabs_save_one_caption(client: TestClient, art: Path) -> None:
    version = version_of(client, "0.png")
    values = {"folder": "art", "name": "0.png", "version": version}
    saved = client.post("/pictures/caption", data={**values, "text": "one"}, headers={"hx-request": "true"})
    assert "Saved" in saved.text
    late = client.post("/pictures/caption", data={**values, "text": "two"}, headers={"hx-request": "true"})
    assert (late.status_code, "Not saved" in late.text, ">one<" in late.text) == (200, True, True)
    # What the tab says next is still held against the version that it showed.
    assert f'name="version" value="{version}"' in late.text
    plain = client.post("/pictures/caption", data={**values, "text": "two"})
    assert (plain.status_code, "one" in plain.text, "two</textarea>" in plain.text) == (409, True, True)
    assert (art / "0.txt").read_text() == "one\n"
    mine = {
        **values,
        "version": version_of(client, "0.png"),
        "text": "two",
        "back": "folder=art&page=1",
        "index": 1,
    }
    done = client.post("/pictures/caption", data=mine)
    assert (done.status_code, done.headers["location"]) == (303, "/pictures/set?folder=art&page=1#p1")
    assert (art / "0.txt").read_text() == "two\n"


def test_all_captions_are_changed_after_a_look_and_back(client: TestClient, art: Path) -> None:
    values = {"folder": "art", "find": "hat", "replacement": "cap", "kind": "tag"}
    assert "No caption would change" in client.post("/pictures/change", data=values).text
    values["find"] = "a hat"
    look = client.post("/pictures/change", data=values, headers={"hx-request": "true"}).text
    assert "3 captions would change" in look
    found = re.search(r'name="digest" value="(\w+)"', look)
    assert found is not None
    assert (art / "0.txt").read_text() == "a hat, number 0"
    done = client.post("/pictures/change", data={**values, "step": "do", "digest": found[1]})
    assert done.status_code == 303
    assert (art / "0.txt").read_text() == "cap, number 0\n"
    assert "3 captions" in client.get("/pictures/set?folder=art").text
    (art / "1.txt").write_text("another")
    undone = client.post("/pictures/undo", data={"folder": "art"}).text
    assert "1.txt" in undone
    assert [(art / f"{index}.txt").read_text() for index in (0, 1)] == ["a hat, number 0\n", "another"]
    gone = client.post("/pictures/undo", data={"folder": "art"})
    assert gone.status_code == 404


def test_pictures_are_sent_one_by_one(client: TestClient, services: Services) -> None:
    answer = client.post("/pictures/upload/mine?file=1.png", content=png())
    assert answer.json() == {"pictures": ["1.png"], "captions": [], "left_out": [], "folder": "pictures/mine"}
    answer = client.post("/pictures/upload/mine?file=1.txt&beside=1.png", content=b"a cat")
    assert answer.json()["captions"] == ["1.txt"]
    answer = client.post("/pictures/upload/mine?file=2.png", content=b"<svg/>")
    assert "SVG" in answer.json()["left_out"][0][1]
    for path in ("10_cat/3.png", "10_cat/../../4.png", "/etc/5.png"):
        client.post("/pictures/upload/mine", params={"file": path}, content=png())
    folder = services.workspace.pictures_dir / "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["1.png", "1.txt", "10_cat", "etc"]
    assert [path.name for path in services.workspace.pictures_dir.iterdir()] == ["mine"]
    assert client.post("/pictures/upload/..%2F..?file=1.png", content=png()).status_code == 404
    assert (
        client.post(
            "/pictures/upload/mine?file=1.png", content=png(), headers={"x-csrf-token": ""}
        ).status_code
        == 403
    )


def test_a_form_without_javascript_sends_them_all(client: TestClient, services: Services) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", png())
        archive.writestr("../b.png", png())
    form = client.get("/pictures").text
    found = re.search(r'action="(/pictures/upload\?csrf=\w+)"', form)
    assert found is not None
    del client.headers["x-csrf-token"]
    files = [
        ("files", ("1.txt", b"a cat")),
        ("files", ("1.png", png())),
        ("files", ("set.zip", buffer.getvalue())),
    ]
    answer = client.post(found[1], data={"name": "mine"}, files=files)
    assert "Left out: 1" in answer.text
    assert "leads out" in answer.text
    folder = services.workspace.pictures_dir / "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["1.png", "1.txt", "a.png"]
    done = client.post(found[1], data={"name": "mine"}, files=[("files", ("2.png", png()))])
    assert (done.status_code, done.headers["location"]) == (303, "/pictures/set?folder=pictures%2Fmine")
    assert client.post(found[1], data={"name": "mine"}).status_code == 400
    assert client.post("/pictures/upload", data={"name": "mine"}, files=files).status_code == 403
    assert "Add pictures" in client.get("/pictures/set?folder=pictures/mine").text


def test_ten_thousand_pictures_show_quickly(client: TestClient, services: Services) -> None:
    folder = services.workspace.folder / "many"
    folder.mkdir()
    content = png()
    for index in range(10_000):
        (folder / f"{index:05}.png").write_bytes(content)
    start = time.perf_counter()
    text = client.get("/pictures/set?folder=many&page=100").text
    assert time.perf_counter() - start < 2
    assert text.count("<textarea") == 60
    assert "05999.png" in text
    assert "09999.png" in client.get("/pictures/set?folder=many&page=9999").text


def test_captions_by_a_model_go_into_the_queue(client: TestClient, services: Services, art: Path) -> None:
    (services.workspace.folder / "blip").mkdir()
    values = {
        "folder": "art",
        "model": "blip",
        "prompt": "--overwrite",
        "max_tokens": "9",
        "overwrite": "true",
    }
    part = client.post("/pictures/blip", data=values, headers={"hx-request": "true"}).text
    assert "sse-connect" in part
    job = services.queue.recent("caption")[0]
    model = services.workspace.folder / "blip"
    given = (f"--model={model}", "--prompt=--overwrite", "--max-tokens=9", "--overwrite")
    assert job.arguments == ("caption", str(art), *given)
    again = client.post("/pictures/blip", data=values)
    assert "already" in again.text
    with pytest.raises(ConfigError, match="already"):
        start_captions(services, PictureSet.open(services.workspace, "art"), {}, False)
    assert "Waiting in the queue" in client.get("/pictures/set?folder=art").text
    (art / "metadata.jsonl").write_text("")
    services.queue.change(job.id, state="running")
    values = {"folder": "art", "name": "0.png", "text": "lost"}
    assert "wait for it" in client.post("/pictures/caption", data=values).text
    services.queue.change(job.id, state="done")
    assert client.post("/pictures/blip", data={"folder": "art"}).status_code == 303
    assert services.queue.recent("caption")[0].arguments == ("caption", str(art), "--out=jsonl")


def test_a_model_in_a_folder_writes_captions(client: TestClient, services: Services, art: Path) -> None:
    make_blip(services.workspace.folder / "blip")
    (art / "1.txt").unlink()
    values = {"folder": "art", "model": "blip", "max_tokens": "5"}
    assert client.post("/pictures/blip", data=values).status_code == 303
    job = services.queue.recent("caption")[0]
    until = time.monotonic() + 60
    while services.queue.job(job.id).is_open and time.monotonic() < until:
        services.supervisor.look()
        time.sleep(0.1)
    assert services.queue.job(job.id).state == "done", services.supervisor.log_tail(job.id)
    assert (art / "1.txt").read_text().split()
    assert (art / "0.txt").read_text() == "a hat, number 0"
    text = client.get("/pictures/set?folder=art").text
    assert "Captions are written" in text
    assert "1 captioned, 2 kept" in text


def test_models_lie_on_the_hub_or_where_one_may_look(services: Services) -> None:
    assert (
        _model(services, "Salesforce/blip-image-captioning-base") == "Salesforce/blip-image-captioning-base"
    )
    with pytest.raises(OutsideError):
        _model(services, "/etc")


def test_a_set_of_other_files_says_so(client: TestClient, services: Services, art: Path) -> None:
    (art / "metadata.csv").write_text("file_name,text\n0.png,from a list\n")
    text = client.get("/pictures/set?folder=art").text
    assert "metadata.csv" in text
    assert "from a list" in text
    assert "<textarea" not in text
    (art / "rows.parquet").write_bytes(b"PAR1")
    assert "Parquet" in client.get("/pictures/set?folder=art").text


def test_filters_and_pages_have_addresses(client: TestClient, art: Path) -> None:
    (art / "1.txt").unlink()
    text = client.get("/pictures/set?folder=art&show=uncaptioned").text
    assert text.count("<textarea") == 1
    assert "Not known: run the check" in client.get("/pictures/set?folder=art&show=duplicate").text
    view = View("a b", 2, "refused", 64, True)
    assert view.query(page=3) == "folder=a+b&page=3&show=refused&resolution=64&buckets=1"
    assert View("art").query() == "folder=art"


def test_what_cannot_be_done_is_said(client: TestClient, services: Services, art: Path) -> None:
    answer = client.post("/pictures/check", data={"folder": "art", "resolution": "100"})
    assert (answer.status_code, "multiple of 8" in answer.text) == (400, True)
    queued = services.queue.add("caption", "art", ["caption", str(art)])
    assert queued.state == "queued"
    answer = client.post("/pictures/blip", data={"folder": "art"}, headers={"hx-request": "true"})
    assert answer.headers["hx-retarget"] == "#notice"
