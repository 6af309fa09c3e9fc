"""Captions for a folder: what is kept, what is written, what is skipped, and that an interruption costs
nothing.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

import lorascope.data.captioning
import lorascope.data.metadata
from captioners import make_blip
from conftest import make_pictures
from lorascope.cli.app import main
from lorascope.data.captioning import Captioner, caption_folder, load_captioner
from lorascope.errors import BaseModelError, DataError, HubError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BLIP captioner; never write into it."""
    return make_blip(tmp_path_factory.mktemp("blip") / "blip")


@pytest.fixture(scope="module")
def captioner(blip_folder: Path) -> Captioner:
    """The tiny captioner, loaded as any other."""
    return load_captioner(str(blip_folder), None, "", 8, CPU)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven pictures, two of them in a folder of their own."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for index, (content, _) in enumerate(make_pictures(7)):
        (folder / ("more" if index > 4 else "") / f"{index}.png").write_bytes(content)
    return folder


def texts(folder: Path) -> dict[str, bytes]:
    """All that stands beside the pictures."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".txt", ".jsonl")
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    """The records of metadata.jsonl."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def stub(captions: Sequence[str] = ()) -> Any:
    """Captions without a model, by the pictures' order."""
    given = iter(captions)
    return lambda pictures: [next(given, "words") for _ in pictures]


def test_captions_are_those_of_the_model_called_by_hand(pictures: Path, blip_folder: Path) -> None:
    captioner = load_captioner(str(blip_folder), None, "a cartoon of", 8, CPU)
    result = caption_folder(pictures, captioner.caption, batch_size=3)
    model = BlipForConditionalGeneration.from_pretrained(blip_folder).eval()
    processor, tokenizer = (
        BlipImageProcessorPil.from_pretrained(blip_folder),
        BertTokenizer.from_pretrained(blip_folder),
    )
    assert result.is_complete and result.num_written == 7
    for name in ("0", "3", "more/6"):
        inputs = processor(images=Image.open(pictures / f"{name}.png").convert("RGB"), return_tensors="pt")
        tokens = model.generate(
            **inputs,
            **tokenizer("a cartoon of", return_tensors="pt", return_token_type_ids=False),
            max_new_tokens=8,
        )
        expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
        assert (pictures / f"{name}.txt").read_text() == expected + "\n"
        assert expected.startswith("a cartoon of ")


def test_without_a_prompt_pictures_differ_and_lengths_are_held(pictures: Path, blip_folder: Path) -> None:
    captioner = load_captioner(str(blip_folder), None, "", 5, CPU)
    caption_folder(pictures, captioner.caption)
    captions = [content.decode().strip() for content in texts(pictures).values()]
    assert len(set(captions)) > 2
    assert all(1 <= len(caption.split()) <= 5 for caption in captions)


@pytest.mark.parametrize("out", ["sidecar", "jsonl"])
def test_an_interrupted_captioning_goes_on_and_ends_in_the_same_bytes(
    pictures: Path, captioner: Captioner, out: Any
) -> None:
    whole = shutil.copytree(pictures, pictures.parent / "whole")
    assert caption_folder(whole, captioner.caption, out=out, batch_size=2).num_written == 7

    def stop(done: int, total: int, caption: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption_folder(pictures, captioner.caption, out=out, batch_size=2, progress=stop)
    assert len(texts(pictures)) == (4 if out == "sidecar" else 1)
    result = caption_folder(pictures, captioner.caption, out=out, batch_size=2)
    assert (result.num_kept, result.num_written) == (4, 3)
    assert texts(pictures) == texts(whole)
    again = caption_folder(pictures, captioner.caption, out=out, batch_size=2)
    assert (again.num_kept, again.num_written) == (7, 0)


def test_sidecars_are_there_as_each_batch_ends(pictures: Path) -> None:
    seen = []
    caption_folder(
        pictures,
        stub(),
        batch_size=3,
        progress=lambda done, total, text: seen.append((done, total, text, len(texts(pictures)))),
    )
    assert seen == [(3, 7, "words", 3), (6, 7, "words", 6), (7, 7, "words", 7)]


def test_captions_that_are_there_are_kept_unless_asked(pictures: Path) -> None:
    (pictures / "0.txt").write_text("mine")
    (pictures / "1.caption").write_text("mine too")
    (pictures / "2.txt").write_text(" \n")
    result = caption_folder(pictures, stub())
    assert (result.num_kept, result.num_written) == (2, 5)
    assert (pictures / "0.txt").read_text() == "mine" and not (pictures / "1.txt").exists()
    assert (pictures / "2.txt").read_text() == "words\n"
    result = caption_folder(pictures, stub(), overwrite=True)
    assert (result.num_kept, result.num_written) == (0, 7)
    assert (pictures / "0.txt").read_text() == (pictures / "1.txt").read_text() == "words\n"


def test_a_caption_without_words_is_written_over_and_a_pipe_is_not_waited_for(pictures: Path) -> None:
    (pictures / "0.txt").write_text(" ,\n\u200b\n")
    os.mkfifo(pictures / "1.txt")
    (pictures / "2.txt").write_text("ein Käse", encoding="utf-16")
    result = caption_folder(pictures, stub())
    assert (pictures / "0.txt").read_text() == "words\n"
    assert (result.num_written, result.num_kept) == (5, 1)
    [skipped] = result.skipped
    assert skipped["picture"] == "1.png" and "1.txt: is a named pipe" in skipped["reason"]


def test_a_caption_that_cannot_be_read_is_not_written_over(pictures: Path) -> None:
    (pictures / "0.txt").write_bytes("größer".encode("latin-1"))
    result = caption_folder(pictures, stub())
    assert [entry["picture"] for entry in result.skipped] == ["0.png"]
    assert result.skipped[0]["reason"] == (
        "0.txt: not UTF-8 (invalid start byte at byte 2): save it as UTF-8, or delete it"
    )
    assert (pictures / "0.txt").read_bytes() == "größer".encode("latin-1")


def test_metadata_keeps_all_other_rows_columns_and_bytes(pictures: Path) -> None:
    kept = '{ "file_name":"./1.png",  "text": "mine", "tags": ["é", 1.0]}'
    lines = [
        '{"file_name": "gone.png", "text": ""}',
        kept,
        "",
        '{"file_name": "3.png", "caption": null, "score": 0.5, "half": "\\ud800"}',
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    (pictures / "2.txt").write_text("beside")
    result = caption_folder(pictures, stub(), out="jsonl")
    assert (result.num_kept, result.num_written) == (2, 5)
    written = (pictures / "metadata.jsonl").read_text().split("\n")
    assert written[:3] == lines[:3]
    assert json.loads(written[3]) == {
        "file_name": "3.png",
        "caption": "words",
        "score": 0.5,
        "half": "\ud800",
    }
    captions = {row["file_name"]: row["text"] for row in map(json.loads, written[4:-1])}
    assert captions == {
        "2.png": "beside",
        **dict.fromkeys(["0.png", "4.png", "more/5.png", "more/6.png"], "words"),
    }


def test_a_caption_that_is_written_while_the_model_looks_is_kept(pictures: Path) -> None:
    def caption(batch: Sequence[Image.Image]) -> list[str]:
        (pictures / "1.txt").write_text("by hand")
        return ["words"] * len(batch)

    result = caption_folder(pictures, caption)
    assert (pictures / "1.txt").read_text() == "by hand"
    assert (result.num_kept, result.num_written) == (1, 6)


def test_a_new_line_has_the_column_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "1.png", "caption": "a"}\n')
    file = lorascope.data.metadata.MetadataFile(path)
    file.put("2.png", "b")
    file.save()
    assert path.read_text().splitlines()[1] == '{"file_name": "2.png", "caption": "b"}'


def test_metadata_is_written_now_and_then_and_not_for_nothing(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    real = lorascope.data.metadata.write_text
    monkeypatch.setattr(
        lorascope.data.metadata, "write_text", lambda path, text: (saved.append(path), real(path, text))
    )
    caption_folder(pictures, stub(), out="jsonl", batch_size=1)
    assert len(saved) == 1
    monkeypatch.setattr(lorascope.data.captioning, "SAVE_EVERY_S", 0.0)
    caption_folder(pictures, stub(), out="jsonl", batch_size=1, overwrite=True)
    assert len(saved) == 8
    caption_folder(pictures, stub(), out="jsonl")
    assert len(saved) == 8


def test_pictures_without_a_caption_are_named(pictures: Path) -> None:
    (pictures / "0.png").write_bytes(b"no picture")
    (pictures / "3.png").write_bytes(b"")
    (pictures / "4.jpg").write_bytes((pictures / "4.png").read_bytes())
    (pictures / ".hidden.png").write_bytes(b"")
    (pictures / "5.png").mkdir()
    (pictures / os.fsdecode(b"6\xff.png")).write_bytes(b"")
    (pictures / "7.png").symlink_to(pictures / "7.png")
    result = caption_folder(pictures, stub(["", "words"]), batch_size=2)
    assert not result.is_complete
    assert result.empty == ["1.png"] and not (pictures / "1.txt").exists()
    assert [entry["picture"] for entry in result.skipped] == ["0.png", "3.png", "4.png", "6\\xff.png"]
    text = result.as_text()
    assert text.startswith(f"{pictures}: 9 pictures: 4 captioned, 0 kept their captions, 5 have none\n")
    assert "  0.png: not an image in a known format" in text
    assert "  3.png: the image file is empty" in text
    assert "  4.png: would share 4.txt with 4.jpg: rename one of them" in text
    assert "  1.png: the model gave no words: caption it by hand, or with another --prompt" in text
    assert "  6\\xff.png: the file name is not UTF-8: rename the file" in text
    assert result.as_dict()["num_written"] == 4


def test_a_picture_file_that_is_too_large_or_closed_is_skipped(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "0.png").write_bytes(b"\0" * 5000)
    monkeypatch.setattr(lorascope.data.captioning, "MAX_FILE_BYTES", 4000)

    def caption(batch: Sequence[Image.Image]) -> list[str]:
        (pictures / "4.png").unlink(missing_ok=True)
        return ["words"] * len(batch)

    result = caption_folder(pictures, caption, batch_size=2)
    assert [entry["reason"] for entry in result.skipped] == [
        "the image file has more bytes than the limit of 4000",
        "the image file cannot be read (No such file or directory)",
    ]


def test_pictures_are_treated_as_for_training(tmp_path: Path) -> None:
    turned = Image.fromarray(np.repeat(np.arange(0, 256, 16, dtype=np.uint8)[None], 8, 0)).convert(
        "RGB"
    )  # 16 wide, 8 high
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.jpg", exif=exif)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "b.png")
    seen: list[Image.Image] = []

    def caption(pictures: Sequence[Image.Image]) -> list[str]:
        seen.extend(pictures)
        return ["words"] * len(pictures)

    caption_folder(tmp_path, caption)
    assert seen[0].size == (8, 16)
    assert seen[1].mode == "RGB" and seen[1].getpixel((0, 0)) == (255, 255, 255)


def test_a_folder_that_does_not_go(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(DataError, match="no such folder: give a folder with pictures"):
        caption_folder(tmp_path / "missing", stub())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no pictures .*: give a folder with pictures"):
        caption_folder(tmp_path / "empty", stub())
    (pictures / "more" / "metadata.jsonl").write_text("")
    with pytest.raises(
        DataError,
        match="metadata.jsonl: is there, so captions beside the pictures would not be read: use --out",
    ):
        caption_folder(pictures, stub())
    with pytest.raises(
        DataError, match="more/metadata.jsonl: holds captions too: caption .*/more by itself, or move it away"
    ):
        caption_folder(pictures, stub(), out="jsonl")
    (pictures / "metadata.csv").write_text("")
    with pytest.raises(
        DataError, match="metadata.csv: holds captions too: turn it into metadata.jsonl, or move it away"
    ):
        caption_folder(pictures, stub(), out="jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9", r"not UTF-8 \(.* at byte 3\): save it as UTF-8"),
        (b'{"file_name": "0.png"}\n{"file_na', "line 2: not JSON .*: correct the line"),
        (b"[" * 100_000, "line 1: not JSON .*recursion.*: correct the line"),
        (b"[1]\n", "line 1: no object with file_name: correct the line"),
        (b'{"file_name": 1}\n', "line 1: no object with file_name: correct the line"),
    ],
)
def test_damaged_metadata_is_left_as_it_is(pictures: Path, content: bytes, message: str) -> None:
    (pictures / "metadata.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"metadata.jsonl: {message}"):
        caption_folder(pictures, stub(), out="jsonl")
    assert (pictures / "metadata.jsonl").read_bytes() == content


def test_a_model_that_is_no_captioner(tmp_path: Path, scorer_folder: Path, blip_folder: Path) -> None:
    def load(model: object, max_tokens: int = 8, prompt: str = "") -> Captioner:
        return load_captioner(str(model), None, prompt, max_tokens, CPU)

    with pytest.raises(
        BaseModelError,
        match="--model '.*': no model folder: give a folder, or a hub id such as Salesforce/blip",
    ):
        load(tmp_path / "missing")
    with pytest.raises(
        BaseModelError, match="cannot be loaded as a BLIP captioner .*: give one like Salesforce/blip"
    ):
        load(tmp_path)
    with pytest.raises(BaseModelError, match="a clip model|cannot be loaded as a BLIP captioner"):
        load(scorer_folder)
    with pytest.raises(HubError, match="--model 'owner/blip': not complete in the cache"):
        load("owner/blip")
    for length in (0, 20):
        with pytest.raises(
            BaseModelError,
            match=f"--max-tokens {length}: must be 1 to 19, which the model can write after this prompt",
        ):
            load(blip_folder, length, "a cartoon of")


def test_another_blip_model_is_not_taken_for_a_captioner(tmp_path: Path, blip_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(blip_folder, tmp_path / "retrieval")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "crossattention" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        BaseModelError, match=r"a blip model with \d+ of a captioner's weights missing: give one like"
    ):
        load_captioner(str(folder), None, "", 8, CPU)


def test_the_command(pictures: Path, blip_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(blip_folder), "--batch-size", "3", "--max-tokens", "6", "--device", "cpu"]
    assert main(["caption", str(pictures), *options]) == 0
    assert capsys.readouterr().out == f"{pictures}: 7 pictures: 7 captioned, 0 kept their captions\n"
    (pictures / "new.png").write_bytes(b"")
    assert main(["caption", str(pictures), *options, "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert (told["num_kept"], told["skipped"]) == (
        7,
        [{"picture": "new.png", "reason": "the image file is empty"}],
    )
    assert main(["caption", str(pictures), *options, "--batch-size", "0"]) == 2
    capsys.readouterr()
    assert main(["caption", "--help"]) == 0
    assert lorascope.data.captioning.DEFAULT_MODEL in capsys.readouterr().out.replace("\n", "")


def test_a_model_with_nothing_to_say(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = make_blip(tmp_path / "silent", silent=True)
    assert (
        main(
            [
                "caption",
                str(pictures),
                "--model",
                str(silent),
                "--prompt",
                "a cartoon of",
                "--max-tokens",
                "6",
                "--quiet",
            ]
        )
        == 3
    )
    assert "7 have none" in capsys.readouterr().out
    assert texts(pictures) == {}
