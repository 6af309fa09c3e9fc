"""Captions as text: encodings, what counts, what is taken out, prefix, trigger word and tags."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorascope
from lorascope.base.configs import count_tokens, load_tokenizer
from lorascope.data.captions import (
    MAX_CAPTION_BYTES,
    SPECIAL_TOKENS,
    caption_in,
    check_additions,
    clean_caption,
    complete_caption,
    decode_text,
    shuffled_caption,
)
from lorascope.data.pictures import RefusedError
from lorascope.errors import DataError
from lorascope.sections import BaseSection
from samples import section

TEXT = "ein Käse, 猫 🐈\n"


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", ""),
        ("utf-8", "\ufeff"),
        ("utf-16-le", "\ufeff"),
        ("utf-16-be", "\ufeff"),
        ("utf-32-le", "\ufeff"),
        ("utf-32-be", "\ufeff"),
    ],
)
def test_text_is_read_as_its_byte_order_mark_says(encoding: str, mark: str) -> None:
    assert decode_text((mark + TEXT).encode(encoding)) == TEXT
    assert decode_text((mark + TEXT.replace("\n", "\r\n")).encode(encoding)) == TEXT


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a café".encode("latin-1"), r"not UTF-8 \(unexpected end of data at byte 5\): save it as UTF-8"),
        (b"\xef\xbb\xbfa\xff", r"not UTF-8 \(invalid start byte at byte \d\): save it as UTF-8"),
        (b"\xff\xfea\0\x00\xd8b\0", r"not UTF-16 \(illegal UTF-16 surrogate at byte 4\): save it as UTF-8"),
        (b"\xfe\xff\0", r"not UTF-16 \(truncated data at byte 2\): save it as UTF-8"),
        (
            "ab".encode("utf-16-le"),
            "byte 1 is zero, as in UTF-16 without a byte order mark: save it as UTF-8",
        ),
        ("é\0".encode(), "byte 2 is zero, as in"),
    ],
)
def test_bytes_that_are_no_text_are_refused_with_their_place(content: bytes, reason: str) -> None:
    with pytest.raises(RefusedError, match=f"^{reason}"):
        decode_text(content)


@pytest.mark.parametrize(
    ("text", "caption", "is_left_out"),
    [
        ("a cat", "a cat", False),
        ("a cat\n\n", "a cat", False),
        ("\n \r\na cat\n", "a cat", False),
        ("a cat\ra dog", "a cat", True),
        ("a cat\r\n\r\nIt sits.", "a cat", True),
        (",,\na cat", "a cat", False),
        ("one\u2028line\x0b", "one\u2028line\x0b", False),
        ("", "", False),
        (" ,\n", " ,\n", False),
    ],
)
def test_one_line_of_a_caption_file_counts(text: str, caption: str, is_left_out: bool) -> None:
    assert caption_in(text.encode()) == (
        caption,
        ["only the first line of its caption file counts"] * is_left_out,
    )


def test_a_caption_file_is_bounded() -> None:
    assert len(caption_in(b"a" * MAX_CAPTION_BYTES)[0]) == MAX_CAPTION_BYTES
    with pytest.raises(RefusedError, match="^more than 65536 bytes, too many for a caption$"):
        caption_in(b"a" * (MAX_CAPTION_BYTES + 1))
    assert clean_caption("é" * MAX_CAPTION_BYTES)[0] == "é" * MAX_CAPTION_BYTES
    with pytest.raises(
        RefusedError, match="^the caption has 1000000 characters, more than the limit of 65536$"
    ):
        clean_caption("a" * 1_000_000)


@pytest.mark.parametrize(
    "caption", [",", " , ,\n,", "，、", "\u200b", "\u200d\u2060,", "\u00ad", "\u202e\u202c", "\x85,"]
)
def test_a_caption_of_commas_and_invisible_characters_is_none(caption: str) -> None:
    with pytest.raises(
        RefusedError, match="^the caption holds nothing but commas, spaces and invisible characters$"
    ):
        clean_caption(caption)


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("a cat<|endoftext|>on a mat", "a cat on a mat"),
        ("<|startoftext|>a cat<|endoftext|>", "a cat"),
        ("a <|endof<|endoftext|>text|> cat", "a <|endof text|> cat"),
        ("a \x00<|endof\x00text|>cat", "a  cat"),
    ],
)
def test_special_tokens_are_taken_out_of_captions(caption: str, text: str) -> None:
    cleaned, treatments = clean_caption(caption)
    assert cleaned == text
    assert "special tokens (<|startoftext|>, <|endoftext|>) taken out of the caption" in treatments
    with pytest.raises(RefusedError, match="^the caption is empty$"):
        clean_caption("<|endoftext|>\n")


@pytest.mark.parametrize("base", ["base/sd15", "pocket/base"])
def test_the_special_tokens_are_those_of_the_tokenizer(base: str) -> None:
    tokenizer = load_tokenizer(BaseSection(model=str(Path(lorascope.__file__).parent / base)))
    assert all(SPECIAL_TOKENS.fullmatch(token) for token in tokenizer.all_special_tokens)
    assert count_tokens(tokenizer, "a cat<|endoftext|>") == count_tokens(tokenizer, "a cat") + 1
    text, _ = clean_caption("a cat<|endoftext|>")
    assert count_tokens(tokenizer, text) == count_tokens(tokenizer, "a cat")


def test_what_only_looks_like_a_special_token_is_text() -> None:
    for text in ("<|EndOfText|>", "a < b | c > d", "<lora:x:1>"):
        assert clean_caption(text) == (text, [])


@pytest.mark.parametrize("key", ["caption_prefix", "trigger_word"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a <|endoftext|>",
            r"'a <\|endoftext\|>' holds <\|endoftext\|>, which CLIP takes for the start or end",
        ),
        ("\x1b[2J", r"'\\x1b\[2J' holds the control character U\+001B: take it out"),
        ("a" * 65_537, "'a{80}' and so on has 65537 characters, more than the limit of 65536: shorten it"),
    ],
)
def test_what_comes_before_captions_is_words(key: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^data.{key} = {message}"):
        check_additions(section("any", **{key: text}))
    check_additions(section("any", **{key: "a drawing,\n\tof <|pad|> "}))


@pytest.mark.parametrize(
    ("caption", "prefix", "word", "expected"),
    [
        ("a cat", None, None, "a cat"),
        ("a cat", "drawing of ", None, "drawing of a cat"),
        ("a cat", None, "sks", "sks, a cat"),
        ("a cat", "drawing of ", "sks", "sks, drawing of a cat"),
        ("a sks cat", None, "sks", "a sks cat"),
        ("SKS, cat", None, "sks", "SKS, cat"),
        ("asks", None, "sks", "sks, asks"),
        ("a cat", "photo of sks, ", "sks", "photo of sks, a cat"),
        ("cat", None, "s.s (x)", "s.s (x), cat"),
        ("a cat", "e\u0301t\u00e9 ", None, "été a cat"),
    ],
)
def test_prefix_and_trigger_word(caption: str, prefix: str | None, word: str | None, expected: str) -> None:
    assert complete_caption(caption, section("any", caption_prefix=prefix, trigger_word=word)) == expected


@pytest.mark.parametrize("generator", [random.Random, np.random.default_rng])
def test_tags_are_shuffled(generator: Callable[[int], Any]) -> None:
    tags = ["a", "b", "c c", "d", "e"]
    caption = " a,b ,, c c, d,e,"
    orders = {shuffled_caption(caption, 0, generator(seed)) for seed in range(20)}
    assert len(orders) > 10
    assert all(sorted(order.split(", ")) == tags for order in orders)
    assert shuffled_caption(caption, 0, generator(3)) == shuffled_caption(caption, 0, generator(3))
    kept = {tuple(shuffled_caption(caption, 2, generator(seed)).split(", ")) for seed in range(20)}
    assert {order[:2] for order in kept} == {("a", "b")} and len(kept) > 3
    assert shuffled_caption(caption, 5, generator(0)) == "a, b, c c, d, e"
    assert shuffled_caption("one caption", 0, generator(0)) == "one caption"


def test_the_trigger_word_stays_first() -> None:
    orders = {
        tuple(shuffled_caption("sks, a, b, c, d", 1, random.Random(seed), "sks").split(", "))
        for seed in range(20)
    }
    assert {order[:2] for order in orders} == {("sks", "a")}
    orders = {
        tuple(shuffled_caption("a sks cat, b, c, d", 0, random.Random(seed), "sks").split(", "))
        for seed in range(20)
    }
    assert {order[0] for order in orders} == {"a sks cat"} and len(orders) > 3
