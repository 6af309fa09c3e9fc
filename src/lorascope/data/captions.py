"""The text of captions: what a file's bytes say, what counts of it, what is taken out, what comes before it.

Lists of prompts are read with the same eye.
"""

import codecs
import random
import re
import unicodedata

import numpy as np

from lorascope.data.pictures import RefusedError
from lorascope.errors import DataError
from lorascope.sections import DataSection

MAX_CAPTION_BYTES = 2**16
"""Of a caption in a file of its own, and the characters of any other: a hundred times what CLIP takes."""

Caption = tuple[str, list[str]]
"""The text of a caption, and what was done to it."""

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
"""Signs that no text holds: all control characters but tabs and line ends, and marks of a byte order."""
SPECIAL_TOKENS = re.compile(r"<\|(?:startoftext|endoftext)\|>")
"""What CLIP's tokenizer takes for the start or end of a text wherever it stands."""

_SHOWN_LETTERS = 80
_COMMAS = ",，、"
# The mark of UTF-16 is the start of that of UTF-32.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "UTF-8-SIG",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode_text(content: bytes) -> str:
    """The text of a file with `\\n` as line ends: UTF-8, or the Unicode encoding that its byte order mark
    names, as Windows programs write it.

    Raises `RefusedError` with the first byte that is none of it. Zero bytes are refused too: they are UTF-16
    without its mark, or no text.
    """
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), "UTF-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-SIG")
        raise RefusedError(f"not {name} ({error.reason} at byte {error.start}): save it as UTF-8") from error
    if "\0" in text:
        place = len(text[: text.index("\0")].encode(encoding))
        raise RefusedError(f"byte {place} is zero, as in UTF-16 without a byte order mark: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def caption_in(content: bytes, *, whole: bool = False) -> Caption:
    """The caption in a text file's bytes, or the `whole` text, and what was done to it.

    As kohya's scripts read it, a caption is one line; here the first with words, so that a blank one before
    it does no harm. `content` may end after one byte more than `MAX_CAPTION_BYTES`: that is refused, as what
    `decode_text` refuses.
    """
    if len(content) > MAX_CAPTION_BYTES:
        raise RefusedError(f"more than {MAX_CAPTION_BYTES} bytes, too many for a caption")
    text = decode_text(content)
    if whole:
        return text, []
    lines = [line for line in text.split("\n") if has_words(line)]
    left_out = ["only the first line of its caption file counts"] if len(lines) > 1 else []
    return lines[0] if lines else text, left_out


def clean_caption(caption: object) -> Caption:
    """A caption as NFC text without control characters, special tokens and outer space, and what was done to
    it.

    Line ends and tabs are no control characters here. Raises `RefusedError` for what is no text, holds none
    or has more characters than `MAX_CAPTION_BYTES`.
    """
    if caption is None:
        raise RefusedError("no caption")
    if not isinstance(caption, str):
        raise RefusedError(f"the caption is not text but {type(caption).__name__}")
    if len(caption) > MAX_CAPTION_BYTES:
        raise RefusedError(
            f"the caption has {len(caption)} characters, more than the limit of {MAX_CAPTION_BYTES}"
        )
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise RefusedError("the caption holds half a character (a lone surrogate)") from error
    treatments = []
    text = CONTROL_CHARACTERS.sub("", caption)
    if text != caption:
        treatments.append("control characters taken out of the caption")
    if SPECIAL_TOKENS.search(text):
        treatments.append("special tokens (<|startoftext|>, <|endoftext|>) taken out of the caption")
    while SPECIAL_TOKENS.search(text):  # what is left may form another one
        text = SPECIAL_TOKENS.sub(" ", text)
    text = unicodedata.normalize("NFC", text).strip()
    if not text:
        raise RefusedError("the caption is empty")
    if not has_words(text):
        raise RefusedError("the caption holds nothing but commas, spaces and invisible characters")
    return text, treatments


def has_words(text: str) -> bool:
    """Whether there is more in a text than commas, spaces and characters that are not seen."""
    return any(
        not (letter.isspace() or letter in _COMMAS or unicodedata.category(letter) in ("Cc", "Cf"))
        for letter in text
    )


def problem_of(text: str) -> str | None:
    """What a text holds that would not reach the model as words, with the remedy; None where nothing does."""
    if len(text) > MAX_CAPTION_BYTES:
        return f"and so on has {len(text)} characters, more than the limit of {MAX_CAPTION_BYTES}: shorten it"
    if control := CONTROL_CHARACTERS.search(text):
        return f"holds the control character U+{ord(control[0]):04X}: take it out"
    if token := SPECIAL_TOKENS.search(text):
        return f"holds {token[0]}, which CLIP takes for the start or end of a text: take it out"
    return None


def check_additions(section: DataSection) -> None:
    """Raise `DataError` where the caption prefix or the trigger word is not all words."""
    for key in ("caption_prefix", "trigger_word"):
        text = getattr(section, key) or ""
        if problem := problem_of(text):
            raise DataError(f"data.{key} = {text[:_SHOWN_LETTERS]!r} {problem}")


def complete_caption(caption: str, section: DataSection) -> str:
    """The caption with the prefix before it, and before both the trigger word and a comma where it is in
    neither.
    """
    complete = unicodedata.normalize("NFC", (section.caption_prefix or "") + caption).strip()
    word = unicodedata.normalize("NFC", section.trigger_word or "").strip()
    return complete if not word or holds_word(complete, word) else f"{word}, {complete}"


def holds_word(text: str, word: str) -> bool:
    """Whether a word or several stand in a text as such, in upper or lower case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def shuffled_caption(
    caption: str,
    keep_tags: int,
    generator: np.random.Generator | random.Random,
    trigger_word: str | None = None,
) -> str:
    """The caption with its comma-separated tags in an order drawn from `generator`; the first `keep_tags`
    stay in place.

    So does a first tag that holds `trigger_word`, which is not counted among them. Empty tags are left out.
    """
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    num_kept = keep_tags + bool(trigger_word and tags and holds_word(tags[0], trigger_word))
    moved = tags[num_kept:]
    generator.shuffle(moved)
    return ", ".join((*tags[:num_kept], *moved))
