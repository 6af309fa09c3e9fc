"""Where pictures and captions come from: Parquet, picture folders, WebDataset tar files, hub data sets.

A source lists its rows with their captions and reads the bytes of one picture when asked; pictures stay where
they are. Nothing is ever unpacked, and what cannot be used becomes a row with the reason.
"""

import re
from collections import Counter
from pathlib import Path

from lorascope.base.hub import fetch_snapshot
from lorascope.data.folders import FolderSource, left_out, unreadable, walk
from lorascope.data.parquet import ParquetSource
from lorascope.data.pictures import SUFFIXES
from lorascope.data.shards import expand_shards, files_in
from lorascope.data.tars import TarSource
from lorascope.errors import DataError
from lorascope.sections import DataSection

_POCKET_DIR = Path(__file__).parents[1] / "pocket" / "cartoon"
_HUB_PATTERNS = (
    *("*.parquet", "*.tar", "*.txt", "*.caption", "*metadata.jsonl", "*metadata.csv"),
    *(f"*{suffix}" for suffix in sorted(SUFFIXES)),
)

Source = ParquetSource | FolderSource | TarSource


def open_source(section: DataSection, revision: str | None = None) -> Source:
    """The source that `data.source` names; `revision` takes the place of `data.revision` for a hub data set.

    Raises `DataError` if there is nothing of that name, it cannot be read or holds no rows of any known kind,
    `HubError` if the hub does not give it.
    """
    try:
        return _choose_source(section, revision)
    except OSError as error:
        raise unreadable(Path(section.source), error) from error


def _choose_source(section: DataSection, revision: str | None) -> Source:
    name, path = section.source, Path(section.source)
    if name == "pocket":
        path = _POCKET_DIR
        if not files_in(path, "*.parquet"):
            raise DataError(
                "data.source = 'pocket': the pocket data set is missing from this installation: install "
                "lorascope again"
            )
    elif not path.exists():
        if path.suffix == ".tar" and "{" in name:
            return TarSource(name, expand_shards(name), section)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise DataError(
                f"data.source = {name!r}: no such file or folder, and no hub data set id such as "
                "owner/name: check the path"
            )
        path = fetch_snapshot(
            name,
            kind="dataset",
            revision=revision or section.revision,
            patterns=_HUB_PATTERNS,
            what=f"data.source = {name!r}",
        )
        name = f"{name}@{path.name}"
    if path.is_dir():
        return _read_folder(name, path, section)
    match path.suffix.lower():
        case ".parquet":
            return ParquetSource(name, {path.name: path}, section)
        case ".tar":
            return TarSource(name, {path.name: path}, section)
        case ".zip" | ".gz" | ".tgz" | ".zst" | ".7z" | ".rar":
            raise DataError(
                f"data.source = {name!r}: compressed: unpack it and give the folder, or the .tar file"
            )
    raise DataError(
        f"data.source = {name!r}: not a Parquet file (.parquet), a tar file (.tar) or a folder: give "
        "one of these"
    )


def _read_folder(name: str, folder: Path, section: DataSection) -> Source:
    """The source that a folder is, with remarks on what in it is not read."""
    source: ParquetSource | TarSource
    if files := files_in(folder, "*.parquet"):
        source, kind = ParquetSource(name, files, section), "Parquet files"
    elif any(child.suffix.lower() in SUFFIXES for child in folder.iterdir()):
        return FolderSource(name, folder, section)
    elif files := files_in(folder, "*.tar"):
        source, kind = TarSource(name, files, section), "tar files"
    else:
        return FolderSource(name, folder, section)
    read = {path.relative_to(folder).as_posix() for path in files.values()}
    source.remarks += left_out((found for found, _ in walk(folder, skip_unreadable=True)), read, kind)
    return source


def count_repeats(section: DataSection) -> tuple[dict[int, int], list[str]]:
    """Pictures of a folder on this machine by the number of times that an epoch shows them, and the source's
    remarks, from names and lists alone. Of a folder of other files the remarks alone; nothing of any other
    source, which is opened or fetched by a run.
    """
    source = open_source(section) if Path(section.source).is_dir() else None
    if not isinstance(source, FolderSource):
        return {}, source.remarks if source else []
    counts = Counter(section.repeats * times for times in source.repeats())
    return dict(sorted(counts.items())), source.remarks
