"""`report.html`, `report.md` and figures from the run folder alone: which arm to keep, how sure that is, and
why.

The page is one offline file under 5 MB with a strict Content-Security-Policy; text from outside (captions,
prompts, file names) passes Jinja's autoescaping. A report needs `study.toml` and at least one arm's
`training.json`; whatever a later stage has not written yet reads "not measured", with the stage's name. Equal
run folders give equal bytes.
"""

import base64
import hashlib
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from lorascope import __version__
from lorascope.evaluation.scores import ALL, BASE
from lorascope.evaluation.verdict import describe_difference
from lorascope.report.conditions import SIGNS, Condition, judge_conditions
from lorascope.report.evidence import (
    NOT_MEASURED,
    Answer,
    Facts,
    Picture,
    answer_of,
    count,
    list_limits,
    list_warnings,
    open_picture,
)
from lorascope.report.figures import Figure, build_figures
from lorascope.report.tables import (
    Table,
    build_arms_table,
    build_contrast_table,
    build_fact_tables,
    build_reference_table,
    cell,
)
from lorascope.store import PEFT_WEIGHTS, RunDir, export_name, write_bytes, write_text

MAX_HTML_BYTES = 5_000_000
MAX_PREVIEWS = 6  # in a row
EMBED_SIDE_PX = 256
LOSSLESS_SIDE_PX = 96  # pictures up to this side are embedded as they are


@dataclass(frozen=True)
class Report:
    """Where the report was written and what it answers; shows itself in a notebook."""

    html_path: Path
    md_path: Path
    figure_paths: tuple[Path, ...]
    keep: str | None
    answer: str

    def _repr_html_(self) -> str:
        page = html.escape(self.html_path.read_text(encoding="utf-8"), quote=True)
        style = (
            'sandbox="allow-scripts allow-downloads" title="lorascope report" width="100%" height="720" '
            'style="border:0"'
        )
        return f'<iframe srcdoc="{page}" {style}></iframe>'


@dataclass(frozen=True)
class Section:
    """One numbered part of the report after the first two."""

    number: int
    id: str
    title: str
    texts: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


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


def build_report(run: RunDir) -> Report:
    """Write `report.html`, `report.md`, `figures/*.svg` and `figures/*.png`, each atomically, the page last.

    Raises `StorageError` if the folder holds no study, no trained arm, or a damaged file.
    """
    facts = Facts(run)
    answer = answer_of(facts)
    figures = build_figures(facts)
    content = _content(facts, answer, figures)
    page = _render_page(facts, content)
    paths = []
    for figure in figures.values():
        for suffix, content_bytes in (("svg", figure.drawing.file_svg), ("png", figure.drawing.png)):
            path = run.figures_dir / f"{figure.key}.{suffix}"
            write_bytes(path, content_bytes)
            paths.append(path)
    write_text(run.report_md, _render_markdown(facts, content))
    write_text(run.report_html, page)
    return Report(run.report_html, run.report_md, tuple(paths), answer.keep, answer.answer)


def verdict_of(run: RunDir) -> Answer:
    """The answer alone, without drawing anything."""
    return answer_of(Facts(run))


def _verdict_content(facts: Facts, answer: Answer) -> dict[str, Any]:
    verdict, keep = facts.verdict, answer.keep
    verb, _, rest = answer.headline.partition(" ")
    items: list[tuple[str, str, str]] = []
    if keep is not None:
        items += _files_of(facts, keep)[:1]
        style = (
            next(
                (reason for reason in verdict.reasons if reason.startswith(f"{keep} learned the style")), None
            )
            if verdict
            else None
        )
        items.append(
            ("Style", style or "Whether it learned the style was not measured: no held-out loss.", "")
        )
    if verdict is not None:
        runner_up = verdict.runner_up or "none: no other arm qualifies"
        items.append(
            (
                "Runner-up",
                runner_up if verdict.runner_up is None else f"{runner_up}, {_mean_text(facts, runner_up)}",
                "",
            )
        )
        open_questions = list(verdict.undecided)
        if len(open_questions) > 3:
            open_questions[1:-1] = [f"{len(open_questions) - 2} more stand below."]
        items.append(("Not decided", " ".join(open_questions) or "Nothing is left open.", ""))
    hero_arms = (BASE, *([keep] if keep else []), *(arm for arm in facts.detailed if arm != keep))[:4]
    hero = [picture for arm in hero_arms for picture in _pictures_of(facts, arm)[:1]]
    return {
        "headline": answer.headline,
        "verb": verb,
        "object": rest,
        "sentences": answer.sentences,
        "facts": [{"label": label, "text": text, "path": path} for label, text, path in items],
        "rule": verdict.rule if verdict else "",
        "reasons": verdict.reasons if verdict else (),
        "undecided": verdict.undecided if verdict else (),
        "hero": hero,
        "picture_note": _picture_note(hero[0]) if hero else "",
    }


def _files_of(facts: Facts, arm: str) -> list[tuple[str, str, str]]:
    """The arm's adapter files, the one for most programs first, each as label, text and path in the run
    folder.
    """
    folder = facts.run.adapters_dir / arm
    name = f"{facts.config.name}-{arm}"
    labels = {
        export_name(name, "kohya"): "For WebUI, Forge, ComfyUI",
        export_name(name, "diffusers"): "For diffusers",
        PEFT_WEIGHTS: "For PEFT",
        f"unet/{PEFT_WEIGHTS}": "For PEFT",
    }
    paths = {file: f"adapters/{arm}/{file}" for file in labels if (folder / file).is_file()}
    return [(labels[file], path, path) for file, path in paths.items()]


def _picture_note(picture: Picture) -> str:
    return (
        f"“{picture.prompt}”, the first {picture.category} prompt of the list, from one initial noise (seed "
        f"{picture.seed})."
    )


def _mean_text(facts: Facts, arm: str) -> str:
    row = facts.summary.get((arm, ALL))
    return f"mean CLIP score {row.mean:.2f}" if row else NOT_MEASURED


def _pictures_of(facts: Facts, arm: str) -> list[Picture]:
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


class Album:
    """Chooses the prompts to show and embeds pictures, the most telling first, until the budget is used."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.by_place = {(p.arm, p.category, p.index, p.seed): p for p in facts.pictures}
        self.seeds = list(dict.fromkeys(p.seed for p in facts.pictures))
        self.prompts = list(dict.fromkeys((p.category, p.index) for p in facts.pictures))
        drawn = [arm for arm in (BASE, *facts.arms) if _pictures_of(facts, arm)]
        self.first = [arm for arm in drawn if arm == BASE or arm in facts.detailed]
        self.others = [arm for arm in drawn if arm not in self.first]
        self.chosen = self._choose()
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

    def fill(self, budget_bytes: int) -> set[str]:
        """Paths of the pictures that fit into the budget."""
        taken: set[str] = set()
        left = budget_bytes
        for block in self.blocks():
            size = 0
            for picture in block:
                size += len(self.embedded(picture)[0]) + 400
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
            else "Every picture of the run is on this page."
        )
        return {
            "rule": self.rule,
            "chosen": chosen,
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


# The whole --------------------------------------------------------------------------------------------------


def _content(facts: Facts, answer: Answer, figures: Mapping[str, Figure]) -> dict[str, Any]:
    conditions = judge_conditions(facts)
    manifest = facts.manifest
    return {
        "name": facts.config.name,
        "version": __version__,
        "dateline": f"finished {str(manifest['finished'])[:16].replace('T', ' ')} UTC"
        if manifest.get("finished")
        else "not finished",
        "verdict": _verdict_content(facts, answer),
        "conditions": conditions,
        "fair_summary": _fair_summary(conditions),
        "sections": _sections(facts, figures),
        "command": manifest.get("command", "lorascope study study.toml"),
        "facts": build_fact_tables(facts),
        "toml": facts.config.to_toml(),
        "warnings": list_warnings(facts),
        "limits": list_limits(facts),
    }


def _fair_summary(conditions: Sequence[Condition]) -> str:
    counts = {state: sum(condition.state == state for condition in conditions) for state in SIGNS}
    parts = [f"{counts['yes']} of {len(conditions)} conditions hold"]
    parts += [f"{counts['caution']} call for caution"] if counts["caution"] else []
    parts += [f"{counts['no']} {'is' if counts['no'] == 1 else 'are'} violated"] if counts["no"] else []
    parts += (
        [f"{counts[NOT_MEASURED]} {'was' if counts[NOT_MEASURED] == 1 else 'were'} not measured"]
        if counts[NOT_MEASURED]
        else []
    )
    return ", ".join(parts) + "."


def _sections(facts: Facts, figures: Mapping[str, Figure]) -> list[Section]:
    def pick(*keys: str) -> tuple[Figure, ...]:
        return tuple(figures[key] for key in keys if key in figures)

    unscored = "Not measured: the score stage has not run."
    scored = facts.scores is not None
    contrasts = build_contrast_table(facts)
    effect = [
        describe_difference(facts.effects[arm, ALL]) for arm in facts.detailed if (arm, ALL) in facts.effects
    ]
    training = (
        "Loss on pictures the arms were trained on, and on pictures they never saw, at fixed noise."
        if facts.probes
        else "Held-out loss: not measured."
    )
    look = (
        "The base and the arms on the same prompts from the same noise."
        if facts.pictures
        else "Not measured: the sample stage has not run."
    )
    look_reference = (
        " Figures 3 to 6 of the reference study show one normal and one abstract prompt this way."
        if facts.pictures
        else ""
    )
    tables = (build_arms_table(facts), *([contrasts] if contrasts else []), build_reference_table())
    return [
        Section(
            3,
            "effect",
            "Effect on the fit to the prompt",
            tuple(effect) if scored else (unscored,),
            pick("effect", "gain"),
            tables,
        ),
        Section(
            4,
            "scale",
            "Where the scores lie",
            ("The scorer's own floor and ceiling, to read the differences above by.",)
            if scored
            else (unscored,),
            pick("scale"),
        ),
        Section(5, "training", "Training", (training,), pick("probe-epochs", "probe-bands", "loss")),
        Section(6, "look", "How it looks", (look + look_reference,)),
        Section(7, "cost", "What it costs", (), pick("cost")),
        Section(8, "reproduce", "Reproduce", ()),
    ]


def _template(name: str, autoescape: bool) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _markdown
    environment.filters["md_table"] = _markdown_table
    return environment.get_template(name)


def _asset(name: str) -> str:
    return (resources.files("lorascope") / "report" / "templates" / name).read_text(encoding="utf-8")


def _render_page(facts: Facts, content: dict[str, Any]) -> str:
    """The page with as many pictures as fit; the rest stays in the run folder."""
    script = _asset("viewer.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    album = Album(facts)
    template = _template("report.html.j2", autoescape=True)
    hero = content["verdict"]["hero"]
    budget = MAX_HTML_BYTES
    while True:
        taken = album.fill(budget)
        verdict = {
            **content["verdict"],
            "pictures": [shown for shown in (album.show(picture, taken) for picture in hero) if shown.source],
        }
        page: str = template.render(
            r={
                **content,
                "verdict": verdict,
                "look": album.content(taken) if facts.pictures else {"chosen": ()},
            },
            css=_asset("report.css"),
            script=script,
            script_hash=f"sha256-{digest}",
        )
        excess = len(page.encode()) - MAX_HTML_BYTES
        if excess < 0 or not taken:
            return page
        budget = (
            min(
                budget,
                sum(
                    len(album.embedded(picture)[0]) + 400
                    for picture in facts.pictures
                    if picture.path in taken
                ),
            )
            - excess
            - 1
        )


def _render_markdown(facts: Facts, content: dict[str, Any]) -> str:
    album = Album(facts)
    text: str = _template("report.md.j2", autoescape=False).render(
        r={**content, "look": album.content(set()) if facts.pictures else {"chosen": ()}}
    )
    return text


def _markdown(text: object) -> str:
    """Text with everything escaped that Markdown or HTML would read as markup."""
    shown = str(text)
    for character in "\\`*_{}[]|#~$":
        shown = shown.replace(character, "\\" + character)
    return (
        shown.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("\r", " ")
        .replace("\n", " ")
    )


def _markdown_table(table: Table) -> str:
    head = "| " + " | ".join(_markdown(column.name) or " " for column in table.columns) + " |"
    rule = "|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|"
    rows = ["| " + " | ".join(_markdown(cell.text) for cell in row.cells) + " |" for row in table.rows]
    return "\n".join([head, rule, *rows])
