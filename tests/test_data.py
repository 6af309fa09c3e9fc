"""Data: every source, check, treatment and refusal on real files, duplicates, and the split's invariants."""

import csv
import hashlib
import io
import json
import os
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from lorascope import data
from lorascope.config import DataSection
from lorascope.data import Dataset, Example, load_dataset, prepare_data
from lorascope.errors import DataError

SIDE = 16
Row = tuple[Any, Any]


def count_words(caption: str) -> int:
    return len(caption.split()) + 2


def pixels(seed: int, side: int = SIDE) -> np.ndarray:
    """A picture of large random blocks, unlike that of any other seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return blocks.repeat(side // 4, axis=0).repeat(side // 4, axis=1)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(count: int, first: int = 0) -> list[Row]:
    return [(encode(pixels(seed)), f"picture {seed}") for seed in range(first, first + count)]


def write(path: Path, rows: Sequence[Row], row_group_size: int | None = None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": image, "path": None} for image, _ in rows], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": images, "text": pa.array([caption for _, caption in rows], pa.string()), **columns})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def section(source: Path | str, **values: Any) -> DataSection:
    return DataSection(**{"source": str(source), "resolution_px": SIDE, "max_refused_share": 1.0, **values})


def prepare(source: Path | str, **values: Any) -> Dataset:
    return prepare_data(section(source, **values), count_words)


def single(tmp_path: Path, image: bytes, **values: Any) -> tuple[np.ndarray, list[str], str | None]:
    """Pixels, treatments and refusal of one picture that stands among three others."""
    source = write(tmp_path / "one.parquet", [(image, "the one"), *plain(3)])
    dataset = prepare(source, **values)
    treatments = [entry["treatment"] for entry in dataset.summary["treated"] if entry["id"] == "one.parquet#0"]
    refused = next((entry["reason"] for entry in dataset.summary["refused"] if entry["id"] == "one.parquet#0"), None)
    found = [example for example in (*dataset.train, *dataset.heldout) if example.caption == "the one"]
    return (dataset.load_pixels(found[0]) if found else np.zeros(0)), treatments, refused


def captions(examples: Sequence[Example]) -> set[str]:
    return {example.caption for example in examples}


# Sources ---------------------------------------------------------------------------------------------------------------


def test_parquet_file(tmp_path: Path) -> None:
    rows = plain(20)
    dataset = prepare(write(tmp_path / "train-0.parquet", rows))
    assert len(dataset.train) == 18
    assert len(dataset.heldout) == 2
    for example in (*dataset.train, *dataset.heldout):
        file, index = example.id.split("#")
        assert file == "train-0.parquet"
        image, caption = rows[int(index)]
        assert example.caption == caption
        assert example.digest == hashlib.sha256(image).hexdigest()
        loaded = dataset.load_pixels(example)
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, pixels(int(caption.split()[1])))


@pytest.mark.parametrize("place", ["", "data"])
def test_folder_with_declared_splits(tmp_path: Path, place: str) -> None:
    write(tmp_path / place / "train-00000-of-00002.parquet", plain(4))
    write(tmp_path / place / "train-00001-of-00002.parquet", plain(4, 10))
    write(tmp_path / place / "test.parquet", plain(2, 20))
    write(tmp_path / place / "validation_1.parquet", plain(2, 30))
    dataset = prepare(tmp_path)
    assert captions(dataset.heldout) == {"picture 20", "picture 21", "picture 30", "picture 31"}
    assert len(dataset.train) == 8
    assert dataset.summary["split"] == "the source's own: test, validation"
    assert {example.id.split("#")[0] for example in dataset.heldout} == {"test.parquet", "validation_1.parquet"}


def test_only_a_test_split_is_drawn_from_like_any_other(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", plain(10))
    write(tmp_path / "testimony.parquet", plain(0))
    dataset = prepare(tmp_path)
    assert (len(dataset.train), len(dataset.heldout)) == (9, 1)
    assert dataset.summary["split"].startswith("0.1 of the pictures")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_plain_bytes_and_other_column_names(tmp_path: Path, kind: Any, text: Any) -> None:
    rows = plain(4)
    table = pa.table({"jpg": pa.array([image for image, _ in rows], kind), "prompt": pa.array([caption for _, caption in rows]).cast(text)})
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = prepare(tmp_path / "a.parquet", image_column="jpg", caption_column="prompt")
    assert captions((*dataset.train, *dataset.heldout)) == {f"picture {seed}" for seed in range(4)}


def test_pocket() -> None:
    dataset = prepare_data(DataSection(num_train=20, num_heldout=10), count_words)
    assert (dataset.summary["source"], len(dataset.train), len(dataset.heldout)) == ("pocket", 20, 10)
    assert dataset.load_pixels(dataset.train[0]).shape == (64, 64, 3)


def test_pocket_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_POCKET_DIR", tmp_path)
    with pytest.raises(DataError, match="missing from this installation: install lorascope again"):
        prepare("pocket")


def write_pictures(folder: Path, names: Sequence[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(pixels(seed), {".jpg": "JPEG"}.get(Path(name).suffix.lower(), "PNG")))


def test_picture_folder_with_sidecars(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "cats/2.PNG", "cats/3.jpg", "4.png", "5.png", ".hidden/6.png", "._1.png"])
    (tmp_path / "1.txt").write_text("\ufeffone", encoding="utf-8")
    (tmp_path / "1.caption").write_text("not this")
    (tmp_path / "cats/2.caption").write_text("two\n")
    (tmp_path / "cats/3.txt").write_text("three")
    (tmp_path / "4.txt").write_bytes(b"caf\xe9")
    dataset = prepare(tmp_path)
    examples = (*dataset.train, *dataset.heldout)
    assert {example.id: example.caption for example in examples} == {"1.png": "one", "cats/2.PNG": "two", "cats/3.jpg": "three"}
    assert dataset.summary["refused"] == [
        {"id": "4.png", "reason": "4.txt cannot be read as UTF-8 text"},
        {"id": "5.png", "reason": "no caption"},
    ]
    assert [example.id for example in dataset.in_storage_order(examples)] == ["1.png", "cats/2.PNG", "cats/3.jpg"]
    two = next(example for example in examples if example.caption == "two")
    np.testing.assert_array_equal(dataset.load_pixels(two), pixels(1))


def test_picture_folder_with_splits(tmp_path: Path) -> None:
    names = ["train/1.png", "train/2.png", "test/3.png"]
    write_pictures(tmp_path, [*names, "test-4.png", "tests/5.png"])
    for path in list(tmp_path.rglob("*.png")):
        path.with_suffix(".txt").write_text(path.stem)
    dataset = prepare(tmp_path)
    assert captions(dataset.heldout) == {"3"}
    assert captions(dataset.train) == {"1", "2", "test-4", "5"}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_picture_folder_with_metadata(tmp_path: Path, kind: str, column: str) -> None:
    write_pictures(tmp_path, ["1.png", "cats/2.png", "3.png", "cats/4.png"])
    (tmp_path / "3.txt").write_text("not read where there is metadata")
    records: list[dict[str, Any]] = [
        {"file_name": "1.png", column: "one, or\nfirst"},
        {"file_name": "./cats/2.png", column: "two"},
        {"file_name": "cats/4.png", column: "four"},
        {"file_name": "missing.png", column: "five"},
        {"file_name": "1.png", column: "again"},
        {"file_name": "../outside.png", column: "six"},
        {"file_name": "/absolute.png", column: "seven"},
    ]
    path = tmp_path / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, records)), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["file_name", column])
            writer.writeheader()
            writer.writerows(records)
    dataset = prepare(tmp_path, caption_column=column if column == "prompt" else "text")
    found = {example.id: example.caption for example in (*dataset.train, *dataset.heldout)}
    assert found == {"1.png": "one, or\nfirst", "cats/2.png": "two", "cats/4.png": "four"}
    lines = (9, 11, 13) if kind == "jsonl" else (7, 8, 9)
    assert [(entry["id"], entry["reason"]) for entry in dataset.summary["refused"]] == [
        ("missing.png", "the picture is not there"),
        (f"metadata.{kind}#{lines[0]}", "1.png was named before"),
        (f"metadata.{kind}#{lines[1]}", "file_name = '../outside.png' does not name a file in this folder"),
        (f"metadata.{kind}#{lines[2]}", "file_name = '/absolute.png' does not name a file in this folder"),
        ("3.png", "no caption"),
    ]


def test_metadata_in_subfolders_names_pictures_beside_it(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/1.png", "train/2.png", "test/1.png"])
    (tmp_path / "train/metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n")
    (tmp_path / "test/metadata.csv").write_text("file_name,text\n1.png,three\n")
    dataset = prepare(tmp_path)
    assert (captions(dataset.train), captions(dataset.heldout)) == ({"one", "two"}, {"three"})


def test_a_source_given_through_parent_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "pictures", ["1.png", "2.png"])
    (tmp_path / "pictures/metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(prepare("../elsewhere/../pictures").train) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "1.png", "text": "a"}\n{oops\n', "metadata.jsonl: line 2: not JSON"),
        ("metadata.jsonl", b"[1]\n", "metadata.jsonl: line 1: not a JSON object"),
        ("metadata.jsonl", b'{"name": "1.png", "text": "a"}\n', "needs columns file_name and text; line 1 has name, text"),
        ("metadata.csv", b"file_name,label\n1.png,a\n", "needs columns file_name and text; line 2 has file_name, label"),
        ("metadata.csv", b"file_name,text\n1.png,caf\xe9\n", "metadata.csv: not UTF-8"),
        ("metadata.csv", b"file_name,text\n1.png," + b"a" * 140_000 + b"\n", "metadata.csv: line 2: not CSV"),
    ],
)
def test_wrong_metadata_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_pictures(tmp_path, ["1.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path)


def test_text_that_cannot_be_written_as_utf8_is_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png", "3.png"])
    os.rename(tmp_path / "3.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    lines = ['{"file_name": "1.png", "text": "half \\ud83d"}', '{"file_name": "2\\ud83d.png", "text": "two"}']
    lines += ['{"file_name": "2.png", "text": 7}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"4 of 4 rows .* cannot be used and none is left"):
        prepare(tmp_path)
    write_pictures(tmp_path / "good", ["8.png", "9.png"])
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "good/8.png", "text": "eight"}\n{"file_name": "good/9.png", "text": "nine"}')
    summary = prepare(tmp_path).summary
    assert {entry["id"]: entry["reason"] for entry in summary["refused"]} == {
        "1.png": "the caption holds half a character (a lone surrogate)",
        "metadata.jsonl#2": "file_name = '2\\ud83d.png' does not name a file in this folder",
        "2.png": "the caption is not text but int",
        "caf\\xe9.png": "the file name is not UTF-8",
    }
    json.dumps(summary, ensure_ascii=False).encode()


def test_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / "abc123"
    write(snapshot / "data" / "train-0.parquet", plain(4))
    calls = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options["repo_type"], options["revision"]))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    dataset = prepare("owner/pictures")
    assert dataset.summary["source"] == "owner/pictures@abc123"
    again = load_dataset(section("owner/pictures"), dataset.summary)
    assert again == dataset
    assert calls == [("owner/pictures", "dataset", None), ("owner/pictures", "dataset", "abc123")]


def test_hub_data_set_without_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(DataError, match=r"'owner/pictures': .* it has no Parquet files at its top or in data/"):
        prepare("owner/pictures")


def test_hub_data_set_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def download(*_: Any, **__: Any) -> str:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(DataError, match="does not exist or is not open to you: check the id"):
        prepare("owner/pictures")


def test_hub_data_set_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DataError, match="'owner/pictures': no such file or folder, and as a hub data set it could not be downloaded"
    ) as caught:
        prepare("owner/pictures")
    assert "\n" not in str(caught.value)


def test_missing_path() -> None:
    with pytest.raises(DataError, match="'no/such/folder': no such file or folder, and no hub data set id"):
        prepare("no/such/folder")


def test_file_that_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,text\n")
    with pytest.raises(DataError, match=r"rows.csv': not a Parquet file \(.parquet\) or a folder"):
        prepare(tmp_path / "rows.csv")


def test_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="no Parquet files in it or its data folder, and no pictures"):
        prepare(tmp_path)


def test_folder_without_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    with pytest.raises(DataError, match=r"2 pictures and no captions: add metadata.jsonl"):
        prepare(tmp_path)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", plain(3))
    content = path.read_bytes()
    path.write_bytes(content[:200])
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as Parquet \(.*\): download or export it again"):
        prepare(path)
    path.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    with pytest.raises(DataError, match=r"a.parquet: row group 0 cannot be read \(.*\): download or export"):
        prepare(path)


@pytest.mark.parametrize("key", ["image_column", "caption_column"])
def test_missing_column(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.parquet", plain(3))
    with pytest.raises(DataError, match=rf"no column 'nothing'; columns present: image, text: set data.{key}"):
        prepare(path, **{key: "nothing"})


def test_column_of_another_type(tmp_path: Path) -> None:
    rows = plain(3)
    path = write(tmp_path / "a.parquet", rows, number=pa.array([1, 2, 3]), many=pa.array([["a"], ["b"], ["c"]]))
    with pytest.raises(DataError, match=r"column 'number' holds int64, needs image bytes: set data.image_column"):
        prepare(path, image_column="number")
    with pytest.raises(DataError, match=r"column 'many' holds list<.*>, needs text: set data.caption_column"):
        prepare(path, caption_column="many")


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.parquet': holds no rows: give a source with pictures and captions"):
        prepare(write(tmp_path / "a.parquet", []))


# Treatments ------------------------------------------------------------------------------------------------------------


def test_rgb_is_left_alone(tmp_path: Path) -> None:
    loaded, treatments, refused = single(tmp_path, encode(pixels(99)))
    np.testing.assert_array_equal(loaded, pixels(99))
    assert (treatments, refused) == ([], None)


def test_opaque_alpha_is_no_treatment(tmp_path: Path) -> None:
    loaded, treatments, _ = single(tmp_path, encode(Image.fromarray(pixels(99)).convert("RGBA")))
    np.testing.assert_array_equal(loaded, pixels(99))
    assert treatments == []


def test_cmyk_jpeg(tmp_path: Path) -> None:
    loaded, treatments, _ = single(tmp_path, encode(Image.new("CMYK", (SIDE, SIDE), (10, 20, 30, 40)), "JPEG", quality=100))
    expected = [round((255 - ink) * (255 - 40) / 255) for ink in (10, 20, 30)]
    assert np.abs(loaded.astype(int) - expected).max() <= 1
    assert treatments == ["CMYK converted to RGB"]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grayscale_is_scaled(tmp_path: Path, kind: str) -> None:
    values = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 257
    loaded, treatments, _ = single(tmp_path, encode(values, kind))
    np.testing.assert_array_equal(loaded, np.repeat((values // 257).astype(np.uint8)[..., None], 3, axis=2))
    assert treatments == ["16 bits a channel scaled to 8", "grayscale converted to RGB"]


def test_16_bit_rounds_to_nearest(tmp_path: Path) -> None:
    values = np.full((SIDE, SIDE), 65535, np.uint16)
    values[0, :4] = [128, 129, 65406, 65407]
    loaded, _, _ = single(tmp_path, encode(values))
    assert loaded[0, :5, 0].tolist() == [0, 1, 254, 255, 255]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_16_bit_rgb(tmp_path: Path) -> None:
    import zlib

    wide = pixels(99).astype(">u2") * 257
    lines = b"".join(b"\0" + line.tobytes() for line in wide)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    loaded, treatments, _ = single(tmp_path, b"\x89PNG\r\n\x1a\n" + chunks)
    np.testing.assert_array_equal(loaded, pixels(99))
    assert treatments == ["16 bits a channel scaled to 8"]


def test_16_bit_transparent_value_becomes_white(tmp_path: Path) -> None:
    values = np.full((SIDE, SIDE), 100 * 257, np.uint16)
    values[:4] = 7 * 257
    image = encode(values)
    end_of_header = 8 + 25
    clear = png_chunk(b"tRNS", struct.pack(">H", 7 * 257))
    loaded, treatments, _ = single(tmp_path, image[:end_of_header] + clear + image[end_of_header:])
    assert (loaded[:4] == 255).all()
    assert (loaded[4:] == 100).all()
    assert "transparency composited on white" in treatments


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (SIDE, SIDE), 0)
    image.putpalette([200, 10, 20, 0, 100, 0])
    image.paste(1, (0, 0, SIDE, 4))
    loaded, treatments, _ = single(tmp_path, encode(image, transparency=1))
    assert (loaded[:4] == 255).all()
    assert (loaded[4:] == [200, 10, 20]).all()
    assert treatments == ["palette converted to RGB", "transparency composited on white"]


def test_rgba_is_composited_on_white(tmp_path: Path) -> None:
    image = np.full((SIDE, SIDE, 4), (0, 0, 0, 51), np.uint8)
    loaded, treatments, _ = single(tmp_path, encode(image))
    assert (loaded == 204).all()
    assert treatments == ["transparency composited on white"]


def test_gray_with_alpha(tmp_path: Path) -> None:
    loaded, treatments, _ = single(tmp_path, encode(Image.new("LA", (SIDE, SIDE), (40, 0))))
    assert (loaded == 255).all()
    assert treatments == ["grayscale converted to RGB", "transparency composited on white"]


@pytest.mark.parametrize(("mode", "value"), [("L", 77), ("1", 255)])
def test_grayscale(tmp_path: Path, mode: str, value: int) -> None:
    image = Image.new(mode, (SIDE, SIDE), value)
    image.paste(0, (0, 0, 4, SIDE))
    loaded, treatments, _ = single(tmp_path, encode(image))
    assert (loaded[:, 4:] == value).all()
    assert (loaded[:, :4] == 0).all()
    assert treatments == ["grayscale converted to RGB"]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_animation_gives_its_first_frame(tmp_path: Path, kind: str) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *others = (Image.new("RGB", (SIDE, SIDE), colour) for colour in colours)
    loaded, treatments, _ = single(tmp_path, encode(first, kind, save_all=True, append_images=others, lossless=True))
    assert np.abs(loaded.astype(int) - colours[0]).max() <= (1 if kind == "MPO" else 0)
    assert treatments[0] == "first of 3 frames used"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    upright = np.zeros((SIDE, SIDE, 3), np.uint8)
    upright[:8, :8] = (250, 0, 0)
    upright[8:, :8] = (0, 250, 0)
    to_stored: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image = encode(np.ascontiguousarray(to_stored[orientation](upright)), kind, exif=exif, **options)
    loaded, treatments, _ = single(tmp_path, image)
    assert np.abs(loaded.astype(int) - upright).max() <= (6 if kind == "JPEG" else 0)
    assert treatments == ([] if orientation == 1 else [f"turned upright (EXIF orientation {orientation})"])


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    image = encode(pixels(99), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    loaded, treatments, refused = single(tmp_path, image)
    np.testing.assert_array_equal(loaded, pixels(99))
    assert (treatments, refused) == ([], None)


def test_exif_that_makes_pillow_raise_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (1, 1))
    monkeypatch.setattr(image, "getexif", lambda: struct.unpack("<I", b""))
    assert data._orientation(image) == 1


def test_small_pictures_are_enlarged(tmp_path: Path) -> None:
    loaded, treatments, _ = single(tmp_path, encode(Image.new("RGB", (12, 8), (1, 2, 3))))
    assert (loaded == (1, 2, 3)).all()
    assert loaded.shape == (SIDE, SIDE, 3)
    assert treatments == ["enlarged from 8 to 16 px"]


def test_wide_and_tall_pictures_are_cropped_about_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((SIDE, 3 * SIDE + 1, 3), np.uint8)
    wide[:, SIDE : 2 * SIDE] = pixels(99)
    for image in (wide, wide.transpose(1, 0, 2)):
        loaded, treatments, _ = single(tmp_path, encode(np.ascontiguousarray(image)))
        np.testing.assert_array_equal(loaded, pixels(99) if image is wide else pixels(99).transpose(1, 0, 2))
        assert treatments == []


def test_resizing_is_lanczos(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    loaded, _, _ = single(tmp_path, encode(image))
    np.testing.assert_array_equal(loaded, np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)))


# Refusals --------------------------------------------------------------------------------------------------------------


def float_tiff() -> bytes:
    return encode(Image.new("F", (SIDE, SIDE), 0.5), "TIFF")


def wide_tiff() -> bytes:
    return encode(Image.fromarray(np.full((SIDE, SIDE), 70_000, np.int32)), "TIFF")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "the image file is empty"),
        (None, "no image bytes in this row"),
        (b"not a picture", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image in a known format"),
        (encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))[:2000], "unreadable image: "),
        (encode(pixels(1, 64), "JPEG", quality=95)[:-20], "unreadable image: image file is truncated"),
        (encode(pixels(1))[:30], ""),
        (float_tiff(), "32-bit pixels: save the picture with 8 or 16 bits"),
        (wide_tiff(), "32-bit pixels"),
    ],
    ids=["zero bytes", "null", "text", "eps", "truncated png", "truncated jpeg", "png header", "float", "32 bits"],
)
def test_pictures_that_cannot_be_used(tmp_path: Path, image: Any, reason: str) -> None:
    loaded, treatments, refused = single(tmp_path, image)
    assert refused is not None
    assert refused.startswith(reason)
    assert "0x" not in refused
    assert (loaded.size, treatments) == (0, [])


def test_pictures_with_too_many_pixels(tmp_path: Path) -> None:
    _, _, refused = single(tmp_path, encode(Image.new("1", (9000, 8000))))
    assert refused == f"9000 x 8000 pixels are more than the limit of {data.MAX_PIXELS}"
    _, _, refused = single(tmp_path, encode(Image.new("1", (10_000, 9_000))))  # Pillow warns from here on
    assert refused == f"10000 x 9000 pixels are more than the limit of {data.MAX_PIXELS}"
    _, _, refused = single(tmp_path, encode(Image.new("1", (20_000, 10_000))))  # and stops from here on
    assert refused == f"the picture has more pixels than the limit of {data.MAX_PIXELS}"


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "no caption"),
        ("", "the caption is empty"),
        (" \n\u3000\u00a0", "the caption is empty"),
        ("word " * 80, "the caption has 82 tokens, the text encoder takes at most 77"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path: Path, caption: str | None, reason: str) -> None:
    path = write(tmp_path / "a.parquet", [*plain(3), (encode(pixels(99)), caption)])
    assert prepare(path).summary["refused"] == [{"id": "a.parquet#3", "reason": reason}]


def test_max_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [*plain(3), (encode(pixels(99)), "one two three")])
    assert prepare_data(section(path), count_words, max_tokens=5).summary["refused"] == []
    assert len(prepare_data(section(path), count_words, max_tokens=4).summary["refused"]) == 1


def test_a_caption_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    rows = plain(3)
    texts = pa.array([b"one", b"two", b"caf\xe9"], pa.binary()).view(pa.string())
    table = pa.table({"image": [{"bytes": image} for image, _ in rows], "text": texts})
    pq.write_table(table, tmp_path / "a.parquet")
    assert prepare(tmp_path / "a.parquet").summary["refused"] == [{"id": "a.parquet#2", "reason": "the caption is not UTF-8"}]


def test_captions_in_any_script_are_kept(tmp_path: Path) -> None:
    texts = ["кошка на окне", "窓辺の猫", "قطة على النافذة", "बिल्ली", "고양이", "γάτα", "chat 🐈‍⬛", "  e\u0301t\u00e9  "]
    path = write(tmp_path / "a.parquet", [(encode(pixels(seed)), text) for seed, text in enumerate(texts)])
    dataset = prepare(path)
    assert captions((*dataset.train, *dataset.heldout)) == {*texts[:-1], "été"}
    assert dataset.summary["refused"] == []


def test_an_unreadable_picture_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, ["1.png", "2.png", "3.png"])
    for path in list(tmp_path.glob("*.png")):
        path.with_suffix(".txt").write_text(path.stem)
    read_bytes = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert prepare(tmp_path).summary["refused"] == [{"id": "2.png", "reason": "the image file cannot be read (Permission denied)"}]


def test_too_many_refusals_stop_the_study(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [*plain(6), *[(b"", "bad")] * 4])
    assert len(prepare(path, max_refused_share=0.4).summary["refused"]) == 4
    with pytest.raises(DataError) as caught:
        prepare(path, max_refused_share=0.39)
    message = str(caught.value)
    assert "4 of 10 rows (40.0%) cannot be used and max_refused_share is 0.39" in message
    assert "(a.parquet#6: the image file is empty; a.parquet#7: the image file is empty; a.parquet#8: the image file is empty)" in message
    assert message.endswith("correct them, or raise data.max_refused_share")


def test_no_usable_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [(b"", "bad"), (encode(pixels(0)), None)])
    with pytest.raises(DataError, match=r"2 of 2 rows \(100.0%\) cannot be used and none is left"):
        prepare(path)


# Duplicates ------------------------------------------------------------------------------------------------------------


def drawing(seed: int, side: int = 128, number_of_shapes: int = 6) -> Image.Image:
    """A flat drawing on white."""
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(number_of_shapes):
        x, y = generator.integers(side // 8, side * 5 // 8, 2).tolist()
        width, height = generator.integers(side // 8, side // 3, 2).tolist()
        pen.ellipse((x, y, x + width, y + height), tuple(generator.integers(0, 200, 3).tolist()))
    return image


def near_duplicates(image: Image.Image) -> list[bytes]:
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return [encode(image), encode(image, "JPEG", quality=80), encode(half), encode(image.point(lambda value: value * 99 // 100))]


def test_exact_duplicates_are_dropped(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(0))
    same_pixels = encode(image, "WEBP", lossless=True)
    rows = [(encode(image), "zero"), *plain(4, 1), (encode(image), "zero"), (same_pixels, "another zero"), (encode(pixels(1)), "picture 1")]
    dataset = prepare(write(tmp_path / "a.parquet", rows))
    assert len(dataset.train) + len(dataset.heldout) == 5
    kept = min(encode(image), same_pixels, key=lambda content: hashlib.sha256(content).hexdigest())
    kept_id, others = (
        ("a.parquet#6", ["a.parquet#0", "a.parquet#5"]) if kept == same_pixels else ("a.parquet#0", ["a.parquet#5", "a.parquet#6"])
    )
    notes = sorted(dataset.summary["duplicates"], key=lambda note: -len(note["ids"]))
    assert notes == [
        {"kind": "exact", "ids": [kept_id, *others], "action": f"kept {kept_id}, dropped the others; their captions differ"},
        {"kind": "exact", "ids": ["a.parquet#1", "a.parquet#7"], "action": "kept a.parquet#1, dropped the other"},
    ]


def test_near_duplicates_are_kept_on_one_side(tmp_path: Path) -> None:
    contents = near_duplicates(drawing(0))
    rows = [(content, f"near {index}") for index, content in enumerate(contents)] + plain(12)
    dataset = prepare(write(tmp_path / "a.parquet", rows), heldout_share=0.3)
    assert len(dataset.train) + len(dataset.heldout) == len(rows)
    (note,) = dataset.summary["duplicates"]
    assert (note["kind"], note["action"]) == ("near", "kept on the same side of the split")
    assert set(note["ids"]) == {f"a.parquet#{index}" for index in range(4)}
    assert {f"near {index}" for index in range(4)} <= captions(dataset.train) or captions(dataset.train).isdisjoint(
        {f"near {index}" for index in range(4)}
    )


def test_different_small_drawings_on_white_are_not_near(tmp_path: Path) -> None:
    def dot(colour: str) -> bytes:
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).ellipse((40, 40, 88, 88), colour)
        return encode(image)

    red, blue = (data._check_row(data._Row(name, "train", dot(name), name), section("any"))[0] for name in ("red", "blue"))
    assert (red.hash ^ blue.hash).bit_count() <= 3
    dataset = prepare(write(tmp_path / "a.parquet", [(dot("red"), "red"), (dot("blue"), "blue"), *plain(4)]))
    assert dataset.summary["duplicates"] == []


def test_near_duplicate_bits(tmp_path: Path) -> None:
    image = drawing(5)
    other = image.copy()
    ImageDraw.Draw(other).line((20, 20, 20, 70), "black", 3)
    first, second = (data._check_row(data._Row("a", "train", encode(i), "a"), section("any"))[0] for i in (image, other))
    bits = (first.hash ^ second.hash).bit_count()
    assert bits > 0
    path = write(tmp_path / "a.parquet", [(encode(image), "a"), (encode(other), "b"), *plain(4)])
    assert len(prepare(path, near_duplicate_bits=bits).summary["duplicates"]) == 1
    assert prepare(path, near_duplicate_bits=bits - 1).summary["duplicates"] == []


def brute_force_groups(pictures: list[data._Picture], max_bits: int) -> set[frozenset[str]]:
    groups = [{picture.example.id} for picture in pictures]
    for index, one in enumerate(pictures):
        for other in pictures[:index]:
            thumbnails = (np.frombuffer(picture.thumbnail, np.uint8).astype(int) for picture in (one, other))
            distance = np.abs(np.subtract(*thumbnails)).mean()
            if (one.hash ^ other.hash).bit_count() <= max_bits and distance <= data.THUMBNAIL_DISTANCE:
                joined = [group for group in groups if one.example.id in group or other.example.id in group]
                groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    return {frozenset(group) for group in groups}


@given(st.integers(0, 2**32), st.integers(0, 8))
@settings(max_examples=25, deadline=None)
def test_near_groups_agree_with_comparing_all_pairs(seed: int, max_bits: int) -> None:
    generator = np.random.default_rng(seed)
    pictures = []
    for index in range(40):
        parent = np.random.default_rng(int(generator.integers(6))).integers(0, 256, 768)
        thumbnail = np.clip(parent + generator.integers(-7, 8, 768), 0, 255).astype(np.uint8)
        bits = sum(1 << bit for bit in set(generator.integers(0, 64, int(generator.integers(4))).tolist()))
        pictures.append(
            data._Picture(Example(str(index), "a", f"{generator.integers(2**60):064x}"), "train", b"", bits, thumbnail.tobytes())
        )
    found = data._near_groups(pictures, max_bits)
    assert {frozenset(picture.example.id for picture in group) for group in found} == brute_force_groups(pictures, max_bits)


def test_a_heldout_duplicate_of_a_training_picture_is_dropped(tmp_path: Path) -> None:
    original, jpeg, half, _ = near_duplicates(drawing(3))
    write(tmp_path / "train.parquet", [(original, "original"), *plain(5)])
    write(tmp_path / "test.parquet", [(jpeg, "jpeg"), (half, "half"), (original, "copy"), *plain(3, 10)])
    dataset = prepare(tmp_path)
    assert captions(dataset.heldout) == {"picture 10", "picture 11", "picture 12"}
    assert "original" in captions(dataset.train)
    exact, near = dataset.summary["duplicates"]
    assert exact["ids"] == ["train.parquet#0", "test.parquet#2"]
    assert exact["action"] == "kept train.parquet#0, dropped the other; their captions differ"
    assert set(near["ids"]) == {"train.parquet#0", "test.parquet#0", "test.parquet#1"}
    assert near["action"].startswith("dropped from the held-out pictures: test.parquet#")


@pytest.mark.parametrize("copies", [plain(3), [(near, "near") for near in near_duplicates(drawing(1))[1:]], [(b"", "bad")]])
def test_no_heldout_pictures_left_of_a_declared_split(tmp_path: Path, copies: list[Row]) -> None:
    write(tmp_path / "train.parquet", [(near_duplicates(drawing(1))[0], "drawing"), *plain(3)])
    write(tmp_path / "test.parquet", copies)
    with pytest.raises(DataError, match=r"no pictures left to hold out: .* distinct pictures in 4 groups.*: give more pictures"):
        prepare(tmp_path)


def test_no_training_pictures_left_of_a_declared_split(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [(b"", "bad")])
    write(tmp_path / "test.parquet", plain(3))
    with pytest.raises(DataError, match="no pictures left to train on: 3 distinct pictures"):
        prepare(tmp_path)


def test_no_heldout_pictures_left_of_one_group(tmp_path: Path) -> None:
    for rows in ([(content, "a") for content in near_duplicates(drawing(1))], plain(1)):
        with pytest.raises(DataError, match=r"no pictures left to hold out: .* in 1 groups"):
            prepare(write(tmp_path / "a.parquet", rows))


# The split -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family_rows() -> list[Row]:
    """Rows among which some are near duplicates of each other and some are the same."""
    rows = plain(24)
    for seed in range(4):
        rows += [(content, f"drawing {seed}") for content in near_duplicates(drawing(seed))]
    return [*rows, rows[0], (rows[1][0], "another caption")]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_rows_changes_nothing(tmp_path: Path, family_rows: list[Row], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(family_rows))
    one = prepare(write(tmp_path / "a.parquet", family_rows), heldout_share=0.25)
    two = prepare(write(tmp_path / "b.parquet", [family_rows[index] for index in order]), heldout_share=0.25)
    for split in ("train", "heldout"):
        contents = [[(example.digest, example.caption) for example in getattr(dataset, split)] for dataset in (one, two)]
        assert contents[0] == contents[1]
        assert [digest for digest, _ in contents[0]] == sorted(digest for digest, _ in contents[0])
    assert one.summary["fingerprint"] == two.summary["fingerprint"]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_near_duplicates_never_straddle_the_split(tmp_path: Path, family_rows: list[Row], share: float) -> None:
    dataset = prepare(write(tmp_path / "a.parquet", family_rows), heldout_share=share)
    train_ids = {example.id for example in dataset.train}
    heldout_ids = {example.id for example in dataset.heldout}
    near = [note for note in dataset.summary["duplicates"] if note["kind"] == "near"]
    assert len(near) == 4
    for note in near:
        assert set(note["ids"]) <= train_ids or set(note["ids"]) <= heldout_ids
    assert abs(len(heldout_ids) - share * (len(train_ids) + len(heldout_ids))) <= 4


def test_subsets_nest(tmp_path: Path, family_rows: list[Row]) -> None:
    path = write(tmp_path / "a.parquet", family_rows)
    everything = prepare(path, heldout_share=0.3)
    for count in (1, 2, 5, 10):
        part = prepare(path, heldout_share=0.3, num_train=count)
        assert (part.train, part.heldout) == (everything.train[:count], everything.heldout)
        part = prepare(path, heldout_share=0.3, num_heldout=count)
        assert (part.train, part.heldout) == (everything.train, everything.heldout[:count])
    assert prepare(path, heldout_share=0.3, num_train=10_000) == everything


def test_held_out_pictures_are_not_the_first_by_digest(tmp_path: Path) -> None:
    dataset = prepare(write(tmp_path / "a.parquet", plain(40)), heldout_share=0.25)
    digests = sorted(example.digest for example in (*dataset.train, *dataset.heldout))
    places = [digests.index(example.digest) for example in dataset.heldout]
    assert 10 < np.mean(places) < 30


def test_fingerprint_follows_what_is_trained_on(tmp_path: Path) -> None:
    rows = plain(10)
    path = write(tmp_path / "a.parquet", rows)
    base = prepare(path).summary["fingerprint"]
    assert prepare(path).summary["fingerprint"] == base
    assert prepare(path, resolution_px=32).summary["fingerprint"] != base
    assert prepare(path, num_train=5).summary["fingerprint"] != base
    assert prepare(path, heldout_share=0.3).summary["fingerprint"] != base
    changed = write(tmp_path / "b.parquet", [(rows[0][0], "another caption"), *rows[1:]])
    assert prepare(changed).summary["fingerprint"] != base


# The summary, loading and memory ---------------------------------------------------------------------------------------


def test_summary(tmp_path: Path) -> None:
    rows = [*plain(5), (b"", "bad"), (encode(Image.new("L", (SIDE, SIDE))), "one two three four")]
    path = write(tmp_path / "a.parquet", rows)
    done: list[tuple[int, int]] = []
    dataset = prepare_data(section(path), count_words, progress=lambda *progress: done.append(progress))
    summary = dataset.summary
    assert json.loads(json.dumps(summary)) == summary
    assert set(summary) == {
        *("source", "resolution_px", "num_rows", "num_train", "num_heldout", "split", "refused", "treated", "duplicates", "train"),
        *("heldout", "caption_tokens", "fingerprint", "buckets", "caption_prefix", "trigger_word"),
    }
    assert summary["source"] == str(path)
    assert (summary["resolution_px"], summary["num_rows"], summary["num_train"], summary["num_heldout"]) == (SIDE, 7, 5, 1)
    assert summary["refused"] == [{"id": "a.parquet#5", "reason": "the image file is empty"}]
    assert summary["treated"] == [{"id": "a.parquet#6", "treatment": "grayscale converted to RGB"}]
    assert summary["caption_tokens"] == {"min": 4, "median": 4.0, "max": 6}
    assert summary["train"][0] == vars(dataset.train[0])
    assert summary["buckets"] == [{"width_px": SIDE, "height_px": SIDE, "num_train": 5, "num_heldout": 1}]
    assert done == [(count, 7) for count in range(1, 8)]


def test_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", plain(10))
    dataset = prepare(path)
    monkeypatch.setattr(data, "_check_row", None)
    again = load_dataset(section(path), json.loads(json.dumps(dataset.summary)))
    assert again == dataset
    for example in again.train:
        np.testing.assert_array_equal(again.load_pixels(example), dataset.load_pixels(example))


def test_load_dataset_of_another_study(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", plain(4))
    summary = prepare(path).summary
    for other in (section(path, resolution_px=32), section("pocket")):
        with pytest.raises(DataError, match=r"data.json was made from .* at 16 px, the study asks for .*: run the data stage again"):
            load_dataset(other, summary)


def test_pictures_that_changed_or_went_away(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", plain(4))
    summary = prepare(path).summary
    write(path, plain(4, 10))
    changed = load_dataset(section(path), summary)
    with pytest.raises(DataError, match=r"a.parquet#[0-3]: the picture changed after it was checked: run the data stage again"):
        changed.load_pixels(changed.train[0])
    write(path, plain(1, 10))
    shorter = load_dataset(section(path), summary)
    with pytest.raises(DataError, match=r"no such row in .*a.parquet': run the data stage again"):
        shorter.load_pixels(next(example for example in shorter.train if example.id != "a.parquet#0"))


def test_a_picture_file_that_went_away(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,one\n2.png,two\n")
    dataset = prepare(tmp_path)
    (tmp_path / dataset.train[0].id).unlink()
    with pytest.raises(DataError, match=r"\.png: cannot be read \(No such file or directory\): put it back"):
        dataset.load_pixels(dataset.train[0])


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    """32 row groups of 8 incompressible pictures."""
    generator = np.random.default_rng(0)
    rows = [(encode(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)), f"noise {index}") for index in range(256)]
    return write(tmp_path / "a.parquet", rows, row_group_size=8)


def test_memory_is_bounded_by_the_row_groups(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_ROW_GROUP_CACHE_BYTES", grouped.stat().st_size // 16)
    before = pa.total_allocated_bytes()
    peak = 0

    def watch(*_: int) -> None:
        nonlocal peak
        peak = max(peak, pa.total_allocated_bytes() - before)

    dataset = prepare_data(section(grouped, near_duplicate_bits=0), count_words, progress=watch)
    for example in dataset.train:
        dataset.load_pixels(example)
        watch()
    assert 0 < peak < grouped.stat().st_size // 6


def test_each_row_group_is_read_once_in_storage_order(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = prepare(grouped)
    monkeypatch.setattr(data, "_ROW_GROUP_CACHE_BYTES", 0)
    read_group = data._ParquetSource._read_group
    groups: list[int] = []

    def watch(source: Any, file: str, group: int, columns: Sequence[str]) -> Any:
        groups.append(group)
        assert list(columns) == ["image"]
        return read_group(source, file, group, columns)

    monkeypatch.setattr(data._ParquetSource, "_read_group", watch)
    ordered = dataset.in_storage_order(dataset.train)
    for example in ordered:
        dataset.load_pixels(example)
    assert groups == sorted(set(groups))
    assert set(ordered) == set(dataset.train)


def test_pixels_can_be_loaded_from_several_threads(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = prepare(grouped)
    monkeypatch.setattr(data, "_ROW_GROUP_CACHE_BYTES", 0)
    failures: list[Exception] = []

    def load(examples: Sequence[Example]) -> None:
        try:
            for example in examples:
                dataset.load_pixels(example)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(dataset.train[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
