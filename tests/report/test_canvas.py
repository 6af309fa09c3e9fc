"""What plots stand on: the looks of arms."""

from lorascope.evaluation.scores import BASE
from lorascope.report.canvas import MAX_LINES, looks_of


def test_looks_differ_in_more_than_colour() -> None:
    looks = looks_of([f"r{n}" for n in range(MAX_LINES)])
    for key in ("colour", "marker", "dash"):
        assert len({str(getattr(looks[f"r{n}"], key)) for n in range(MAX_LINES)}) == MAX_LINES
    many = looks_of([f"r{n}" for n in range(30)], ("r7",))
    assert many["r7"].colour != many["r8"].colour == many[BASE].colour
