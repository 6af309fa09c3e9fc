"""The Plan step: answers to a draft, every change saved, the live plan, the check, the start."""

import shutil
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from conftest import make_pictures
from lorascope.config import load_study
from lorascope.errors import ConfigError
from lorascope.web.drafts import new_draft, read_draft
from lorascope.web.plan_page import _base, _count
from lorascope.web.plans import find_trial, kept_plan, plan_of, start_trial
from lorascope.web.services import Services
from lorascope.web.starting import study_arguments
from lorascope.web.workspace import MissingError, OutsideError
from web_client import make_services, web_client

HTMX = {"hx-request": "true"}


@pytest.fixture
def services(tmp_path: Path) -> Services:
    services = make_services(tmp_path / "work")
    folder = services.workspace.pictures_dir / "blocks"
    folder.mkdir(parents=True)
    for index, (content, text) in enumerate(make_pictures(12)):
        (folder / f"{index}.png").write_bytes(content)
        (folder / f"{index}.txt").write_text(text)
    return services


def text_of(services: Services, name: str) -> str:
    return read_draft(services.workspace, name).text


def test_the_questions_know_the_folders_and_count(services: Services, client: TestClient) -> None:
    text = client.get("/plan", params={"folder": "pictures/blocks"}).text
    assert '<option value="pictures/blocks">' in text and "12 pictures." in text
    assert client.get("/plan/-/count", params={"folder": "pocket"}).text.startswith("1,500 drawings")
    assert "lies outside" in client.get("/plan/-/count", params={"folder": "/etc"}).text
    assert "is known once it is read" in client.get("/plan/-/count", params={"folder": "owner/name"}).text
    (services.workspace.pictures_dir / "10_cat").mkdir()
    shutil.copy(
        services.workspace.pictures_dir / "blocks" / "0.png", services.workspace.pictures_dir / "10_cat"
    )
    assert "13 pictures, 22 an epoch" in client.get("/plan/-/count", params={"folder": "pictures"}).text


def test_answers_that_name_nothing_or_something_elsewhere_are_refused(
    services: Services, client: TestClient, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    workspace = services.workspace
    with pytest.raises(ConfigError, match="name a folder of pictures"):
        _count(workspace, " ")
    with pytest.raises(ConfigError, match="name a folder, a checkpoint file"):
        _base(workspace, "")
    with pytest.raises(OutsideError):
        _base(workspace, str(tmp_path / "outside"))
    with pytest.raises(MissingError):
        _count(workspace, "pictures/gone")
    assert _base(workspace, "owner/name") == "owner/name"
    answer = client.post("/plan", data={"folder": "pictures/blocks", "goal": "fun"}, headers=HTMX)
    assert "must be one of style, subject, everything" in answer.text
    assert client.post("/plan", data={"folder": "../outside"}).status_code == 403


def test_answers_make_a_draft_that_fits_with_its_reasons_and_plan(
    services: Services, client: TestClient
) -> None:
    answers = {"folder": "pictures/blocks", "base": "pocket", "time": "8000", "word": "blok"}
    made = client.post("/plan", data=answers)
    assert (made.status_code, made.headers["location"]) == (303, "/plan/blocks")
    config = read_draft(services.workspace, "blocks").config
    assert (config.data.source, config.data.num_train, config.data.trigger_word) == (
        "pictures/blocks",
        11,
        "blok",
    )
    assert len(config.expand_arms()) == 6
    page = client.get("/plan/blocks").text
    assert "All that is useful fits" in page
    assert "One for all: then the best learning rate" in page
    assert "Smallest difference" in page  # of the plan that was made for the answers
    assert client.get("/plan").text.count('<a href="/plan/blocks">') == 1


def test_a_change_is_saved_at_once_right_or_wrong_and_shown_at_its_key(
    services: Services, client: TestClient
) -> None:
    new_draft(services.workspace, "mine", 'preset = "smoke"\n')
    said = client.post("/plan/mine/keys", data={"train.epochs": "0"}, headers=HTMX)
    assert said.headers["hx-trigger"] == "draft-changed"
    assert text_of(services, "mine") == 'preset = "smoke"\n\n[train]\nepochs = 0\n'
    assert (
        'id="key-train-epochs-fault" hx-swap-oob="true">train.epochs = 0: must be at least 1</p>' in said.text
    )
    page = client.get("/plan/mine").text
    assert 'aria-invalid="true"' in page and "must be at least 1" in page
    assert "not right yet" in client.get("/plan/mine/live", headers=HTMX).text
    cleared = client.post("/plan/mine/keys", data={"train.epochs": ""}, headers=HTMX).text
    assert "Saved." in cleared and "must be" not in cleared
    assert text_of(services, "mine") == 'preset = "smoke"\n'
    assert client.post("/plan/mine/keys", data={"train.fun": "1"}).status_code == 400


def test_without_scripts_a_part_of_the_form_is_saved_as_a_whole(
    services: Services, client: TestClient
) -> None:
    new_draft(services.workspace, "mine", 'preset = "smoke"\n')
    form = {"sample.steps": "7", "sample.seeds": "0, 1", "sample.prompt_prefix": "", "csrf": "x"}
    done = client.post("/plan/mine/keys", data=form)
    assert (done.status_code, done.headers["location"]) == (303, "/plan/mine#part-sample")
    config = read_draft(services.workspace, "mine").config
    assert (config.sample.steps, config.sample.seeds) == (7, (0, 1))
    client.post("/plan/mine/keys", data={"arms.0.rank": "4", "add": "arms"})
    assert len(read_draft(services.workspace, "mine").config.arms) == 2
    client.post("/plan/mine/keys", data={"remove": "arms.1"})
    assert len(read_draft(services.workspace, "mine").config.arms) == 1


def test_a_key_that_excludes_another_takes_its_place_in_the_page_too(
    services: Services, client: TestClient
) -> None:
    new_draft(services.workspace, "mine", "[[arms]]\nrank = 4\nalpha = 4\n")
    said = client.post("/plan/mine/keys", data={"arms.0.alpha_per_rank": "2"}, headers=HTMX).text
    assert 'id="key-arms-0-alpha" hx-swap-oob="true"' in said
    assert "alpha_per_rank = 2" in text_of(services, "mine")


def test_the_text_is_saved_as_it_was_typed_and_not_over_a_newer_one(
    services: Services, client: TestClient
) -> None:
    draft = new_draft(services.workspace, "mine", "train.epochs = 2\n")
    form = {"text": "train.epochs =", "version": draft.version}
    said = client.post("/plan/mine/text", data=form, headers=HTMX).text
    assert "not valid TOML" in said and text_of(services, "mine") == "train.epochs ="
    assert "The form is here again" in client.get("/plan/mine").text
    late = client.post("/plan/mine/text", data={**form, "text": "name = 'late'"})
    assert late.status_code == 400 and "in another window" in late.text
    assert text_of(services, "mine") == "train.epochs ="
    hostile = "# </textarea><script>alert(1)</script>"
    client.post(
        "/plan/mine/text", data={"text": hostile, "version": read_draft(services.workspace, "mine").version}
    )
    assert "<script>alert" not in client.get("/plan/mine").text


def test_a_draft_is_made_of_a_run_of_a_preset_and_of_what_a_run_leaves_open(
    services: Services, client: TestClient, finished: Path
) -> None:
    shutil.copytree(finished, services.workspace.runs_dir / "tiny")
    assert client.get("/plan?from=tiny").headers["location"] == "/plan/tiny"
    run = load_study(finished / "study.toml", environment={})
    assert read_draft(services.workspace, "tiny").config == run
    following = client.get("/plan?next=tiny").headers["location"]
    assert following == "/plan/tiny-next"
    assert read_draft(services.workspace, "tiny-next").config.digest() != run.digest()
    assert client.post("/plan", data={"preset": "smoke"}).headers["location"] == "/plan/smoke"
    assert text_of(services, "smoke") == 'preset = "smoke"\n'
    assert client.get("/plan?from=gone").status_code == 404
    assert client.post("/plan/smoke/delete").headers["location"] == "/plan"
    assert client.get("/plan/smoke").status_code == 404


def test_a_plan_is_kept_by_what_the_study_is(services: Services, study_file: Path) -> None:
    services = make_services(services.workspace.folder, study_file.parents[1])
    config = load_study(study_file, environment={})
    assert kept_plan(services, config) is None
    plan = plan_of(services, config)
    assert plan["pictures"] > 0
    assert kept_plan(services, config.model_copy(update={"name": "other"})) is plan
    assert not list((services.workspace.state_dir / "plans").iterdir())
    with pytest.raises(OutsideError, match=r"data\.source"):
        plan_of(services, load_study(preset="smoke", overrides=["data.source=/etc"], environment={}))


def run_queue(services: Services) -> None:
    """Run what waits, to the end."""
    give_up = time.monotonic() + 120
    while services.queue.jobs("queued", "running") and time.monotonic() < give_up:
        services.supervisor.look()
        time.sleep(0.1)


def test_a_study_is_checked_and_started_once_it_passed(tmp_path: Path, study_file: Path) -> None:
    services = make_services(tmp_path / "work", study_file.parents[1])
    new_draft(services.workspace, "mine", study_file.read_text())
    with web_client(services) as client:
        asked = client.post("/plan/mine/start", data={"run": "mine"})
        assert "was not checked" in asked.text and "Start all the same" in asked.text
        assert services.queue.jobs() == []
        assert client.post("/plan/mine/preflight").status_code == 303
        draft = read_draft(services.workspace, "mine")
        job = start_trial(services, draft)  # the one that waits
        assert (job.kind, job.arguments) == ("preflight", ("preflight", "studies/mine.toml", "--json"))
        assert len(services.queue.jobs()) == 1
        run_queue(services)
        trial = find_trial(services, draft)
        assert trial is not None and trial.has_passed(draft.config)
        assert "This study would run here" in client.get("/plan/mine").text
        started = client.post("/plan/mine/start", data={"run": "first"})
        assert started.headers["location"] == "/runs/first"
        assert services.queue.last_of("first").arguments == tuple(study_arguments("first"))  # type: ignore[union-attr]
        taken = client.post("/plan/mine/start", data={"run": "first"})
        assert taken.status_code == 409 and 'value="first-2"' in taken.text
        client.post("/plan/mine/keys", data={"train.epochs": "1"})
        assert "it was changed since" in client.get("/plan/mine").text
        assert "since it was changed" in client.post("/plan/mine/start", data={"run": "next"}).text
        sure = client.post("/plan/mine/start", data={"run": "next", "sure": "yes"})
        assert sure.headers["location"] == "/runs/next"
        services.queue.change(services.queue.last_of("first").id, state="cancelled")  # type: ignore[union-attr]
        services.queue.change(services.queue.last_of("next").id, state="cancelled")  # type: ignore[union-attr]


def test_a_failed_check_says_what_to_do_and_is_asked_about(tmp_path: Path, study_file: Path) -> None:
    services = make_services(tmp_path / "work", study_file.parents[1])
    new_draft(services.workspace, "mine", study_file.read_text().replace("lr = 1e-3", "lr = 1e20"))
    with web_client(services) as client:
        client.post("/plan/mine/preflight")
        run_queue(services)
        page = client.get("/plan/mine").text
        assert "no arm is left (r4: loss is not finite" in page and "lower arms.lr" in page
        asked = client.post("/plan/mine/start", data={"run": "mine"}).text
        assert "The check of this very study failed: no arm is left" in asked
