"""What `lorascope data check` says and draws, and its answer to a script."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorascope.cli.app import main
from lorascope.data.check import DataCheck, _fit_lines, _histogram, _lacks_letters, check_data
from lorascope.data.examples import check_source
from lorascope.errors import EXIT_DONE, EXIT_INPUT, StorageError
from samples import count_words, drawing, encode, near_duplicates, pixels, section, write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of two sizes, near and exact duplicates, and one of each fault."""
    folder = tmp_path / "pictures"
    write_pictures(folder / "3_blocks", [f"{number}.png" for number in range(10)])
    for number in range(9):
        (folder / f"3_blocks/{number}.txt").write_text(
            f"blocks, number {number}, кошка" + "\a" * (number == 4)
        )
    for number, content in enumerate([*near_duplicates(drawing(1)), encode(pixels(0))]):
        (folder / f"drawing{number}.png").write_bytes(content)
        (folder / f"drawing{number}.txt").write_text("a drawing")
    (folder / "broken.png").write_bytes(b"broken")
    (folder / "broken.txt").write_text("broken")
    (folder / "long.png").write_bytes(encode(pixels(30)))
    (folder / "long.txt").write_text("word " * 80)
    (folder / "commas.png").write_bytes(encode(pixels(31)))
    (folder / "commas.txt").write_text(", ,\n")
    (folder / "wide.png").write_bytes(encode(np.concatenate([pixels(40), pixels(41)], axis=1)))
    (folder / "wide.txt").write_text("a wide one")
    return folder


def look(folder: Path, **values: Any) -> DataCheck:
    return check_data(check_source(section(folder, **values), count_words), 77)


def test_it_says_what_is_there_in_lines_that_fit(folder: Path) -> None:
    text = look(folder, buckets=True, bucket_step_px=8, resolution_px=32).as_text()
    lines = text.splitlines()
    assert max(map(len, lines[1:])) <= 100
    assert lines[:2] == [str(folder), "19 rows, 16 can be used, 3 refused"]
    for line in (
        "        1  no caption: 3_blocks/9.png",
        "Caption lengths in tokens, 1 is cut at 77, the longest has 82",
        "        1  the caption is cut at 77 tokens, all that the text encoder takes: long.png",
        "        1  the caption holds nothing but commas, spaces and invisible characters: commas.png",
        "        1  control characters taken out of the caption: 3_blocks/4.png",
        "        9 pictures seen 3 times an epoch",
        "Near duplicates: 4 pictures in 1 group",
        "Exact duplicates: 2 pictures in 1 group",
        "  blocks 9, кошка 9, a drawing 5",
    ):
        assert line in lines, line
    assert any(line.startswith("        1  not an image in a known format") for line in lines)
    assert any("(captions differ)" in line for line in lines)
    assert any(line.startswith("    40 x 24          1") for line in lines)
    assert "A run would start: 13 pictures to train on" in text


def test_it_says_why_no_run_would_start(folder: Path) -> None:
    result = look(folder, max_refused_share=0.1)
    assert result.dataset is None
    text = result.as_text()
    assert "No run would start: data.source" in text and "3 of 19 rows (15.8%) cannot be used" in " ".join(
        text.split()
    )
    assert max(map(len, text.splitlines()[1:])) <= 100
    assert result.as_dict()["would_start"] is False and "3 of 19 rows" in result.as_dict()["problem"]


def test_all_of_it_as_json(folder: Path) -> None:
    report = json.loads(json.dumps(look(folder).as_dict()))
    assert (report["num_rows"], report["num_usable"], report["would_start"]) == (19, 16, True)
    assert report["num_train"] + report["num_heldout"] == 15
    assert (
        len(report["refused"]) == 3 and len(report["sizes"]) == len(report["caption_tokens"]["values"]) == 16
    )
    assert report["buckets"] == [{"width_px": 16, "height_px": 16, "num_pictures": 16}]
    assert report["repeats"] == {"1": 7, "3": 9}


def test_sheets_are_drawn(folder: Path, tmp_path: Path) -> None:
    drawn = []
    paths = look(folder).draw(tmp_path / "out", drawn.append)
    assert [path.name for path in paths] == ["contact-sheet.png", "duplicates.png"]
    assert sum(drawn) == 16 + 6
    for path in paths:
        with Image.open(path) as sheet:
            assert sheet.width == 1140
            assert np.asarray(sheet).std() > 20
    with pytest.raises(StorageError, match="a part of this path is a file"):
        look(folder).draw(folder / "broken.png" / "out")


def test_no_sheet_of_no_duplicates_and_a_gap_for_what_went_away(tmp_path: Path) -> None:
    write_pictures(tmp_path / "few", ["1.png", "2.png", "3.png"])
    for number in "123":
        (tmp_path / f"few/{number}.txt").write_text("one")
    result = look(tmp_path / "few")
    (tmp_path / "few/2.png").unlink()
    assert [path.name for path in result.draw(tmp_path / "out")] == ["contact-sheet.png"]


def test_histograms_have_few_round_ranges() -> None:
    assert _histogram([7, 7, 7]) == ["7        3  ##############################"]
    lines = _histogram([*range(100, 1100, 7)])
    assert [line.split()[0] for line in lines] == ["0", "200", "400", "600", "800", "1000"]
    assert sum(int(line.split()[3]) for line in lines) == 143
    assert len(_histogram([1, 10**6])) <= 8


def test_captions_are_cut_to_the_cell(folder: Path) -> None:
    from PIL import ImageFont

    from lorascope.data.check import _font_path

    font = ImageFont.truetype(str(_font_path()), 12)
    lines = _fit_lines("a long caption with many words, and on it goes " * 3, font, 120, 3)
    assert len(lines) == 3 and lines[-1].endswith("…") and all(font.getlength(line) <= 130 for line in lines)
    assert _fit_lines("short", font, 120, 3) == ["short"]
    assert "".join(_fit_lines("x" * 30, font, 60, 9)) == "x" * 30
    assert _fit_lines("", font, 60, 3) == []


def test_the_command(
    folder: Path, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "data",
        "check",
        str(folder),
        "--resolution",
        "32",
        "--buckets",
        "--base",
        str(pipeline_folder),
    ]
    arguments += ["-s", "data.bucket_step_px=8", "-s", "data.heldout_share=0.2"]
    assert main(arguments) == EXIT_INPUT
    captured = capsys.readouterr()
    assert "No run would start" in captured.out
    assert "Token indices sequence length" not in captured.err
    out = str(tmp_path / "out")
    assert main([*arguments, "-s", "data.max_refused_share=0.5", "--json", "--out", out]) == EXIT_DONE
    report = json.loads(capsys.readouterr().out)
    assert report["would_start"] and len(report["sheets"]) == 2
    assert (report["caption_tokens"]["max"], report["caption_tokens"]["num_cut"]) == (77, 1)
    assert main([*arguments, "-s", "data.max_refused_share=0.5"]) == EXIT_DONE
    assert capsys.readouterr().out.splitlines()[-1] == "Duplicates are drawn side by side with --out FOLDER."
    assert main([*arguments, "-s", "data.max_refused_share=0.5", "-q"]) == EXIT_DONE
    assert capsys.readouterr().out == ""


def test_the_command_on_what_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tmp_path / "absent")]) == EXIT_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and "no such file or folder" in captured.err.splitlines()[-1]


def test_the_sheet_says_where_its_font_lacks_letters() -> None:
    assert not _lacks_letters("a café,\nкот, γάτα")
    assert _lacks_letters("a cat, 赤い猫")
