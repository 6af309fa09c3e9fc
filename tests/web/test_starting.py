"""How a study begins: its folder, its place in the queue, and what it may not read."""

from pathlib import Path

import pytest

from lorascope.config import load_study, parse_study
from lorascope.errors import ConfigError, StorageError
from lorascope.web.services import Services
from lorascope.web.starting import TakenError, require_readable, start_study, study_arguments
from lorascope.web.workspace import MissingError, OutsideError
from web_client import make_services


@pytest.fixture
def services(tmp_path: Path) -> Services:
    (tmp_path / "outside").mkdir()
    return make_services(tmp_path / "work")


def test_a_study_is_frozen_under_its_name_and_waits(services: Services) -> None:
    job = start_study(services, "one", parse_study('preset = "smoke"'))
    frozen = load_study(services.workspace.run_dir("one") / "study.toml", environment={})
    assert frozen.name == "one"
    assert frozen.digest() == load_study(preset="smoke", environment={}).digest()
    assert (job.kind, job.title, job.run, job.state) == ("study", "one", "one", "queued")
    assert job.arguments == ("study", "runs/one/study.toml", "--run-dir", "runs/one")
    assert list(job.arguments) == study_arguments("one")


def test_a_name_is_given_once(services: Services) -> None:
    config = parse_study('preset = "smoke"')
    start_study(services, "one", config)
    with pytest.raises(TakenError, match="one: is a run already: choose another name"):
        start_study(services, "one", config)
    (services.workspace.runs_dir / "bare").mkdir()  # a folder that is no run has its name too
    with pytest.raises(TakenError):
        start_study(services, "bare", config)
    with pytest.raises(MissingError, match="names have"):
        start_study(services, "../one", config)
    assert len(services.queue.jobs()) == 1


def test_what_cannot_be_queued_leaves_no_folder(services: Services) -> None:
    services.queue._connection.execute("PRAGMA query_only = 1")
    with pytest.raises(StorageError, match="the queue cannot be used"):
        start_study(services, "one", parse_study('preset = "smoke"'))
    assert list(services.workspace.runs_dir.iterdir()) == []


@pytest.mark.parametrize(
    "key", ["data.source", "sample.prompts", "base.model", "score.model", "score.style_model"]
)
def test_a_study_reads_nothing_outside_of_what_may_be_looked_into(
    services: Services, tmp_path: Path, key: str
) -> None:
    inside = services.workspace.folder / "inside"
    inside.mkdir()
    for path in ("inside", str(inside), "owner/name", "pocket"):
        require_readable(services.workspace, parse_study(f'{key} = "{path}"'))
    (inside / "link").symlink_to(tmp_path / "outside")
    for path in (str(tmp_path / "outside"), "../outside", "inside/link", "/nowhere", ".lorascope-web"):
        with pytest.raises(OutsideError, match=f"{key} = .*: lies outside"):
            require_readable(services.workspace, parse_study(f'{key} = "{path}"'))
    with pytest.raises(OutsideError):
        start_study(services, "one", parse_study(f'{key} = "/nowhere"'))
    assert not services.workspace.runs_dir.exists()


def test_the_text_of_a_study_is_read_as_its_file(tmp_path: Path) -> None:
    text = 'preset = "smoke"\ntrain.epochs = 2'
    (tmp_path / "own.toml").write_text(text)
    assert parse_study(text, "own", {}) == load_study(tmp_path / "own.toml", environment={})
    with pytest.raises(ConfigError, match=r"^own: train\.epoch: unknown key"):
        parse_study("train.epoch = 2", "own")
    with pytest.raises(ConfigError, match="^study: not valid TOML"):
        parse_study("train.epochs =")
