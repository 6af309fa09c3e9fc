"""A folder of pictures with their captions: listed, saved so that no text is lost, changed all at once, and
changed back.

Captions are the text files beside the pictures, or stand in one `metadata.jsonl`. Where they stand elsewhere
(other lists, Parquet, tar files) they are shown, and said why they are not changed here.
"""

import posixpath
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from lorascope.data.captions import MAX_CAPTION_BYTES, decode_text, has_words, holds_word, problem_of
from lorascope.data.folders import walk
from lorascope.data.metadata import MetadataFile, read_metadata
from lorascope.data.names import is_inside, is_unicode, shown
from lorascope.data.pictures import SUFFIXES, RefusedError, picture_size
from lorascope.data.rows import CAPTION_NAMES, Stamp
from lorascope.data.shards import files_in
from lorascope.errors import ConfigError, DataError, LorascopeError, StorageError
from lorascope.shapes import Number, Shape
from lorascope.store import (
    digest_bytes,
    digest_json,
    open_regular,
    read_regular,
    read_table,
    write_json,
    write_text,
)
from lorascope.web.workspace import MissingError, OutsideError, Workspace

MAX_FILES = 100_000
"""Files below a folder: more are somebody's home rather than a set of pictures."""

_SHOWN_METADATA_BYTES = 64 * 2**20
_CAPTION_ENDINGS = (".txt", ".caption")
_LISTS = ("metadata.jsonl", "metadata.csv")
_CHANGE: dict[str, Shape] = {"what": str, "when": Number, "rows": [list]}
_RECENT = 12

# Of all pages of this server: looking at what is there and writing are one.
_writing = threading.Lock()


@dataclass(frozen=True)
class Caption:
    """The text of a caption file. `version` is a digest of it, by which a page says what it showed; `problem`
    says why the text cannot be changed here.
    """

    text: str
    version: str
    file: str
    problem: str = ""

    @property
    def is_there(self) -> bool:
        """Whether there are words in it."""
        return has_words(self.text)


@dataclass(frozen=True)
class Conflict:
    """A text that was not saved, since another one was saved after the page had been loaded."""

    mine: str
    theirs: Caption


@dataclass(frozen=True)
class Change:
    """What is to be done to all captions: a word in front, or a tag or text replaced by another."""

    trigger: str = ""
    find: str = ""
    replacement: str = ""
    whole_tag: bool = True
    same_case: bool = False

    def check(self) -> None:
        """Raise `ConfigError` where there is nothing to do, or a text that would not reach the model."""
        if not self.trigger.strip() and not self.find.strip():
            raise ConfigError("nothing to look for: type a tag or a text")
        for text in (self.trigger, self.replacement):
            if problem := problem_of(text):
                raise ConfigError(f"{text[:80]!r} {problem}")

    @property
    def words(self) -> str:
        """The change, as undo calls it."""
        if self.trigger:
            return f"{self.trigger!r} in front"
        kind = "tag" if self.whole_tag else "text"
        return f"{kind} {self.find!r} replaced by {self.replacement!r}"

    def of(self, text: str) -> str:
        """The caption as it would be."""
        if self.trigger:
            word = self.trigger.strip()
            return text if not has_words(text) or holds_word(text, word) else f"{word}, {text}"
        if self.whole_tag:
            return self._with_tag_replaced(text)
        flags = 0 if self.same_case else re.IGNORECASE
        return re.sub(re.escape(self.find), lambda _: self.replacement, text, flags=flags)

    def _with_tag_replaced(self, text: str) -> str:
        find, new = self.find.strip(), self.replacement.strip()
        parts, changed = [], False
        for part in text.split(","):
            tag = part.strip()
            if tag == find or (not self.same_case and tag.casefold() == find.casefold()):
                changed = True
                if not new:
                    continue  # with its comma
                part = part.replace(tag, new)
            parts.append(part)
        return ",".join(parts).strip() if changed else text


@dataclass(frozen=True)
class Plan:
    """What a change would do: caption files with the texts before and after. `digest` stands for all of it.

    `num_without` pictures have no caption, and `left_out` have one that cannot be changed.
    """

    change: Change
    rows: list[tuple[str, str, str]]
    num_without: int
    left_out: list[str]

    @property
    def digest(self) -> str:
        """Of what is changed, so that what is done is what was shown."""
        return digest_json(self.rows)[:16]


@dataclass(frozen=True)
class LastChange:
    """The change of all captions that can be undone."""

    what: str
    when: float
    num_captions: int


@dataclass
class PictureSet:
    """A folder below one that may be looked into; `folder` is absolute, without links."""

    workspace: Workspace
    folder: Path

    @classmethod
    def open(cls, workspace: Workspace, text: str) -> "PictureSet":
        """The set in the folder that a browser named; raises as `Workspace.resolve`, and `MissingError` for
        what is no folder.
        """
        folder = workspace.resolve(text)
        if not folder.is_dir():
            raise MissingError(f"{shown(text)}: is no folder: choose the folder that it is in")
        return cls(workspace, folder)

    @property
    def address(self) -> str:
        """How pages name the folder."""
        return self.workspace.shown_path(self.folder)

    @cached_property
    def stamps(self) -> dict[str, Stamp | str]:
        """All files by name, with their stamps or what is wrong with them; raise `DataError` for too many."""
        found = dict(islice(walk(self.folder, skip_unreadable=True), MAX_FILES + 1))
        if len(found) > MAX_FILES:
            raise DataError(
                f"{self.address}: more than {MAX_FILES:,} files: choose a folder nearer to the pictures"
            )
        return found

    @cached_property
    def pictures(self) -> list[str]:
        """Names of the pictures, sorted."""
        return sorted(
            name
            for name in self.stamps
            if posixpath.splitext(name)[1].lower() in SUFFIXES and is_unicode(name)
        )

    @cached_property
    def lists(self) -> list[str]:
        """The lists that hold captions, where there are any."""
        return sorted(name for name in self.stamps if posixpath.basename(name) in _LISTS)

    @cached_property
    def rows_elsewhere(self) -> str:
        """What the folder is read as in place of its pictures; empty where they are read."""
        if files_in(self.folder, "*.parquet"):
            return "Parquet files"
        beside = any("/" not in name for name in self.pictures)
        return "tar files" if not beside and files_in(self.folder, "*.tar") else ""

    @property
    def read_only(self) -> str:
        """Why captions are not changed here; empty where they are."""
        if self.rows_elsewhere:
            return (
                f"The pictures and captions of this folder stand in {self.rows_elsewhere}, which are not "
                "changed here. They can be checked and trained on as they are."
            )
        if self.lists and not self._is_list_changed_here:
            return (
                f"The captions of this folder stand in {shown(self.lists[0])}, so text files beside the "
                "pictures are not read. Change them there, or move it away to write captions here."
            )
        return ""

    @cached_property
    def _is_list_changed_here(self) -> bool:
        """Whether captions stand in one `metadata.jsonl` of this folder which can be read whole."""
        path = self.folder / _LISTS[0]
        if self.lists != [_LISTS[0]] or path.is_symlink() or path.stat().st_size > _SHOWN_METADATA_BYTES:
            return False
        try:
            columns = {key for key in self._list.columns if key in CAPTION_NAMES}
        except DataError:
            return False
        return columns <= {"text"} or columns == {"caption"}

    @cached_property
    def _list(self) -> MetadataFile:
        return MetadataFile(self.folder / _LISTS[0])

    def is_captioned(self, name: str) -> bool:
        """Whether a picture has a caption file, or a line in a list."""
        if self.lists:
            return has_words(self._in_lists.get(name, "") if self.read_only else self._list.caption(name))
        stem = posixpath.splitext(name)[0]
        found = (self.stamps.get(stem + ending) for ending in _CAPTION_ENDINGS)
        return any(isinstance(stamp, tuple) and stamp[0] > 0 for stamp in found)

    def path_of(self, name: str) -> Path:
        """The file of a picture that a browser named, with links followed.

        Raises `OutsideError` where it leads out of what may be looked into, `MissingError` where it is gone.
        """
        self._check_name(name)
        return self.workspace.resolve(str(self.folder / name))

    def _check_name(self, name: str) -> None:
        whole = posixpath.normpath(name)
        hidden = any(part.startswith(".") for part in name.split("/"))
        if whole != name or not is_inside(name) or hidden or "\\" in name or "\0" in name:
            raise OutsideError(f"{shown(name)[:200]}: is no picture of this folder")
        if posixpath.splitext(name)[1].lower() not in SUFFIXES:
            raise OutsideError(f"{shown(name)[:200]}: is no picture of this folder")
        if not (self.folder / name).parent.resolve().is_relative_to(self.folder):
            raise OutsideError(f"{shown(name)[:200]}: is no picture of this folder")
        if not (self.folder / name).is_file():
            raise MissingError(f"{shown(name)[:200]}: is not there any more")

    def size_of(self, name: str) -> tuple[int, int]:
        """Upright width and height in pixels; raise `RefusedError` for what is no picture."""
        try:
            with open_regular(self.path_of(name), DataError) as file:
                return picture_size(file)
        except LorascopeError as error:
            raise RefusedError(str(error)) from error
        except OSError as error:
            raise RefusedError(f"cannot be read ({error.strerror})") from error

    # -- one caption -----------------------------------------------------------------------------------------

    def caption(self, name: str) -> Caption:
        """The caption of a picture as its file has it now."""
        if self.read_only:
            file = self.lists[0] if self.lists else self._caption_file(name)
            return Caption(self._in_lists.get(name, ""), "", file, problem=self.read_only)
        return self._read(self._place(name))

    @cached_property
    def _in_lists(self) -> dict[str, str]:
        """Captions by picture, as far as lists can be read."""
        found: dict[str, str] = {}
        for name in self.lists:
            path = self.folder / name
            try:
                # A link may lead anywhere; a huge list is for training, not for a page.
                if self.workspace.resolve(str(path)).stat().st_size > _SHOWN_METADATA_BYTES:
                    continue
                lines = read_metadata(path, "text")
            except (LorascopeError, OSError):
                continue  # the check says what is wrong with it
            for line in lines:
                picture = posixpath.normpath(posixpath.join(posixpath.dirname(name), str(line.file_name)))
                if isinstance(line.caption, str):
                    found.setdefault(picture, line.caption)
        return found

    def _place(self, name: str) -> str:
        """Where a picture's caption stands: its file, or in a list its own name."""
        return name if self.lists else self._caption_file(name)

    def _caption_file(self, name: str) -> str:
        """The file that holds a picture's caption, or would."""
        stem = posixpath.splitext(name)[0]
        there = [stem + ending for ending in _CAPTION_ENDINGS if (self.folder / (stem + ending)).exists()]
        return there[0] if there else stem + _CAPTION_ENDINGS[0]

    def _read(self, file: str) -> Caption:
        if self.lists:
            text = self._list.caption(file)
            return Caption(text, digest_bytes(text.encode(errors="replace"))[:16], file)
        path = self.folder / file
        try:
            if path.is_symlink():
                self.workspace.resolve(str(path))
            text = decode_text(read_regular(path, DataError, MAX_CAPTION_BYTES)).rstrip("\n")
        except FileNotFoundError:
            text = ""
        except (RefusedError, LorascopeError) as error:
            return Caption("", "", file, f"{shown(file)} {error}")
        return Caption(text, digest_bytes(text.encode())[:16], file)

    def save(self, name: str, text: str, version: str) -> Caption | Conflict:
        """Save a caption, where its file still has the text of this version; else give both texts.

        Raises `DataError` for a text that would not reach the model, or where captions are not changed here.
        """
        self._check_name(name)
        text = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
        if problem := self.read_only or problem_of(text):
            raise DataError(f"{shown(name)}: the caption {problem}" if not self.read_only else problem)
        if len(text.encode(errors="replace")) >= MAX_CAPTION_BYTES or not is_unicode(text):
            raise DataError(
                f"{shown(name)}: at most {MAX_CAPTION_BYTES:,} bytes of text are a caption: shorten it"
            )
        with self._fresh():
            now = self._read(self._place(name))
            if now.problem:
                raise DataError(now.problem)
            if now.text == text:
                return now
            if now.version != version:
                return Conflict(text, now)
            self._write({now.file: text})
            return self._read(now.file)

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        """Nobody else writes, and a list is as it stands on the disk now."""
        with _writing:
            self.__dict__.pop("_list", None)
            yield

    def _write(self, texts: Mapping[str, str]) -> None:
        """Write captions by their places."""
        for place, text in texts.items():
            if self.lists:
                self._list.put(place, text)
            else:
                write_text(self.folder / place, f"{text}\n" if text else "")
        if self.lists:
            self._list.save()

    # -- all captions ----------------------------------------------------------------------------------------

    def plan(self, change: Change) -> Plan:
        """What a change would do."""
        change.check()
        if self.read_only:
            raise DataError(self.read_only)
        rows, without, left_out = [], 0, []
        # Two pictures of one name share their caption file.
        for file in dict.fromkeys(map(self._place, self.pictures)):
            caption = self._read(file)
            if caption.problem:
                left_out.append(caption.problem)
            elif not caption.is_there:
                without += 1
            elif (after := change.of(caption.text)) != caption.text:
                rows.append((file, caption.text, after))
        return Plan(change, rows, without, left_out)

    def apply(self, change: Change, digest: str) -> LastChange:
        """Do what was shown; raise `ConfigError` where captions have changed since.

        The texts before are kept first: whatever stops this, `undo` leads back.
        """
        with self._fresh():
            plan = self.plan(change)
            if plan.digest != digest:
                raise ConfigError("captions have changed since this was shown: look at it once more")
            done = LastChange(change.words, time.time(), len(plan.rows))
            write_json(self._undo_path, {"what": done.what, "when": done.when, "rows": plan.rows})
            self._write({file: after for file, _, after in plan.rows})
        return done

    @property
    def _undo_path(self) -> Path:
        name = digest_bytes(str(self.folder).encode(errors="surrogateescape"))[:32]
        return self.workspace.state_dir / "caption-changes" / f"{name}.json"

    def last_change(self) -> LastChange | None:
        """The change that can be undone, None without one."""
        if not self._undo_path.exists():
            return None
        try:
            found = read_table(self._undo_path, _CHANGE)
        except StorageError:
            return None
        return LastChange(found["what"], found["when"], len(found["rows"]))

    def undo(self) -> tuple[int, list[str]]:
        """Bring back the texts from before the last change of all captions.

        Gives how many, and the files that were changed since, which stay as they are. Raises `MissingError`
        where there is nothing to undo.
        """
        with self._fresh():
            if not self._undo_path.exists():
                raise MissingError("there is no change of all captions to undo: it may be undone already")
            if self.read_only:
                raise DataError(self.read_only)
            back, others = {}, []
            for file, before, after in read_table(self._undo_path, _CHANGE)["rows"]:
                now = self._read(file)
                if now.text == after and not now.problem:
                    back[file] = before
                elif now.text != before:
                    others.append(file)
            self._write(back)
            self._undo_path.unlink()
        return len(back), others


def recent_sets(workspace: Workspace) -> list[Path]:
    """Folders that were looked at, newest first, then sets that were uploaded."""
    try:
        named = read_table(workspace.state_dir / "recent-sets.json", {"folders": [str]})["folders"]
    except StorageError:
        named = []
    uploaded = []
    if workspace.pictures_dir.is_dir():
        folders = [path for path in workspace.pictures_dir.iterdir() if path.is_dir() and path.name[0] != "."]
        uploaded = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
    found = []
    for path in (*map(Path, named), *uploaded):
        try:
            folder = workspace.resolve(str(path))
        except LorascopeError:
            continue  # gone, or not allowed any more
        if folder.is_dir() and folder not in found:
            found.append(folder)
    return found[:_RECENT]


def note_recent(workspace: Workspace, folder: Path) -> None:
    """Put a folder first among those that were looked at."""
    known = recent_sets(workspace)
    if not is_unicode(str(folder)) or known[:1] == [folder]:
        return
    names = [str(path) for path in (folder, *(other for other in known if other != folder))]
    write_json(workspace.state_dir / "recent-sets.json", {"folders": names[:_RECENT]})
