"""The home page: runs and queue, pictures of runs, and deleting with care."""

from pathlib import Path

import pytest
from PIL import Image
from starlette.requests import Request
from starlette.testclient import TestClient

from lorascope.errors import ConfigError
from lorascope.run_folder import RunDir
from lorascope.web.home import delete, inside
from lorascope.web.services import Services
from lorascope.web.workspace import MissingError, OutsideError
from web_client import make_services, web_client


def test_a_finished_run_shows_with_verdict_picture_and_links(client: TestClient) -> None:
    text = client.get("/").text
    assert '<h2><a href="/runs/tiny">tiny</a></h2>' in text
    assert 'class="state done"' in text
    assert "/runs/tiny/result" in text
    picture = text.split('<img src="')[1].split('"')[0].replace("&amp;", "&")
    answer = client.get(picture)
    assert answer.headers["content-type"] == "image/webp"
    assert answer.content[:4] == b"RIFF"


def test_an_empty_workspace_says_how_to_begin(tmp_path: Path) -> None:
    with web_client(make_services(tmp_path)) as client:
        assert "No run yet" in client.get("/").text


def test_a_damaged_run_does_not_hide_the_others(services: Services, client: TestClient) -> None:
    damaged = services.workspace.runs_dir / "damaged"
    damaged.mkdir()
    (damaged / "study.toml").write_text("arms = 3")
    text = client.get("/").text
    assert "tiny" in text
    assert "damaged" in text
    assert "arms" in text


def test_a_run_is_deleted_once_its_name_is_typed(services: Services, client: TestClient) -> None:
    folder = services.workspace.runs_dir / "tiny"
    assert "frees" in client.get("/runs/tiny/delete").text
    wrong = client.post("/runs/tiny/delete", data={"sure": "tin"})
    assert (wrong.status_code, folder.exists()) == (400, True)
    request = Request({"type": "http", "app": client.app.app})  # type: ignore[attr-defined]  # behind the gate
    with pytest.raises(ConfigError, match="type 'tiny' to delete it"):
        delete(request, "tiny", "tin")
    done = client.post("/runs/tiny/delete", data={"sure": "tiny"})
    assert (done.status_code, folder.exists()) == (303, False)
    assert client.get("/runs/tiny").status_code == 404


def test_a_run_that_is_worked_in_or_waits_is_not_deleted(services: Services, client: TestClient) -> None:
    folder = services.workspace.runs_dir / "tiny"
    with RunDir(folder).lock():
        answer = client.post("/runs/tiny/delete", data={"sure": "tiny"})
    assert "another lorascope process" in answer.text
    job = services.queue.add("study", "tiny", ["env"], "tiny")
    services.queue.change(job.id, state="running", started=0)
    answer = client.post("/runs/tiny/delete", data={"sure": "tiny"})
    assert "cancel it first" in answer.text
    assert folder.exists()


def test_pictures_come_from_within_their_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "in.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    assert inside(folder, "in.png", ".png") == folder / "in.png"
    for path in ("../out.png", str(tmp_path / "out.png"), "link.png"):
        with pytest.raises(OutsideError):
            inside(folder, path, ".png")
    for path in ("gone.png", "a\0b.png"):
        with pytest.raises(MissingError):
            inside(folder, path, ".png")
    with pytest.raises(OutsideError):
        inside(folder, "in.png", ".txt")


def test_the_disk_of_a_run_is_told(client: TestClient) -> None:
    assert client.get("/runs/tiny/disk").text.endswith(("KiB", "MiB"))
