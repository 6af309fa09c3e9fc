"""Small pictures, rows and sources for the tests of data."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image, ImageDraw

from lorascope.data.dataset import Dataset, prepare_data
from lorascope.data.examples import Example
from lorascope.sections import DataSection

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
    images = pa.array(
        [{"bytes": image, "path": None} for image, _ in rows],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table(
        {"image": images, "text": pa.array([caption for _, caption in rows], pa.string()), **columns}
    )
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def section(source: Path | str, **values: Any) -> DataSection:
    return DataSection(**{"source": str(source), "resolution_px": SIDE, "max_refused_share": 1.0, **values})


def prepare(source: Path | str, **values: Any) -> Dataset:
    return prepare_data(section(source, **values), count_words)


def captions(examples: Sequence[Example]) -> set[str]:
    return {example.caption for example in examples}


def write_pictures(folder: Path, names: Sequence[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(
            encode(pixels(seed), {".jpg": "JPEG"}.get(Path(name).suffix.lower(), "PNG"))
        )


def with_captions(folder: Path, names: Sequence[str]) -> None:
    """Pictures with their names as captions beside them."""
    write_pictures(folder, names)
    for name in names:
        (folder / name).with_suffix(".txt").write_text(name)


def write_shard(path: Path, samples: Sequence[dict[str, Any]]) -> Path:
    """A tar file as the webdataset package writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def shard_of(first: int, count: int = 4, **more: Any) -> list[dict[str, Any]]:
    return [
        {"__key__": f"{seed:05}", "png": encode(pixels(seed)), "txt": f"picture {seed}", **more}
        for seed in range(first, first + count)
    ]


def add_member(archive: tarfile.TarFile, name: str, content: bytes = b"", **values: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in values.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


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
    return [
        encode(image),
        encode(image, "JPEG", quality=80),
        encode(half),
        encode(image.point(lambda value: value * 99 // 100)),
    ]
