"""Prompt lists: what pictures are drawn of for the scores."""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from lorascope.errors import DataError

_PROMPTS_DIR = Path(__file__).parent / "prompt_lists"


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample with; `index` counts from 0 within its category."""

    category: str
    index: int
    text: str


def load_prompts(name_or_path: str, num_prompts: int | None) -> list[Prompt]:
    """Prompts of a list of ours (`pocket`, `sd15`) or of a file, the first `num_prompts` of each category, or
    all.

    A file is UTF-8 text with a section such as `[normal]` for each category and one prompt a line; blank
    lines and lines that start with `#` are left out. Raises `DataError` with the line to correct.
    """
    path = _PROMPTS_DIR / f"{name_or_path}.txt" if re.fullmatch(r"\w+", name_or_path) else Path(name_or_path)
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise DataError(
            f"sample.prompts = {name_or_path!r}: not `pocket`, `sd15` or an existing file: check the path"
        )
    sections = _read_sections(path)
    return [
        Prompt(category, index, text)
        for category, texts in sections.items()
        for index, text in enumerate(texts[:num_prompts])
    ]


def _read_sections(path: Path) -> dict[str, list[str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    sections: dict[str, list[str]] = {}
    first_lines: dict[str, int] = {}
    category = None
    for number, line in enumerate(lines, start=1):
        text = unicodedata.normalize("NFC", line).strip()
        if not text or text.startswith("#"):
            continue
        if text.startswith("[") and text.endswith("]"):
            category = text[1:-1].strip()
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", category):
                raise DataError(
                    f"{path}: line {number}: {text}: a category is letters, digits, - and _, for "
                    "example [normal]"
                )
            sections.setdefault(category, [])
        elif category is None:
            raise DataError(
                f"{path}: line {number}: {text!r} stands before the first section: put a line such as "
                "[normal] above it"
            )
        elif text in first_lines:
            raise DataError(
                f"{path}: line {number}: {text!r} stands on line {first_lines[text]} already: take one "
                "of them out"
            )
        else:
            first_lines[text] = number
            sections[category].append(text)
    if not sections:
        raise DataError(f"{path}: holds no prompts: add a section such as [normal] and one prompt a line")
    for name, prompts in sections.items():
        if not prompts:
            raise DataError(f"{path}: section [{name}] is empty: add prompts, or take it out")
    return sections
