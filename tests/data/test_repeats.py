"""Numbers in the names of folders, and how often their pictures are seen."""

from pathlib import Path

import pytest

from lorascope.errors import DataError
from samples import (
    encode,
    pixels,
    prepare,
    shard_of,
    with_captions,
    write_pictures,
    write_shard,
)


def test_repeat_folders(tmp_path: Path) -> None:
    names = [
        "10_cat/1.png",
        "10_cat/below/2.png",
        "3_dog/1.png",
        "007_bond/1.png",
        "+2_x/1.png",
        "999_most/1.png",
    ]
    with_captions(tmp_path, [*names, "plain/1.png"])
    dataset = prepare(tmp_path, repeats=2)
    found = {example.id: example.repeats for example in (*dataset.train, *dataset.heldout)}
    assert found == dict(zip([*names, "plain/1.png"], (20, 20, 6, 14, 4, 1998, 2), strict=True))
    assert [entry["repeats"] for entry in dataset.summary["train"]] == [
        example.repeats for example in dataset.train
    ]
    assert dataset.summary["remarks"] == []


def test_numbers_in_names_of_folders_that_are_no_repeats_are_said(tmp_path: Path) -> None:
    odd = ["2024_holiday", "1.5_style", "1000_many", f"{'9' * 200}_x"]
    with_captions(tmp_path, [f"{name}/1.png" for name in [*odd, "style_10", "part_007", "5_dog/part_2"]])
    dataset = prepare(tmp_path)
    examples = (*dataset.train, *dataset.heldout)
    assert {example.id: example.repeats for example in examples if example.repeats > 1} == {
        "5_dog/part_2/1.png": 5
    }
    assert len(examples) == 7
    rest = "their pictures are seen as often as others; to see them 10 times, call a folder such as 10_name"
    assert dataset.summary["remarks"] == [
        "names of folders that begin with a number that is no number of repeats, which is whole and "
        f"from 1 to 999: 1.5_style, 1000_many, 2024_holiday and 1 more: {rest}",
        f"names of folders that end with a number, which is not read as repeats: style_10: {rest}",
    ]


@pytest.mark.parametrize("name", ["0_none", "-3_none", "000_none", f"-{'9' * 100}_none"])
def test_pictures_that_are_to_be_seen_no_times_are_refused(tmp_path: Path, name: str) -> None:
    with_captions(tmp_path, ["1.png", "2.png", "10_cat/3.png", f"10_cat/{name}/4.png"])
    shard = [*shard_of(0), {"__key__": f"10_cat/{name}/4", "png": encode(pixels(9)), "txt": "four"}]
    tar = write_shard(tmp_path / "tar/a.tar", shard)
    for source, row_id in ((tmp_path, f"10_cat/{name}/4.png"), (tar, f"a.tar/10_cat/{name}/4")):
        assert prepare(source).summary["refused"] == [
            {
                "id": row_id,
                "reason": f"the name of its folder {name} asks for no repeats: rename it with a number "
                "from 1 to 999, take it away, or turn data.folder_repeats off",
            }
        ]


def test_a_repeat_folder_that_is_the_source_itself_is_said(tmp_path: Path) -> None:
    with_captions(tmp_path / "10_cat", ["1.png", "2.png"])
    dataset = prepare(tmp_path / "10_cat")
    assert {example.repeats for example in (*dataset.train, *dataset.heldout)} == {1}
    assert dataset.summary["remarks"] == [
        "repeats are read from folders inside the source, not from its own name 10_cat: give the "
        "folder above, or set data.repeats"
    ]


def test_names_of_folders_say_nothing_where_folder_repeats_is_off(tmp_path: Path) -> None:
    names = ["10_cat/1.png", "0_none/2.png", "2024_holiday/3.png", "style_10/4.png"]
    with_captions(tmp_path / "7_all", names)
    shard = [
        {"__key__": name.removesuffix(".png"), "png": encode(pixels(number)), "txt": name}
        for number, name in enumerate(names)
    ]
    for source in (tmp_path / "7_all", write_shard(tmp_path / "tar/a.tar", shard)):
        dataset = prepare(source, folder_repeats=False, repeats=2)
        assert [example.repeats for example in (*dataset.train, *dataset.heldout)] == [2] * 4
        assert dataset.summary["refused"] == dataset.summary["remarks"] == []


def test_the_name_of_a_folder_is_no_caption_where_folder_repeats_is_off(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["10_cat/1.png", "10_cat/2.png"])
    assert prepare(tmp_path).summary["refused"] == []
    with pytest.raises(DataError, match="2 pictures and no captions: add"):
        prepare(tmp_path, folder_repeats=False)


def test_the_name_of_a_repeat_folder_is_the_caption_where_it_has_no_caption_file(tmp_path: Path) -> None:
    write_pictures(
        tmp_path, ["10_sks cat/1.png", "10_sks cat/2.png", "5_dog/1.png", "5_dog/2.png", "others/1.png"]
    )
    (tmp_path / "5_dog/1.txt").write_text("a dog")
    summary = prepare(tmp_path).summary
    named = [
        {"id": f"10_sks cat/{number}.png", "treatment": "captioned by the name of its folder"}
        for number in (1, 2)
    ]
    assert summary["treated"] == named
    assert summary["refused"] == [
        {"id": name, "reason": "no caption"} for name in ("5_dog/2.png", "others/1.png")
    ]
    assert sorted(row["caption"] for split in ("train", "heldout") for row in summary[split])
