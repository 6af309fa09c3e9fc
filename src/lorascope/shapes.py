"""Whether a JSON value holds what its reader needs.

A shape is a type or a union of types (`bool` is no number), `[shape]` for a list, `{key: shape}` for an
object with at least these keys, `Each(shape)` for an object of any keys, or `Maybe(shape)` for that or null.
A key that ends in `?` may be missing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

Shape: TypeAlias = Any  # as the module says; a type of its own would refer to itself
Number = int | float
Text = str | None


@dataclass(frozen=True)
class Each:
    """The shape of an object whose values, under any keys, are of one shape."""

    shape: Shape


@dataclass(frozen=True)
class Maybe:
    """A shape or null."""

    shape: Shape


def find_fault(value: object, shape: Shape) -> str | None:
    """What is wrong with a value of this shape, in words without the file's name; None where nothing is."""
    place = _misfit(value, shape, "")
    if place is None:
        return None
    return f"no `{place[:80]}`, or not of its type" if place else "not of its type"


def _misfit(value: object, shape: Shape, place: str) -> str | None:
    """Where the value first differs from its shape, such as `train[3].caption`; "" is the value itself."""
    match shape:
        case dict():
            if not isinstance(value, dict):
                return place
            names = {key.removesuffix("?"): key for key in shape}
            if missing := [name for name, key in names.items() if name == key and name not in value]:
                return _join(place, missing[0])
            return _first(
                _misfit(value[name], shape[key], _join(place, name))
                for name, key in names.items()
                if name in value
            )
        case Each():
            if not isinstance(value, dict):
                return place
            return _first(_misfit(item, shape.shape, _join(place, name)) for name, item in value.items())
        case Maybe():
            return None if value is None else _misfit(value, shape.shape, place)
        case [inner]:
            if not isinstance(value, list):
                return place
            return _first(_misfit(item, inner, f"{place}[{number}]") for number, item in enumerate(value))
        case _:
            fits = isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
            return None if fits else place


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _first(misfits: Iterable[str | None]) -> str | None:
    return next((misfit for misfit in misfits if misfit is not None), None)
