"""The plot of prompts against style, without a run."""

import re

from lorascope.report.canvas import looks_of
from lorascope.report.front_plot import Mark, draw_front


def test_the_prices_label_has_room_where_every_arm_keeps_nearly_all() -> None:
    marks = [Mark("r16", strength, strength / 2, 100 - strength) for strength in (0.5, 1.0)]
    drawing = draw_front(marks, looks_of(["r16"]), (0.0, 100.0), 90.0, "style", "kept, %")
    low, least, high = (
        float(value) for value in re.findall(r'data-(?:low|least|high)="([^"]*)"', drawing.page_svg)
    )
    assert least == 90 and (least - low) / (high - low) > 0.07
