"""A folder of pictures: captions that two pages save, changes of all captions, and undo."""

import time
from pathlib import Path

import pytest
from PIL import Image

from hostile import make_pipe
from lorascope.data.captions import MAX_CAPTION_BYTES
from lorascope.data.pictures import RefusedError
from lorascope.errors import ConfigError, DataError
from lorascope.web import picture_set
from lorascope.web.picture_set import Caption, Change, Conflict, PictureSet, note_recent, recent_sets
from lorascope.web.workspace import MissingError, OutsideError, Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "work")


def make_set(workspace: Workspace, *captions: str | None, name: str = "art") -> PictureSet:
    folder = workspace.folder / name
    folder.mkdir()
    for index, text in enumerate(captions):
        Image.new("RGB", (8, 6), (index, 0, 0)).save(folder / f"{index}.png")
        if text is not None:
            (folder / f"{index}.txt").write_text(text)
    return PictureSet.open(workspace, name)


def saved(found: PictureSet, name: str, text: str, version: str) -> Caption:
    result = found.save(name, text, version)
    assert isinstance(result, Caption)
    return result


def test_a_caption_is_saved_beside_its_picture(workspace: Workspace) -> None:
    found = make_set(workspace, "a cat\n", None)
    assert found.pictures == ["0.png", "1.png"]
    assert [found.is_captioned(name) for name in found.pictures] == [True, False]
    shown = found.caption("0.png")
    assert shown.text == "a cat"
    after = saved(found, "0.png", "a dog\r\nwith a hat", shown.version)
    assert (found.folder / "0.txt").read_text() == "a dog\nwith a hat\n"
    assert after == found.caption("0.png")
    saved(found, "1.png", "new", found.caption("1.png").version)
    assert (found.folder / "1.txt").read_text() == "new\n"
    saved(found, "1.png", "", found.caption("1.png").version)
    assert (found.folder / "1.txt").read_text() == ""
    assert not found.caption("1.png").is_there


def test_of_two_pages_the_later_save_is_told_and_no_text_is_lost(workspace: Workspace) -> None:
    found = make_set(workspace, "first")
    version = found.caption("0.png").version
    saved(found, "0.png", "of the one page", version)
    result = found.save("0.png", "of the other", version)
    assert isinstance(result, Conflict)
    assert (result.mine, result.theirs.text) == ("of the other", "of the one page")
    assert found.caption("0.png").text == "of the one page"
    assert saved(found, "0.png", "of the other", result.theirs.version).text == "of the other"
    # The same text twice is no conflict.
    assert saved(found, "0.png", "of the other", version).text == "of the other"


def test_captions_of_kohya_are_saved_where_they_stand(workspace: Workspace) -> None:
    found = make_set(workspace, None)
    (found.folder / "0.caption").write_text("there")
    saved(found, "0.png", "changed", found.caption("0.png").version)
    assert (found.folder / "0.caption").read_text() == "changed\n"
    assert not (found.folder / "0.txt").exists()


def test_a_text_that_would_not_reach_the_model_is_refused(workspace: Workspace) -> None:
    found = make_set(workspace, "a")
    version = found.caption("0.png").version
    for text in (
        "a\0b",
        "<|endoftext|>",
        "x" * (MAX_CAPTION_BYTES + 1),
        "\ud800",
        "ü" * (MAX_CAPTION_BYTES // 2),
    ):
        with pytest.raises(DataError):
            found.save("0.png", text, version)
    assert found.caption("0.png").text == "a"


@pytest.mark.parametrize(
    "name",
    [
        "../0.png",
        "/etc/0.png",
        "..\\0.png",
        ".hidden.png",
        "a/../0.png",
        "0.txt",
        "\\\\host\\0.png",
        "link/0.png",
    ],
)
def test_names_that_lead_out_are_refused(workspace: Workspace, tmp_path: Path, name: str) -> None:
    found = make_set(workspace, "a")
    (tmp_path / "out").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "out" / "0.png")
    (found.folder / "link").symlink_to(tmp_path / "out")
    with pytest.raises(OutsideError):
        found.save(name, "text", "")
    with pytest.raises(OutsideError):
        found.path_of(name)


def test_what_is_gone_or_no_folder_is_said(workspace: Workspace) -> None:
    found = make_set(workspace, "a")
    with pytest.raises(MissingError):
        found.path_of("gone.png")
    with pytest.raises(MissingError):
        PictureSet.open(workspace, "art/0.png")
    with pytest.raises(OutsideError):
        PictureSet.open(workspace, "//host/share")


def test_links_out_are_neither_shown_nor_written_through(workspace: Workspace, tmp_path: Path) -> None:
    found = make_set(workspace, None)
    secret = tmp_path / "secret"
    secret.write_text("secret text")
    (found.folder / "0.txt").symlink_to(secret)
    (found.folder / "1.png").symlink_to(secret)
    caption = found.caption("0.png")
    assert (caption.text, "outside" in caption.problem) == ("", True)
    with pytest.raises(DataError):
        found.save("0.png", "over", caption.version)
    assert secret.read_text() == "secret text"
    with pytest.raises(RefusedError):
        found.size_of("1.png")
    with pytest.raises(OutsideError):
        found.path_of("1.png")


def test_captions_that_cannot_be_read_say_why(workspace: Workspace) -> None:
    found = make_set(workspace, None, None)
    (found.folder / "0.txt").write_bytes(b"\xff\xfe\xff")
    make_pipe(found.folder / "1.txt")
    assert "UTF-16" in found.caption("0.png").problem
    assert "pipe" in found.caption("1.png").problem


def test_captions_of_a_list_are_changed_in_it(workspace: Workspace) -> None:
    found = make_set(workspace, "unread", None, None)
    path = found.folder / "metadata.jsonl"
    path.write_text(
        '{"file_name": "0.png",  "caption": "a hat", "more": 1}\n{"file_name": "1.png"}\n', encoding="utf-8"
    )
    shown = found.caption("0.png")
    assert (shown.text, found.read_only) == ("a hat", "")
    assert [found.is_captioned(name) for name in found.pictures] == [True, False, False]
    other = PictureSet.open(workspace, "art")
    saved(other, "1.png", "another page's", other.caption("1.png").version)
    saved(found, "0.png", "a cäp", shown.version)
    assert path.read_text(encoding="utf-8").splitlines() == [
        '{"file_name": "0.png", "caption": "a cäp", "more": 1}',
        '{"file_name": "1.png", "caption": "another page\'s"}',
    ]
    conflict = found.save("1.png", "mine", PictureSet.open(workspace, "art").caption("2.png").version)
    assert isinstance(conflict, Conflict)
    change = Change(trigger="zwx")
    plan = found.plan(change)
    assert [row[2] for row in plan.rows] == ["zwx, a cäp", "zwx, another page's"]
    found.apply(change, plan.digest)
    assert PictureSet.open(workspace, "art").caption("0.png").text == "zwx, a cäp"
    assert found.undo() == (2, [])
    assert PictureSet.open(workspace, "art").caption("0.png").text == "a cäp"


def test_captions_that_stand_elsewhere_are_shown_and_not_changed(workspace: Workspace) -> None:
    found = make_set(workspace, "unread")
    (found.folder / "metadata.csv").write_text("file_name,text\n0.png,from the list\n")
    assert found.caption("0.png").text == "from the list"
    assert "metadata.csv" in found.read_only
    with pytest.raises(DataError):
        found.save("0.png", "text", "")
    with pytest.raises(DataError):
        found.plan(Change(trigger="word"))
    prompts = make_set(workspace, None, name="prompts")
    (prompts.folder / "metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "a hat"}\n')
    assert "metadata.jsonl" in prompts.read_only
    assert prompts.caption("0.png").text == "a hat"
    parquet = make_set(workspace, "a", name="rows")
    (parquet.folder / "rows.parquet").write_bytes(b"PAR1")
    assert "Parquet" in parquet.read_only
    tars = PictureSet.open(workspace, ".")
    (tars.folder / "0.tar").write_bytes(b"")
    assert "tar files" in tars.read_only


def test_a_damaged_list_does_not_take_the_page_down(workspace: Workspace) -> None:
    found = make_set(workspace, "a")
    (found.folder / "metadata.jsonl").write_text("not JSON")
    assert found.caption("0.png").text == ""


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (Change(trigger="zwx"), "a cat", "zwx, a cat"),
        (Change(trigger="zwx"), "a ZWX cat", "a ZWX cat"),
        (Change(find="hat", replacement="cap"), "a hat, hat,  Hat ", "a hat, cap,  cap"),
        (Change(find="hat", replacement="cap", same_case=True), "Hat, hat", "Hat, cap"),
        (Change(find="hat"), "hat, red, hat", "red"),
        (Change(find="a.c", replacement="\\1", whole_tag=False), "abc a.c A.C", "abc \\1 \\1"),
        (Change(find="cat", replacement="dog", whole_tag=False, same_case=True), "Cat cat", "Cat dog"),
    ],
)
def test_what_a_change_makes_of_a_caption(change: Change, before: str, after: str) -> None:
    assert change.of(before) == after


def test_all_captions_are_changed_as_shown_and_changed_back(workspace: Workspace) -> None:
    found = make_set(workspace, "a hat", "nothing", None, "hat, red")
    change = Change(find="hat", replacement="cap", whole_tag=False)
    plan = found.plan(change)
    assert plan.rows == [("0.txt", "a hat", "a cap"), ("3.txt", "hat, red", "cap, red")]
    assert plan.num_without == 1
    assert found.caption("0.png").text == "a hat"
    found.apply(change, plan.digest)
    assert found.caption("3.png").text == "cap, red"
    last = found.last_change()
    assert last is not None
    assert (last.num_captions, "hat" in last.what) == (2, True)
    saved(found, "3.png", "my own", found.caption("3.png").version)
    assert found.undo() == (1, ["3.txt"])
    assert [found.caption(name).text for name in ("0.png", "3.png")] == ["a hat", "my own"]
    assert found.last_change() is None
    with pytest.raises(MissingError):
        found.undo()


def test_captions_that_changed_since_they_were_shown_are_left_alone(workspace: Workspace) -> None:
    found = make_set(workspace, "a hat")
    change = Change(trigger="zwx")
    digest = found.plan(change).digest
    saved(found, "0.png", "another", found.caption("0.png").version)
    with pytest.raises(ConfigError, match="once more"):
        found.apply(change, digest)
    assert found.caption("0.png").text == "another"


def test_a_change_that_stops_halfway_can_be_undone(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_set(workspace, "a", "b")
    change = Change(trigger="zwx")
    digest = found.plan(change).digest
    write = picture_set.write_text

    def fill_disk(path: Path, text: str) -> None:
        if path.name == "1.txt":
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(picture_set, "write_text", fill_disk)
    with pytest.raises(OSError, match="space"):
        found.apply(change, digest)
    monkeypatch.undo()
    assert found.undo() == (1, [])
    assert [found.caption(name).text for name in found.pictures] == ["a", "b"]


def test_a_change_without_words_is_refused() -> None:
    for change in (
        Change(),
        Change(find=" "),
        Change(trigger="a\0"),
        Change(find="a", replacement="<|endoftext|>"),
    ):
        with pytest.raises(ConfigError):
            change.check()


def test_ten_thousand_pictures_are_listed_quickly(workspace: Workspace) -> None:
    folder = workspace.folder / "many"
    folder.mkdir()
    for index in range(10_000):
        (folder / f"{index:05}.png").touch()
        (folder / f"{index:05}.txt").write_text("a, b")
    start = time.perf_counter()
    found = PictureSet.open(workspace, "many")
    assert len(found.pictures) == sum(map(found.is_captioned, found.pictures)) == 10_000
    assert time.perf_counter() - start < 2


def test_too_many_files_are_somebodys_home(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_set, "MAX_FILES", 2)
    with pytest.raises(DataError, match="nearer"):
        _ = make_set(workspace, "a", "b").stamps


def test_sets_that_were_looked_at_come_first(workspace: Workspace) -> None:
    assert recent_sets(workspace) == []
    sent = workspace.pictures_dir / "sent"
    sent.mkdir(parents=True)
    one, two = make_set(workspace, name="one"), make_set(workspace, name="two")
    note_recent(workspace, one.folder)
    note_recent(workspace, two.folder)
    note_recent(workspace, two.folder)
    assert recent_sets(workspace) == [two.folder, one.folder, sent]
    two.folder.rmdir()
    assert recent_sets(workspace) == [one.folder, sent]
