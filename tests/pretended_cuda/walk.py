"""Run a study's stages on the pretended device: `python -m pretended_cuda.walk LIBRARY RUN_DIR STUDY.toml`.

The last line it prints is JSON: what was noted in each stage, and what was still alive after training.
"""

import gc
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pretended_cuda import guard

STAGES = (
    "check_inputs",
    "prepare_data",
    "encode",
    "train",
    "sample",
    "check_merge",
    "score",
    "diagnose",
    "report",
)


def walk(run_dir: Path, study_file: Path) -> dict[str, Any]:
    """Events by stage, as [kind, operation, place, count], and the names of what outlived training."""
    import torch

    from pretended_cuda import device

    device.install()  # before the package takes what it replaces
    from lorascope.config import load_study
    from lorascope.doctor import examination, kernels
    from lorascope.machine import speed
    from lorascope.study import Study
    from lorascope.training import step, timing, tuning

    # Timed as a GPU is, on less work: all of it is done by this CPU.
    speed._SIDE["cuda"] = 64
    tuning._ATTENTION_FLOPS["cuda"], timing._PASS_FLOPS["cuda"], tuning._LEAST_FLOPS = 1e4, 1e6, 0.0
    tuning._MOST_S, timing._REPLAYS = 2.0, 1
    kernels._ATTENTION_FLOPS["cuda"] = 1e6
    examination._PASS_FLOPS["cuda"], examination._MAX_SIDE_PX["cuda"] = 1e7, 32
    study = Study(load_study(study_file, overrides=["device=cuda"], environment={}), run_dir)
    seen: dict[str, Any] = {}
    outlived: list[str] = []
    with study.working("walk"):
        for stage in STAGES:
            first = len(device.EVENTS)
            gc.collect()
            gc.disable()  # what only a collection would free has outlived its use
            began = time.process_time()
            getattr(study, stage)()
            print(f"{stage}: {time.process_time() - began:.1f} s of the processor", file=sys.stderr)
            if stage == "train":
                kinds = (step.Step, step.Recorded, torch.cuda.CUDAGraph)
                outlived = [type(item).__name__ for item in gc.get_objects() if type(item) in kinds]
            gc.enable()
            counts = Counter(device.EVENTS[first:])
            seen[stage] = [[*event, count] for event, count in counts.items()]
    return {"events": seen, "outlived": outlived}


if __name__ == "__main__":
    guard.load(Path(sys.argv[1]))
    print(json.dumps(walk(Path(sys.argv[2]), Path(sys.argv[3]))))
