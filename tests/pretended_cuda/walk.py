"""Run a study's stages on the pretended device: `python -m pretended_cuda.walk LIBRARY RUN_DIR [KEY=VALUE...]`.

The last line it prints is JSON: what was noted in each stage, and what was still alive after training.
"""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from pretended_cuda import guard

STAGES = ("check_inputs", "prepare_data", "encode", "train", "sample", "check_merge", "score", "report")


def walk(run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Events by stage, as [kind, operation, place, count], and the names of what outlived training."""
    import torch
    from pretended_cuda import device

    device.install()  # before the package takes what it replaces
    from lorascope.config import load_study
    from lorascope.machine import speed
    from lorascope.study import Study
    from lorascope.training import step, tuning

    # Timed as a GPU is, on less work: all of it is done by this CPU.
    speed._SIDE["cuda"] = 64
    tuning._ATTENTION_FLOPS["cuda"], tuning._PASS_FLOPS["cuda"], tuning._LEAST_FLOPS = 1e5, 1e7, 0.0
    tuning._MOST_S, tuning._REPLAYS = 2.0, 1
    study = Study(load_study(preset="smoke", overrides=["device=cuda", *overrides], environment={}), run_dir)
    seen, outlived = {}, []
    with study.working("walk"):
        for stage in STAGES:
            first = len(device.EVENTS)
            gc.collect()
            gc.disable()
            began = time.monotonic()
            getattr(study, stage)()
            print(f"{stage}: {time.monotonic() - began:.1f} s", file=sys.stderr)
            if stage == "train":
                kinds = (step.Step, step.Recorded, torch.cuda.CUDAGraph)
                outlived = [type(item).__name__ for item in gc.get_objects() if isinstance(item, kinds)]
            gc.enable()
            counts: dict[device.Event, int] = {}
            for event in device.EVENTS[first:]:
                counts[event] = counts.get(event, 0) + 1
            seen[stage] = [[*event, count] for event, count in counts.items()]
    return {"events": seen, "outlived": outlived}


if __name__ == "__main__":
    guard.load(Path(sys.argv[1]))
    print(json.dumps(walk(Path(sys.argv[2]), sys.argv[3:])))
