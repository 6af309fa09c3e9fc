"""Runs at a glance: states, files that are damaged or hostile, many of them, and long curves."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorascope.run_folder import RunDir
from lorascope.web.pages import render
from lorascope.web.runs import read_progress
from lorascope.web.services import Services
from lorascope.web.workspace import MissingError
from web_client import make_services, web_client

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just("../../../etc")
    | st.just("<script>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)

BEGUN = {"stage": "train", "done": 1, "total": 2, "unit": "steps", "rate": 1.5, "left_s": 2, "note": ""}


@pytest.fixture
def services(tmp_path: Path, finished: Path) -> Services:
    services = make_services(tmp_path / "work")
    shutil.copytree(finished, services.workspace.runs_dir / "tiny")
    return services


def folder_of(services: Services) -> Path:
    return services.workspace.runs_dir / "tiny"


def test_states_of_a_run(services: Services) -> None:
    folder, queue = folder_of(services), services.queue
    card = services.runs.card("tiny")
    assert (card.state, card.arms, card.picture is not None) == ("done", ("r4", "r8"), True)
    assert services.runs.card("tiny") is card  # kept
    with RunDir(folder).lock():
        (folder / "progress.json").write_text(
            json.dumps(
                {
                    "stage": "train",
                    "done": 3,
                    "total": 12,
                    "unit": "steps",
                    "rate": 2,
                    "left_s": 4.5,
                    "note": "",
                }
            )
        )
        card = services.runs.card("tiny")
        assert (card.state, card.is_elsewhere) == ("running", True)
        assert card.progress is not None and card.progress.percent == 25
        assert [stage.name for stage in card.stages if stage.is_under_way] == ["train"]
    assert services.runs.card("tiny").state == "done"
    job = queue.add("study", "tiny", ["study"], run="tiny")
    for state, shown in (
        ("queued", "waiting"),
        ("running", "running"),
        ("paused", "paused"),
        ("done", "done"),
    ):
        queue.change(job.id, state=state, message="why")
        card = services.runs.card("tiny")
        assert (card.state, card.message) == (shown, "why" if state == "paused" else "")
        assert services.runs.cards() == [card]
    (folder / "manifest.json").unlink()
    assert services.runs.card("tiny").state == "unfinished"


def test_an_arm_that_failed_is_shown_as_soon_as_it_did(services: Services) -> None:
    folder = folder_of(services)
    assert services.runs.card("tiny").failed_arms == {}
    path = folder / "adapters" / "r4" / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "failed": "the loss is no number"}))
    with (folder / "lorascope.log").open("a") as log:
        log.write("arm r4 failed\n")
    assert services.runs.card("tiny").failed_arms == {"r4": "the loss is no number"}


def test_a_run_that_is_looked_at_is_not_taken_for_worked_in(services: Services) -> None:
    """Whoever asks for the lock has it for a moment."""
    states: set[str] = set()

    def look() -> None:
        for _ in range(200):
            states.add(services.runs.card("tiny").state)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == {"done"}


def test_looking_at_a_run_writes_nothing(services: Services) -> None:
    folder = folder_of(services)
    (folder / ".lock").unlink()
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with web_client(services) as client:
        assert client.get("/").status_code == client.get("/runs/tiny").status_code == 200
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_a_run_that_goes_while_all_are_listed(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(services.workspace), "run_names", lambda _: ["gone", "tiny"])
    assert [card.name for card in services.runs.cards()] == ["tiny"]
    with pytest.raises(MissingError):
        services.runs.card("gone")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["manifest.json", "diagnosis.json", "progress.json", "groups.json"]),
    key=st.sampled_from(["keep", "stages", "stage", "arm", "done", "left_s", "rate", ""]),
    value=JSON,
)
def test_whatever_a_folders_files_hold_its_page_is_shown(
    services: Services, name: str, key: str, value: object
) -> None:
    folder = folder_of(services)
    path = folder / name
    before = path.read_bytes() if path.exists() else None
    known = (
        json.loads(before) if before else {"stage": "train", "done": 1, "total": 2, "unit": "", "note": ""}
    )
    path.write_text(json.dumps({**known, key: value} if key else value))
    try:
        with RunDir(folder).lock():
            card = services.runs.card("tiny")
        card = services.runs.card("tiny")
        assert card.picture is None or ".." not in card.picture
        assert "<script>" not in render("_runs.html.j2", cards=[card], csrf="")
        render("_status.html.j2", card=card, waits_for=[], csrf="")
    finally:
        path.unlink() if before is None else path.write_bytes(before)


@pytest.mark.parametrize(
    "name", ["manifest.json", "diagnosis.json", "progress.json", "lorascope.log", ".lock"]
)
def test_pipes_in_place_of_files_hold_nothing_up(services: Services, name: str) -> None:
    path = folder_of(services) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with web_client(services) as client:
        assert client.get("/runs/tiny").status_code == client.get("/").status_code == 200
    assert read_progress(RunDir(folder_of(services))) is None


def test_links_out_of_a_run_are_not_followed(services: Services, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = folder_of(services)
    with web_client(services) as client:
        for name, address in (("report.html", "report"), ("lorascope.log", "log")):
            assert client.get(f"/runs/tiny/{address}").status_code == 200
            (folder / name).unlink()
            (folder / name).symlink_to(secret)
            answer = client.get(f"/runs/tiny/{address}")
            assert (answer.status_code, "secret" in answer.text) == (404, False)


def test_the_report_is_shown_in_a_sandbox(services: Services) -> None:
    with web_client(services) as client:
        policy = client.get("/runs/tiny/report").headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts ") and "allow-same-origin" not in policy
    assert "frame-ancestors 'self'" in policy


def test_previews_are_those_of_the_last_epoch(services: Services) -> None:
    folder = folder_of(services) / "previews" / "r4"
    for name in ("epoch-0002", "epoch-0010", "epoch-9999x", "epoch-", "other"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "a.png").write_bytes(b"")
    with web_client(services) as client:
        assert "previews%2Fr4%2Fepoch-0010%2Fa.png" in client.get("/runs/tiny").text


@pytest.mark.figures
def test_hundreds_of_runs_are_listed_quickly(services: Services) -> None:
    source = folder_of(services)
    for number in range(300):
        target = services.workspace.runs_dir / f"run-{number}"
        target.mkdir()
        for name in ("study.toml", "manifest.json", "diagnosis.json", "lorascope.log"):
            shutil.copy(source / name, target)
        services.queue.add("study", target.name, ["study"], run=target.name)
    with web_client(services) as client:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            assert client.get("/").text.count('class="card"') == 301
            seconds.append(time.perf_counter() - started)
    print(f"301 runs: {seconds[0]:.2f} s, then {min(seconds):.3f} s")
    assert seconds[0] < 6 and min(seconds) < 0.3


@pytest.mark.figures
def test_the_first_page_is_quick(services: Services) -> None:
    with web_client(services) as client:
        started = time.perf_counter()
        client.get("/")
        seconds = time.perf_counter() - started
    print(f"first page: {seconds:.3f} s")
    assert seconds < 0.3


@pytest.mark.figures
def test_long_curves_are_shown_quickly(services: Services) -> None:
    path = RunDir(folder_of(services)).metrics_jsonl
    with path.open("w") as file:
        for step in range(25_000):
            for arm in ("r4", "r8"):
                record = {
                    "kind": "train",
                    "step": step,
                    "epoch": step / 100,
                    "arm": arm,
                    "loss": 1 / (step + 1),
                }
                file.write(json.dumps({**record, "grad_norm": 0.1, "lr": 1e-4}) + "\n")
    with web_client(services) as client:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            text = client.get("/runs/tiny").text
            seconds.append(time.perf_counter() - started)
    print(f"50,000 records: {seconds[0]:.2f} s, then {min(seconds):.3f} s, {len(text):,} characters")
    assert seconds[0] < 2 and min(seconds) < 0.1 and len(text) < 100_000
