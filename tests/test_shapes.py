"""JSON values against the shapes that their readers need."""

from typing import Any

import pytest

from lorascope.shapes import Each, Maybe, Number, Shape, Text, find_fault

PERSON = {
    "name": str,
    "age?": Number,
    "friends?": [{"name": str}],
    "marks?": Each(int),
    "note?": Text,
    "home?": Maybe({"town": str}),
}


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ({"name": "a", "unknown": []}, PERSON),
        ({"name": "a", "age": 3, "friends": [], "marks": {}, "note": None, "home": None}, PERSON),
        (
            {
                "name": "a",
                "age": 3.5,
                "friends": [{"name": "b"}],
                "marks": {"x": 1},
                "note": "x",
                "home": {"town": "c"},
            },
            PERSON,
        ),
        (True, bool),
        ([], [int]),
    ],
)
def test_a_value_of_its_shape_has_no_fault(value: Any, shape: Shape) -> None:
    assert find_fault(value, shape) is None


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"name": None}, "name"),
        ({"age": "3"}, "age"),
        ({"age": True}, "age"),
        ({"age": None}, "age"),
        ({"friends": {}}, "friends"),
        ({"friends": [{"name": "b"}, {}]}, "friends[1].name"),
        ({"friends": [1]}, "friends[0]"),
        ({"marks": []}, "marks"),
        ({"marks": {"x": 1, "y": 1.5}}, "marks.y"),
        ({"note": 1}, "note"),
        ({"home": {}}, "home.town"),
        ({"home": []}, "home"),
    ],
)
def test_the_first_place_that_differs_is_named(change: dict[str, Any], place: str) -> None:
    assert find_fault({"name": "a", **change}, PERSON) == f"no `{place}`, or not of its type"


def test_a_missing_key_and_another_kind_of_value_are_named() -> None:
    assert find_fault({}, PERSON) == "no `name`, or not of its type"
    assert find_fault([], PERSON) == "not of its type"
    assert find_fault(1, bool) == "not of its type"
