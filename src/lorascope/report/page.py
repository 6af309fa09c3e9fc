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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from lorascope import __version__
from lorascope.errors import StorageError
from lorascope.evaluation.choice import NO_SWEEP
from lorascope.evaluation.scores import ALL, BASE
from lorascope.evaluation.sentences import describe_difference, name_point, percent_text, style_text
from lorascope.evaluation.sweep_rows import Point
from lorascope.evaluation.verdict import Verdict
from lorascope.report.album import NO_PICTURES, Album, pictures_of
from lorascope.report.collapse import collapse_text
from lorascope.report.conditions import SIGNS, Condition, judge_conditions
from lorascope.report.copying import copying_texts
from lorascope.report.evidence import (
    MAX_DETAILED,
    NOT_MEASURED,
    Answer,
    Facts,
    Picture,
    answer_of,
    as_sentence,
    count,
    list_limits,
    list_warnings,
)
from lorascope.report.figure import Figure
from lorascope.report.figures import build_figures
from lorascope.report.kinds import build_kind_tables, kind_texts
from lorascope.report.price import MAX_PERCENT, price_choices
from lorascope.report.tables import (
    Table,
    build_arms_table,
    build_contrast_table,
    build_fact_tables,
    build_reference_table,
)
from lorascope.report.why import arms_in_focus, explain_arms
from lorascope.run_folder import RunDir
from lorascope.store import PEFT_WEIGHTS, access_errors, export_name, write_bytes, write_text

MAX_HTML_BYTES = 5_000_000


@dataclass(frozen=True)
class Report:
    """Where the report was written and what it answers; shows itself in a notebook."""

    html_path: Path
    md_path: Path
    figure_paths: tuple[Path, ...]
    keep: str | None
    answer: str
    verdict: Answer

    def _repr_html_(self) -> str:
        page = html.escape(self.html_path.read_text(encoding="utf-8"), quote=True)
        style = (
            'sandbox="allow-scripts allow-downloads" title="lorascope report" width="100%" height="720" '
            'style="border:0"'
        )
        return f'<iframe srcdoc="{page}" {style}></iframe>'


@dataclass(frozen=True)
class Section:
    """One part of the report after the first two. `name` is what the page's list of sections calls it."""

    id: str
    name: str
    title: str
    texts: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    number: int = 0


@access_errors(StorageError)
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
    return Report(run.report_html, run.report_md, tuple(paths), answer.keep, answer.answer, answer)


def verdict_of(run: RunDir) -> Answer:
    """The answer alone, without drawing anything."""
    return answer_of(Facts(run))


def verdict_content(facts: Facts, answer: Answer) -> dict[str, Any]:
    """The verdict as a page shows it: headline in three parts, sentences, what stands beside them, the rule,
    and the pictures that show it, base first.
    """
    verdict = facts.verdict
    verb, _, rest = answer.headline.partition(" ")
    if verdict is not None and verdict.keep is not None:
        arm, _, rest = rest.partition(" ")
    else:
        arm, rest = rest, ""
    items = _verdict_items(facts, verdict) if verdict is not None else []
    hero = _hero(facts, answer.keep)
    return {
        "headline": answer.headline,
        "verb": verb,
        "object": arm,
        "rest": rest,
        "keep": answer.keep or "",
        "sentences": answer.sentences,
        "facts": [{"label": label, "text": text, "path": path} for label, text, path in items],
        "rule": verdict.rule if verdict else "",
        "reasons": verdict.reasons if verdict else (),
        "undecided": verdict.undecided if verdict else (),
        "hero": hero,
        "picture_note": _picture_note(hero[0]) if hero else "",
    }


def _verdict_items(facts: Facts, verdict: Verdict) -> list[tuple[str, str, str]]:
    """What stands beside the verdict, each as label, text and path in the run folder."""
    items: list[tuple[str, str, str]] = []
    if verdict.point is not None:
        point, run = verdict.point, facts.run.path.name
        if point.epoch == "last":
            items += _files_of(facts, point.arm)[:1]
        checkpoint = " --checkpoint best" if point.epoch == "best" else ""
        strength = f" --strength {point.strength:g}" if point.strength != 1 else ""
        items.append(("In a prompt", str(verdict.tag), ""))
        if checkpoint or strength:
            command = f"lorascope export {run} --arm {point.arm}{checkpoint}{strength}"
            items.append(("As a file to use at full strength", command, ""))
        shown = "shown" if verdict.is_shown else "not shown"
        price = f"a cost of at most {100 * verdict.max_prompt_loss:g} % is {shown}"
        items.append(("Keeps of the prompts", f"{percent_text(point.retention)}; {price}", ""))
        items.append(("Style", style_text(point.style), ""))
        second = verdict.runner_up
        runner_up = "none: no other arm counts"
        if second is not None:
            kept, style = percent_text(second.retention), style_text(second.style)
            runner_up = f"{name_point(second)}: keeps {kept}, style {style}"
        items.append(("Runner-up", runner_up, ""))
    open_questions = list(verdict.undecided)
    if len(open_questions) > 3:
        open_questions[1:-1] = [f"{len(open_questions) - 2} more stand below."]
    items.append(("Not decided", " ".join(open_questions) or "Nothing is left open.", ""))
    return items


def _hero(facts: Facts, keep: str | None) -> list[Picture]:
    """One prompt by the base, by what was chosen at the strength that was chosen and at full strength, and by
    the arm that fails or the runner-up.
    """
    verdict = facts.verdict
    if facts.sweep is not None and facts.front is not None and verdict is not None and verdict.point:
        chosen = verdict.point.point
        points = [Point(BASE, "last", 0.0, chosen.guidance), chosen, replace(chosen, strength=1.0)]
        if verdict.contrast is not None:
            points.append(Point(verdict.contrast.failing[0], "last", chosen.strength, chosen.guidance))
        elif verdict.runner_up is not None:
            points.append(verdict.runner_up.point)
        return [
            Picture(
                BASE if point.arm == BASE else f"{point.arm} at {point.strength:g}",
                row.category,
                row.prompt_index,
                row.prompt,
                row.seed,
                row.image,
                row.clip_score,
            )
            for point in dict.fromkeys(points)
            for row in facts.sweep.of(point)[:1]
        ]
    arms = (BASE, *([keep] if keep else []), *(arm for arm in facts.detailed if arm != keep))[:4]
    return [picture for arm in arms for picture in pictures_of(facts, arm)[:1]]


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


def _content(facts: Facts, answer: Answer, figures: Mapping[str, Figure]) -> dict[str, Any]:
    conditions = judge_conditions(facts)
    manifest = facts.manifest
    return {
        "name": facts.config.name,
        "version": __version__,
        "dateline": f"finished {str(manifest['finished'])[:16].replace('T', ' ')} UTC"
        if manifest.get("finished")
        else "not finished",
        "verdict": verdict_content(facts, answer),
        "conditions": conditions,
        "fair_summary": _fair_summary(conditions),
        "sections": _sections(facts, figures),
        "why": why_content(facts),
        "price": price_choices(facts),
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
    collapse = collapse_text(facts)
    effect += [collapse] if collapse else []
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
    kinds = build_kind_tables(facts)
    tables = (build_arms_table(facts), *([contrasts] if contrasts else []), build_reference_table())
    sections = [
        Section("trade", "Prompts and style", "What style costs", _trade_texts(facts), pick("front")),
        Section("why", "Why", "Why each arm wins or fails", _why_texts(facts), pick("layers")),
        Section(
            "effect",
            "Effect",
            "Effect on the fit to the prompt",
            tuple(effect) if scored else (unscored,),
            pick("effect", "gain"),
            tables,
        ),
        Section(
            "scale",
            "Scale",
            "Where the scores lie",
            ("The scorer's own floor and ceiling, to read the differences above by.",)
            if scored
            else (unscored,),
            pick("scale"),
        ),
        Section("training", "Training", "Training", (training,), pick("probe-epochs", "probe-bands", "loss")),
        Section("look", "Look", "How it looks", (look + look_reference,)),
        Section("copying", "Copying", "Does it copy training pictures?", copying_texts(facts)),
        Section("cost", "Cost", "What it costs", (), pick("cost")),
        *([Section("kinds", "Kinds", "Kinds side by side", kind_texts(facts), (), kinds)] if kinds else []),
        Section("reproduce", "Reproduce", "Reproduce", ()),
    ]
    return [replace(section, number=number) for number, section in enumerate(sections, start=3)]


def _trade_texts(facts: Facts) -> tuple[str, ...]:
    front = facts.front
    reason = NO_SWEEP if front is None else front.fidelity_reason or front.style_reason
    if front is None or reason is not None:
        return (as_sentence(reason or NO_SWEEP),)
    return (
        "An adapter's strength can be turned down: that gives back some of the prompts and takes some of "
        "the style. So arms are compared over strengths, not at full strength alone.",
    )


def why_content(facts: Facts) -> dict[str, Any]:
    """Why each arm wins or fails: the rows that are shown at once, and those of many arms that are not."""
    rows, focus = explain_arms(facts), arms_in_focus(facts)
    is_few = len(facts.settings) <= MAX_DETAILED
    first = [row for arm in focus for row in rows if row.arm == arm] if not is_few else rows
    others = [row for row in rows if row not in first]
    return {"first": first, "others": others, "others_title": f"{count(len(others), 'further arm')}"}


def _why_texts(facts: Facts) -> tuple[str, ...]:
    if facts.diagnosis is None:
        return (as_sentence(NO_SWEEP),)
    return (
        "The first cause that holds, of a fixed order, with the signals that decided; what holds beside it "
        "is named too. An intervention, such as a lower strength, counts more than what only goes along "
        "with a fault. Every signal with its interval and control, and every threshold with its source, "
        "stands in diagnosis.json. `lorascope next RUN` prints the study to run after this one.",
    )


def _template(name: str, autoescape: bool) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _with_code
    environment.filters["md"] = _markdown
    environment.filters["md_table"] = _markdown_table
    return environment.get_template(name)


def _with_code(text: str) -> Any:
    """Text for the page, with what stands between backticks as code."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def _asset(name: str) -> str:
    return (resources.files("lorascope") / "report" / "templates" / name).read_text(encoding="utf-8")


def _render_page(facts: Facts, content: dict[str, Any]) -> str:
    """The page with as many pictures as fit; the rest stays in the run folder."""
    script = _asset("viewer.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    album = Album(facts)
    template = _template("report.html.j2", autoescape=True)
    hero = content["verdict"]["hero"]
    swept = {picture.path for picture in hero} - {picture.path for picture in facts.pictures}
    budget = MAX_HTML_BYTES
    while True:
        taken = album.fill(budget)
        verdict = {
            **content["verdict"],
            "pictures": [
                shown for shown in (album.show(picture, taken | swept) for picture in hero) if shown.source
            ],
        }
        page: str = template.render(
            r={
                **content,
                "verdict": verdict,
                "look": album.content(taken) if facts.pictures else NO_PICTURES,
            },
            css=_asset("report.css"),
            max_percent=MAX_PERCENT,
            script=script,
            script_hash=f"sha256-{digest}",
        )
        excess = len(page.encode()) - MAX_HTML_BYTES
        if excess < 0 or not taken:
            return page
        budget = min(budget, album.size(taken)) - excess - 1


def _render_markdown(facts: Facts, content: dict[str, Any]) -> str:
    album = Album(facts)
    text: str = _template("report.md.j2", autoescape=False).render(
        r={**content, "look": album.content(set()) if facts.pictures else NO_PICTURES}
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
