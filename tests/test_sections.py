"""The tables of a study file: bounds of every number."""

import re
from collections.abc import Iterator
from typing import get_args, get_origin

import pytest
from pydantic import BaseModel

from lorascope.reference import alternatives
from lorascope.schema import StudyConfig
from studies import refusal, study


def number_keys(section: type[BaseModel], kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of everything in a study that takes a number of this kind, or a list of them."""
    for name, field in section.model_fields.items():
        kinds = alternatives(field.annotation)
        lists = [
            item
            for outer in kinds
            if get_origin(outer) is tuple
            for part in get_args(outer)
            if part is not Ellipsis
            for item in alternatives(part)
        ]
        for inner in (*kinds, *lists):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from number_keys(inner, kind, f"{prefix}{name}." + ("0." if inner in lists else ""))
        if kind in kinds:
            yield f"{prefix}{name}"
        if kind in lists:
            yield f"{prefix}{name}.0"


WHOLE_KEYS = list(number_keys(StudyConfig, int))
REAL_KEYS = list(number_keys(StudyConfig, float))


def refusal_of(key: str, value: str) -> str:
    """What is said of a value at a key, which may be the first item of a list of its own."""
    override = f"{key.removesuffix('.0')}=[{value}, 1]" if key.endswith(".0") else f"{key}={value}"
    message = refusal("adapter.groups=[{targets=['to_q']}]", override)
    assert message.startswith(f"--set: {key} = "), message
    assert len(message) < 300
    return message


@pytest.mark.parametrize("key", WHOLE_KEYS)
@pytest.mark.parametrize("value", [10**19, -(10**19), 10**400])
def test_every_whole_number_has_bounds(key: str, value: int) -> None:
    assert re.search("must be (at (most|least)|less than) ", refusal_of(key, str(value)))


@pytest.mark.parametrize("key", REAL_KEYS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300", "-1e300", "-1e-3", "-1e-310"])
def test_every_real_number_is_finite_and_has_bounds(key: str, value: str) -> None:
    wanted = (
        "a finite number$"
        if value.lstrip("-") in ("nan", "inf")
        else "(at (most|least)|less than|more than) "
    )
    assert re.search(f"must be {wanted}", refusal_of(key, value))


# What may be 0, or takes a number by 0 for the smallest that makes a difference.
HARMLESS = {
    *("data.heldout_share", "data.max_refused_share", "sample.guidance", "train.betas.0"),
    *("arms.0.rank_dropout", "arms.0.rank_dropout.0"),
    *("train.caption_dropout", "train.noise_offset", "train.weight_decay"),
    *("diagnose.guidances.0", "verdict.max_prompt_loss"),
}


@pytest.mark.parametrize("key", REAL_KEYS)
@pytest.mark.parametrize("value", ["5e-324", "1e-40"])
def test_a_number_that_float32_takes_for_0_is_refused_where_0_would_be(key: str, value: str) -> None:
    if key not in HARMLESS:
        assert re.search("must be (0, which turns it off, or )?at least ", refusal_of(key, value))
    else:
        override = f"{key.removesuffix('.0')}=[{value}, 0.9]" if key.endswith(".0") else f"{key}={value}"
        assert study(override)


@pytest.mark.parametrize("value", ["nan", "[0.9, nan]", "{deep=[{deeper=nan}]}"])
def test_arguments_of_an_optimizer_hold_no_nan(value: str) -> None:
    assert "must hold no NaN: give a number" in refusal(
        'train.optimizer="SGD"', f"train.optimizer_args={{momentum={value}}}"
    )
    assert study("train.optimizer_args={growth_rate=inf}").train.optimizer_args


def test_bounds_are_found_for_lists_and_tables_too() -> None:
    assert {"arms.0.rank", "arms.0.rank.0", "adapter.groups.0.rank", "workers"} <= set(WHOLE_KEYS)
    assert {"arms.0.lr", "arms.0.lr.0", "adapter.groups.0.alpha", "train.betas.0"} <= set(REAL_KEYS)
    assert set(REAL_KEYS) > HARMLESS
    assert "train.batch_size = 1000000000000: must be at most 65536" in refusal(
        "train.batch_size=1000000000000"
    )


def test_captions_as_prompts_need_a_number() -> None:
    told = refusal("sample.prompts=captions")
    assert "how many of them is not said: set sample.num_prompts" in told
    assert study("sample.prompts=captions", "sample.num_prompts=2").sample.num_prompts == 2
