"""The pictures of a run: checked, without duplicates, split, and their pixels.

Every order and every choice follows the SHA-256 of the picture's bytes, so that shuffling the rows changes
nothing and smaller subsets nest.
"""

import hashlib
import logging
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.console import log
from lorascope.data.examples import Checked, Example, check_source, count_reasons
from lorascope.data.names import name_some
from lorascope.data.pictures import (
    RefusedError,
    decode_picture,
)
from lorascope.data.sources import Source, open_source
from lorascope.data.split import (
    describe_duplicates,
    describe_near,
    draw_split,
    drop_exact,
    group_near,
    own_split,
)
from lorascope.errors import DataError
from lorascope.sections import DataSection
from lorascope.store import digest_json

_SHOWN_REFUSALS = 3
_SHOWN_KINDS = 8
_EXAMPLE_KEYS = tuple(item.name for item in fields(Example))


@dataclass(frozen=True)
class Dataset:
    """Training and held-out examples, each in the order of their digests; `summary` is the content of
    `data.json`.
    """

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    summary: dict[str, Any]
    _source: Source = field(repr=False, compare=False)

    def load_pixels(self, example: Example) -> np.ndarray:
        """The picture, centre-cropped to the example's shape and resized: uint8 [height_px, width_px, 3],
        RGB, 0 to 255.

        Reads the file or row group on demand and may be called from several threads. Raises `DataError` if
        the bytes are gone or no longer those the checks saw.
        """
        try:
            content = self._source.read(example.id)
            if hashlib.sha256(content).hexdigest() != example.digest:
                raise DataError(
                    f"{example.id}: the picture changed after it was checked: run the data stage again"
                )
            return decode_picture(content, example.width_px, example.height_px)
        except RefusedError as error:
            raise DataError(f"{example.id}: {error}: put it back, or run the data stage again") from error

    def in_storage_order(self, examples: Iterable[Example]) -> list[Example]:
        """The examples in the order in which they stand in the source: to load many, go through them in this
        order.
        """
        return sorted(examples, key=lambda example: self._source.position(example.id))


def prepare_data(
    section: DataSection,
    count_tokens: Callable[[str], int],
    max_tokens: int = 77,
    progress: Callable[[int, int], None] | None = None,
    index_dir: Path | None = None,
) -> Dataset:
    """Check every row of the source, find duplicates and split; afterwards every example can be loaded and
    trained on.

    `count_tokens` gives a caption's length in tokens, with the start and end tokens. Longer captions than
    `max_tokens` are kept, but what comes after is cut by the tokenizer, as diffusers' and kohya's training
    do; that is noted. `progress` is called with rows done and rows in all. Rows that cannot be used are
    refused with a reason and the rest goes on; each kind of refusal and treatment is logged. Of exact
    duplicates (same bytes or same decoded pixels) one is kept, the first by digest, a training picture before
    a held-out one; near duplicates are kept but never straddle the split. Pictures that were looked at before
    and have not changed are not read again (`index_dir`, in the user's cache if None).

    Raises `DataError` if the source cannot be read, too many rows are refused, or nothing is left to train on
    or to hold out.
    """
    checked = check_source(section, count_tokens, max_tokens, progress, index_dir)
    _log_reasons(checked, max_tokens)
    dataset = split_pictures(checked)
    for sentence in describe_duplicates(dataset.summary["duplicates"]):
        log.info("data     %s", sentence)
    return dataset


def _log_reasons(checked: Checked, max_tokens: int) -> None:
    """Say what was refused and what was done to the rest, and which caption is the longest of those cut."""
    for level, kind, entries in (
        (logging.WARNING, "refused", checked.refused),
        (logging.INFO, "treated", checked.treated),
    ):
        counted = count_reasons(entries)
        for count, words in counted[:_SHOWN_KINDS]:
            log.log(level, "data     %s %d: %s", kind, count, words)
        if len(counted) > _SHOWN_KINDS:
            log.log(level, "data     %s for %d more reasons", kind, len(counted) - _SHOWN_KINDS)
    long = [picture for picture in checked.pictures if picture.num_tokens > max_tokens]
    if long:
        longest = max(long, key=lambda picture: picture.num_tokens)
        log.warning(
            "data     captions longer than %d tokens, which are cut there: %d, the longest, of %d, "
            "that of %s",
            max_tokens,
            len(long),
            longest.num_tokens,
            name_some([longest.example.id]),
        )


def split_pictures(checked: Checked) -> Dataset:
    """The second half of `prepare_data`: find duplicates and split. Raises `DataError` where no run can
    start.
    """
    _require_few_refusals(checked)
    section = checked.section
    kept, duplicates = drop_exact(checked.pictures)
    groups = group_near(kept, section.near_duplicate_bits)
    if len(checked.splits) > 1 and "train" in checked.splits:
        heldout_ids, leaked_ids = own_split(groups)
        split = f"the source's own: {', '.join(sorted(checked.splits - {'train'}))}"
    else:
        heldout_ids, leaked_ids = draw_split(groups, section.heldout_share), set()
        split = (
            f"{section.heldout_share:g} of the pictures, chosen by content digest, near duplicates together"
        )
    duplicates += describe_near(groups, leaked_ids)
    ordered = sorted(kept, key=lambda picture: picture.example.digest)
    untrained_ids = heldout_ids | leaked_ids
    heldout = [picture.example for picture in ordered if picture.example.id in heldout_ids][
        : section.num_heldout
    ]
    train = [picture.example for picture in ordered if picture.example.id not in untrained_ids][
        : section.num_train
    ]
    if not heldout or not train:
        raise DataError(
            f"data.source = {section.source!r}: no pictures left to "
            f"{'train on' if heldout else 'hold out'}: {len(kept)} distinct pictures in {len(groups)} "
            f"groups of near duplicates, {len(leaked_ids)} held-out ones dropped as duplicates of "
            "training pictures: give more pictures, or lower data.near_duplicate_bits"
        )
    used = {example.id for example in (*train, *heldout)}
    tokens = [picture.num_tokens for picture in kept if picture.example.id in used]
    summary = _summarise(checked, train, heldout, tokens, split, duplicates)
    return Dataset(tuple(train), tuple(heldout), summary, checked.source)


def _require_few_refusals(checked: Checked) -> None:
    """Raise `DataError` where more rows were refused than the study allows, or all."""
    section, num_rows = checked.section, checked.num_rows
    share = len(checked.refused) / num_rows
    if share <= section.max_refused_share and checked.pictures:
        return
    first = "; ".join(
        f"{name_some([refusal['id']])}: {refusal['reason']}" for refusal in checked.refused[:_SHOWN_REFUSALS]
    )
    limit = f"max_refused_share is {section.max_refused_share:g}" if checked.pictures else "none is left"
    raise DataError(
        f"data.source = {section.source!r}: {len(checked.refused)} of {num_rows} rows ({share:.1%}) "
        f"cannot be used and {limit} ({first}): correct them"
        + (", or raise data.max_refused_share" if checked.pictures else "")
    )


def _summarise(
    checked: Checked,
    train: Sequence[Example],
    heldout: Sequence[Example],
    tokens: Sequence[int],
    split: str,
    duplicates: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The content of `data.json`; `tokens` are the lengths of the captions that are used."""
    section = checked.section
    return {
        "source": checked.source.name,
        "resolution_px": section.resolution_px,
        "caption_prefix": section.caption_prefix,
        "trigger_word": section.trigger_word,
        "buckets": _count_buckets(train, heldout),
        "num_rows": checked.num_rows,
        "num_train": len(train),
        "num_heldout": len(heldout),
        "split": split,
        "remarks": checked.source.remarks,
        "refused": checked.refused,
        "treated": checked.treated,
        "duplicates": duplicates,
        "train": [vars(example) for example in train],
        "heldout": [vars(example) for example in heldout],
        "caption_tokens": {"min": min(tokens), "median": statistics.median(tokens), "max": max(tokens)},
        "fingerprint": _fingerprint(section.resolution_px, train, heldout),
    }


def load_dataset(section: DataSection, summary: dict[str, Any]) -> Dataset:
    """The data set that `prepare_data` described in `summary` (the content of `data.json`), without the
    checks.

    Raises `DataError` if `summary` belongs to another source or resolution, if it says other things of the
    pictures than its fingerprint is of, or if the source is gone.
    """
    name, _, revision = summary["source"].partition("@")
    if section.source not in (summary["source"], name) or section.resolution_px != summary["resolution_px"]:
        raise DataError(
            f"data.json was made from {summary['source']!r} at {summary['resolution_px']} px, the study "
            f"asks for {section.source!r} at {section.resolution_px} px: run the data stage again"
        )
    source = open_source(section, revision=revision if name == section.source and revision else None)
    square = {
        "width_px": section.resolution_px,
        "height_px": section.resolution_px,
    }  # as run folders of before buckets have it
    train, heldout = (
        tuple(
            Example(**{**square, **{key: example[key] for key in _EXAMPLE_KEYS if key in example}})
            for example in summary[split]
        )
        for split in ("train", "heldout")
    )
    if summary["fingerprint"] != _fingerprint(section.resolution_px, train, heldout):
        raise DataError(
            "data.json: damaged (its pictures and captions are not those that its fingerprint is of): "
            "delete it and run the data stage again"
        )
    return Dataset(train, heldout, summary, source)


def _fingerprint(resolution_px: int, train: Iterable[Example], heldout: Iterable[Example]) -> str:
    """One digest for everything that training and evaluation see of the data."""
    splits = {"train": train, "heldout": heldout}
    content = {
        name: [
            [example.digest, example.caption, example.repeats, example.width_px, example.height_px]
            for example in examples
        ]
        for name, examples in splits.items()
    }
    return digest_json({"resolution_px": resolution_px, **content})


def _count_buckets(train: Sequence[Example], heldout: Sequence[Example]) -> list[dict[str, int]]:
    """The sizes in which pictures are given, narrowest first, with the number of pictures of each."""
    counts = [
        Counter((example.width_px, example.height_px) for example in examples)
        for examples in (train, heldout)
    ]
    sizes = sorted(counts[0].keys() | counts[1].keys(), key=lambda size: (size[0] / size[1], size))
    return [
        {
            "width_px": size[0],
            "height_px": size[1],
            "num_train": counts[0][size],
            "num_heldout": counts[1][size],
        }
        for size in sizes
    ]
