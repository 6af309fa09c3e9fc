"""Rows to examples: every row of a source is looked at, and used or refused with a reason.

What is kept in memory is a caption and the facts of a picture, some 2 kB, never the pictures themselves.
"""

import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lorascope.console import log
from lorascope.data.captions import Caption, check_additions, clean_caption, complete_caption
from lorascope.data.index import Outcome, PictureIndex, default_index_dir
from lorascope.data.names import name_some
from lorascope.data.pictures import (
    PictureFacts,
    RefusedError,
    choose_bucket,
    examine_picture,
    plan_buckets,
)
from lorascope.data.rows import Row
from lorascope.data.sources import Source, open_source
from lorascope.errors import DataError
from lorascope.sections import DataSection

_PENDING_PER_THREAD = 4


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


def check_source(
    section: DataSection,
    count_tokens: Callable[[str], int],
    max_tokens: int = 77,
    progress: Callable[[int, int], None] | None = None,
    index_dir: Path | None = None,
) -> Checked:
    """Look at every row of the source: the first half of `dataset.prepare_data`, with the same arguments.

    Raises `DataError` if the source cannot be read, or a text that is put before its captions is not all
    words.
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
    row_ids = []
    with (
        PictureIndex(index_dir or default_index_dir(), source.origin) as index,
        closing(_look_at_all(source, index)) as looks,
        warnings.catch_warnings(),
    ):
        # pictures that large are refused, with a reason
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for row, caption, outcome in looks:
            _take(checked, row, caption, outcome, count_tokens, max_tokens)
            row_ids.append(row.id)
            if progress is not None:
                progress(len(row_ids), checked.num_rows)
        index.keep_only(row_ids)
        if index.num_found:
            log.debug(
                "data     %d of %d pictures have not changed since an earlier look",
                index.num_found,
                checked.num_rows,
            )
    return checked


def _look_at_all(source: Source, index: PictureIndex) -> Generator[tuple[Row, Caption, Outcome], None, None]:
    """The rows in their order, each with its cleaned caption and what its picture showed; threads look ahead.

    What the index knows is not looked at again, and what was seen goes into it.
    """
    num_threads = os.cpu_count() or 1
    pending: deque[tuple[Row, Caption, Outcome | Future[tuple[Outcome, bool]]]] = deque()

    def finish() -> tuple[Row, Caption, Outcome]:
        row, caption, outcome = pending.popleft()
        if isinstance(outcome, Future):
            outcome, is_lasting = outcome.result()
            if is_lasting and row.stamp is not None:
                index.add(row.id, row.stamp, outcome)
        return row, caption, outcome

    with ThreadPoolExecutor(num_threads) as pool:
        for row in source.rows():
            try:
                if row.problem is not None or row.stamp is None:
                    raise RefusedError(row.problem or "the picture is not there")
                caption = clean_caption(row.caption)
            except RefusedError as error:
                pending.append((row, ("", []), error))
            else:
                found = index.find(row.id, row.stamp)
                pending.append((row, caption, found or pool.submit(_look_at, source, row.id)))
            if len(pending) > num_threads * _PENDING_PER_THREAD:
                yield finish()
        while pending:
            yield finish()


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
