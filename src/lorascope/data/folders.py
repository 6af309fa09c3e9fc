"""Pictures in a folder, at any depth, with captions from lists or from a text file beside each."""

import functools
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorascope.data.captions import MAX_CAPTION_BYTES, caption_in, clean_caption
from lorascope.data.metadata import read_metadata
from lorascope.data.names import is_inside, is_unicode, name_some, shown
from lorascope.data.pictures import MAX_FILE_BYTES, SUFFIXES, RefusedError
from lorascope.data.repeats import repeat_folder, repeat_remarks, repeats_in, repeats_of, repeats_problem
from lorascope.data.rows import SPLITS, Row, Stamp, stamp_of
from lorascope.errors import DataError
from lorascope.sections import DataSection

KINDS = {"pictures": SUFFIXES, "Parquet files": {".parquet"}, "tar files": {".tar"}}
"""What a folder may be read as, with the endings of its files."""

_UNREAD_SUFFIXES = frozenset(
    (
        *(".heic", ".heif", ".jxl", ".jp2", ".tga", ".exr", ".hdr", ".ico", ".svg", ".eps", ".pdf"),
        *(".psd", ".psb", ".xcf", ".kra", ".clip", ".ai"),
        *(".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
        *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"),
    )
)
_CAPTION_ENDINGS = (".txt", ".caption")
_SHOWN_PATH = 300
_FOLDER_LINK = "is a link to a folder, which is not followed"


class FolderSource:
    """Pictures in a folder, at any depth; captions from `metadata.jsonl`/`metadata.csv`, or a text file
    beside each.

    A metadata file speaks for its folder and what is below, and where there is one, no caption beside a
    picture counts. Otherwise `1.txt` or, where that is missing, `1.caption` holds the caption of `1.png`.
    What does not count is compared with what does, and said where it differs. Pictures of a folder `10_name`
    are seen 10 times; where it holds no caption file at all, its name is their caption. Without
    `data.folder_repeats` names of folders say neither.
    """

    def __init__(self, name: str, folder: Path, section: DataSection) -> None:
        self.name = name
        self.origin = str(folder.resolve())
        self.remarks: list[str] = []
        self._folder = folder
        self._section = section

    @functools.cached_property
    def _listed(self) -> list[tuple[Row, str, list[str]]]:
        """Rows without the captions that stand in files of their own; the list or else the caption file that
        counts, and the caption files that do not.
        """
        stamps = dict(sorted(walk(self._folder)))
        pictures = [name for name in stamps if posixpath.splitext(name)[1].lower() in SUFFIXES]
        metadata = [name for name in stamps if posixpath.basename(name) in ("metadata.jsonl", "metadata.csv")]
        if not pictures:
            unread = _unread_files(stamps)
            remedy = f", {unread}" if unread else ": give a folder with any of these"
            raise DataError(
                f"data.source = {self.name!r}: no Parquet or tar files in it or its data folder, and no "
                f"pictures ({', '.join(sorted(SUFFIXES))}){remedy}"
            )
        self.remarks += self._remarks_on(stamps, pictures)
        if not metadata:
            return self._captioned_beside(stamps, pictures)
        named: dict[str, str] = {}
        listed = list(self._metadata_rows(stamps, pictures, metadata, named))
        return [
            (row, named.get(row.id, ""), _readable(_caption_files(row.id, stamps), stamps)) for row in listed
        ]

    def _remarks_on(self, stamps: Mapping[str, Stamp | str], pictures: Sequence[str]) -> list[str]:
        """What the names of files and folders show that is not read, or may be read otherwise than meant."""
        remarks = []
        if unread := _unread_files(stamps):
            remarks.append(unread)
        remarks += left_out(stamps, set(pictures), "pictures")
        if links := [name for name, status in stamps.items() if status == _FOLDER_LINK]:
            remarks.append(f"links to folders are not followed: {name_some(links)}: move the folders here")
        if not self._section.folder_repeats:
            return remarks
        remarks += repeat_remarks(map(posixpath.dirname, pictures))
        if (own := self._folder.resolve().name) and repeats_in(own) is not None:
            remarks.append(
                f"repeats are read from folders inside the source, not from its own name {shown(own)}: "
                "give the folder above, or set data.repeats"
            )
        return remarks

    def _captioned_beside(
        self, stamps: Mapping[str, Stamp | str], pictures: Sequence[str]
    ) -> list[tuple[Row, str, list[str]]]:
        """The rows of a folder without lists: captions stand beside the pictures, or are their folder's
        name.
        """
        captions = {picture: _caption_files(picture, stamps) for picture in pictures}
        captioned = {self._repeat_folder(picture) for picture, files in captions.items() if files}
        rows = []
        for picture, files in captions.items():
            row = self._picture_row(picture, stamps)
            folder = self._repeat_folder(picture)
            if not files and folder and folder not in captioned:
                text = posixpath.basename(folder).partition("_")[2]
                row = self._picture_row(picture, stamps, text, "captioned by the name of its folder")
            if files and not row.problem and isinstance(status := stamps[files[0]], str):
                row = row.with_problem(f"{shown(posixpath.basename(files[0]))} {status}")
            rows.append((row, files[0] if files else "", _readable(files[1:], stamps)))
        shared = Counter(counting for _, counting, _ in rows if counting)
        if several := [name for name, number in shared.items() if number > 1]:
            self.remarks.append(
                f"caption files that count for more than one picture of their name: {name_some(several)}: "
                "rename pictures that need captions of their own"
            )
        if not any(counting or row.treatments for row, counting, _ in rows):
            raise DataError(
                f"data.source = {self.name!r}: {len(pictures)} pictures and no captions: add "
                "metadata.jsonl or metadata.csv with file_name and text, or a .txt file beside each "
                "picture (`lorascope caption` writes them)"
            )
        return rows

    def _repeat_folder(self, picture: str) -> str | None:
        return repeat_folder(posixpath.dirname(picture)) if self._section.folder_repeats else None

    def _picture_row(
        self,
        picture: str,
        stamps: Mapping[str, Stamp | str],
        caption: object = None,
        *treatments: str,
    ) -> Row:
        if not is_unicode(picture):
            return Row(shown(picture), "train", None, None, problem="the file name is not UTF-8")
        status = stamps.get(picture, "is not there")
        stamp = None if isinstance(status, str) else status
        problem = None if stamp else f"the picture {status}"
        by_folder = self._section.folder_repeats
        if stamp and by_folder and (unseen := repeats_problem(picture)):
            problem = unseen
        elif stamp and stamp[0] > MAX_FILE_BYTES:
            problem = f"the image file has {stamp[0]} bytes, more than the limit of {MAX_FILE_BYTES}"
        split, repeats = _split_of_picture(picture), repeats_of(picture) if by_folder else 1
        return Row(picture, split, stamp, caption, repeats, problem, treatments)

    def _metadata_rows(
        self,
        stamps: Mapping[str, Stamp | str],
        pictures: Sequence[str],
        metadata: Sequence[str],
        named: dict[str, str],
    ) -> Iterator[Row]:
        """A row for each line of the metadata files, then for each picture that none of them names.

        `named` is filled with the pictures and the metadata file that names each.
        """
        for name in metadata:
            path = self._folder / name
            if isinstance(status := stamps[name], str):
                raise DataError(f"{path} {status}: put a file in its place, or take it away")
            for line in read_metadata(path, self._section.caption_column):
                picture = posixpath.normpath(posixpath.join(posixpath.dirname(name), str(line.file_name)))
                problem = None
                if not _names_a_file(line.file_name) or not is_inside(picture):
                    problem = f"file_name = {line.file_name!r} does not name a file in this folder"
                elif picture in named:
                    problem = f"{shown(picture)} was named before, in {shown(named[picture])}"
                if problem:
                    yield Row(f"{shown(name)}#{line.number}", "train", None, None, problem=problem)
                    continue
                named[picture] = name
                row = self._picture_row(picture, stamps, line.caption)
                yield line.with_more_fields(row, shown(name))
        for picture in pictures:
            if picture not in named:
                row = self._picture_row(picture, stamps)
                yield row if row.problem else row.with_problem(_unnamed(picture, metadata, stamps))

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return len(self._listed)

    def rows(self) -> Iterator[Row]:
        """All rows in the order of their names; caption files are read as they come."""
        for row, counting, others in self._listed:
            if counting and not row.problem and counting.endswith(_CAPTION_ENDINGS):
                name = shown(posixpath.basename(counting))
                try:
                    row = row.with_caption(self._read_caption_file(counting), name)
                except OSError as error:
                    row = row.with_problem(f"{name} cannot be read ({error.strerror})")
            yield self._compared(row, counting, others) if others and not row.problem else row

    def repeats(self) -> list[int]:
        """How often each picture that can be used so far is seen in an epoch, from names and lists alone."""
        return [row.repeats for row, _, _ in self._listed if not row.problem]

    def _read_caption_file(self, name: str) -> bytes:
        with (self._folder / name).open("rb") as file:
            return file.read(MAX_CAPTION_BYTES + 1)

    def _compared(self, row: Row, counting: str, others: Sequence[str]) -> Row:
        """The row with what is to be said of caption files that do not count beside the one that does."""
        kind = posixpath.basename(counting)
        if counting.endswith(_CAPTION_ENDINGS):
            kind = f"its {posixpath.splitext(counting)[1]} file"
        try:
            caption = clean_caption(row.caption)[0]
        except RefusedError as error:
            endings = " and ".join(posixpath.splitext(name)[1] for name in others)
            return row.with_problem(f"{error} in {kind}, and beside that its {endings} does not count")
        for name in others:
            try:
                other = clean_caption(caption_in(self._read_caption_file(name))[0])[0]
            except (OSError, RefusedError):
                continue  # what cannot be read does not count anyway
            if other != caption:
                treatment = f"{kind} counts, its {posixpath.splitext(name)[1]} file says otherwise"
                row = replace(row, treatments=(*row.treatments, treatment))
        return row

    def position(self, row_id: str) -> tuple[Any, ...]:
        """Where the row stands in the source, to be sorted by."""
        return (row_id,)

    def read(self, row_id: str) -> bytes:
        """The bytes of one picture file, from any thread; raise `RefusedError` if it cannot be read."""
        try:
            if (path := self._folder / row_id).exists() and not path.is_file():
                raise RefusedError("the image file is no file any more")
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise RefusedError(f"the image file cannot be read ({error.strerror})") from error
        if len(content) > MAX_FILE_BYTES:
            raise RefusedError(f"the image file has more bytes than the limit of {MAX_FILE_BYTES}")
        return content


def walk(folder: Path, *, skip_unreadable: bool = False) -> Iterator[tuple[str, Stamp | str]]:
    """Names of all files below `folder`, relative to it, with their stamps, or with what is wrong with them.

    Hidden files and folders are left out, and links to folders not followed. Raises `DataError` where a
    folder cannot be read, unless such are to be skipped.
    """
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{below}{entry.name}/")
                    else:
                        yield f"{below}{entry.name}", _status_of(entry)
        except OSError as error:
            if not skip_unreadable:
                raise unreadable(folder / below, error) from error


def _status_of(entry: os.DirEntry[str]) -> Stamp | str:
    """The stamp of a file; what is wrong where it is none, since a pipe, say, may never end."""
    try:
        status = entry.stat()
    except OSError as error:
        return f"is a link that leads nowhere ({error.strerror})"
    if stat.S_ISREG(status.st_mode):
        return stamp_of(status)
    return _FOLDER_LINK if stat.S_ISDIR(status.st_mode) else "is a pipe, a socket or a device, not a file"


def unreadable(path: Path, error: OSError) -> DataError:
    """The error to raise of a file or folder that the system does not let us read."""
    return DataError(
        f"{shown(str(path))[:_SHOWN_PATH]}: cannot be read ({error.strerror}): put it back, or correct "
        "its permissions"
    )


def _unread_files(stamps: Mapping[str, Stamp | str]) -> str:
    """Words on pictures and films in formats that are not read, which show by their endings or by captions
    that stand beside them; empty where there are none.
    """
    parts = [(name, *posixpath.splitext(name)) for name in stamps]
    stems = {stem for _, stem, ending in parts if ending.lower() in SUFFIXES}
    unread = [
        shown(name)
        for name, stem, ending in parts
        if ending.lower() in _UNREAD_SUFFIXES
        or (stem not in stems and ending not in _CAPTION_ENDINGS and _caption_files(name, stamps))
    ]
    if not unread:
        return ""
    files = f"{len(unread):,} files in formats" if len(unread) > 1 else "1 file in a format"
    return f"{files} not read here: {name_some(unread)}: convert what is to be used to PNG or JPEG"


def left_out(names: Iterable[str], read: Collection[str], read_kind: str) -> list[str]:
    """Remarks on the files that a source could be made of too, and that are not read since others are.

    `names` are those of all files, `read` those of the files that are read; `read_kind` is a key of `KINDS`.
    """
    remaining = [name for name in names if name not in read]
    remarks = []
    for kind, endings in KINDS.items():
        found = [name for name in remaining if posixpath.splitext(name)[1].lower() in endings]
        if found:
            what = f"{len(found):,} {kind} are" if len(found) > 1 else f"1 {kind.removesuffix('s')} is"
            others = "others" if kind == read_kind else read_kind
            remarks.append(
                f"{what} not read, since {others} are: {name_some(sorted(found))}: to use such, give a "
                "folder of them alone"
            )
    return remarks


def _caption_files(picture: str, names: Mapping[str, Stamp | str]) -> list[str]:
    """The caption files beside a picture, the one that counts first."""
    stem = posixpath.splitext(picture)[0]
    return [name for ending in _CAPTION_ENDINGS if (name := stem + ending) in names]


def _names_a_file(name: object) -> bool:
    return isinstance(name, str) and is_unicode(name) and "\0" not in name


def _readable(files: Iterable[str], stamps: Mapping[str, Stamp | str]) -> list[str]:
    return [name for name in files if not isinstance(stamps[name], str)]


def _unnamed(picture: str, metadata: Sequence[str], stamps: Mapping[str, Stamp | str]) -> str:
    """Why a picture that no list names has no caption."""
    beside = _caption_files(picture, stamps)
    unread = (
        f", and {shown(posixpath.basename(beside[0]))} is not read where there is such a list"
        if beside
        else ""
    )
    return f"no caption: no line of {name_some(metadata)} names it{unread}"


def _split_of_picture(name: str) -> str:
    """The split that a picture's top folder is called after; `train` where it is called otherwise."""
    top, slash, _ = name.partition("/")
    return top if slash and top in SPLITS else "train"
