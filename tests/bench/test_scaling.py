"""What is measured of growing adapters, ranks and batches, and how it is drawn."""

import torch

from lorascope.bench.scaling import plan_scaling
from lorascope.bench.table import draw_scaling


def test_scaling_goes_over_adapters_rank_and_batch() -> None:
    points = plan_scaling(torch.device("cpu"))
    assert [(what, value) for what, value, *_ in points if what != "batch"] == [
        *(("adapters", count) for count in (1, 2, 4, 8)),
        *(("rank", rank) for rank in (4, 16, 64, 128)),
    ]
    drawn = [
        {"what": "adapters", "value": 1, "step_ms": 5.0, "memory_bytes": 2**30},
        {"what": "rank", "value": 4, "reason": "full"},
    ]
    assert b"adapters in one pass" in draw_scaling(drawn).file_svg
