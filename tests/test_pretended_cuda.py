"""The CUDA paths on a pretended device (`pretended_cuda`): every stage, what waits, what is held too long."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import make_pictures, make_pipeline_folder
from lorascope.store import read_json
from pretended_cuda import guard

# Where training may wait for the device: before and after the steps, in checkpoints and at the end of an
# epoch.
_BESIDE_STEPS = {
    "parked",
    "AdapterBank.__init__",
    "_plan_masks",
    "AdapterBank._put",
    "_Stacked.bind",
    "AdapterBank._select",
    "MixedBank.select",
    "AdapterBank.unpadded",
    "AdapterBank.adapter",
    "Trainer.save_checkpoint",
    "_probe_selected",
    "probe_losses",
}
# Where drawing may: before the first step of a batch, and after the last, when its pictures are checked and
# taken.
_BESIDE_DENOISING = {
    "AdapterBank.__init__",
    "_plan_masks",
    "AdapterBank._put",
    "_Stacked.bind",
    "AdapterBank._select",
    "MixedBank.select",
    "Painter.draw",
    "Autoencoder._in_bounds",
    "to_bytes",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    return guard.build(tmp_path_factory.mktemp("guard"))


def _walk(library: Path, study: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The run folder of a study on the pretended device, and what was seen."""
    (folder / "study.toml").write_text(study)
    paths = (str(path) for path in (library, folder / "run", folder / "study.toml"))
    done = subprocess.run(
        [sys.executable, "-m", "pretended_cuda.walk", *paths],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", json.loads(done.stdout.splitlines()[-1])


def _stretched(png: bytes, sides: tuple[int, int], path: Path) -> None:
    Image.open(io.BytesIO(png)).resize(sides).save(path)


def _waits(seen: dict[str, Any], stage: str) -> dict[tuple[str, str], int]:
    """How often the host waited for the device in a stage, by kind and function."""
    counts: dict[tuple[str, str], int] = {}
    for kind, _, place, count in seen["events"][stage]:
        if kind != "async copy":
            key = kind, place.split(" ")[-1]
            counts[key] = counts.get(key, 0) + count
    return counts


def _check_waits(run: Path, seen: dict[str, Any]) -> None:
    """A step may wait for the record of the one before, a batch of pictures for a check and itself."""
    steps = max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())
    training = _waits(seen, "train")
    num_passes = len(read_json(run / "groups.json")["groups"])
    assert training.pop(("wait", "_Pending.wait"), 0) <= steps * num_passes
    assert {place for _, place in training} <= _BESIDE_STEPS, training
    sampling = _waits(seen, "sample")
    assert {place for _, place in sampling} <= _BESIDE_DENOISING, sampling


@pytest.fixture(scope="module")
def broad(
    library: Path, scorer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The blocks of SD v1.5's U-Net, thin; fp16, buckets, text encoder, two seeds, several kinds, an arm that
    fails.
    """
    folder = tmp_path_factory.mktemp("broad")
    cross = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
    make_pipeline_folder(
        folder / "base",
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=(*cross[0], "DownBlock2D"),
        up_block_types=("UpBlock2D", *cross[1]),
        norm_num_groups=4,
    )
    for side, kind in ((96, "wide"), (56, "square")):
        for index, (png, caption) in enumerate(make_pictures(6, seed=side)):
            (folder / "pictures").mkdir(exist_ok=True)
            picture = folder / "pictures" / f"{kind}-{index}.png"
            _stretched(png, (side, 56), picture)
            picture.with_suffix(".txt").write_text(f"{kind}, {caption}")
    (folder / "prompts.txt").write_text("[normal]\nwide\nsquare\n")
    choices = 'kind = "tlora", mask_when = "training", '
    choices += "lr_ratio = 4, max_weight_norm = 0.1, rank_dropout = 0.1"
    return _walk(
        library,
        f"""
        base.model = "{folder / "base"}"
        data.source = "{folder / "pictures"}"
        data.resolution_px = 64
        data.buckets = true
        data.bucket_step_px = 16
        data.heldout_share = 0.2
        arms = [
            {{ rank = 2, lr = 1e-3, seed = [0, 1], {choices} }},
            {{ rank = 4, lr = 1e20, seed = 0 }},
            {{ rank = 5, lr = 1e-3, kind = "tlora", init = "random-svd" }},
            {{ kind = "full", lr = 1e-4 }},
        ]
        adapter.groups = [{{ component = "text_encoder", targets = ["q_proj", "v_proj"] }}]
        train.epochs = 2
        train.batch_size = 2
        train.accumulation_steps = 2
        train.num_probe = 2
        train.checkpoint_every_steps = 2
        train.precision = "fp16"
        sample = {{ prompts = "{folder / "prompts.txt"}", steps = 2, seeds = [0, 1] }}
        score = {{ model = "{scorer_folder}", resamples = 100 }}
        diagnose = {{ strengths = [0.5, 1.0], steps = 2, guidances = [3.0], num_guidance_prompts = 1 }}
        """,
        folder,
    )


def test_every_stage_passes_and_waits_only_beside_steps(broad: tuple[Path, dict[str, Any]]) -> None:
    run, seen = broad
    _check_waits(run, seen)
    merged = read_json(run / "merge_check.json").values()
    # Where torch allows it, the device rounds convolutions to TF32, which the check would not forgive.
    assert merged and all(check["ok"] for check in merged)
    assert not seen["outlived"], "recordings hold gigabytes: nothing may keep them"
    assert (run / "report.html").exists()


def test_the_broad_study_was_broad(broad: tuple[Path, dict[str, Any]]) -> None:
    run, _ = broad
    facts = {arm: read_json(run / "adapters" / arm / "training.json") for arm in ("r2-s0", "r2-s1", "r4-s0")}
    assert [bool(fact["failed"]) for fact in facts.values()] == [False, False, True]
    assert {fact["step"] for fact in facts.values()} == {
        "a CUDA graph for forward and backward, one for clipping and AdamW"
    }
    data = read_json(run / "data.json")
    assert len(data["buckets"]) == 2
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in losses if line["arm"].startswith("r2"))


def test_the_first_start_finds_every_fast_path_right(broad: tuple[Path, dict[str, Any]]) -> None:
    """Recorded steps are replayed there, at the addresses of their recording."""
    run, _ = broad
    [kept] = read_json(run.parent / "cache" / "lorascope" / "doctor.json").values()
    found = {finding["check"]: finding["status"] for finding in kept["findings"]}
    assert set(found.values()) == {"ok"}
    assert {"attention cudnn", "channels_last", "recorded step", "half-precision VAE"} <= set(found)
