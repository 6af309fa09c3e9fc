"""Prompt lists: the format, its errors, and the lists that ship with the package."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.errors import DataError
from lorascope.evaluation import prompts
from lorascope.evaluation.prompts import Prompt, check_prefix, describe_cut, load_prompts


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
    text = (
        "\ufeff# a comment\r\n\r\n[normal]\r\n  a cat  \r\n"
        "# another\r\na dog, \u0065\u0301clair\r\n[ odd-1 ]\r\n[normal\r\n"
    )
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
        ("[normal]\na cat\nA  Cat\n", "line 3: 'A  Cat' stands on line 2 already: take one of them out"),
        ("[normal]\na \x07cat\n", r"line 2: 'a \\x07cat' holds the control character U\+0007: take it out"),
        ("[normal]\na\ufeffcat\n", r"line 2: .* holds the control character U\+FEFF: take it out"),
        (
            "[normal]\na cat<|endoftext|>\n",
            r"line 2: .* holds <\|endoftext\|>, which CLIP takes for the start or end of a text: take it out",
        ),
        ("[normal]\n, \u200b,\n", "line 2: .* holds no words: take it out"),
        (
            f"[normal]\n{'a' * 65_537}\n",
            "line 2: 'a{80}' and so on has 65537 characters, more than the limit of 65536: shorten it",
        ),
        ("[normal]\na cat\n[abstract]\n# nothing\n", r"section \[abstract\] is empty"),
        ("", "holds no prompts"),
        ("# only a comment\n", "holds no prompts"),
        ("[a/b]\na cat\n", r"line 1: '\[a/b\]': a category is letters"),
        ("[]\na cat\n", r"line 1: '\[\]': a category is letters"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path, text), None)


@pytest.mark.parametrize(
    ("prefix", "prompt", "message"),
    [
        ("sks <|endoftext|>", "a cat", r"'sks <\|endoftext\|>' holds <\|endoftext\|>, which CLIP takes for "),
        ("<|startoftext|>", "a cat", r"'<\|startoftext\|>' holds <\|startoftext\|>, which CLIP takes for "),
        ("sks\x00", "a cat", r"'sks\\x00' holds the control character U\+0000: take it out"),
        ("<|endof", "text|> a cat", r"'<\|endof' before 'text\|> a cat' holds <\|endoftext\|>, which CLIP "),
        ("a" * 65_537, "a cat", "'a{80}' and so on has 65537 characters, more than the limit of 65536"),
    ],
)
def test_a_prefix_that_is_not_all_words_is_refused(prefix: str, prompt: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^sample.prompt_prefix = {message}"):
        check_prefix(prefix, [Prompt("normal", 0, prompt)])


def test_a_prefix_may_be_any_words_and_need_not_be() -> None:
    for prefix in ("", "sks, ", " ", "猫, <3 |"):
        check_prefix(prefix, load_prompts("pocket", None))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("[normal]\ncafé\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt: not UTF-8 .* at byte 12"):
        load_prompts(str(path), None)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_list_as_windows_programs_save_it(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("[normal]\r\nein Käse, 猫\r\n".encode(encoding))
    assert load_prompts(str(path), None) == [Prompt("normal", 0, "ein Käse, 猫")]


def test_a_list_is_bounded_and_its_path_may_be_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "[normal]\na cat\n")
    monkeypatch.setattr(prompts, "MAX_LIST_BYTES", 10)
    with pytest.raises(
        DataError, match=r"prompts.txt: more than 10 bytes, too many for a list of prompts: give"
    ):
        load_prompts(path, None)
    with pytest.raises(
        DataError, match=r"cannot be read \(File name too long\): correct the path or its perm"
    ):
        load_prompts("a" * 300 + ".txt", None)


def test_prompts_that_are_cut_are_told_with_the_longest() -> None:
    texts = ["a cat", "word " * 80, "more " * 90]
    assert describe_cut(texts, lambda text: len(text.split()) + 2, 77) == (
        f"2 of 3 are longer than 77 tokens and are cut there, the longest, of 92: {('more ' * 16)!r}"
    )
    assert describe_cut(texts, lambda text: len(text.split()), 92) == ""


LETTERS = st.text(
    st.sampled_from("ab,[]#\n\r\t \0\ufeff\u200b\u0301\x85é猫") | st.characters(exclude_categories=["Cs"]),
    max_size=12,
)
LINES = LETTERS | st.sampled_from(["[normal]", "[a b]", "[]", "a cat", "A cat", "# no", "<|endoftext|>", ""])


def test_any_list_is_read_or_an_error_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(
        st.tuples(
            st.lists(LINES, max_size=6).map("\n".join), st.sampled_from(["utf-8", "utf-16", "utf-16-le"])
        ).map(lambda pair: ("[normal]\n" + pair[0]).encode(pair[1]))
        | st.binary(max_size=40)
    )
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read = load_prompts(str(path), None)
        except DataError as error:
            message = str(error)
            assert len(message.splitlines()) == 1, message
            return
        assert read and len({prompt.text.lower() for prompt in read}) == len(read)
        assert all(prompt.text == prompt.text.strip() != "" for prompt in read)

    check()


@pytest.mark.parametrize("name", ["sd16", "missing.txt", ".", "", "a\0b"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="not `pocket`, `sd15`, `captions` or an existing file"):
        load_prompts(name, None)


def test_a_file_of_another_name_without_suffix_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("[normal]\na cat\n")
    monkeypatch.chdir(tmp_path)
    assert load_prompts("mine", None) == [Prompt("normal", 0, "a cat")]


def test_the_pictures_own_captions_are_prompts() -> None:
    train = ["a red  house", "a dog", "A red house", "a cat", "a boat"]
    heldout = ["A Dog", "a bird", "a tree", "a bird"]
    prompts = load_prompts("captions", 3, [train, heldout])
    assert [(prompt.category, prompt.index, prompt.text) for prompt in prompts] == [
        ("trained", 0, "a red  house"),
        ("trained", 1, "a cat"),
        ("trained", 2, "a boat"),
        ("heldout", 0, "a bird"),
        ("heldout", 1, "a tree"),
    ]
    unknown = load_prompts("captions", 2)
    assert [(prompt.category, prompt.index) for prompt in unknown] == [
        ("trained", 0),
        ("trained", 1),
        ("heldout", 0),
        ("heldout", 1),
    ]


def test_captions_of_one_kind_of_pictures_alone_are_needed() -> None:
    with pytest.raises(DataError, match="no caption is of the heldout pictures alone: give a list"):
        load_prompts("captions", 2, [["a dog", "a cat"], ["a dog"]])
