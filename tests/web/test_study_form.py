"""The form of a study: every key of the schema, texts as values, and where a message belongs."""

from typing import Any

import pytest

from lorascope.config import parse_study
from lorascope.errors import ConfigError
from lorascope.reference import reference_table
from lorascope.schema import StudyConfig
from lorascope.web.drafts import write_toml
from lorascope.web.study_form import (
    Field,
    add_table,
    as_text,
    as_value,
    build_form,
    fault_at,
    remove_table,
    set_keys,
)


def fields_of(table: dict[str, Any], config: StudyConfig | None) -> dict[str, Field]:
    parts = build_form(table, config)
    return {field.key: field for part in parts for group in part.tables for field in group.fields}


def test_every_key_of_the_schema_has_its_field() -> None:
    table = {"adapter": {"groups": [{"targets": ["a"]}]}}
    found = {key.replace(".0.", ".") for key in fields_of(table, StudyConfig())}
    keys = {line.split("`")[1] for line in reference_table().splitlines()[2:]}
    assert found == keys


def test_a_field_says_type_range_default_and_what_the_file_says() -> None:
    table = {"data": {"resolution_px": 128}, "arms": [{"rank": [4, 8]}]}
    fields = fields_of(table, parse_study("data.resolution_px = 128\n[[arms]]\nrank = [4, 8]"))
    side = fields["data.resolution_px"]
    assert (side.value, side.default, side.kind) == ("128", "64", "whole number")
    assert side.limits == "at least 16, at most 4,096, a multiple of 8"
    assert "centre-cropped" in side.meaning
    assert (fields["arms.0.rank"].value, fields["arms.0.rank"].limits) == (
        "4, 8",
        "at least 1, at most 1,024",
    )
    assert fields["data.buckets"].options == ("true", "false")
    assert fields["train.schedule"].options == ("constant", "linear", "cosine")
    assert fields["train.betas"].default == "0.9, 0.999"
    assert fields["train.max_grad_norm"].limits == fields["arms.0.seed"].limits == "at least 0"


def test_where_the_file_says_nothing_the_presets_values_are_the_defaults() -> None:
    config = parse_study('preset = "style"')
    fields = fields_of({"preset": "style"}, config)
    assert (fields["train.epochs"].value, fields["train.epochs"].default) == ("", "40")
    assert fields["arms.0.rank"].default == "8, 16, 32"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.epochs", "3", 3),
        ("train.epochs", "three", "three"),
        ("arms.0.rank", "8", 8),
        ("arms.0.rank", "4, 8", [4, 8]),
        ("arms.0.rank", "[4, 8]", [4, 8]),
        ("arms.0.lr", "1e-4", 1e-4),
        ("arms.0.name", "12", "12"),
        ("data.flip", "true", True),
        ("data.source", "a, b", "a, b"),
        ("adapter.targets", "to_q, mid_block.*.conv1", ["to_q", "mid_block.*.conv1"]),
        ("adapter.targets", "to_q", ["to_q"]),
        ("adapter.groups.0.targets", "proj_in", ["proj_in"]),
        ("trackers", "wandb", ["wandb"]),
        ("train.optimizer_args", "{ momentum = 0.9 }", {"momentum": 0.9}),
        ("diagnose.epochs", "last", ["last"]),
        ("diagnose.guidances", "[]", []),
    ],
)
def test_texts_are_values_and_back(key: str, text: str, value: Any) -> None:
    assert as_value(key, text) == value
    assert as_value(key, as_text(value) or "[]") == value


def test_keys_are_laid_over_a_table() -> None:
    table: dict[str, Any] = {"data": {"flip": True}, "arms": [{"rank": 4, "alpha": 4, "lr": 1e-4}]}
    set_keys(table, {"data.flip": "", "train.epochs": " 2 ", "arms.0.alpha_per_rank": "2"}, StudyConfig())
    assert table == {"train": {"epochs": 2}, "arms": [{"rank": 4, "alpha_per_rank": 2, "lr": 1e-4}]}
    both: dict[str, Any] = {"arms": [{"alpha": 4}]}
    set_keys(both, {"arms.0.alpha": "4", "arms.0.alpha_per_rank": "2"}, None)
    assert both["arms"] == [{"alpha": 4, "alpha_per_rank": 2}]  # which the schema refuses at its key


def test_arms_of_the_defaults_are_written_down_when_one_is_changed() -> None:
    table: dict[str, Any] = {"preset": "style"}
    config = parse_study('preset = "style"')
    set_keys(table, {"arms.0.lr": ""}, config)
    assert "arms" not in table
    set_keys(table, {"arms.0.lr": "2e-4"}, config)
    assert table["arms"] == [{"rank": [8, 16, 32], "alpha": 16.0, "lr": 2e-4}]
    assert parse_study(write_toml(table)).arms[0].lr == 2e-4


def test_tables_are_added_and_taken_away() -> None:
    table: dict[str, Any] = {}
    add_table(table, "arms", StudyConfig())
    assert len(table["arms"]) == 2
    remove_table(table, "arms", 0, None)
    assert table["arms"] == [{"rank": 16}]
    add_table(table, "adapter.groups", None)
    assert parse_study(write_toml(table)).adapter.groups[0].targets == ("proj_in",)
    remove_table(table, "adapter.groups", 0, None)
    for key, number, message in (
        ("arms", 0, "at least one table of arms"),
        ("arms", 7, "no such table any more"),
        ("data", 0, "of this there is one table"),
    ):
        with pytest.raises(ConfigError, match=message):
            remove_table(table, key, number, None)


@pytest.mark.parametrize("key", ["fun", "data.fun", "arms.0.fun", "data.source.x", "csrf"])
def test_a_key_that_no_study_has_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        set_keys({}, {key: "1"}, None)
    with pytest.raises(ConfigError, match="no such table any more"):
        set_keys({"arms": [{}]}, {"arms.5.rank": "4"}, None)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("train.epochs = 0", "train.epochs"),
        ("[[arms]]\nrank = 4\n[[arms]]\nrank = [4, 0]", "arms.1.rank"),
        ("data.buckets = 3", "data.buckets"),
        ("train.fun = 3", "train.fun"),
        ("[[arms]]\nalpha = 1\nalpha_per_rank = 1", "arms.0.alpha_per_rank"),
        ('sample.prompts = "captions"', "sample"),
        ("train =", ""),
    ],
)
def test_a_message_is_about_its_key(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_study(text, "studies/mine.toml", {})
    found, words = fault_at(str(caught.value), ("studies/mine.toml", "study"))
    assert found == key
    assert not words.startswith("studies/")
