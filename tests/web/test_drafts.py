"""Drafts: names, text as it was typed, two windows at once, TOML with reasons."""

import tomllib
from pathlib import Path

import pytest

from lorascope.errors import ConfigError
from lorascope.web.drafts import (
    MAX_BYTES,
    Reason,
    StaleError,
    change_draft,
    delete_draft,
    free_name,
    list_drafts,
    new_draft,
    read_draft,
    read_reasons,
    save_draft,
    write_toml,
)
from lorascope.web.workspace import MissingError, Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "work")


def test_a_draft_is_kept_as_it_was_typed(workspace: Workspace) -> None:
    assert list_drafts(workspace) == []
    draft = new_draft(workspace, "mine", "train.epochs = 2\r\n", (Reason("train.epochs", 2, "few"),))
    assert (draft.name, draft.text, draft.argument) == ("mine", "train.epochs = 2\n", "studies/mine.toml")
    assert (draft.config.name, draft.config.train.epochs) == ("mine", 2)
    assert read_reasons(workspace, "mine") == [Reason("train.epochs", 2, "few")]
    wrong = save_draft(workspace, "mine", "train.epochs =")
    with pytest.raises(ConfigError, match=r"studies/mine\.toml: not valid TOML"):
        assert wrong.table
    with pytest.raises(ConfigError, match=r"studies/mine\.toml: not valid TOML"):
        assert wrong.config
    assert [name for name, _ in list_drafts(workspace)] == ["mine"]
    delete_draft(workspace, "mine")
    assert list_drafts(workspace) == [] and read_reasons(workspace, "mine") == []


def test_a_name_that_is_taken_is_given_a_number(workspace: Workspace) -> None:
    assert [new_draft(workspace, "mine", "").name for _ in range(3)] == ["mine", "mine-2", "mine-3"]
    assert free_name("a", {"a", "a-2"}.__contains__) == "a-3"
    for name in ("../mine", "", "a/b", ".hidden"):
        with pytest.raises(MissingError, match="names have"):
            read_draft(workspace, name)
    with pytest.raises(MissingError, match="no study 'gone'"):
        read_draft(workspace, "gone")


def test_of_two_windows_the_later_one_is_told(workspace: Workspace) -> None:
    first = new_draft(workspace, "mine", "train.epochs = 2\n")
    change_draft(workspace, "mine", lambda draft: "train.epochs = 3\n", first.version)
    with pytest.raises(StaleError, match="was changed in another window meanwhile"):
        change_draft(workspace, "mine", lambda draft: "train.epochs = 4\n", first.version)
    assert read_draft(workspace, "mine").text == "train.epochs = 3\n"


def test_a_text_of_no_size_for_a_study_and_a_link_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no study file is as long"):
        save_draft(workspace, "mine", "#" * (MAX_BYTES + 1))
    (tmp_path / "secret").write_text("secret")
    workspace.studies_dir.mkdir(exist_ok=True)
    (workspace.studies_dir / "link.toml").symlink_to(tmp_path / "secret")
    with pytest.raises(MissingError):
        read_draft(workspace, "link")
    assert list_drafts(workspace) == []


def test_toml_is_the_same_with_reasons() -> None:
    table = {
        "name": "mine",
        "data": {"source": 'a "b"\nc', "num_train": 3},
        "arms": [{"rank": [4, 8], "lr": 1e-4}, {"rank": 2}],
        "adapter": {"targets": ["to_q"], "groups": [{"targets": ["a.*"], "rank": 2}]},
        "train": {"optimizer_args": {"momentum": 0.9, "odd key": {"a": 1}}, "betas": [0.9, 0.99]},
    }
    text = write_toml(table, {"arms.1.rank": "small", "data.num_train": "few", "name": "whole"})
    assert tomllib.loads(text) == table
    assert "# small\nrank = 2" in text and "# few\nnum_train = 3" in text and text.startswith("# whole\nname")
