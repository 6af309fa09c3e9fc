"""A run folder with every file ARCHITECTURE.md lists, made from arithmetic: no training, no model, no clock.

Run as a script, it writes one for a look at the report: `python tests/synthetic_run.py FOLDER [many|kinds]`.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image, ImageDraw

from lorascope.arms import Arm, Kind
from lorascope.diagnosis.causes import decide_all
from lorascope.diagnosis.layers import LayerFigures
from lorascope.diagnosis.nearest import compare, keep_nearest
from lorascope.diagnosis.record import write_diagnosis
from lorascope.diagnosis.signals import (
    ArmSignals,
    make_signal,
    sweep_signals,
    trace_fronts,
    training_signals,
)
from lorascope.evaluation.choice import choose_by_arm, choose_point
from lorascope.evaluation.scores import ScoreRow, Scores, write_scores
from lorascope.evaluation.sweep_rows import Point, StyleFacts, Sweep, SweepRow, read_sweep, write_sweep
from lorascope.run_folder import JsonLines, RunDir
from lorascope.schema import StudyConfig
from lorascope.store import digest_bytes, write_json, write_text

NORMAL = (
    "a man reading a newspaper",
    "a dog in the rain",
    "two apples on a table",
    "a red bicycle",
    "a cat on a chair",
    "a house by the sea",
    "a woman with an umbrella",
    "a train in the snow",
    "a bowl of soup",
    "a child flying a kite",
    "an old clock",
    "a green bus",
    "a bird on a branch",
    "a pair of shoes",
    "a slice of cake",
    "a fish in a bowl",
    "a boat on a lake",
    "a tall tree",
    "a yellow taxi",
    "a cup of coffee",
    "a horse in a field",
    "a guitar",
    "a pile of books",
    "a street at night",
    "a bunch of flowers",
)
ABSTRACT = (
    "waiting for a shape to appear",
    "the weight of silence",
    "a thought that turns around",
    "time folding in on itself",
    "almost remembering",
    "the colour of a promise",
    "hope at the edge",
    "the sound of nothing",
    "a slow idea",
    "distance between friends",
    "the end of a question",
    "balance without rest",
    "a door that is not there",
    "the first minute",
    "an argument with the wind",
    "borrowed light",
    "patience",
    "a memory of water",
    "the opposite of noise",
    "a quiet victory",
    "what the map forgot",
    "a rule that bends",
    "fear of the small",
    "growing backwards",
    "the space inside a word",
)
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
SCORER = {
    "model": "pocket",
    "digest": "c" * 64,
    "dtype": "float32",
    "preprocessing": "64 px, bicubic",
    "scale": "100 x cosine",
}
BANDS = ("0-250", "250-500", "500-750", "750-1000")


def make_run(
    path: Path,
    ranks: Sequence[int] = (16, 64),
    lrs: Sequence[float] = (5e-4,),
    training_seeds: Sequence[int] = (0,),
    num_prompts: int = 25,
    sample_seeds: Sequence[int] = (0,),
    side_px: int = 64,
    failed: Sequence[str] = (),
    stages: Sequence[str] = ("data", "encode", "train", "sample", "merge_check", "score", "diagnose"),
    with_probes: bool = True,
    odd_text: str | None = None,
    num_steps: int = 600,
    kinds: Sequence[Kind] = ("lora",),
) -> RunDir:
    """Write the run folder at `path`: base model and scorer are called `pocket`; `odd_text` becomes the first
    prompt and caption. Of each of the `kinds` there are all arms.
    """
    run = RunDir(path)
    rng = np.random.default_rng(7)
    config = StudyConfig.model_validate(
        {
            "name": path.name,
            "arms": [
                {
                    "kind": kind,
                    **({} if kind == "full" else {"rank": list(ranks), "alpha_per_rank": 2.0}),
                    "lr": list(lrs),
                    "seed": list(training_seeds),
                }
                for kind in kinds
            ],
            "train": {"epochs": 4},
            "sample": {"num_prompts": num_prompts, "seeds": list(sample_seeds)},
            "score": {"resamples": 500},
        }
    )
    write_text(run.study_toml, config.to_toml())
    facts = {
        name: {"inputs": digest_bytes(name.encode()), "seconds": 10.0 + 7 * i}
        for i, name in enumerate(stages)
    }
    run.describe(
        lorascope="0.1.0",
        versions={"numpy": "2.0.0", "torch": "2.13.0+cpu"},
        commit="0" * 40,
        command="lorascope study study.toml",
        device={"name": "synthetic CPU", "threads": 2, "memory_bytes": 8 * 2**30},
        started="2026-01-02T03:04:05Z",
        finished="2026-01-02T03:14:05Z",
        base={
            "model": "pocket",
            "digest": "b" * 64,
            "parameters": {"unet": 12_600_000, "vae": 1_200_000, "text_encoder": 2_000_000},
            "prediction_type": "epsilon",
            "dtype": "float32",
        },
        adapter={"modules": 60, "targets": list(config.adapter.targets)},
        stages=facts,
    )
    if "data" in stages:
        _write_data(run, odd_text)
    arms = [arm for arm in config.expand_arms() if arm.name not in failed]
    if "train" in stages:
        _write_training(run, list(config.expand_arms()), failed, with_probes, num_steps, rng)
    if "merge_check" in stages:
        write_json(
            run.merge_check_json,
            {
                arm.name: {
                    "relative_error": 3e-7 * (1 + i),
                    "tolerance": 1e-3,
                    "mean_pixel_difference": 0.0,
                    "ok": True,
                }
                for i, arm in enumerate(arms)
                if arm.kind != "tlora"  # which has no merged weights
            },
        )
    if "sample" in stages:
        _write_samples(run, arms, config, num_prompts, side_px, odd_text, rng, with_scores="score" in stages)
    if "diagnose" in stages:
        _write_sweep(run, arms, min(num_prompts, 12), side_px, odd_text)
        if "data" in stages:
            _write_nearest(run, arms, side_px)
        _write_diagnosis(run, list(config.expand_arms()), failed)
    return run


def _write_data(run: RunDir, odd_text: str | None) -> None:
    def entry(index: int) -> dict[str, str]:
        caption = odd_text if odd_text is not None and index == 0 else f"drawing number {index}"
        return {"id": f"row-{index:04d}", "caption": caption, "digest": digest_bytes(str(index).encode())}

    write_json(
        run.data_json,
        {
            "source": "pocket",
            "resolution_px": 64,
            "num_rows": 132,
            "num_train": 100,
            "num_heldout": 28,
            "split": "the source's own test split",
            "refused": [{"id": "row-0130", "reason": "no caption"}],
            "treated": [{"id": "row-0007", "treatment": "transparent: laid on white"}],
            "duplicates": [{"kind": "near", "ids": ["row-0003", "row-0131"], "action": "row-0131 left out"}],
            "train": [entry(i) for i in range(100)],
            "heldout": [entry(i) for i in range(100, 128)],
            "caption_tokens": {"min": 3, "median": 6, "max": 11},
            "fingerprint": "f" * 64,
        },
    )


# By kind: doublings of the gain, and size and time over those of LoRA.
_PUSHES = {"tlora": -0.3, "dora": 0.2, "loha": -0.1, "lokr": -0.5, "full": -2.2}
_SIZES = {"dora": 1.1, "loha": 2.0, "lokr": 0.2, "full": 0.2}
_TIMES = {"dora": 1.19, "loha": 1.4, "lokr": 1.1, "full": 1.6}


def _passes(arms: Sequence[Arm]) -> Iterator[list[Arm]]:
    """The arms of each pass: of one family, and DoRA apart."""
    alike: dict[tuple[str, bool], list[Arm]] = {}
    for arm in arms:
        alike.setdefault((arm.family, arm.kind == "dora"), []).append(arm)
    yield from alike.values()


def _gain(arm: Arm) -> float:
    """Doublings of an arm's gain from 0.004, that of rank 16 at lr 5e-4 and alpha = 2 rank; other kinds act
    as LoRA of a little less or more.
    """
    return math.log2(arm.lr * arm.scale * math.sqrt(arm.rank) / 4e-3) + _PUSHES.get(arm.kind, 0.0)


def _damage(arm: Arm) -> float:
    """How far an arm is off, from its gain: small gains help a little, large ones harm."""
    gain = _gain(arm)
    return 0.6 - 0.4 * gain - 1.1 * max(0.0, gain) ** 2 + 0.25 * math.sin(arm.seed)


def _write_training(
    run: RunDir,
    planned: list[Arm],
    failed: Sequence[str],
    with_probes: bool,
    num_steps: int,
    rng: np.random.Generator,
) -> None:
    log = JsonLines(run.metrics_jsonl)
    arms = [arm for arm in planned if arm.name not in failed]
    if with_probes:
        for split in ("train", "heldout"):
            for conditional in (True, False):
                for i, band in enumerate((*BANDS, "all")):
                    log.append(
                        {
                            "kind": "probe",
                            "step": 0,
                            "epoch": 0,
                            "arm": "base",
                            "split": split,
                            "band": band,
                            "conditional": conditional,
                            "loss": 0.3 / (i + 1),
                            "difference": 0.0,
                            "difference_low": 0.0,
                            "difference_high": 0.0,
                            "count": 32,
                        }
                    )
    shared = rng.lognormal(-2.0, 0.5, num_steps)
    for step in range(1, num_steps + 1):
        epoch = 4 * step / num_steps
        for arm in planned:
            if arm.name in failed and step > 40:
                continue
            loss = float(
                shared[step - 1] * (0.85 + 0.25 * math.exp(-step / 150) + 0.01 * math.log2(arm.rank))
            )
            log.append(
                {
                    "kind": "train",
                    "step": step,
                    "epoch": epoch,
                    "arm": arm.name,
                    "loss": loss,
                    "grad_norm": 0.2,
                    "lr": arm.lr,
                }
            )
        if with_probes and step % (num_steps // 4) == 0:
            for arm in arms:
                for split in ("train", "heldout"):
                    for conditional in (True, False):
                        for i, band in enumerate((*BANDS, "all")):
                            gap = 0.0015 * epoch * math.log2(arm.rank) / 4 if split == "heldout" else 0.0
                            difference = (-0.012 + gap - 0.002 * i) * (1.0 if conditional else 0.5)
                            log.append(
                                {
                                    "kind": "probe",
                                    "step": step,
                                    "epoch": epoch,
                                    "arm": arm.name,
                                    "split": split,
                                    "band": band,
                                    "conditional": conditional,
                                    "loss": 0.3 / (i + 1) + difference,
                                    "difference": difference,
                                    "difference_low": difference - 0.003,
                                    "difference_high": difference + 0.003,
                                    "count": 32,
                                }
                            )
    log.close()
    for arm, group in ((arm, own) for own in _passes(planned) for arm in own):
        size = _SIZES.get(arm.kind, 1)
        folder = run.adapters_dir / arm.name
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "name": arm.name,
            "rank": arm.rank,
            "alpha": arm.alpha,
            "lr": arm.lr,
            "seed": arm.seed,
            "arm": arm.name,
            "scale": arm.scale,
            "steps": num_steps,
            "epochs": 4,
            "modules": 60,
            "parameters": round(60_000 * size * arm.rank),
            "group": [other.name for other in group],
            "run_time_s": round(184.5 * _TIMES.get(group[0].kind, 1) * len(group) / len(planned), 3),
            "images_per_s": 13.0,
            "peak_memory_bytes": 900_000_000 + 2_000_000 * arm.rank,
            "peak_memory_kind": "rss",
            "failed": "loss or gradient is not finite at step 41" if arm.name in failed else None,
        }
        if arm.name not in failed:
            (folder / "adapter_model.safetensors").write_bytes(b"synthetic")
            facts |= {
                "file_bytes": round(240_000 * size * arm.rank),
                "final_loss": 0.118 + 0.0006 * math.log2(arm.rank),
            }
        write_json(folder / "training.json", facts)


def _write_samples(
    run: RunDir,
    arms: list[Arm],
    config: StudyConfig,
    num_prompts: int,
    side_px: int,
    odd_text: str | None,
    rng: np.random.Generator,
    with_scores: bool,
) -> None:
    prompts = {"normal": list(NORMAL[:num_prompts]), "abstract": list(ABSTRACT[:num_prompts])}
    if odd_text is not None:
        prompts["normal"][0] = odd_text
    rows: list[ScoreRow] = []

    def add(
        kind: str,
        name: str,
        category: str,
        index: int,
        prompt: str,
        seed: int,
        score: float,
        image: str = "",
        arm: Arm | None = None,
    ) -> None:
        rank = arm.rank if arm else 0 if name == "base" else None
        alpha, lr, training_seed = (arm.alpha, arm.lr, arm.seed) if arm else (None, None, None)
        digest = digest_bytes(image.encode()) if image else ""
        rows.append(
            ScoreRow(
                kind,
                name,
                rank,
                alpha,
                lr,
                training_seed,
                category,
                index,
                prompt,
                seed,
                score,
                image,
                digest,
            )
        )

    for category, level in (("normal", 27.0), ("abstract", 22.0)):
        for index, prompt in enumerate(prompts[category]):
            easy = float(rng.normal(0, 2))
            for seed in config.sample.seeds:
                for name, arm in (("base", None), *((arm.name, arm) for arm in arms)):
                    damage = 0.0 if arm is None else _damage(arm) * (1 if category == "normal" else 0.5)
                    score = level + easy + damage + float(rng.normal(0, 1))
                    image = f"images/{name}/{category}-{index:03d}-{seed}.png"
                    _draw(
                        run.path / image,
                        index,
                        category,
                        seed,
                        side_px,
                        0.0 if arm is None else -damage,
                        None if arm is None else arm.rank,
                    )
                    add("arm", name, category, index, prompt, seed, score, image, arm)
                    if name == "base":
                        add(
                            "calibration",
                            "shuffled prompts",
                            category,
                            index,
                            prompt,
                            seed,
                            16 + float(rng.normal(0, 1.5)),
                            image,
                        )
            add("calibration", "noise", category, index, prompt, 0, 14 + float(rng.normal(0, 0.8)))
    for index in range(28):
        add(
            "calibration",
            "real held-out",
            "captions",
            index,
            f"drawing number {100 + index}",
            0,
            30 + float(rng.normal(0, 2)),
        )
    if not with_scores:
        return
    write_scores(run, Scores.from_rows(rows, SCORER))


def _write_sweep(run: RunDir, arms: list[Arm], num_prompts: int, side_px: int, odd_text: str | None) -> None:
    """Every arm at four strengths: style grows with strength, prompt fidelity falls with its square, and both
    with the gain.
    """
    rng = np.random.default_rng(11)
    rows: list[SweepRow] = []
    for category, level, texts in (("normal", 27.0, NORMAL), ("abstract", 22.0, ABSTRACT)):
        for index, text in enumerate(texts[:num_prompts]):
            prompt = odd_text if odd_text is not None and (category, index) == ("normal", 0) else text
            score = level + float(rng.normal(0, 2))
            points = [(None, 0.0), *((arm, strength) for arm in arms for strength in STRENGTHS)]
            for arm, strength in points:
                gain = _gain(arm) if arm else 0.0
                lost, style = 1.2 * 3**gain * strength**2, 0.42 * 1.3**gain * strength
                point = Point(arm.name if arm else "base", "last", strength)
                image = f"sweep/{point.arm}/{point.folder}/{category}-{index:03d}-0.png"
                path = run.path / image
                _draw(path, index, category, 0, side_px, lost, arm.rank if arm else None)
                row = SweepRow(
                    kind="point",
                    arm=point.arm,
                    rank=arm.rank if arm else 0,
                    alpha=arm.alpha if arm else None,
                    lr=arm.lr if arm else None,
                    training_seed=arm.seed if arm else None,
                    epoch="last",
                    strength=strength,
                    guidance=point.guidance,
                    unconditional="own",
                    category=category,
                    prompt_index=index,
                    prompt=prompt,
                    seed=0,
                    clip_score=score - lost + float(rng.normal(0, 0.5)),
                    style=style + float(rng.normal(0, 0.05)),
                    image=image,
                    image_digest=digest_bytes(image.encode()),
                )
                rows.append(row)
                if arm is None:
                    floor = 16 + float(rng.normal(0, 0.8))
                    rows.append(replace(row, kind="shuffled", clip_score=floor))
    write_sweep(run, Sweep(tuple(rows), SCORER, StyleFacts(0.97, 2, 28, None)))


def _write_diagnosis(run: RunDir, planned: Sequence[Arm], failed: Sequence[str]) -> None:
    """Signals that go with the sweep: with the gain, updates grow and guidance leaves the base's."""
    fronts = trace_fronts(read_sweep(run), resamples=500)
    chosen = choose_by_arm(fronts.own, choose_point(fronts.own, resamples=500), resamples=500)
    signals = []
    for arm in planned:
        gain = _gain(arm)
        size = 0.1 * 2.0**gain
        measured = {
            "heldout": -0.03 - 0.01 * gain,
            "train_gap": 0.004,
            "rise": 0.0,
            "gain_ratio": 0.6,
            "guidance_cosine": min(1.0, 0.5 * 2.0**-gain),
        }
        found = {
            key: make_signal(key, value, low=value - 0.01, high=value + 0.01, count=24)
            for key, value in measured.items()
        }
        found["intruder_share"] = make_signal("intruder_share", min(1.0, 0.4 * size), control=0.0, count=60)
        found["norm_ratio"] = make_signal("norm_ratio", size, count=60)
        sound = ("finite_losses", "finite_pictures", "merge_ok", "file_ok")
        found |= {key: make_signal(key, 1.0) for key in sound}
        fields = training_signals([], arm.name, "loss is not finite" if arm.name in failed else None)
        if arm.name not in failed:
            layers = _layers(arm, size) if arm.has_factors else ()
            fields |= {**found, **sweep_signals(fronts, arm.name), "layers": layers}
            point = chosen.get(arm.name)
            fields |= {"chosen": (point.epoch, point.strength) if point else None}
        signals.append(ArmSignals(arm, best_epoch=4, num_train=100, caption_dropout=0.1, **fields))
    write_diagnosis(run, decide_all(signals))


def _write_nearest(run: RunDir, arms: Sequence[Arm], side_px: int) -> None:
    """Drawings at full strength beside scenes of their own; the first training picture is near one."""
    sweep = read_sweep(run)
    rows = {arm.name: sweep.of(Point(arm.name, "last", 1.0)) for arm in arms}
    drawn = {arm: [np.asarray(Image.open(run.path / row.image)) for row in own] for arm, own in rows.items()}
    scenes = []
    for index in range(20):
        path = run.path / "scene.png"
        _draw(path, 0 if index == 0 else 100 + index, "normal", 0, side_px, 0.0, None)
        scenes.append(np.asarray(Image.open(path).convert("RGB")))
        path.unlink()
    kinds = scenes[:10], scenes[10:]
    compared = {arm: compare(pictures, *kinds) for arm, pictures in drawn.items()}
    keep_nearest(run, rows, compared, *kinds)


def _layers(arm: Arm, size: float) -> tuple[LayerFigures, ...]:
    """Updates that grow towards the output, and are larger in what reads the prompt."""
    places = [
        f"{side}_blocks.{block}" for side, blocks in (("down", "012"), ("up", "123")) for block in blocks
    ]
    paths = [f"unet.{place}.attentions.{n}" for place in places[:3] for n in (0, 1)]
    paths += ["unet.mid_block.attentions.0"]
    paths += [f"unet.{place}.attentions.{n}" for place in places[3:] for n in (0, 1, 2)]
    found = []
    for depth, path in enumerate(paths):
        for attention in (1, 2):
            for n, kind in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
                layer = f"{path}.transformer_blocks.0.attn{attention}.{kind}"
                ratio = size * (0.5 + depth / len(paths)) * (0.7 + 0.15 * n) * attention / 1.5
                found.append(LayerFigures(layer, arm.rank, ratio, 1.5 * ratio, 3.0, 8, 10, 0))
    return tuple(found)


def _draw(
    path: Path, index: int, category: str, seed: int, side_px: int, damage: float, rank: int | None
) -> None:
    """A plain scene per prompt and seed; arms flatten its colours, damage adds noise."""
    rng = np.random.default_rng([index, seed, category == "normal"])
    sky, ground, thing = rng.integers(60, 255, (3, 3))
    image = Image.new("RGB", (side_px, side_px), tuple(int(c) for c in sky))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, side_px * 0.7, side_px, side_px), fill=tuple(int(c) for c in ground))
    x, y, r = (rng.uniform(0.25, 0.75, 3) * side_px).tolist()
    box = (x - r / 2, y - r / 2, x + r / 2, y + r / 2)
    if category == "normal":
        draw.ellipse(
            box,
            fill=tuple(int(c) for c in thing),
            outline=None if rank is None else (20, 20, 20),
            width=max(1, side_px // 32),
        )
    else:
        draw.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=tuple(int(c) for c in thing))
    if damage > 0.5:
        pixels = np.asarray(image, dtype=np.float64) + rng.normal(0, 18 * damage, (side_px, side_px, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=1)


if __name__ == "__main__":
    look = sys.argv[2] if len(sys.argv) > 2 else ""
    kinds: tuple[Kind, ...] = get_args(Kind) if look == "kinds" else ("lora",)
    many = look == "many"
    ranks, lrs = ((4, 8, 16, 32, 64, 128), (1e-4, 2e-4, 5e-4, 1e-3)) if many else ((16, 64), (5e-4,))
    print(make_run(Path(sys.argv[1]), ranks, lrs, sample_seeds=(0, 1), kinds=kinds).path)
