"""Whatever a source's files hold, its rows are used or refused by name, or one line says why not.

`FUZZ_FACTOR` multiplies the number of examples.
"""

import json
import os
import random
import re
import struct
import tarfile
import tempfile
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lorascope.data.captioning import caption_folder
from lorascope.data.captions import clean_caption, decode_text
from lorascope.data.examples import check_source
from lorascope.data.pictures import RefusedError, examine_picture
from lorascope.data.repeats import MAX_REPEATS
from lorascope.data.sources import count_repeats
from lorascope.errors import LorascopeError
from samples import (
    SIDE,
    count_words,
    encode,
    pixels,
    plain,
    section,
    shard_of,
    write,
    write_pictures,
    write_shard,
)

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
LETTERS = st.text(st.sampled_from('ab1.png/,"\n\r\t\0\ufeff é日') | st.characters(), max_size=12)


def bounded(num_examples: int) -> Any:
    return settings(
        max_examples=num_examples * FACTOR,
        deadline=None,
        derandomize=FACTOR == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def look(source: Path, **values: Any) -> None:
    """Every row is used or refused, and what is said can be written; an error is the user's and has one
    line.
    """
    try:
        checked = check_source(section(source, **values), count_words, index_dir=source.parent / "index")
    except LorascopeError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        return
    assert len(checked.pictures) + len(checked.refused) == checked.num_rows
    for picture in checked.pictures:
        examine_picture(checked.source.read(picture.example.id))
    json.dumps([checked.refused, checked.treated, checked.source.remarks], ensure_ascii=False).encode()


def damaged(content: bytes, seed: int, most: int) -> bytes:
    """The bytes with some of them changed, taken out or doubled."""
    generator = random.Random(seed)
    result = bytearray(content)
    for _ in range(generator.randint(1, most)):
        place = generator.randrange(len(result))
        match generator.randrange(5):
            case 0 | 1:
                result[place] ^= 1 << generator.randrange(8)
            case 2:
                result[place] = generator.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 3:
                del result[place : place + generator.randint(1, 40)]
            case _:
                result[place:place] = result[place : place + generator.randint(1, 40)]
        if not result:
            return b""
    return bytes(result)


# Tar files --------------------------------------------------------------------------------------------------


NUMBERS = st.sampled_from(
    [b"0", b"7", b"777777777777", b"-1", b"\x80" + b"\0" * 10 + b"\1", b"\xff" * 12, b"x", b""]
)
PAX_VALUES = st.sampled_from(
    ["0", "5", "1" * 20, "1" * 400, "-1", "-512", "x", "", "1e400", "nan", "0,1", "1,", "1\n2", "\0", "é"]
)
PAX_KEYS = st.sampled_from(
    [
        *("size", "path", "linkpath", "mtime", "uid", "hdrcharset", "GNU.sparse.map", "GNU.sparse.size"),
        *("GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.realsize", "GNU.sparse.name", "odd"),
    ]
)
MEMBERS = st.tuples(
    st.binary(max_size=20) | st.sampled_from([b"a.png", b"a.txt", b"b.png", b"../c.png", b"a", b"."]),
    NUMBERS | st.binary(max_size=12),
    st.sampled_from(list(b"0125LKxgSDVM7\0")),
    st.dictionaries(PAX_KEYS, PAX_VALUES, max_size=3),
    st.binary(max_size=30) | st.just(encode(pixels(1))),
)


def header(name: bytes, size: bytes, kind: int, num_bytes: int) -> bytes:
    """A tar header with the right checksum; a size that is empty stands for the true one."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = (size or b"%011o" % num_bytes).ljust(12, b"\0")
    block[156] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def archive_of(members: list[Any]) -> bytes:
    content = b""
    for name, size, kind, more, body in members:
        if more:
            content += tarfile.TarInfo._create_pax_generic_header(more, b"x", "utf-8")  # type: ignore[attr-defined]
        content += header(name, size, kind, len(body)) + body + bytes(-len(body) % 512)
    return content + bytes(1024)


def test_any_tar_headers(tmp_path: Path) -> None:
    @bounded(150)
    @given(st.lists(MEMBERS, min_size=1, max_size=4))
    def check(members: list[Any]) -> None:
        (tmp_path / "a.tar").write_bytes(archive_of(members))
        look(tmp_path / "a.tar")

    check()


def test_damaged_tar_files(tmp_path: Path) -> None:
    content = write_shard(tmp_path / "a.tar", shard_of(0, 3)).read_bytes()

    @bounded(60)
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        (tmp_path / "a.tar").write_bytes(damaged(content, seed, 4))
        look(tmp_path / "a.tar")

    check()


# Lists ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_any_list(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    start = "file_name,text\n" if name.endswith("csv") else '{"file_name": "1.png", "text": "a"}\n'
    pieces = st.sampled_from(
        [
            *(
                "1.png",
                "2.png",
                "file_name",
                "text",
                ",",
                '"',
                "\n",
                "\r",
                "{",
                "}",
                "[",
                ":",
                '"file_name": "2.png"',
            ),
            *('"text": ', "null", "NaN", "1e999", "9" * 5000, "\\ud800", "\ufeff", "\0", "a, b"),
        ]
    )

    @bounded(150)
    @given(st.booleans(), st.lists(pieces | LETTERS, max_size=12))
    def check(has_start: bool, parts: list[str]) -> None:
        text = (start if has_start else "") + "".join(parts)
        (tmp_path / name).write_bytes(text.encode(errors="surrogatepass"))
        look(tmp_path)

    check()


# Captions ---------------------------------------------------------------------------------------------------


PIECES = st.sampled_from(
    [
        *(
            "a cat",
            ", ",
            "\n",
            "\r\n",
            "\r",
            "\t",
            " ",
            "\0",
            "\x07",
            "\x1b[2J",
            "\x85",
            "\u2028",
            "\u200b",
            "\ufeff",
        ),
        *(
            "<|endoftext|>",
            "<|startoftext|>",
            "<|endof",
            "text|>",
            "e\u0301",
            "\u202e",
            "\u3164",
            "🐈\u200d⬛",
            "word " * 90,
        ),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=6).map("".join)
ENCODINGS = st.sampled_from(
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "cp1252", "utf-7"]
)
FILES = st.tuples(TEXTS, ENCODINGS).map(lambda pair: pair[0].encode(pair[1], errors="replace")) | st.binary(
    max_size=12
)


def test_any_caption_files(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "1.jpg", "2.png"])
    names = ["1.txt", "1.caption", "2.txt", "2.caption"]

    @bounded(40)
    @given(
        st.dictionaries(st.sampled_from(names), FILES),
        st.sampled_from([None, "list", "file_name,text\n1.png,a cat\n"]),
    )
    def check(files: dict[str, bytes], listing: str | None) -> None:
        for name in names:
            (tmp_path / name).unlink(missing_ok=True)
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "metadata.csv").unlink(missing_ok=True)
        if listing:
            (tmp_path / "metadata.csv").write_text(listing)
        look(tmp_path, caption_prefix="of ", trigger_word="sks")
        result = caption_folder(tmp_path, lambda batch: ["words"] * len(batch)) if not listing else None
        assert result is None or result.num_pictures == 3

    check()


@bounded(300)
@given(TEXTS | st.none() | st.floats() | st.binary(max_size=3) | st.lists(st.text()))
def test_any_caption_is_cleaned_once_and_for_all(caption: object) -> None:
    try:
        text, treatments = clean_caption(caption)
    except RefusedError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        return
    assert isinstance(caption, str) and text
    assert clean_caption(text) == (text, [])
    if not treatments:
        assert text == unicodedata.normalize("NFC", caption).strip()


@bounded(150)
@given(TEXTS.filter(lambda text: "\0" not in text), st.sampled_from(["utf-8-sig", "utf-16", "utf-32"]))
def test_any_text_with_a_byte_order_mark_is_read(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding)) == text.replace("\r\n", "\n").replace("\r", "\n")


def test_any_names_of_folders_and_pictures(tmp_path: Path) -> None:
    numbers = st.sampled_from(["10", "0", "-1", "+3", "007", "1.5", "2024", "9" * 60, "٣", "1_0", "", "1e3"])
    parts = st.tuples(numbers, st.sampled_from(["_", "-", "", " "]), LETTERS).map("".join)
    names = parts.map(lambda name: re.sub("[/\0\ud800-\udfff]", "", name).strip(".")[:40]).filter(bool)

    @bounded(30)
    @given(st.lists(st.tuples(names, names), min_size=1, max_size=3))
    def check(places: list[tuple[str, str]]) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as name:
            pictures = [f"{folder}/{stem}.png" for folder, stem in places]
            write_pictures(Path(name), pictures)
            (Path(name) / pictures[0]).with_suffix(".txt").write_text("a cat")
            look(Path(name))
            counts, _ = count_repeats(section(name))
            assert all(1 <= repeats <= MAX_REPEATS for repeats in counts)

    check()


# Parquet ----------------------------------------------------------------------------------------------------


TYPES = st.recursive(
    st.sampled_from(
        [
            *(pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(4), pa.string(), pa.large_string()),
            *(pa.string_view(), pa.null(), pa.int64(), pa.bool_(), pa.float32(), pa.timestamp("ns")),
            pa.dictionary(pa.int32(), pa.string()),
            pa.dictionary(pa.int32(), pa.binary()),
        ]
    ),
    lambda inner: st.one_of(
        inner.map(pa.list_),
        st.lists(st.tuples(st.sampled_from(["bytes", "path", "", "a.b"]), inner), max_size=3).map(pa.struct),
    ),
    max_leaves=4,
)
COLUMNS = st.lists(
    st.tuples(st.sampled_from(["image", "text", "img", "caption", "a.b", "image.bytes", "", "é"]), TYPES),
    max_size=4,
)


def value_of(kind: Any, number: int) -> Any:
    """A value that a column of this type takes."""
    if pa.types.is_dictionary(kind):
        return value_of(kind.value_type, number)
    if pa.types.is_struct(kind):
        return [(field.name, value_of(field.type, number)) for field in kind]
    if pa.types.is_list(kind):
        return [value_of(kind.value_type, number)]
    if pa.types.is_fixed_size_binary(kind):
        return b"1234"
    if pa.types.is_boolean(kind):
        return True
    if pa.types.is_null(kind) or number == 3:
        return None
    for is_kind, value in (
        (pa.types.is_integer, number),
        (pa.types.is_floating, 0.5),
        (pa.types.is_timestamp, number),
    ):
        if is_kind(kind):
            return value
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return f"text {number}" if is_text else encode(pixels(number))


def test_any_schema_of_parquet(tmp_path: Path) -> None:
    @bounded(100)
    @given(COLUMNS, st.sampled_from([{}, {"caption_column": "a.b"}, {"image_column": "image.bytes"}]))
    def check(columns: list[tuple[str, Any]], values: dict[str, str]) -> None:
        try:
            arrays = [pa.array([value_of(kind, number) for number in range(4)], kind) for _, kind in columns]
            table = pa.Table.from_arrays(arrays, [name for name, _ in columns])
            pq.write_table(table, tmp_path / "a.parquet")
        except (pa.ArrowException, NotImplementedError, ValueError):
            return  # no such file can be
        look(tmp_path / "a.parquet", **values)

    check()


def test_damaged_parquet_files(tmp_path: Path) -> None:
    contents = [
        write(tmp_path / "a.parquet", plain(6), row_group_size=3).read_bytes(),
        write(tmp_path / "a.parquet", [(image, "long text " * 9) for image, _ in plain(6)]).read_bytes(),
    ]

    @bounded(80)
    @given(st.integers(0, 2**32), st.booleans())
    @example(1_172_087_222, False)  # text of the footer that is no UTF-8
    @example(762, False)  # an index beyond the dictionary of the captions
    def check(seed: int, in_footer: bool) -> None:
        content = contents[seed % 2]
        (length,) = struct.unpack("<I", content[-8:-4])
        start = len(content) - 8 - length if in_footer else 0
        (tmp_path / "a.parquet").write_bytes(content[:start] + damaged(content[start:], seed, 3))
        look(tmp_path / "a.parquet")

    check()


# Pictures ---------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


HEADERS = st.tuples(
    st.sampled_from([0, 1, SIDE, SIDE, 2**31, 2**32 - 1]),
    st.sampled_from([0, 1, SIDE, SIDE, 70_000]),
    st.sampled_from([0, 1, 2, 4, 8, 16, 3]),
    st.sampled_from([0, 2, 3, 4, 6, 5]),
    *[st.sampled_from([0, 0, 1])] * 3,
).map(lambda values: chunk(b"IHDR", struct.pack(">IIBBBBB", *values)))
PIXELS = st.sampled_from(
    [zlib.compress(bytes(17 * SIDE * 8)), zlib.compress(b""), b"", b"x", pixels(1).tobytes()]
)
KINDS = [
    b"PLTE",
    b"tRNS",
    b"gAMA",
    b"iCCP",
    b"eXIf",
    b"acTL",
    b"fcTL",
    b"fdAT",
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"pHYs",
]
CHUNKS = st.one_of(
    HEADERS,
    PIXELS.map(lambda content: chunk(b"IDAT", content)),
    st.tuples(st.sampled_from([*KINDS, b"IEND", b"abcd", b"\xff\xfe00"]), st.binary(max_size=40)).map(
        lambda part: chunk(*part)
    ),
    st.binary(max_size=20),
)


def used_or_refused(content: bytes) -> None:
    try:
        facts = examine_picture(content)
    except RefusedError as error:
        reason = str(error)
        assert len(reason.splitlines()) == 1
    else:
        assert facts.width_px >= 1 and facts.height_px >= 1


@pytest.mark.filterwarnings("ignore")
@bounded(200)
@given(HEADERS, st.lists(CHUNKS, max_size=6))
def test_any_chunks_of_a_png(start: bytes, parts: list[bytes]) -> None:
    used_or_refused(b"\x89PNG\r\n\x1a\n" + start + b"".join(parts) + chunk(b"IEND", b""))


PICTURES = [
    encode(pixels(3)),
    encode(Image.fromarray(pixels(3)).convert("P")),
    encode(Image.fromarray(pixels(3)), save_all=True, append_images=[Image.fromarray(pixels(4))]),
    encode(pixels(3), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
    encode(pixels(3), "WEBP"),
    encode(pixels(3), "GIF", save_all=True, append_images=[Image.fromarray(pixels(4))]),
    encode(pixels(3), "BMP"),
    encode(pixels(3), "TIFF", compression="tiff_adobe_deflate"),
    encode(pixels(3), "TIFF"),
    encode(pixels(3), "MPO", save_all=True, append_images=[Image.fromarray(pixels(4))]),
]


@pytest.mark.filterwarnings("ignore")
@bounded(200)
@given(st.sampled_from(PICTURES), st.integers(0, 2**32))
def test_damaged_pictures(content: bytes, seed: int) -> None:
    used_or_refused(damaged(content, seed, 3))
