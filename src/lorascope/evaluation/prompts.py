"""Prompt lists: what pictures are drawn of for the scores."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorascope.data.captions import decode_text, has_words, problem_of
from lorascope.data.pictures import RefusedError
from lorascope.errors import DataError

# In place of a list: the first captions of the training and of the held-out pictures, a category each.
OWN_CAPTIONS = "captions"
_CAPTION_CATEGORIES = ("trained", "heldout")
MAX_LIST_BYTES = 16 * 2**20
_PROMPTS_DIR = Path(__file__).parent / "prompt_lists"
_SHOWN_LETTERS = 80


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample with; `index` counts from 0 within its category."""

    category: str
    index: int
    text: str


def load_prompts(
    name_or_path: str, num_prompts: int | None, captions: Sequence[Sequence[str]] | None = None
) -> list[Prompt]:
    """Prompts of a list of ours (`pocket`, `sd15`), of a file, or `captions` of the training and the held-out
    pictures; the first `num_prompts` of each category, or all.

    Before the pictures are known, their captions are stood for by as many words as there will be at most.

    A file is text with a section such as `[normal]` for each category and one prompt a line; blank lines and
    lines that start with `#` are left out. Raises `DataError` with the line to correct.
    """
    if name_or_path == OWN_CAPTIONS:
        return _caption_prompts(num_prompts, captions)
    own, path = _PROMPTS_DIR / f"{name_or_path}.txt", Path(name_or_path)
    if re.fullmatch(r"\w+", name_or_path) and own.is_file():
        path = own
    try:
        if not path.is_file():
            raise DataError(
                f"sample.prompts = {name_or_path!r}: not `pocket`, `sd15`, `captions` or an existing file: "
                "check the path"
            )
        with path.open("rb") as file:
            content = file.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"sample.prompts = {name_or_path!r}: cannot be read ({error.strerror}): correct the path or its "
            "permissions"
        ) from error
    return [
        Prompt(category, index, text)
        for category, texts in _read_sections(path, content).items()
        for index, text in enumerate(texts[:num_prompts])
    ]


def _caption_prompts(num_prompts: int | None, captions: Sequence[Sequence[str]] | None) -> list[Prompt]:
    """Each caption once, without those that both kinds of pictures have; without captions words that stand
    for them.
    """
    assert num_prompts is not None
    if captions is None:
        captions = [[f"caption {index}" for index in range(num_prompts)]] * 2
        return [
            Prompt(category, index, text)
            for category, texts in zip(_CAPTION_CATEGORIES, captions, strict=True)
            for index, text in enumerate(texts)
        ]
    keys = [{_key(text) for text in texts} for texts in captions]
    shared, prompts = keys[0] & keys[1], []
    for category, texts in zip(_CAPTION_CATEGORIES, captions, strict=True):
        first: dict[str, str] = {}
        for text in texts:
            first.setdefault(_key(text), text)
        chosen = [text for key, text in first.items() if key not in shared][:num_prompts]
        if not chosen:
            raise DataError(
                f'sample.prompts = "{OWN_CAPTIONS}": no caption is of the {category} pictures alone: give a '
                "list of prompts"
            )
        prompts += [Prompt(category, index, text) for index, text in enumerate(chosen)]
    return prompts


def _key(text: str) -> str:
    """What CLIP sees of a text: neither case nor the width of a space."""
    return " ".join(text.lower().split())


def check_prefix(prefix: str, prompts: Sequence[Prompt]) -> None:
    """Raise `DataError` where a prefix is not all words, by itself or before one of the prompts."""
    for text in (prefix, *(prefix + prompt.text for prompt in prompts)):
        if problem := problem_of(text):
            before = "" if text == prefix else f" before {text[len(prefix) :][:_SHOWN_LETTERS]!r}"
            raise DataError(f"sample.prompt_prefix = {prefix[:_SHOWN_LETTERS]!r}{before} {problem}")


def describe_cut(texts: Sequence[str], count_tokens: Callable[[str], int], max_tokens: int) -> str:
    """Words on those of the texts that the model cuts at `max_tokens`; none where it cuts none."""
    lengths = {text: length for text in texts if (length := count_tokens(text)) > max_tokens}
    if not lengths:
        return ""
    longest = max(lengths, key=lambda text: lengths[text])
    return (
        f"{len(lengths)} of {len(texts)} are longer than {max_tokens} tokens and are cut there, the longest, "
        f"of {lengths[longest]}: {longest[:_SHOWN_LETTERS]!r}"
    )


def _read_sections(path: Path, content: bytes) -> dict[str, list[str]]:
    if len(content) > MAX_LIST_BYTES:
        raise DataError(
            f"{path}: more than {MAX_LIST_BYTES} bytes, too many for a list of prompts: give a shorter one"
        )
    try:
        lines = decode_text(content).split("\n")
    except RefusedError as error:
        raise DataError(f"{path}: {error}") from error
    sections: dict[str, list[str]] = {}
    first_lines: dict[str, int] = {}
    category = None
    for number, line in enumerate(lines, start=1):
        text = unicodedata.normalize("NFC", line).strip()
        if not text or text.startswith("#"):
            continue
        where, shown = f"{path}: line {number}", repr(text[:_SHOWN_LETTERS])
        key = _key(text)
        if text.startswith("[") and text.endswith("]"):
            category = text[1:-1].strip()
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", category):
                raise DataError(
                    f"{where}: {shown}: a category is letters, digits, - and _, for example [normal]"
                )
            sections.setdefault(category, [])
        elif problem := problem_of(text):
            raise DataError(f"{where}: {shown} {problem}")
        elif not has_words(text):
            raise DataError(f"{where}: {shown} holds no words: take it out")
        elif category is None:
            raise DataError(
                f"{where}: {shown} stands before the first section: put a line such as [normal] above it"
            )
        elif key in first_lines:
            raise DataError(
                f"{where}: {shown} stands on line {first_lines[key]} already: take one of them out"
            )
        else:
            first_lines[key] = number
            sections[category].append(text)
    if not sections:
        raise DataError(f"{path}: holds no prompts: add a section such as [normal] and one prompt a line")
    for name, prompts in sections.items():
        if not prompts:
            raise DataError(f"{path}: section [{name}] is empty: add prompts, or take it out")
    return sections
