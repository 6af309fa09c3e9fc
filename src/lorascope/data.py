"""Rows to examples: sources, checks, duplicates, the split and the pixels; and the prompt lists.

The pictures stay where they are. What is kept in memory is a caption, a digest, a 64-bit hash and a 16 x 16 thumbnail a
picture, never the pictures themselves; a Parquet file is read one row group at a time. Every order and every choice
follows the SHA-256 of the picture's bytes, so that shuffling the rows changes nothing and smaller subsets nest.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import posixpath
import random
import re
import statistics
import threading
import unicodedata
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image, UnidentifiedImageError

from lorascope.config import DataSection
from lorascope.errors import DataError, first_line
from lorascope.store import digest_json

MAX_PIXELS = 64 * 2**20
SPLITS = ("train", "test", "validation")
THUMBNAIL_DISTANCE = 4.0
"""Near duplicates also differ by at most this much, of 255, in the mean over their 16 x 16 RGB thumbnails: the 64-bit
hashes alone take different small drawings on white for the same."""

_PACKAGE_DIR = Path(__file__).parent
_POCKET_DIR = _PACKAGE_DIR / "pocket" / "cartoon"
_PROMPTS_DIR = _PACKAGE_DIR / "prompts"
_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"))
Image.init()
_FORMATS = tuple(name for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF") if name in Image.OPEN)
_ROW_GROUP_CACHE_BYTES = 256 * 2**20
_ROWS_AT_ONCE = 64
_SHOWN_REFUSALS = 3
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Example:
    """A picture that passed every check, with its caption.

    `id` says where it stands: `train-00000-of-00001.parquet#12` (row 12, from 0) or `cats/1.png`. `caption` is what is
    trained on: NFC normalised and stripped, with `data.caption_prefix` and `data.trigger_word`. `digest` is the SHA-256
    of the image file's bytes, as 64 hex digits. `repeats` is how often it is seen in an epoch, `width_px` and
    `height_px` the size in which `Dataset.load_pixels` gives it.
    """

    id: str
    caption: str
    digest: str
    repeats: int = 1
    width_px: int = 0
    height_px: int = 0


@dataclass(frozen=True)
class Dataset:
    """Training and held-out examples, each in the order of their digests; `summary` is the content of `data.json`."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    summary: dict[str, Any]
    _source: "_Source" = field(repr=False, compare=False)

    def load_pixels(self, example: Example) -> np.ndarray:
        """The picture, centre-cropped to the example's shape and resized: uint8 [height_px, width_px, 3], RGB, 0 to 255.

        Reads the file or row group on demand and may be called from several threads. Raises `DataError` if the bytes
        are gone or no longer those the checks saw.
        """
        content = self._source.read(example.id)
        if hashlib.sha256(content).hexdigest() != example.digest:
            raise DataError(f"{example.id}: the picture changed after it was checked: run the data stage again")
        return _fit(_decode(content)[0], example.width_px, example.height_px)

    def in_storage_order(self, examples: Iterable[Example]) -> list[Example]:
        """The examples in the order in which they stand in the source: to load many, go through them in this order."""
        return sorted(examples, key=lambda example: self._source.position(example.id))


def prepare_data(
    section: DataSection,
    count_tokens: Callable[[str], int],
    max_tokens: int = 77,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Check every row of the source, find duplicates and split; afterwards every example can be loaded and trained on.

    `count_tokens` gives a caption's length in tokens, with the start and end tokens; longer captions than `max_tokens`
    are refused, not cut. `progress` is called with rows done and rows in all. Rows that cannot be used are refused with
    a reason and the rest goes on. Of exact duplicates (same bytes or same decoded pixels) one is kept, the first by
    digest, a training picture before a held-out one; near duplicates are kept but never straddle the split.

    Raises `DataError` if the source cannot be read, too many rows are refused, or nothing is left to train on or to
    hold out.
    """
    source = _open_source(section)
    if not source.num_rows:
        raise DataError(f"data.source = {section.source!r}: holds no rows: give a source with pictures and captions")
    checked = _check_rows(source, section, count_tokens, max_tokens, progress)
    kept, duplicates = _drop_exact(checked.pictures)
    groups = _near_groups(kept, section.near_duplicate_bits)
    if len(checked.splits) > 1 and "train" in checked.splits:
        heldout_ids, leaked_ids = _own_split(groups)
        split = f"the source's own: {', '.join(sorted(checked.splits - {'train'}))}"
    else:
        heldout_ids, leaked_ids = _draw_split(groups, section.heldout_share), set()
        split = f"{section.heldout_share:g} of the pictures, chosen by content digest, near duplicates together"
    duplicates += _describe_near(groups, leaked_ids)
    ordered = sorted(kept, key=lambda picture: picture.example.digest)
    heldout = [picture.example for picture in ordered if picture.example.id in heldout_ids][: section.num_heldout]
    train = [picture.example for picture in ordered if picture.example.id not in heldout_ids | leaked_ids][: section.num_train]
    if not heldout or not train:
        raise DataError(
            f"data.source = {section.source!r}: no pictures left to {'train on' if heldout else 'hold out'}: {len(kept)} distinct"
            f" pictures in {len(groups)} groups of near duplicates, {len(leaked_ids)} held-out ones dropped as duplicates of training"
            " pictures: give more pictures, or lower data.near_duplicate_bits"
        )
    tokens = [checked.num_tokens[example.id] for example in (*train, *heldout)]
    summary = {
        "source": source.name,
        "resolution_px": section.resolution_px,
        "caption_prefix": section.caption_prefix,
        "trigger_word": section.trigger_word,
        "buckets": _count_buckets(train, heldout),
        "num_rows": source.num_rows,
        "num_train": len(train),
        "num_heldout": len(heldout),
        "split": split,
        "refused": checked.refused,
        "treated": checked.treated,
        "duplicates": duplicates,
        "train": [vars(example) for example in train],
        "heldout": [vars(example) for example in heldout],
        "caption_tokens": {"min": min(tokens), "median": statistics.median(tokens), "max": max(tokens)},
        "fingerprint": _fingerprint(section.resolution_px, train, heldout),
    }
    return Dataset(tuple(train), tuple(heldout), summary, source)


def load_dataset(section: DataSection, summary: dict[str, Any]) -> Dataset:
    """The data set that `prepare_data` described in `summary` (the content of `data.json`), without the checks.

    Raises `DataError` if `summary` belongs to another source or resolution, or the source is gone.
    """
    name, _, revision = summary["source"].partition("@")
    if section.source not in (summary["source"], name) or section.resolution_px != summary["resolution_px"]:
        raise DataError(
            f"data.json was made from {summary['source']!r} at {summary['resolution_px']} px, the study asks for {section.source!r} at"
            f" {section.resolution_px} px: run the data stage again"
        )
    source = _open_source(section, revision=revision if name == section.source and revision else None)
    train, heldout = (tuple(Example(**example) for example in summary[split]) for split in ("train", "heldout"))
    return Dataset(train, heldout, summary, source)


def _fingerprint(resolution_px: int, train: Iterable[Example], heldout: Iterable[Example]) -> str:
    """One digest for everything that training and evaluation see of the data."""
    splits = {"train": train, "heldout": heldout}
    content = {
        name: [[example.digest, example.caption, example.repeats, example.width_px, example.height_px] for example in examples]
        for name, examples in splits.items()
    }
    return digest_json({"resolution_px": resolution_px, **content})


def _count_buckets(train: Sequence[Example], heldout: Sequence[Example]) -> list[dict[str, int]]:
    """The sizes in which pictures are given, narrowest first, with the number of pictures of each."""
    counts = [Counter((example.width_px, example.height_px) for example in examples) for examples in (train, heldout)]
    sizes = sorted(counts[0].keys() | counts[1].keys(), key=lambda size: (size[0] / size[1], size))
    return [{"width_px": size[0], "height_px": size[1], "num_train": counts[0][size], "num_heldout": counts[1][size]} for size in sizes]


# Sources ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A row as the source holds it; `problem` says why it cannot be used, if that is already known."""

    id: str
    split: str
    content: bytes | Path | None
    caption: object
    problem: str | None = None


class _ParquetSource:
    """Rows of Parquet files with a picture column (bytes, or a struct with bytes) and a caption column."""

    def __init__(self, name: str, files: Mapping[str, Path], image_column: str, caption_column: str) -> None:
        self.name = name
        self._files = dict(files)
        self._columns = (image_column, caption_column)
        self._first_rows: dict[str, list[int]] = {}
        self._cache: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        for file in self._files:
            with self._open(file) as parquet:
                self._check_columns(file, parquet.schema_arrow)
                sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            self._first_rows[file] = [0, *itertools.accumulate(sizes)]
        self.num_rows = sum(first[-1] for first in self._first_rows.values())

    def _open(self, file: str) -> Any:
        try:
            return pq.ParquetFile(self._files[file])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self._files[file]}: cannot be read as Parquet ({first_line(error)}): download or export it again") from error

    def _check_columns(self, file: str, schema: Any) -> None:
        for key, column, fits in (
            ("image_column", self._columns[0], _holds_images),
            ("caption_column", self._columns[1], _holds_text),
        ):
            if column not in schema.names:
                raise DataError(f"{self._files[file]}: no column {column!r}; columns present: {', '.join(schema.names)}: set data.{key}")
            kind = schema.field(column).type
            if not fits(kind):
                needed = "image bytes" if key == "image_column" else "text"
                raise DataError(f"{self._files[file]}: column {column!r} holds {kind}, needs {needed}: set data.{key}")

    def _read_group(self, file: str, group: int, columns: Sequence[str]) -> Any:
        with self._open(file) as parquet:
            try:
                return parquet.read_row_group(group, columns=list(columns))
            except (OSError, pa.ArrowException) as error:
                where = f"{self._files[file]}: row group {group}"
                raise DataError(f"{where} cannot be read ({first_line(error)}): download or export the file again") from error

    def rows(self) -> Iterator[_Row]:
        for file, first_rows in self._first_rows.items():
            split = _split_of_file(file)
            for group, first_row in enumerate(first_rows[:-1]):
                table = self._read_group(file, group, self._columns)
                images, captions = (table.column(column) for column in self._columns)
                for index in range(table.num_rows):
                    row_id = f"{file}#{first_row + index}"
                    content = _image_bytes(images[index].as_py())
                    try:
                        yield _Row(row_id, split, content, captions[index].as_py())
                    except UnicodeDecodeError:
                        yield _Row(row_id, split, content, None, "the caption is not UTF-8")

    def position(self, row_id: str) -> tuple[Any, ...]:
        file, _, row = row_id.rpartition("#")
        return file, int(row)

    def read(self, row_id: str) -> bytes:
        """The image file's bytes of one row; row groups stay cached up to a fixed number of bytes."""
        file, _, row = row_id.rpartition("#")
        first_rows = self._first_rows.get(file, [0])
        if not row.isdigit() or int(row) >= first_rows[-1]:
            raise DataError(f"{row_id}: no such row in {self.name!r}: run the data stage again")
        group = int(np.searchsorted(first_rows, int(row), side="right")) - 1
        with self._lock:
            if (file, group) not in self._cache:
                self._cache[file, group] = self._read_group(file, group, self._columns[:1]).column(0)
                while len(self._cache) > 1 and sum(column.nbytes for column in self._cache.values()) > _ROW_GROUP_CACHE_BYTES:
                    self._cache.popitem(last=False)
            self._cache.move_to_end((file, group))
            return _image_bytes(self._cache[file, group][int(row) - first_rows[group]].as_py()) or b""


class _FolderSource:
    """Pictures in a folder, at any depth; captions from `metadata.jsonl`/`metadata.csv`, or a text file beside each.

    A metadata file speaks for its folder and what is below, and where there is one, no captions are read beside the
    pictures. Otherwise `1.txt` or, where that is missing, `1.caption` holds the caption of `1.png`.
    """

    def __init__(self, name: str, folder: Path, caption_column: str) -> None:
        self.name = name
        self._folder = folder
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        pictures = [name for name in names if Path(name).suffix.lower() in _SUFFIXES]
        metadata = [name for name in names if name.rpartition("/")[2] in ("metadata.jsonl", "metadata.csv")]
        if not pictures:
            raise DataError(
                f"data.source = {name!r}: no Parquet files in it or its data folder, and no pictures ({', '.join(sorted(_SUFFIXES))}):"
                " give a folder with either"
            )
        if metadata:
            self._rows = _metadata_rows(folder, pictures, metadata, caption_column)
        elif any(_caption_path(folder / picture) for picture in pictures):
            self._rows = [_picture_row(folder, picture, _caption_path(folder / picture)) for picture in pictures]
        else:
            raise DataError(
                f"data.source = {name!r}: {len(pictures)} pictures and no captions: add metadata.jsonl or metadata.csv with file_name and"
                " text, or a .txt file beside each picture"
            )
        self.num_rows = len(self._rows)

    def rows(self) -> Iterator[_Row]:
        for row in self._rows:
            if isinstance(row.caption, Path):
                try:
                    yield _Row(row.id, row.split, row.content, row.caption.read_text(encoding="utf-8-sig"))
                except (OSError, UnicodeDecodeError):
                    yield _Row(row.id, row.split, row.content, None, f"{row.caption.name} cannot be read as UTF-8 text")
            else:
                yield row

    def position(self, row_id: str) -> tuple[Any, ...]:
        return (row_id,)

    def read(self, row_id: str) -> bytes:
        try:
            return (self._folder / row_id).read_bytes()
        except OSError as error:
            raise DataError(
                f"{self._folder / row_id}: cannot be read ({error.strerror}): put it back, or run the data stage again"
            ) from error


_Source = _ParquetSource | _FolderSource


def _open_source(section: DataSection, revision: str | None = None) -> _Source:
    """The source that `data.source` names; `revision` pins a hub data set."""
    name, path = section.source, Path(section.source)
    if name == "pocket":
        path = _POCKET_DIR
        if not _parquet_files(path):
            raise DataError("data.source = 'pocket': the pocket data set is missing from this installation: install lorascope again")
    elif not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise DataError(f"data.source = {name!r}: no such file or folder, and no hub data set id such as owner/name: check the path")
        path = _download(name, revision)
        name = f"{name}@{path.name}"
    if path.is_dir():
        if files := _parquet_files(path):
            return _ParquetSource(name, files, section.image_column, section.caption_column)
        return _FolderSource(name, path, section.caption_column)
    if path.suffix.lower() != ".parquet":
        raise DataError(f"data.source = {name!r}: not a Parquet file (.parquet) or a folder: give one of these")
    return _ParquetSource(name, {path.name: path}, section.image_column, section.caption_column)


def _parquet_files(folder: Path) -> dict[str, Path]:
    """Parquet files of the folder, or else of its data folder, by name."""
    for place in (folder, folder / "data"):
        if files := sorted(path for path in place.glob("*.parquet") if not path.name.startswith(".")):
            return {path.name: path for path in files}
    return {}


def _download(name: str, revision: str | None) -> Path:
    """Folder with the Parquet files of a hub data set, from the hub's local cache or the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    where = f"data.source = {name!r}: no such file or folder, and as a hub data set"
    try:
        path = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=["*.parquet"]))
    except RepositoryNotFoundError as error:
        raise DataError(f"{where} it does not exist or is not open to you: check the id, or log in with `hf auth login`") from error
    except Exception as error:  # the client passes on whatever its transport raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{where} it could not be downloaded ({reason}): check the network, or give a local folder") from error
    if not _parquet_files(path):
        raise DataError(f"{where} it has no Parquet files at its top or in data/: download its pictures and give the folder")
    return path


def _split_of_file(name: str) -> str:
    """The split that a Parquet file's name starts with; `train` where it starts with none."""
    found = re.match(rf"({'|'.join(SPLITS)})(?![a-zA-Z])", name)
    return found[1] if found else "train"


def _split_of_picture(name: str) -> str:
    """The split that a picture's top folder is called after; `train` where it is called otherwise."""
    top, slash, _ = name.partition("/")
    return top if slash and top in SPLITS else "train"


def _holds_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(member.name == "bytes" and _holds_images(member.type) for member in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _holds_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind))


def _image_bytes(value: Any) -> bytes | None:
    content: bytes | None = value.get("bytes") if isinstance(value, dict) else value
    return content


def _caption_path(picture: Path) -> Path | None:
    return next((path for suffix in (".txt", ".caption") if (path := picture.with_suffix(suffix)).is_file()), None)


def _metadata_rows(folder: Path, pictures: Sequence[str], metadata: Sequence[str], caption_column: str) -> list[_Row]:
    """A row for each line of the metadata files, then for each picture that none of them names."""
    rows: dict[str, _Row] = {}
    for name in metadata:
        for line, record in _read_metadata(folder / name):
            file_name = record.get("file_name")
            columns = [column for column in (caption_column, "text", "caption") if column in record]
            if "file_name" not in record or not columns:
                raise DataError(
                    f"{folder / name}: needs columns file_name and {caption_column}; line {line} has {', '.join(map(str, record))}"
                )
            row_id = f"{name}#{line}"
            picture = posixpath.normpath(posixpath.join(posixpath.dirname(name), str(file_name)))
            is_inside = not picture.startswith(("/", "../")) and picture not in (".", "..")
            if not isinstance(file_name, str) or not _is_unicode(file_name) or not is_inside:
                rows[row_id] = _Row(row_id, "train", None, None, f"file_name = {file_name!r} does not name a file in this folder")
            elif picture in rows:
                rows[row_id] = _Row(row_id, "train", None, None, f"{picture} was named before")
            else:
                rows[picture] = _picture_row(folder, picture, record[columns[0]])
    return [*rows.values(), *(_picture_row(folder, picture, None) for picture in pictures if picture not in rows)]


def _picture_row(folder: Path, picture: str, caption: object) -> _Row:
    if not _is_unicode(picture):
        return _Row(os.fsencode(picture).decode(errors="backslashreplace"), "train", None, None, "the file name is not UTF-8")
    problem = None if (folder / picture).is_file() else "the picture is not there"
    return _Row(picture, _split_of_picture(picture), folder / picture, caption, problem)


def _is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: JSON escapes and file names can hold half characters that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_metadata(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and record of each line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for record in reader:
                yield reader.line_num, record
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.reader.line_num}: not CSV ({error}): correct the line") from error
        return
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except ValueError as error:
            raise DataError(f"{path}: line {line}: not JSON ({error}): correct the line") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}: line {line}: not a JSON object: give one object with file_name and text a line")
        yield line, record


# Pictures --------------------------------------------------------------------------------------------------------------


class _RefusedError(Exception):
    """A row that cannot be used; the message is the reason that is reported."""


def _decode(content: bytes) -> tuple[Image.Image, list[str]]:
    """The picture as 8-bit RGB, and what had to be done to it; raise `_RefusedError` if it cannot be used.

    Colour profiles are not applied. 16-bit grey v becomes round(v / 257).
    """
    if not content:
        raise _RefusedError("the image file is empty")
    treatments = []
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _RefusedError(f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS}")
            if (num_frames := getattr(image, "n_frames", 1)) > 1:
                treatments.append(f"first of {num_frames} frames used")
            declared = _orientation(image)
            image.load()
            orientation = _orientation(image)  # a TIFF is turned as it is loaded, and then says 1
            is_deep_png = image.format == "PNG" and content[24] == 16  # bits a channel, in the header
            if image.mode.startswith("I;16") or is_deep_png:
                treatments.append("16 bits a channel scaled to 8")
            if image.mode in ("1", "L", "LA", "I") or image.mode.startswith("I;16"):
                treatments.append("grayscale converted to RGB")
            elif image.mode in ("P", "PA"):
                treatments.append("palette converted to RGB")
            elif image.mode not in ("RGB", "RGBA"):
                treatments.append(f"{image.mode} converted to RGB")
            picture, is_transparent = _to_rgb(image)
            if is_transparent:
                treatments.append("transparency composited on white")
    except _RefusedError:
        raise
    except Image.DecompressionBombError as error:
        raise _RefusedError(f"the picture has more pixels than the limit of {MAX_PIXELS}") from error
    except UnidentifiedImageError as error:
        raise _RefusedError(f"not an image in a known format ({', '.join(_FORMATS)})") from error
    except Exception as error:  # decoders raise errors of any type on damaged files
        raise _RefusedError(f"unreadable image: {first_line(error)}") from error
    if declared in _TURNS:
        treatments.append(f"turned upright (EXIF orientation {declared})")
    if orientation in _TURNS:
        picture = picture.transpose(_TURNS[orientation])
    return picture, treatments


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a picture with damaged EXIF is used as it stands
        return 1


def _to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """A loaded image as RGB on white, and whether anything of it was transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise _RefusedError("32-bit pixels: save the picture with 8 or 16 bits a channel")
        clear = values == image.info.get("transparency", -1)
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return Image.fromarray(np.where(clear, np.uint8(255), grey)).convert("RGB"), bool(clear.any())
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    layers = image.convert("RGBA")
    is_transparent = layers.getchannel("A").getextrema() != (255, 255)
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB"), is_transparent


def _crop(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centred part of the picture with the shape of `width` x `height`, to the nearest pixel."""
    scale = max(width / picture.width, height / picture.height)
    part_width, part_height = min(picture.width, round(width / scale)), min(picture.height, round(height / scale))
    left, top = (picture.width - part_width) // 2, (picture.height - part_height) // 2
    return picture.crop((left, top, left + part_width, top + part_height))


def _fit(picture: Image.Image, width: int, height: int) -> np.ndarray:
    """Centre-crop and resize: uint8 [height, width, 3]."""
    # A reducing gap of 3 box-averages what is far larger first; the result is that of plain Lanczos to the eye.
    return np.array(_crop(picture, width, height).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0))


# Checks ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    """What the search for duplicates needs of an example."""

    example: Example
    split: str
    pixel_digest: bytes
    hash: int
    thumbnail: bytes


@dataclass
class _Checked:
    splits: set[str] = field(default_factory=set)
    pictures: list[_Picture] = field(default_factory=list)
    num_tokens: dict[str, int] = field(default_factory=dict)
    refused: list[dict[str, str]] = field(default_factory=list)
    treated: list[dict[str, str]] = field(default_factory=list)


def _check_rows(
    source: _Source,
    section: DataSection,
    count_tokens: Callable[[str], int],
    max_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> _Checked:
    checked = _Checked()
    num_done = 0

    def check(row: _Row) -> tuple[_Picture, list[str]] | _RefusedError:
        try:
            return _check_row(row, section)
        except _RefusedError as error:
            return error

    num_threads = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # pictures that large are refused, with a reason
        rows = source.rows()
        while batch := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            for row, outcome in zip(batch, pool.map(check, batch), strict=True):
                num_done += 1
                checked.splits.add(row.split)
                if isinstance(outcome, _RefusedError):
                    checked.refused.append({"id": row.id, "reason": str(outcome)})
                elif (num_tokens := count_tokens(outcome[0].example.caption)) > max_tokens:
                    reason = f"the caption has {num_tokens} tokens, the text encoder takes at most {max_tokens}"
                    checked.refused.append({"id": row.id, "reason": reason})
                else:
                    picture, treatments = outcome
                    checked.pictures.append(picture)
                    checked.num_tokens[row.id] = num_tokens
                    checked.treated += [{"id": row.id, "treatment": treatment} for treatment in treatments]
                if progress is not None:
                    progress(num_done, source.num_rows)
    share = len(checked.refused) / source.num_rows
    if share > section.max_refused_share or not checked.pictures:
        first = "; ".join(f"{refusal['id']}: {refusal['reason']}" for refusal in checked.refused[:_SHOWN_REFUSALS])
        limit = f"max_refused_share is {section.max_refused_share:g}" if checked.pictures else "none is left"
        raise DataError(
            f"data.source = {section.source!r}: {len(checked.refused)} of {source.num_rows} rows ({share:.1%}) cannot be used and {limit}"
            f" ({first}): correct them" + (", or raise data.max_refused_share" if checked.pictures else "")
        )
    return checked


def _check_row(row: _Row, section: DataSection) -> tuple[_Picture, list[str]]:
    """A row as a picture with its treatments; raise `_RefusedError` with the reason if it cannot be used."""
    if row.problem is not None:
        raise _RefusedError(row.problem)
    if row.caption is None:
        raise _RefusedError("no caption")
    if not isinstance(row.caption, str):
        raise _RefusedError(f"the caption is not text but {type(row.caption).__name__}")
    if not _is_unicode(row.caption):
        raise _RefusedError("the caption holds half a character (a lone surrogate)")
    caption = unicodedata.normalize("NFC", row.caption).strip()
    if not caption:
        raise _RefusedError("the caption is empty")
    if row.content is None:
        raise _RefusedError("no image bytes in this row")
    try:
        content = row.content.read_bytes() if isinstance(row.content, Path) else row.content
    except OSError as error:
        raise _RefusedError(f"the image file cannot be read ({error.strerror})") from error
    image, treatments = _decode(content)
    if (side := min(image.size)) < section.resolution_px:
        treatments.append(f"enlarged from {side} to {section.resolution_px} px")
    square = _crop(image, 1, 1)
    pixels = hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes())
    thumbnail = square.resize((16, 16), Image.Resampling.BOX).tobytes()
    digest = hashlib.sha256(content).hexdigest()
    example = Example(row.id, _complete_caption(caption, section), digest, section.repeats, section.resolution_px, section.resolution_px)
    return _Picture(example, row.split, pixels.digest(), _difference_hash(square), thumbnail), treatments


def _complete_caption(caption: str, section: DataSection) -> str:
    """The caption with the prefix before it, and before both the trigger word where it is in neither."""
    complete = unicodedata.normalize("NFC", (section.caption_prefix or "") + caption).strip()
    word = unicodedata.normalize("NFC", section.trigger_word or "").strip()
    return complete if not word or _holds_word(complete, word) else f"{word}, {complete}"


def _holds_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def shuffled_caption(caption: str, keep_tags: int, generator: np.random.Generator | random.Random, trigger_word: str | None = None) -> str:
    """The caption with its comma-separated tags in an order drawn from `generator`; the first `keep_tags` stay in place.

    So does a first tag that holds `trigger_word`, which is not counted among them. Empty tags are left out.
    """
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    num_kept = keep_tags + bool(trigger_word and tags and _holds_word(tags[0], trigger_word))
    moved = tags[num_kept:]
    generator.shuffle(moved)
    return ", ".join((*tags[:num_kept], *moved))


def _difference_hash(square: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 cells is darker than its right neighbour, by more than the noise of JPEG on flat areas."""
    cells = np.asarray(square.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(np.diff(cells, axis=1) > 2).tobytes(), "big")  # of 255


# Duplicates and the split ----------------------------------------------------------------------------------------------


def _drop_exact(pictures: Iterable[_Picture]) -> tuple[list[_Picture], list[dict[str, Any]]]:
    """Pictures of which no two share bytes or decoded pixels, and a note on each set of equal ones."""
    equal: dict[bytes, list[_Picture]] = {}
    for picture in sorted(
        pictures, key=lambda picture: (picture.split != "train", picture.example.digest, picture.example.caption, picture.example.id)
    ):
        equal.setdefault(picture.pixel_digest, []).append(picture)
    notes = []
    for kept, *dropped in equal.values():
        if dropped:
            differ = any(picture.example.caption != kept.example.caption for picture in dropped)
            action = f"kept {kept.example.id}, dropped the other{'s' if len(dropped) > 1 else ''}" + (
                "; their captions differ" if differ else ""
            )
            notes.append({"kind": "exact", "ids": [picture.example.id for picture in (kept, *dropped)], "action": action})
    return [kept for kept, *_ in equal.values()], notes


def _near_groups(pictures: Sequence[_Picture], max_bits: int) -> list[list[_Picture]]:
    """Groups of near duplicates, most of one picture; two pictures are in one group if a chain of near pairs joins them.

    A pair is near if the hashes differ in at most `max_bits` bits and the thumbnails by at most `THUMBNAIL_DISTANCE`.
    Their means, over all or over each 4 x 4 block, then differ by no more than that either: pictures sorted by the mean
    are each compared with a short run of those after it, in one vectorised step, and the blocks spare most of the rest.
    """
    thumbnails = np.frombuffer(b"".join(picture.thumbnail for picture in pictures), np.uint8).reshape(len(pictures), -1)
    means = thumbnails.mean(axis=1)
    order = np.argsort(means, kind="stable")
    thumbnails, means = thumbnails[order], means[order]
    blocks = thumbnails.reshape(-1, 4, 4, 4, 4, 3).mean(axis=(2, 4), dtype=np.float32).reshape(len(pictures), -1)
    hashes = np.array([picture.hash for picture in pictures], np.uint64)[order]
    ends = np.searchsorted(means, means + THUMBNAIL_DISTANCE, side="right")
    group = np.arange(len(pictures))
    for index, end in enumerate(ends):
        run = slice(index + 1, end)
        is_candidate = (np.bitwise_count(hashes[run] ^ hashes[index]) <= max_bits) & (group[run] != group[index])
        candidates = index + 1 + np.flatnonzero(is_candidate)
        if len(candidates):
            candidates = candidates[np.abs(blocks[candidates] - blocks[index]).mean(axis=1) <= THUMBNAIL_DISTANCE + 1e-3]
            distances = np.abs(thumbnails[candidates].astype(np.int16) - thumbnails[index]).mean(axis=1)
            joined = group[candidates[distances <= THUMBNAIL_DISTANCE]]
            group[np.isin(group, joined)] = group[index]
    members: dict[int, list[_Picture]] = {}
    for label, position in zip(group.tolist(), order.tolist(), strict=True):
        members.setdefault(label, []).append(pictures[position])
    by_digest = [sorted(pictures, key=lambda picture: picture.example.digest) for pictures in members.values()]
    return sorted(by_digest, key=lambda pictures: pictures[0].example.digest)


def _own_split(groups: Iterable[Sequence[_Picture]]) -> tuple[set[str], set[str]]:
    """Ids of the source's held-out pictures, and of those that duplicate a training picture and must be dropped."""
    heldout_ids: set[str] = set()
    leaked_ids: set[str] = set()
    for group in groups:
        ids = {picture.example.id for picture in group if picture.split != "train"}
        (heldout_ids if len(ids) == len(group) else leaked_ids).update(ids)
    return heldout_ids, leaked_ids


def _draw_split(groups: Sequence[Sequence[_Picture]], share: float) -> set[str]:
    """Ids of the pictures to hold out: whole groups, in an order independent of that in which subsets are taken."""
    num_pictures = sum(map(len, groups))
    num_wanted = min(max(1, round(share * num_pictures)), num_pictures - 1)
    heldout_ids: set[str] = set()
    for group in sorted(groups, key=lambda group: hashlib.sha256(group[0].example.digest.encode()).digest()):
        if len(heldout_ids) + len(group) <= num_wanted:
            heldout_ids.update(picture.example.id for picture in group)
    return heldout_ids


def _describe_near(groups: Iterable[Sequence[_Picture]], leaked_ids: set[str]) -> list[dict[str, Any]]:
    notes = []
    for group in groups:
        ids = [picture.example.id for picture in group]
        if len(ids) > 1:
            leaked = [picture_id for picture_id in ids if picture_id in leaked_ids]
            action = f"dropped from the held-out pictures: {', '.join(leaked)}" if leaked else "kept on the same side of the split"
            notes.append({"kind": "near", "ids": ids, "action": action})
    return notes


# Prompts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample with; `index` counts from 0 within its category."""

    category: str
    index: int
    text: str


def load_prompts(name_or_path: str, num_prompts: int | None) -> list[Prompt]:
    """Prompts of a list of ours (`pocket`, `sd15`) or of a file, the first `num_prompts` of each category, or all.

    A file is UTF-8 text with a section such as `[normal]` for each category and one prompt a line; blank lines and lines
    that start with `#` are left out. Raises `DataError` with the line to correct.
    """
    path = _PROMPTS_DIR / f"{name_or_path}.txt" if re.fullmatch(r"\w+", name_or_path) else Path(name_or_path)
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise DataError(f"sample.prompts = {name_or_path!r}: not `pocket`, `sd15` or an existing file: check the path")
    sections = _read_sections(path)
    return [Prompt(category, index, text) for category, texts in sections.items() for index, text in enumerate(texts[:num_prompts])]


def _read_sections(path: Path) -> dict[str, list[str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    sections: dict[str, list[str]] = {}
    first_lines: dict[str, int] = {}
    category = None
    for number, line in enumerate(lines, start=1):
        text = unicodedata.normalize("NFC", line).strip()
        if not text or text.startswith("#"):
            continue
        if text.startswith("[") and text.endswith("]"):
            category = text[1:-1].strip()
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", category):
                raise DataError(f"{path}: line {number}: {text}: a category is letters, digits, - and _, for example [normal]")
            sections.setdefault(category, [])
        elif category is None:
            raise DataError(f"{path}: line {number}: {text!r} stands before the first section: put a line such as [normal] above it")
        elif text in first_lines:
            raise DataError(f"{path}: line {number}: {text!r} stands on line {first_lines[text]} already: take one of them out")
        else:
            first_lines[text] = number
            sections[category].append(text)
    if not sections:
        raise DataError(f"{path}: holds no prompts: add a section such as [normal] and one prompt a line")
    for name, prompts in sections.items():
        if not prompts:
            raise DataError(f"{path}: section [{name}] is empty: add prompts, or take it out")
    return sections
