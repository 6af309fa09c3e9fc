"""Prompt lists: the format, its errors, and the lists that ship with the package."""

from pathlib import Path

import pytest

from lorascope.errors import DataError
from lorascope.evaluation.prompts import Prompt, load_prompts


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["sd15", "pocket"])
def test_own_lists_have_25_of_each_category(name: str) -> None:
    prompts = load_prompts(name, None)
    assert [prompt.category for prompt in prompts] == ["normal"] * 25 + ["abstract"] * 25
    assert [prompt.index for prompt in prompts] == [*range(25), *range(25)]


def test_sd15_names_the_reference_prompts() -> None:
    prompts = load_prompts("sd15", None)
    assert Prompt("normal", 0, "a man reading a newspaper") in prompts
    assert Prompt("abstract", 0, "waiting for a shape to appear") in prompts


def test_format(tmp_path: Path) -> None:
    text = "\ufeff# a comment\r\n\r\n[normal]\r\n  a cat  \r\n# another\r\na dog, \u0065\u0301clair\r\n[ odd-1 ]\r\n[normal\r\n"
    assert load_prompts(write(tmp_path, text), None) == [
        Prompt("normal", 0, "a cat"),
        Prompt("normal", 1, "a dog, éclair"),
        Prompt("odd-1", 0, "[normal"),
    ]


def test_a_category_may_go_on_later(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path, "[a]\none\n[b]\ntwo\n[a]\nthree\n"), None)
    assert prompts == [Prompt("a", 0, "one"), Prompt("a", 1, "three"), Prompt("b", 0, "two")]


def test_num_prompts_takes_the_first_of_each_category() -> None:
    everything = load_prompts("sd15", None)
    assert load_prompts("sd15", 2) == [prompt for prompt in everything if prompt.index < 2]
    assert load_prompts("sd15", 1000) == everything


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[normal]\na cat\n[abstract]\nhope\n\na cat \n", "line 6: 'a cat' stands on line 2 already"),
        ("a cat\n[normal]\n", "line 1: 'a cat' stands before the first section"),
        ("[normal]\na cat\n[abstract]\n# nothing\n", r"section \[abstract\] is empty"),
        ("", "holds no prompts"),
        ("# only a comment\n", "holds no prompts"),
        ("[a/b]\na cat\n", r"line 1: \[a/b\]: a category is letters"),
        ("[]\na cat\n", r"line 1: \[\]: a category is letters"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path, text), None)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("[normal]\ncafé\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt: not UTF-8 .* at byte 12"):
        load_prompts(str(path), None)


@pytest.mark.parametrize("name", ["sd16", "missing.txt", ".", ""])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="not `pocket`, `sd15` or an existing file"):
        load_prompts(name, None)


def test_a_file_of_another_name_without_suffix_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("[normal]\na cat\n")
    monkeypatch.chdir(tmp_path)
    assert load_prompts("mine", None) == [Prompt("normal", 0, "a cat")]
