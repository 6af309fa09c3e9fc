"""The working folder, and paths that a browser may name and may not."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.errors import ConfigError, StorageError
from lorascope.web.workspace import MissingError, OutsideError, Workspace, require_name
from rights import without_rights


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a workspace, an allowed folder and one outside."""
    for name in ("work/pictures/cats", "allowed/.hidden", "outside"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("work/pictures/cats/a.png", "allowed/b.png", "allowed/.hidden/c.png", "outside/d.png"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.fixture
def workspace(place: Path) -> Workspace:
    return Workspace.open(place / "work", [place / "allowed"])


def test_paths_within_are_found_relative_and_absolute(place: Path, workspace: Workspace) -> None:
    cats = place / "work/pictures/cats"
    assert workspace.resolve("pictures/cats") == workspace.resolve(str(cats)) == cats
    assert workspace.resolve("pictures/../pictures/cats/a.png") == cats / "a.png"
    assert workspace.resolve(str(place / "allowed/b.png")) == place / "allowed/b.png"
    assert workspace.resolve("") == workspace.resolve(".") == place / "work"
    assert workspace.shown_path(cats) == "pictures/cats"
    assert workspace.shown_path(place / "allowed") == str(place / "allowed")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "..",
            "../outside/d.png",
            "pictures/../../outside",
            "/etc/passwd",
            "/",
            "/etc/no such file",
            "../no",
        ),
        *("//server/share", "\\\\server\\share", "\\/server", "/\\server", "\\\\?\\C:\\", "a\0b", "\ud800"),
        *(".lorascope-web/token", ".lorascope-web", ".no such", "pictures/.no/x", "x" * 5000),
    ],
)
def test_paths_elsewhere_and_hidden_ones_are_refused(workspace: Workspace, text: str) -> None:
    with pytest.raises((OutsideError, MissingError)) as error:
        workspace.resolve(text)
    if len(text) < 5000:
        assert error.type is OutsideError


def test_whether_something_outside_is_there_is_not_said(place: Path, workspace: Workspace) -> None:
    (place / "work/.lorascope-web").mkdir()
    (place / "work/.lorascope-web/token").write_text("x")
    for there, gone in (
        ("../outside/d.png", "../outside/no.png"),
        (".lorascope-web/token", ".lorascope-web/none"),
        (f"{place}/allowed/.hidden/c.png", f"{place}/allowed/.hidden/none"),
    ):
        messages = set()
        for text in (there, gone):
            with pytest.raises(OutsideError) as error:
                workspace.resolve(text)
            messages.add(str(error.value).replace(Path(text).name, "NAME"))
        assert len(messages) == 1


def test_links_are_followed_and_judged_by_where_they_lead(place: Path, workspace: Workspace) -> None:
    pictures = place / "work/pictures"
    (pictures / "in").symlink_to(place / "allowed")
    (pictures / "out").symlink_to(place / "outside")
    (pictures / "hidden").symlink_to(place / "allowed/.hidden")
    (pictures / "dangling").symlink_to(place / "nothing")
    (pictures / "circle").symlink_to(pictures / "round")
    (pictures / "round").symlink_to(pictures / "circle")
    assert workspace.resolve("pictures/in/b.png") == place / "allowed/b.png"
    for name in (
        "out",
        "out/d.png",
        "in/../../outside/d.png",
        "hidden/c.png",
        "dangling",
        "circle",
        "circle/x",
    ):
        with pytest.raises(OutsideError):
            workspace.resolve(f"pictures/{name}")


def test_what_is_gone_is_said_to_be_so(workspace: Workspace) -> None:
    with pytest.raises(MissingError, match="check the path"):
        workspace.resolve("pictures/dogs")
    with pytest.raises(MissingError):
        workspace.resolve("pictures/cats/a.png/b.png")


def test_a_folder_that_nobody_may_enter_is_no_fault() -> None:
    with without_rights() as folder:
        (folder / "closed").mkdir()
        (folder / "closed/a.png").write_bytes(b"x")
        workspace = Workspace.open(folder)
        (folder / "closed").chmod(0)
        with pytest.raises(MissingError):
            workspace.resolve("closed/a.png")
        (folder / "runs/closed").mkdir(parents=True)
        (folder / "runs/closed").chmod(0)
        assert workspace.run_names() == []
        for path in (folder / "closed", folder / "runs/closed"):
            path.chmod(0o700)


def test_a_hidden_folder_that_was_allowed_may_be_looked_into(place: Path) -> None:
    workspace = Workspace.open(place / "work", [place / "allowed", place / "allowed/.hidden"])
    assert workspace.resolve(str(place / "allowed/.hidden/c.png")).name == "c.png"


def test_a_folder_to_allow_must_be_there(place: Path) -> None:
    with pytest.raises(ConfigError, match="--allow .*none: no such folder"):
        Workspace.open(place / "work", [place / "none"])


def test_a_folder_that_cannot_be_made_is_one_line(place: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        Workspace.open(place / "allowed/b.png/work")


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.one_of(st.sampled_from(["..", ".", "", "~", "pictures", "/", "\\"]), st.text(max_size=8))
    )
)
def test_no_path_leads_out(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp() / "no path leads out" / "work"
    workspace = Workspace.open(folder)
    try:
        found = workspace.resolve("/".join(parts))
    except (OutsideError, MissingError):
        return
    assert found.is_relative_to(folder)


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "0", "x" * 64])
def test_names(name: str) -> None:
    assert require_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "_a", "a/b", "a\\b", "a\0", "a b", "ü", "a\n", "a.", "x" * 65, "a:b"]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(MissingError, match="letters, digits"):
        require_name(name)


def test_runs_are_folders_with_a_study_the_last_changed_first(place: Path, workspace: Workspace) -> None:
    assert workspace.run_names() == []
    for number, name in enumerate(("one", "two", "three")):
        folder = workspace.runs_dir / name
        folder.mkdir(parents=True)
        (folder / "study.toml").write_text("")
        os.utime(folder / "study.toml", (number, number))
    (workspace.runs_dir / "one/manifest.json").write_text("{}")
    (workspace.runs_dir / "empty").mkdir()
    (workspace.runs_dir / "a file").write_text("")
    (workspace.runs_dir / ".hidden").mkdir()
    (workspace.runs_dir / ".hidden/study.toml").write_text("")
    (workspace.runs_dir / "link").symlink_to(workspace.runs_dir / "one")
    assert workspace.run_names() == ["one", "three", "two"]
    assert workspace.run_dir("one") == workspace.runs_dir / "one"
    for name in ("empty", "link", "none", ".hidden", "../work", "x" * 65):
        with pytest.raises(MissingError):
            workspace.run_dir(name)
