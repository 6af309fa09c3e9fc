"""What plots stand on: the looks of arms."""

from lorascope.evaluation.scores import BASE
from lorascope.report.canvas import MAX_LINES, fitting_columns, looks_by_series, looks_of


def test_looks_differ_in_more_than_colour() -> None:
    looks = looks_of([f"r{n}" for n in range(MAX_LINES)])
    for key in ("colour", "marker", "dash"):
        assert len({str(getattr(looks[f"r{n}"], key)) for n in range(MAX_LINES)}) == MAX_LINES
    many = looks_of([f"r{n}" for n in range(30)], ("r7",))
    assert many["r7"].colour != many["r8"].colour == many[BASE].colour


def test_a_series_has_one_look_whichever_others_there_are() -> None:
    order = tuple("abcdef")
    looks, series = looks_by_series({"one": "a", "two": "c", "three": "c"}, order)
    assert list(series) == ["a", "c"]
    assert series["c"] == looks_by_series({"two": "c"}, order)[1]["c"]
    assert (looks["two"].colour, looks["two"].marker) == (looks["three"].colour, looks["three"].marker)
    assert looks["two"].dash != looks["three"].dash
    _, every = looks_by_series({name: name for name in order}, order)
    assert len({look.colour for look in every.values()}) == len({look.marker for look in every.values()}) == 6


def test_a_legend_has_fewer_columns_of_longer_names() -> None:
    assert [fitting_columns(["r16", "x" * length]) for length in (3, 18, 40)] == [3, 2, 1]
    assert fitting_columns([]) == 3
