"""The report's pictures: which prompts are shown, and which pictures the page itself holds."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from lorascope.diagnosis.nearest import Pair
from lorascope.evaluation.scores import ALL, BASE
from lorascope.evaluation.sweep_rows import SweepRow
from lorascope.report.copying import caption_of, nearest_of_kept, say_pair
from lorascope.report.evidence import MAX_DETAILED, Facts, Picture, count, open_picture
from lorascope.report.tables import cell
from lorascope.report.why import arms_in_focus

MAX_PREVIEWS = 6  # in a row
MAX_STRIPS = 3  # prompts shown from strength to strength
EMBED_SIDE_PX = 256
LOSSLESS_SIDE_PX = 96  # pictures up to this side are embedded as they are
# What the page shows of an album without pictures.
NO_PICTURES: dict[str, Any] = {"chosen": (), "strips": (), "pairs": ()}
_MARKUP_BYTES = 400  # of a picture in the page, beside its data


@dataclass(frozen=True)
class Shown:
    """A picture as the page shows it; without `source` it is only linked."""

    arm: str
    path: str
    score: str
    alt: str
    source: str = ""
    side: int = 0


@dataclass(frozen=True)
class PromptRow:
    """The pictures of one prompt and seed side by side."""

    key: str
    category: str
    prompt: str
    seed: int
    note: str
    pictures: tuple[Shown, ...]


@dataclass(frozen=True)
class Strip:
    """One prompt at every strength: a row an arm, the base's picture first. `rows` are arms with theirs."""

    prompt: str
    note: str
    rows: tuple[tuple[str, tuple[Shown, ...]], ...]


class Album:
    """Chooses the prompts to show and embeds pictures, the most telling first, until the budget is used."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.by_place = {(p.arm, p.category, p.index, p.seed): p for p in facts.pictures}
        self.seeds = list(dict.fromkeys(p.seed for p in facts.pictures))
        self.prompts = list(dict.fromkeys((p.category, p.index) for p in facts.pictures))
        drawn = [arm for arm in (BASE, *facts.arms) if pictures_of(facts, arm)]
        self.first = [arm for arm in drawn if arm == BASE or arm in facts.detailed]
        self.others = [arm for arm in drawn if arm not in self.first]
        self.chosen = self._choose()
        self.strips = self._strips()
        self.pairs = self._pairs()
        self._cache: dict[str, tuple[str, int]] = {}

    def _choose(self) -> dict[tuple[str, int], str]:
        """The prompts to show, each with why: two of each category, then the largest gains and losses of the
        others.
        """
        chosen = {}
        for category in dict.fromkeys(category for category, _ in self.prompts):
            for place in [place for place in self.prompts if place[0] == category][:2]:
                chosen[place] = f"{category}, among the first two"
        arm = self.judged
        if arm is not None:
            effects = sorted(
                self.facts.effects[arm, ALL].per_prompt,
                key=lambda item: (-item.difference, item.category, item.prompt_index),
            )
            left = [item for item in effects if (item.category, item.prompt_index) not in chosen]
            gains = [item for item in left[:2] if item.difference > 0]
            losses = [item for item in left[::-1][:2] if item.difference < 0 and item not in gains]
            for items, word in ((gains, "gains"), (losses, "losses")):
                for item in items:
                    chosen[item.category, item.prompt_index] = (
                        f"{item.category}, among {arm}'s largest {word} "
                        f"({cell(item.difference, '+.1f').text})"
                    )
        return chosen

    @property
    def judged(self) -> str | None:
        """The arm whose gains and losses choose prompts: the kept one, else the best."""
        arm = (self.facts.verdict.keep if self.facts.verdict else None) or next(iter(self.facts.ranked), None)
        return arm if arm is not None and (arm, ALL) in self.facts.effects else None

    @property
    def rule(self) -> str:
        """How the prompts were chosen, in words."""
        text = "The first two prompts of each category"
        if self.judged is not None:
            text += (
                ", then of all others the two with the largest gains and the two with the largest losses "
                f"of {self.judged} against the base"
            )
        seed = f" Pictures in a row start from the same noise, seed {self.seeds[0]};" if self.seeds else ""
        return (
            f"{text}. Nobody picked them by eye.{seed} the number is the CLIP score."
            if self.facts.scores
            else f"{text}.{seed} scores were not measured."
        )

    def blocks(self) -> list[list[Picture]]:
        """Pictures in the order in which they are worth embedding; a block is embedded whole or not at
        all.
        """
        rest = [place for place in self.prompts if place not in self.chosen]
        blocks = [self._take(self.first, list(self.chosen), self.seeds[:1])]
        blocks += [[picture for _, _, rows in self.strips for _, row in rows for picture in row]]
        blocks += [[picture for _, row in self.pairs for *_, picture in row]]
        blocks += [[picture for _, row in self._preview_rows() for _, picture in row]]
        blocks += [self._take([arm], rest, self.seeds[:1]) for arm in self.first]
        blocks += [self._take([arm], self.prompts, self.seeds[:1]) for arm in self.others]
        blocks += [
            self._take([arm], self.prompts, [seed])
            for seed in self.seeds[1:]
            for arm in (*self.first, *self.others)
        ]
        return [block for block in blocks if block]

    def _take(
        self, arms: Iterable[str], places: Sequence[tuple[str, int]], seeds: Sequence[int]
    ) -> list[Picture]:
        keys = [(arm, *place, seed) for seed in seeds for place in places for arm in arms]
        return [self.by_place[key] for key in keys if key in self.by_place]

    def embedded(self, picture: Picture) -> tuple[str, int]:
        """Data URI and side of a picture, made once; empty if its file is not there."""
        if picture.path not in self._cache:
            path = self._file_of(picture)
            self._cache[picture.path] = ("", 0) if path is None else _embed(path)
        return self._cache[picture.path]

    def _file_of(self, picture: Picture) -> Path | None:
        """The picture's file, if it is there and inside the run folder."""
        root = self.facts.run.path.resolve()
        path = (root / picture.path).resolve()
        return path if picture.path and path.is_relative_to(root) and path.is_file() else None

    def _size(self, picture: Picture) -> int:
        """Bytes that a picture takes in the page, about."""
        return len(self.embedded(picture)[0]) + _MARKUP_BYTES

    def size(self, taken: set[str]) -> int:
        """Bytes that the pictures which `fill` took take in the page, about."""
        return sum(
            self._size(picture) for block in self.blocks() for picture in block if picture.path in taken
        )

    def fill(self, budget_bytes: int) -> set[str]:
        """Paths of the pictures that fit into the budget."""
        taken: set[str] = set()
        left = budget_bytes
        for block in self.blocks():
            size = 0
            for picture in block:
                size += self._size(picture)
                if size > left:
                    return taken
            taken |= {picture.path for picture in block if self.embedded(picture)[0]}
            left -= size
        return taken

    def show(self, picture: Picture, taken: set[str]) -> Shown:
        """A picture for the page."""
        score = "" if picture.score is None else cell(picture.score, ".1f").text
        alt = f"{picture.arm}: {picture.prompt} (seed {picture.seed})"
        if picture.path in taken:
            source, side = self.embedded(picture)
            return Shown(picture.arm, picture.path, score, alt, source, side)
        return Shown(picture.arm, picture.path if self._file_of(picture) else "", score, alt)

    def content(self, taken: set[str]) -> dict[str, Any]:
        """The chosen prompts and the contact sheet."""
        chosen = [
            self._prompt_row(place, self.seeds[0], self.first, note, taken)
            for place, note in self.chosen.items()
        ]
        sheet = []
        for seed in self.seeds:
            for place in self.prompts:
                skip = self.first if seed == self.seeds[0] and place in self.chosen else []
                arms = [
                    a
                    for a in (*self.first, *self.others)
                    if a not in skip and (p := self.by_place.get((a, *place, seed))) and p.path in taken
                ]
                if arms:
                    sheet.append(self._prompt_row(place, seed, arms, f"{place[0]}, seed {seed}", taken))
        left_out = sum(
            picture.path not in taken and self._file_of(picture) is not None
            for picture in self.facts.pictures
        )
        note = (
            f"{left_out:,} pictures are not embedded, to keep this page under 5 MB; they lie in the "
            "folder images, by arm."
            if left_out
            else "Every picture that was scored for the table of arms is on this page."
        )
        return {
            "rule": self.rule,
            "chosen": chosen,
            "strips": self.shown_strips(taken),
            "strip_rule": self.strip_rule,
            "pairs": self.shown_pairs(taken),
            "previews": self.previews(taken),
            "sheet": sheet,
            "sheet_title": f"Contact sheet: {count(len(sheet), 'further row')} of pictures",
            "sheet_note": note
            + (
                " The contact sheet does not repeat the prompts above for the arms shown there."
                if sheet
                else ""
            ),
        }

    def _strips(self) -> list[tuple[str, str, list[tuple[str, list[Picture]]]]]:
        """For each of `MAX_STRIPS` prompts its text, why it was chosen, and the arms in focus, each with its
        pictures of the last epoch from the base, of strength 0, to the highest strength.
        """
        sweep, front = self.facts.sweep, self.facts.front
        if sweep is None or front is None or front.guidance is None:
            return []
        own = [
            point
            for point in sweep.points
            if (point.epoch, point.guidance) == ("last", front.guidance) and not point.is_intervention
        ]
        paths = {
            arm: sorted((p for p in own if p.arm in (BASE, arm)), key=lambda p: (p.arm != BASE, p.strength))
            for arm in arms_in_focus(self.facts)
        }
        drawn = {(row.point, row.category, row.prompt_index): row for row in reversed(sweep.rows)}
        strips = []
        for (category, index), note in self._choose_for_strips().items():
            rows = [
                (arm, [_of_row(drawn[key]) for point in path if (key := (point, category, index)) in drawn])
                for arm, path in paths.items()
                if len(path) > 1
            ]
            if rows and rows[0][1]:
                strips.append((rows[0][1][0].prompt, note, rows))
        return strips

    def _choose_for_strips(self) -> dict[tuple[str, int], str]:
        """The first prompt of each category, then the largest losses at the highest strength of one arm."""
        front, arm = self.facts.front, self._strip_arm
        if front is None or arm is None:
            return {}
        full = max((p for p in front.of(arm) if p.epoch == "last"), key=lambda p: p.strength, default=None)
        prompts = full.per_prompt if full else ()
        chosen: dict[tuple[str, int], str] = {}
        for item in prompts:
            if all(category != item.category for category, _ in chosen) and len(chosen) < MAX_STRIPS:
                chosen[item.category, item.prompt_index] = f"{item.category}, the first"
        for item in sorted(prompts, key=lambda item: item.difference or 0.0):
            if item.difference is not None and len(chosen) < MAX_STRIPS:
                shown = (
                    f"{item.category}, among {arm}'s largest losses ({cell(item.difference, '+.1f').text})"
                )
                chosen.setdefault((item.category, item.prompt_index), shown)
        return chosen

    @property
    def _strip_arm(self) -> str | None:
        """The arm whose losses choose the strips' prompts: the kept one, else the first in focus."""
        keep = self.facts.verdict.keep if self.facts.verdict else None
        return keep or next(iter(arms_in_focus(self.facts)), None)

    @property
    def strip_rule(self) -> str:
        """How the strips' prompts and arms were chosen, in words."""
        focus, few = arms_in_focus(self.facts), len(self.facts.arms) <= MAX_DETAILED
        arms = "" if few else f" Of {len(self.facts.arms)} arms these are shown: {', '.join(focus)}."
        return (
            f"The first prompt of each category, then what {self._strip_arm} loses most on at full strength. "
            f"All pictures of a prompt start from the same noise; the number is the CLIP score.{arms}"
        )

    def shown_strips(self, taken: set[str]) -> list[Strip]:
        """The chosen prompts from strength to strength."""
        strips = []
        for prompt, note, rows in self.strips:
            shown = tuple(
                (
                    arm,
                    tuple(
                        replace(
                            self.show(picture, taken),
                            arm=picture.arm,
                            alt=f"{BASE if picture.arm == BASE else f'{arm} at strength {picture.arm}'}: "
                            f"{prompt} (seed {picture.seed})",
                        )
                        for picture in row
                    ),
                )
                for arm, row in rows
            )
            strips.append(Strip(prompt, note, shown))
        return strips

    def _pairs(self) -> list[tuple[Pair, list[tuple[str, str, Picture]]]]:
        """The kept arm's nearest pairs, each with its pictures: text alternative, distance and picture."""
        keep, nearest = self.facts.verdict.keep if self.facts.verdict else None, nearest_of_kept(self.facts)
        if keep is None or nearest is None:
            return []

        def picture(name: str, pair: Pair, path: str) -> Picture:
            return Picture(name, "", 0, pair.prompt, pair.seed, path, None)

        rows = []
        for pair in nearest.pairs:
            drawing = f"{keep} at full strength: {pair.prompt} (seed {pair.seed})"
            row = [(drawing, "", picture("drawing", pair, pair.drawing))]
            for kind, found in (("training", pair.training), ("held-out", pair.heldout)):
                caption = caption_of(self.facts, found.id)
                alt = f"{kind} picture {found.id}{f': {caption}' if caption else ''}"
                row.append((alt, f"{found.distance:.3f}", picture(f"nearest {kind}", pair, found.picture)))
            rows.append((pair, row))
        return rows

    def shown_pairs(self, taken: set[str]) -> list[PromptRow]:
        """The kept arm's nearest pairs for the page."""
        rows = []
        for number, (pair, row) in enumerate(self.pairs):
            shown = tuple(replace(self.show(picture, taken), alt=alt, score=d) for alt, d, picture in row)
            rows.append(PromptRow(f"pair-{number}", "", pair.prompt, pair.seed, say_pair(pair), shown))
        return rows

    def _preview_rows(self) -> list[tuple[str, list[tuple[int, Picture]]]]:
        """For each arm in detail and each preview prompt the pictures by epoch, the base first, at most
        `MAX_PREVIEWS`.
        """
        rows = []
        for arm in (arm for arm in self.facts.detailed if arm != BASE):
            by_prompt: dict[tuple[str, int], list[tuple[int, Picture]]] = {}
            for epoch, picture in self.facts.previews:
                if picture.arm in (BASE, arm):
                    by_prompt.setdefault((picture.category, picture.index), []).append((epoch, picture))
            for row in by_prompt.values():
                places = {round(place * (len(row) - 1) / (MAX_PREVIEWS - 1)) for place in range(MAX_PREVIEWS)}
                rows.append((arm, [row[place] for place in sorted(places)]))
        return rows

    def previews(self, taken: set[str]) -> list[PromptRow]:
        """How the fixed prompts looked as each arm was trained."""
        rows = []
        for arm, row in self._preview_rows():
            first = row[0][1]
            shown = [
                replace(
                    self.show(picture, taken),
                    arm=f"epoch {epoch}" if epoch else BASE,
                    alt=f"{arm}, epoch {epoch}: {picture.prompt}",
                )
                for epoch, picture in row
            ]
            key = f"{arm}-{first.category}-{first.index:03d}"
            rows.append(
                PromptRow(
                    key, first.category, first.prompt, first.seed, f"{arm} during training", tuple(shown)
                )
            )
        return rows

    def _prompt_row(
        self, place: tuple[str, int], seed: int, arms: Iterable[str], note: str, taken: set[str]
    ) -> PromptRow:
        pictures = [self.by_place[arm, *place, seed] for arm in arms if (arm, *place, seed) in self.by_place]
        shown = tuple(self.show(picture, taken) for picture in pictures)
        prompt = pictures[0].prompt if pictures else ""
        return PromptRow(f"{place[0]}-{place[1]:03d}-{seed}", place[0], prompt, seed, note, shown)


def _of_row(row: SweepRow) -> Picture:
    """A picture of the sweep, named by its strength."""
    name = BASE if row.arm == BASE else f"{row.strength:g}"
    return Picture(name, row.category, row.prompt_index, row.prompt, row.seed, row.image, row.clip_score)


def pictures_of(facts: Facts, arm: str) -> list[Picture]:
    """An arm's pictures, in the order of the prompts' list."""
    return [picture for picture in facts.pictures if picture.arm == arm]


def _embed(path: Path) -> tuple[str, int]:
    """A picture as a data URI, with its side in pixels: small ones as they are, others as WebP of at most
    `EMBED_SIDE_PX`.
    """
    image = open_picture(path).convert("RGB")
    lossless = max(image.size) <= LOSSLESS_SIDE_PX
    if max(image.size) > EMBED_SIDE_PX:
        factor = EMBED_SIDE_PX / max(image.size)
        image = image.resize(
            (max(1, round(image.width * factor)), max(1, round(image.height * factor))),
            Image.Resampling.LANCZOS,
        )
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=lossless, quality=75, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), max(image.size)
