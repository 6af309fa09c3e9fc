"""Rows to examples: checks, captions, duplicates, the split and the pixels.

What is kept in memory is a caption and the facts of a picture, some 2 kB, never the pictures themselves.
Every order and every choice follows the SHA-256 of the picture's bytes, so that shuffling the rows changes
nothing and smaller subsets nest.
"""

import hashlib
import logging
import os
import re
import statistics
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lorascope.console import log
from lorascope.data.captions import Caption, check_additions, clean_caption, complete_caption
from lorascope.data.duplicates import MOST_FOR_SECOND_LOOK, alike_pairs, join_groups, near_groups
from lorascope.data.index import Outcome, PictureIndex, default_index_dir
from lorascope.data.names import name_some
from lorascope.data.pictures import (
    PictureFacts,
    RefusedError,
    choose_bucket,
    decode_picture,
    examine_picture,
    plan_buckets,
)
from lorascope.data.rows import Row
from lorascope.data.sources import Source, open_source
from lorascope.errors import DataError
from lorascope.schema import DataSection
from lorascope.store import digest_json

_PENDING_PER_THREAD = 4
_SHOWN_REFUSALS = 3
_SHOWN_KINDS = 8
_SHOWN_GROUPS = 2
_LEAST_BORDER = 0.02  # of a side


@dataclass(frozen=True)
class Example:
    """A picture that passed every check, with its caption.

    `id` says where it stands: `train-00000-of-00001.parquet#12` (row 12, from 0) or `cats/1.png`. `caption`
    is what is trained on: NFC normalised and stripped, with `data.caption_prefix` and `data.trigger_word`.
    `digest` is the SHA-256 of the image file's bytes, as 64 hex digits. `repeats` is how often it is seen in
    an epoch, `width_px` and `height_px` the size in which `Dataset.load_pixels` gives it.
    """

    id: str
    caption: str
    digest: str
    repeats: int = 1
    width_px: int = 0
    height_px: int = 0


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


@dataclass(frozen=True)
class Picture:
    """An example that can be used, with what the search for duplicates needs."""

    example: Example
    split: str
    facts: PictureFacts
    num_tokens: int


@dataclass
class Checked:
    """A source after its rows were looked at one by one: pictures in the order of the rows, refusals and
    treatments.
    """

    source: Source
    section: DataSection
    buckets: list[tuple[int, int]]
    num_rows: int = 0
    splits: set[str] = field(default_factory=set)
    pictures: list[Picture] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    treated: list[dict[str, str]] = field(default_factory=list)


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


def count_reasons(entries: Iterable[dict[str, str]]) -> list[tuple[int, str]]:
    """The number of each kind of refusal or treatment, most frequent first, with words on it and names of
    rows; what differs in numbers alone is of one kind.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for entry in entries:
        reason = entry.get("reason") or entry["treatment"]
        kinds.setdefault(re.sub(r"\d+", "#", reason), []).append((reason, entry["id"]))
    return [
        (
            len(members),
            f"{members[0][0]}{', and the like' if len({reason for reason, _ in members}) > 1 else ''}: "
            f"{name_some([row_id for _, row_id in members])}",
        )
        for members in sorted(kinds.values(), key=len, reverse=True)
    ]


def describe_duplicates(notes: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on the near and one on the exact duplicates of `data.json`: how many there are, what was
    done with them, and pictures of the largest groups.
    """
    sentences = []
    for kind, done, mark, words in (
        ("near", "kept on one side of the split", "dropped from", "held-out pictures of {} groups dropped"),
        ("exact", "one of each group kept", "captions differ", "captions differ in {} groups"),
    ):
        groups = sorted((note for note in notes if note["kind"] == kind), key=lambda note: -len(note["ids"]))
        if not groups:
            continue
        num_pictures, plural = sum(len(note["ids"]) for note in groups), "s" if len(groups) > 1 else ""
        sentence = f"{num_pictures:,} pictures in {len(groups):,} group{plural} of {kind} duplicates, {done}"
        if num_odd := sum(mark in note["action"] for note in groups):
            numbered = words.format(f"{num_odd:,}")
            sentence += f", {numbered if num_odd > 1 else numbered.replace('groups', 'group')}"
        sentence += f": {'; '.join(name_some(note['ids']) for note in groups[:_SHOWN_GROUPS])}"
        if len(groups) > _SHOWN_GROUPS:
            sentence += f"; and {len(groups) - _SHOWN_GROUPS:,} more"
        sentences.append(sentence)
    return sentences


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


def check_source(
    section: DataSection,
    count_tokens: Callable[[str], int],
    max_tokens: int = 77,
    progress: Callable[[int, int], None] | None = None,
    index_dir: Path | None = None,
) -> Checked:
    """The first half of `prepare_data`: look at every row. Raises `DataError` if the source cannot be
    read or a text that is put before its captions is not all words.
    """
    check_additions(section)
    source = open_source(section)
    checked = Checked(source, section, _buckets_of(section), source.num_rows)
    if not source.num_rows:
        raise DataError(
            f"data.source = {section.source!r}: holds no rows: give a source with pictures and captions"
        )
    for remark in source.remarks:
        log.warning("data     %s", remark)
    num_threads = os.cpu_count() or 1
    with (
        PictureIndex(index_dir or default_index_dir(), source.origin) as index,
        ThreadPoolExecutor(num_threads) as pool,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter(
            "ignore", Image.DecompressionBombWarning
        )  # pictures that large are refused, with a reason
        pending: deque[tuple[Row, Caption, Outcome | Future[tuple[Outcome, bool]]]] = deque()
        row_ids = []

        def start(row: Row) -> tuple[Row, Caption, Outcome | Future[tuple[Outcome, bool]]]:
            try:
                if row.problem is not None or row.stamp is None:
                    raise RefusedError(row.problem or "the picture is not there")
                caption = clean_caption(row.caption)
            except RefusedError as error:
                return row, ("", []), error
            return row, caption, index.find(row.id, row.stamp) or pool.submit(_look_at, source, row.id)

        def finish() -> None:
            row, caption, outcome = pending.popleft()
            if isinstance(outcome, Future):
                outcome, is_lasting = outcome.result()
                if is_lasting and row.stamp is not None:
                    index.add(row.id, row.stamp, outcome)
            _take(checked, row, caption, outcome, count_tokens, max_tokens)
            row_ids.append(row.id)
            if progress is not None:
                progress(len(row_ids), checked.num_rows)

        for row in source.rows():
            pending.append(start(row))
            if len(pending) > num_threads * _PENDING_PER_THREAD:
                finish()
        while pending:
            finish()
        index.keep_only(row_ids)
        if index.num_found:
            log.debug(
                "data     %d of %d pictures have not changed since an earlier look",
                index.num_found,
                checked.num_rows,
            )
    return checked


def _look_at(source: Source, row_id: str) -> tuple[Outcome, bool]:
    """Facts of a picture, or why it cannot be used; and whether that stays so as long as the file does not
    change.
    """
    try:
        content = source.read(row_id)
    except RefusedError as error:
        return error, False
    try:
        return examine_picture(content), True
    except RefusedError as error:
        return error, not isinstance(error.__cause__, MemoryError)


def _take(
    checked: Checked,
    row: Row,
    cleaned: Caption,
    outcome: Outcome,
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> None:
    """Add a row to what was checked, as a picture or as a refusal."""
    section = checked.section
    checked.splits.add(row.split)
    if isinstance(outcome, RefusedError):
        checked.refused.append({"id": row.id, "reason": str(outcome)})
        return
    caption, treatments = (
        complete_caption(cleaned[0], section),
        [*row.treatments, *cleaned[1], *outcome.treatments],
    )
    if (num_tokens := count_tokens(caption)) > max_tokens:
        treatments.append(f"the caption is cut at {max_tokens} tokens, all that the text encoder takes")
    width, height = choose_bucket(outcome.width_px, outcome.height_px, checked.buckets)
    if outcome.width_px < width or outcome.height_px < height:
        if section.buckets:
            treatments.append(
                f"enlarged from {outcome.width_px} x {outcome.height_px} to {width} x {height} px"
            )
        else:
            treatments.append(f"enlarged from {min(outcome.width_px, outcome.height_px)} to {width} px")
    example = Example(row.id, caption, outcome.digest, section.repeats * row.repeats, width, height)
    checked.pictures.append(Picture(example, row.split, outcome, num_tokens))
    checked.treated += [{"id": row.id, "treatment": treatment} for treatment in treatments]


def _buckets_of(section: DataSection) -> list[tuple[int, int]]:
    """The widths and heights to choose from: the square alone without buckets."""
    if not section.buckets:
        return [(section.resolution_px, section.resolution_px)]
    if buckets := plan_buckets(section.resolution_px, section.bucket_step_px, section.bucket_max_ratio):
        return buckets
    raise DataError(
        f"data.bucket_step_px = {section.bucket_step_px}: no bucket fits into data.resolution_px = "
        f"{section.resolution_px}: lower the step, or raise the resolution"
    )


def split_pictures(checked: Checked) -> Dataset:
    """The second half of `prepare_data`: find duplicates and split. Raises `DataError` where no run can
    start.
    """
    section, num_rows = checked.section, checked.num_rows
    share = len(checked.refused) / num_rows
    if share > section.max_refused_share or not checked.pictures:
        first = "; ".join(
            f"{name_some([refusal['id']])}: {refusal['reason']}"
            for refusal in checked.refused[:_SHOWN_REFUSALS]
        )
        limit = f"max_refused_share is {section.max_refused_share:g}" if checked.pictures else "none is left"
        raise DataError(
            f"data.source = {section.source!r}: {len(checked.refused)} of {num_rows} rows ({share:.1%}) "
            f"cannot be used and {limit} ({first}): correct them"
            + (", or raise data.max_refused_share" if checked.pictures else "")
        )
    kept, duplicates = _drop_exact(checked.pictures)
    groups = _near_groups(kept, section.near_duplicate_bits)
    if len(checked.splits) > 1 and "train" in checked.splits:
        heldout_ids, leaked_ids = _own_split(groups)
        split = f"the source's own: {', '.join(sorted(checked.splits - {'train'}))}"
    else:
        heldout_ids, leaked_ids = _draw_split(groups, section.heldout_share), set()
        split = (
            f"{section.heldout_share:g} of the pictures, chosen by content digest, near duplicates together"
        )
    duplicates += _describe_near(groups, leaked_ids)
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
    summary = {
        "source": checked.source.name,
        "resolution_px": section.resolution_px,
        "caption_prefix": section.caption_prefix,
        "trigger_word": section.trigger_word,
        "buckets": _count_buckets(train, heldout),
        "num_rows": num_rows,
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
    return Dataset(tuple(train), tuple(heldout), summary, checked.source)


def load_dataset(section: DataSection, summary: dict[str, Any]) -> Dataset:
    """The data set that `prepare_data` described in `summary` (the content of `data.json`), without the
    checks.

    Raises `DataError` if `summary` belongs to another source or resolution, or the source is gone.
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
        tuple(Example(**{**square, **example}) for example in summary[split])
        for split in ("train", "heldout")
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


# Duplicates and the split -----------------------------------------------------------------------------------


def _drop_exact(pictures: Iterable[Picture]) -> tuple[list[Picture], list[dict[str, Any]]]:
    """Pictures of which no two share bytes or decoded pixels, and a note on each set of equal ones."""
    equal: dict[bytes, list[Picture]] = {}
    for picture in sorted(
        pictures,
        key=lambda picture: (
            picture.split != "train",
            picture.example.digest,
            picture.example.caption,
            picture.example.id,
        ),
    ):
        equal.setdefault(picture.facts.pixel_digest, []).append(picture)
    notes = []
    for kept, *dropped in equal.values():
        if dropped:
            differ = any(picture.example.caption != kept.example.caption for picture in dropped)
            action = f"kept {kept.example.id}, dropped the other{'s' if len(dropped) > 1 else ''}" + (
                "; their captions differ" if differ else ""
            )
            notes.append(
                {
                    "kind": "exact",
                    "ids": [picture.example.id for picture in (kept, *dropped)],
                    "action": action,
                }
            )
    return [kept for kept, *_ in equal.values()], notes


def _near_groups(pictures: Sequence[Picture], max_bits: int) -> list[list[Picture]]:
    """Groups of near duplicates, most of one picture, each in the order of digests."""
    facts = [picture.facts for picture in pictures]
    thumbnails, contents = (
        np.frombuffer(b"".join(parts), np.uint8).reshape(len(facts), -1)
        for parts in ((fact.thumbnail for fact in facts), (fact.content for fact in facts))
    )
    numbers = near_groups(np.array([fact.hash for fact in facts], np.uint64), thumbnails, max_bits)
    if len(facts) > MOST_FOR_SECOND_LOOK:
        log.warning(
            "data     shifted, mirrored and brighter copies are looked for among %d pictures at most, "
            "here are %d",
            MOST_FOR_SECOND_LOOK,
            len(facts),
        )
    elif max_bits:
        shapes = np.array([fact.content_width_px / fact.content_height_px for fact in facts])
        shares = np.array(
            [(f.content_width_px / f.width_px, f.content_height_px / f.height_px) for f in facts]
        )
        has_border = shares.min(axis=1) < 1 - _LEAST_BORDER
        numbers = join_groups(numbers, alike_pairs(contents, shapes, has_border))
    members: dict[int, list[Picture]] = {}
    for number, picture in zip(numbers.tolist(), pictures, strict=True):
        members.setdefault(number, []).append(picture)
    by_digest = [sorted(group, key=lambda picture: picture.example.digest) for group in members.values()]
    return sorted(by_digest, key=lambda group: group[0].example.digest)


def _own_split(groups: Iterable[Sequence[Picture]]) -> tuple[set[str], set[str]]:
    """Ids of the source's held-out pictures, and of those that duplicate a training picture and must be
    dropped.
    """
    heldout_ids: set[str] = set()
    leaked_ids: set[str] = set()
    for group in groups:
        ids = {picture.example.id for picture in group if picture.split != "train"}
        (heldout_ids if len(ids) == len(group) else leaked_ids).update(ids)
    return heldout_ids, leaked_ids


def _draw_split(groups: Sequence[Sequence[Picture]], share: float) -> set[str]:
    """Ids of the pictures to hold out: whole groups, in an order independent of that in which subsets are
    taken.
    """
    num_pictures = sum(map(len, groups))
    num_wanted = min(max(1, round(share * num_pictures)), num_pictures - 1)
    heldout_ids: set[str] = set()
    for group in sorted(groups, key=lambda group: hashlib.sha256(group[0].example.digest.encode()).digest()):
        if len(heldout_ids) + len(group) <= num_wanted:
            heldout_ids.update(picture.example.id for picture in group)
    return heldout_ids


def _describe_near(groups: Iterable[Sequence[Picture]], leaked_ids: set[str]) -> list[dict[str, Any]]:
    notes = []
    for group in groups:
        ids = [picture.example.id for picture in group]
        if len(ids) > 1:
            leaked = [picture_id for picture_id in ids if picture_id in leaked_ids]
            action = (
                f"dropped from the held-out pictures: {', '.join(leaked)}"
                if leaked
                else "kept on the same side of the split"
            )
            notes.append({"kind": "near", "ids": ids, "action": action})
    return notes
