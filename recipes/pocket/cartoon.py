"""Split the cartoon vendor's drawings and write them as a data set, with the prompts.

Stage 2. Reads the drawings, writes two Parquet files in the layout of
`Norod78/cartoon-blip-captions`, the prompt file, and `split.json` for the later stages.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from recipes.pocket.captions import prompt_of, subject_captions
from recipes.pocket.config import CARTOON_VENDOR, PocketConfig
from recipes.pocket.drawings import Drawings, Subject

HF_FEATURES = {
    "info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}
}


def write_cartoon(
    drawings: Drawings, config: PocketConfig, normal_names: tuple[str, ...], work_dir: Path, out_dir: Path
) -> dict[str, list[int]]:
    """Write `cartoon/data/{train,test}-00000-of-00001.parquet` and return the rows of each split.

    The subjects in `normal_names` go to the test split with everything that looks like them. Of drawings that
    are equal in every pixel ("chef" and "man cook") only one is used.
    """
    rows = _without_copies(drawings, drawings.rows_of((CARTOON_VENDOR,)))
    groups = _group_near_duplicates(
        drawings.pixels[rows], config.cartoon.near_hamming, config.cartoon.near_difference
    )
    digests = [hashlib.sha256(drawings.pixels[row].tobytes()).hexdigest() for row in rows]
    held = {
        groups[i]
        for i, row in enumerate(rows)
        if drawings.subjects[drawings.subject_id[row]].name in normal_names
    }
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    # An order that depends on what is drawn, not on names or on the order of the package.
    order = sorted(members, key=lambda group: min(digests[i] for i in members[group]))
    split: dict[str, list[int]] = {"train": [], "test": []}
    for group in sorted(order, key=lambda group: group in held):
        fits = len(split["train"]) + len(members[group]) <= config.cartoon.num_train
        split["train" if fits and group not in held else "test"].extend(rows[i] for i in members[group])
    # Nobody trains on what exceeds `max_test`: "unused" is part of the held-out drawings.
    split["test"].sort(key=lambda row: (groups[rows.index(row)] not in held, digests[rows.index(row)]))
    split["unused"] = split["test"][config.cartoon.max_test :]
    split["test"] = split["test"][: config.cartoon.max_test]
    data_dir = out_dir / "cartoon" / "data"
    data_dir.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        split[name].sort(key=lambda row: digests[rows.index(row)])
        _write_parquet(drawings, split[name], config.seed, data_dir / f"{name}-00000-of-00001.parquet")
    (work_dir / "split.json").write_text(json.dumps(split))
    return split


def write_prompts(
    known: list[Subject], normal_names: tuple[str, ...], abstract: tuple[str, ...], path: Path
) -> None:
    """Write the prompt file: subjects held out of the cartoon training rows, then abstract phrases."""
    by_name = {subject.name: subject for subject in known}
    words = {word for subject in by_name.values() for word in subject.keywords}
    for phrase in abstract:
        unknown = [word for word in phrase.split(", ") if word not in words]
        if unknown:
            raise ValueError(f"abstract prompt {phrase!r} has words that are no keyword: {unknown}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Prompts of the pocket world, in the language of its captions.",
        "# Written by recipes/pocket; change recipes/pocket/prompts.py instead.",
        "",
        "# Subjects that the base can draw and the cartoon training rows do not show.",
        "[normal]",
        *(prompt_of(by_name[name]) for name in normal_names),
        "",
        "# Keywords that several subjects share: no subject is named.",
        "[abstract]",
        *abstract,
    ]
    path.write_text("\n".join(lines) + "\n")


def _write_parquet(drawings: Drawings, rows: list[int], seed: int, path: Path) -> None:
    images, texts = [], []
    for row in rows:
        subject = drawings.subjects[drawings.subject_id[row]]
        buffer = io.BytesIO()
        Image.fromarray(drawings.pixels[row]).save(buffer, format="PNG", optimize=True)
        captions = subject_captions(subject, seed)
        digest = hashlib.sha256(subject.id.encode()).digest()
        images.append({"bytes": buffer.getvalue(), "path": f"{subject.id}.png"})
        texts.append(captions[digest[0] % len(captions)])
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image_type), ("text", pa.string())], metadata={"huggingface": json.dumps(HF_FEATURES)}
    )
    table = pa.table(
        {"image": pa.array(images, image_type), "text": pa.array(texts, pa.string())}, schema=schema
    )
    part = path.with_suffix(".part")
    pq.write_table(table, part)
    part.replace(path)


def _without_copies(drawings: Drawings, rows: list[int]) -> list[int]:
    """The rows whose pixels no earlier row has."""
    first = {drawings.pixels[row].tobytes(): row for row in reversed(rows)}
    return sorted(first.values())


def _group_near_duplicates(images: np.ndarray, max_hamming: int, max_difference: float) -> list[int]:
    """The group of each image of (N, 64, 64, 3) uint8: near duplicates, and their near duplicates, share
    one.
    """
    hashes = np.stack([_difference_hash(image) for image in images])  # (N, 64) bool
    small = (
        images.reshape(len(images), 32, 2, 32, 2, 3).mean((2, 4)).astype(np.float32) / 255
    )  # (N, 32, 32, 3)
    parent = list(range(len(images)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i in range(len(images)):
        near = np.flatnonzero((hashes[i + 1 :] != hashes[i]).sum(1) <= max_hamming) + i + 1
        for j in near:
            if np.abs(small[i] - small[j]).mean() <= max_difference:
                parent[root(int(j))] = root(i)
    return [root(i) for i in range(len(images))]


def _difference_hash(image: np.ndarray) -> np.ndarray:
    """64 bits: is each of 8x8 cells darker than its right neighbour."""
    grey = np.asarray(
        Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16
    )
    return (grey[:, :-1] < grey[:, 1:]).ravel()
