"""What `lorascope data check` says of a source, in text, as JSON and as pictures of its pictures."""

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lorascope.data.dataset import Dataset, split_pictures
from lorascope.data.examples import Checked, Picture, count_reasons
from lorascope.data.names import name_some
from lorascope.data.pictures import RefusedError, decode_picture
from lorascope.errors import DataError
from lorascope.store import atomic_path

_COLUMNS = 100
_BAR = 30
_SHOWN_TAGS = 20
_SHOWN_GROUPS = 8
_BINS = 8

_SHEET_COLUMNS = 6
_SHEET_PICTURES = 60
_SHEET_GROUPS = 24
_CELL = 176
_MARGIN = 12
_TEXT_PX = 12
_TEXT_LINES = 3


@dataclass(frozen=True)
class DataCheck:
    """What a look at a source showed; `dataset` is None where no run would start, and `problem` says why."""

    checked: Checked
    max_tokens: int
    dataset: Dataset | None
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        """All of it for a script; `would_start` is the answer."""
        checked, dataset = self.checked, self.dataset
        tokens = [picture.num_tokens for picture in checked.pictures]
        return {
            "source": checked.source.name,
            "would_start": dataset is not None,
            "problem": self.problem,
            "num_rows": checked.num_rows,
            "num_usable": len(checked.pictures),
            "num_train": len(dataset.train) if dataset else None,
            "num_heldout": len(dataset.heldout) if dataset else None,
            "num_seen_per_epoch": sum(example.repeats for example in dataset.train) if dataset else None,
            "split": dataset.summary["split"] if dataset else None,
            "resolution_px": checked.section.resolution_px,
            "sizes": [[picture.facts.width_px, picture.facts.height_px] for picture in checked.pictures],
            "buckets": [
                {"width_px": width, "height_px": height, "num_pictures": count}
                for (width, height), count in self._count_buckets()
            ],
            "caption_tokens": {
                "values": tokens,
                "max": self.max_tokens,
                "num_cut": sum(number > self.max_tokens for number in tokens),
            },
            "tags": [[tag, count] for tag, count in self._count_tags()],
            "repeats": self._count_repeats(),
            "remarks": checked.source.remarks,
            "refused": checked.refused,
            "treated": checked.treated,
            "duplicates": dataset.summary["duplicates"] if dataset else None,
        }

    def as_text(self) -> str:
        """All of it for a reader, in lines of at most 100 characters but for the source's name."""
        checked, dataset = self.checked, self.dataset
        num_refused = len(checked.refused)
        lines = [
            checked.source.name,
            f"{checked.num_rows:,} rows, {len(checked.pictures):,} can be used, {num_refused:,} refused",
        ]
        if checked.source.remarks:
            lines += _section(
                "Beside the rows",
                [line for remark in checked.source.remarks for line in textwrap.wrap(remark, _COLUMNS - 2)],
            )
        if num_refused:
            lines += _section("Refused", _wrapped(count_reasons(checked.refused)))
        if checked.treated:
            lines += _section("Treated", _wrapped(count_reasons(checked.treated)))
        if checked.pictures:
            sides = [min(picture.facts.width_px, picture.facts.height_px) for picture in checked.pictures]
            lines += _section("Shorter side in pixels", _histogram(sides))
            lines += _section(f"Sizes in training, {self._plan()}", self._bucket_lines())
            tokens = [picture.num_tokens for picture in checked.pictures]
            lines += _section(f"Caption lengths in tokens{self._cut(tokens)}", _histogram(tokens))
            if tags := self._count_tags():
                shown = ", ".join(f"{tag} {count:,}" for tag, count in tags[:_SHOWN_TAGS])
                lines += _section(f"Most frequent of {len(tags):,} tags", textwrap.wrap(shown, _COLUMNS - 2))
            if repeats := self._count_repeats():
                lines += _section(
                    "Repeats",
                    [
                        f"{count:>7,} pictures seen {times} times an epoch"
                        for times, count in sorted(repeats.items())
                    ],
                )
        if dataset is not None:
            lines += self._duplicate_lines(dataset.summary["duplicates"])
            seen = sum(example.repeats for example in dataset.train)
            more = f", {seen:,} an epoch with repeats" if seen != len(dataset.train) else ""
            lines += [
                "",
                (
                    f"A run would start: {len(dataset.train):,} pictures to train on{more}, "
                    f"{len(dataset.heldout):,} held out."
                ),
                f"Held out: {dataset.summary['split']}.",
            ]
        else:
            lines += ["", *textwrap.wrap(f"No run would start: {self.problem}", _COLUMNS)]
        return "\n".join(lines)

    def _cut(self, tokens: Sequence[int]) -> str:
        """What becomes of captions that are too long."""
        if num_cut := sum(number > self.max_tokens for number in tokens):
            verb = "are" if num_cut > 1 else "is"
            return f", {num_cut:,} {verb} cut at {self.max_tokens}, the longest has {max(tokens):,}"
        return f", at most {self.max_tokens}"

    def _plan(self) -> str:
        section = self.checked.section
        if not section.buckets:
            return f"the centre square at {section.resolution_px} px"
        return (
            f"{len(self.checked.buckets)} buckets, steps of {section.bucket_step_px} px, area up to "
            f"{section.resolution_px} squared"
        )

    def _count_buckets(self) -> list[tuple[tuple[int, int], int]]:
        counts = Counter(
            (picture.example.width_px, picture.example.height_px) for picture in self.checked.pictures
        )
        return [(size, counts[size]) for size in self.checked.buckets]

    def _bucket_lines(self) -> list[str]:
        counts = self._count_buckets()
        most = max(count for _, count in counts)
        return [_bar(f"{width:>4} x {height:<4}", count, most) for (width, height), count in counts]

    def _count_tags(self) -> list[tuple[str, int]]:
        """Comma-separated parts of the captions that stand in more than one, most frequent first."""
        captions = (picture.example.caption for picture in self.checked.pictures)
        counts = Counter(
            tag for caption in captions for tag in {part.strip() for part in caption.split(",")} if tag
        )
        return sorted(
            ((tag, count) for tag, count in counts.items() if count > 1),
            key=lambda entry: (-entry[1], entry[0]),
        )

    def _count_repeats(self) -> dict[int, int]:
        """Pictures by the number of times that an epoch shows them; nothing if each is shown once."""
        counts = Counter(picture.example.repeats for picture in self.checked.pictures)
        return dict(counts) if set(counts) - {1} else {}

    def _duplicate_lines(self, duplicates: Sequence[dict[str, Any]]) -> list[str]:
        lines = []
        for kind, title in (("exact", "Exact duplicates"), ("near", "Near duplicates")):
            groups = sorted(
                (note for note in duplicates if note["kind"] == kind), key=lambda note: -len(note["ids"])
            )
            if groups:
                num_pictures, plural = (
                    sum(len(note["ids"]) for note in groups),
                    "s" if len(groups) > 1 else "",
                )
                shown = [_describe_group(note) for note in groups[:_SHOWN_GROUPS]]
                more = (
                    [f"and {len(groups) - _SHOWN_GROUPS:,} more groups"]
                    if len(groups) > _SHOWN_GROUPS
                    else []
                )
                lines += _section(
                    f"{title}: {num_pictures:,} pictures in {len(groups):,} group{plural}", shown + more
                )
        return lines

    def draw(self, out_dir: Path, progress: Callable[[int], None] = lambda count: None) -> list[Path]:
        """Write `contact-sheet.png`, pictures with captions as training sees them, and `duplicates.png`,
        groups side by side.

        Of many pictures some are drawn, chosen by digest, and of many groups the largest, near duplicates
        first. Gives the paths that were written: no sheet of nothing. Raises `StorageError` if `out_dir`
        cannot be written.
        """
        by_id = {picture.example.id: picture for picture in self.checked.pictures}
        chosen = sorted(self.checked.pictures, key=lambda picture: picture.example.digest)[:_SHEET_PICTURES]
        title = f"{self.checked.source.name}: {len(chosen):,} of {len(by_id):,} pictures"
        if _lacks_letters("".join(picture.example.caption for picture in chosen)):
            title += "; boxes stand for letters that this font lacks, training reads them all the same"
        sheets = [
            ("contact-sheet.png", [(title, [(picture, picture.example.caption) for picture in chosen])])
        ]
        notes = self.dataset.summary["duplicates"] if self.dataset else []
        groups = sorted(notes, key=lambda note: (note["kind"] == "exact", -len(note["ids"])))[:_SHEET_GROUPS]
        sheets.append(
            (
                "duplicates.png",
                [(f"{note['kind']}: {note['action']}", self._members(note["ids"], by_id)) for note in groups],
            )
        )
        written = []
        for name, rows in sheets:
            if any(cells for _, cells in rows):
                with atomic_path(out_dir / name) as partial:
                    self._draw_sheet(rows, progress).save(partial)
                written.append(out_dir / name)
        return written

    def _members(self, ids: Sequence[str], by_id: dict[str, Picture]) -> list[tuple[Picture, str]]:
        return [(by_id[row_id], row_id) for row_id in ids[:_SHEET_COLUMNS]]

    def _draw_sheet(
        self, rows: Sequence[tuple[str, Sequence[tuple[Picture, str]]]], progress: Callable[[int], None]
    ) -> Image.Image:
        """Titles, each with cells of a picture and its text below."""
        font = ImageFont.truetype(str(_font_path()), _TEXT_PX)
        line_px, cell_px = _TEXT_PX + 4, _CELL + _TEXT_LINES * (_TEXT_PX + 4) + _MARGIN
        width = _MARGIN + _SHEET_COLUMNS * (_CELL + _MARGIN)
        heights = [
            line_px + _MARGIN // 2 + math.ceil(len(cells) / _SHEET_COLUMNS) * cell_px for _, cells in rows
        ]
        sheet = Image.new("RGB", (width, _MARGIN + sum(heights)), "white")
        pen = ImageDraw.Draw(sheet)
        top = _MARGIN
        for (title, cells), height in zip(rows, heights, strict=True):
            pen.text((_MARGIN, top), _fit_lines(title, font, width - 2 * _MARGIN, 1)[0], "black", font)
            for number, (picture, text) in enumerate(cells):
                left = _MARGIN + number % _SHEET_COLUMNS * (_CELL + _MARGIN)
                upper = top + line_px + _MARGIN // 2 + number // _SHEET_COLUMNS * cell_px
                self._draw_cell(sheet, picture, left, upper)
                for row, line in enumerate(_fit_lines(text, font, _CELL, _TEXT_LINES)):
                    pen.text((left, upper + _CELL + 2 + row * line_px), line, "black", font)
                progress(1)
            top += height
        return sheet

    def _draw_cell(self, sheet: Image.Image, picture: Picture, left: int, upper: int) -> None:
        example = picture.example
        scale = _CELL / max(example.width_px, example.height_px)
        width, height = max(1, round(example.width_px * scale)), max(1, round(example.height_px * scale))
        try:
            pixels = decode_picture(self.checked.source.read(example.id), width, height)
        except RefusedError:  # it went away since it was checked
            return
        x, y = left + (_CELL - width) // 2, upper + _CELL - height
        sheet.paste(Image.fromarray(pixels), (x, y))
        ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + width, y + height), outline="lightgrey")


def check_data(checked: Checked, max_tokens: int) -> DataCheck:
    """Tell of a checked source whether a run would start with it, and why not."""
    try:
        return DataCheck(checked, max_tokens, split_pictures(checked), None)
    except DataError as error:
        return DataCheck(checked, max_tokens, None, str(error))


def _section(title: str, lines: Iterable[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)]


def _wrapped(counted: Iterable[tuple[int, str]]) -> list[str]:
    """Lines of counts and what is counted."""
    return [
        line
        for count, words in counted
        for line in textwrap.wrap(f"{count:>7,}  {words}", _COLUMNS - 2, subsequent_indent=" " * 9)
    ]


def _describe_group(note: dict[str, Any]) -> str:
    """Names of a group's pictures, and what is worth knowing besides, in one line."""
    remark = next(
        (words for words in ("captions differ", "dropped from the held-out") if words in note["action"]), ""
    )
    room = _COLUMNS - 2 - len(f" ({remark})") * bool(remark)
    names = name_some(note["ids"])
    return (names if len(names) <= room else f"{names[: room - 1]}…") + (f" ({remark})" if remark else "")


def _histogram(values: Sequence[int]) -> list[str]:
    """Up to eight ranges of equal width, a round number, with the number of values in each."""
    low, high = min(values), max(values)
    width = 1
    while (high // width - low // width) >= _BINS:
        magnitude = 10 ** (len(str(width)) - 1)
        width = width * 2 if width != 2 * magnitude else 5 * magnitude
    counts = Counter(value // width for value in values)
    most = max(counts.values())
    digits = len(str(high))
    return [
        _bar(
            f"{place * width:>{digits}}" + (f" to {(place + 1) * width - 1:>{digits}}" if width > 1 else ""),
            counts[place],
            most,
        )
        for place in range(low // width, high // width + 1)
    ]


def _bar(label: str, count: int, most: int) -> str:
    return f"{label}  {count:>7,}  {'#' * math.ceil(_BAR * count / most) if most else ''}".rstrip()


def _font_path() -> Path:
    """DejaVu Sans, which comes with Matplotlib and has most scripts' letters."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def _lacks_letters(text: str) -> bool:
    """Whether the sheets' font has no sign for a letter of the text: it has none for Chinese, Japanese and
    Korean.
    """
    from matplotlib.ft2font import FT2Font

    return bool(
        {ord(letter) for letter in text if not letter.isspace()} - FT2Font(_font_path()).get_charmap().keys()
    )


def _fit_lines(text: str, font: ImageFont.FreeTypeFont, width: int, num_lines: int) -> list[str]:
    """The text in at most so many lines of at most so many pixels, with an ellipsis where it goes on."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < num_lines:
        end = next((end for end in range(len(rest), 1, -1) if font.getlength(rest[:end]) <= width), 1)
        if end < len(rest) and len(lines) == num_lines - 1:
            return [*lines, rest[: max(1, end - 2)].rstrip() + "…"]
        if end < len(rest) and (space := rest.rfind(" ", 1, end + 1)) > 0:
            end = space
        lines.append(rest[:end].strip())
        rest = rest[end:].strip()
    return lines
