"""What every arm draws at several strengths, guidance scales and epochs: planned, drawn and scored.

All points of one guidance scale are slices of the same batches, from the same initial noise. A picture at a
lower strength shows what the same adapter does when it is given less weight: nothing is trained for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lorascope.adapters.bank import Slice
from lorascope.adapters.mixed import Bank
from lorascope.adapters.schedule import schedule_of
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.errors import StorageError
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import Job, draw_all, plan_jobs
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.scoring import Encoder, clip_score, derange
from lorascope.evaluation.sweep_rows import (
    SCALED_INTRUDERS,
    Epoch,
    Point,
    Slot,
    SweepRow,
    cut_to,
    name_of,
    order_rows,
)
from lorascope.run_folder import RunDir
from lorascope.sections import DiagnoseSection, SampleSection


class StyleEncoder(Encoder, Protocol):
    """What a sweep needs of `features.ClipEncoder`."""

    def encode_images_and_hidden(
        self, pictures: Sequence[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...


_RANKS_OF_FULL = (4, 16, 64)  # that it is cut to in a study of nothing else


@dataclass(frozen=True)
class Part:
    """Points that are drawn together: the same jobs, guidance, unconditional branch and kind of weights."""

    points: tuple[Point, ...]
    jobs: tuple[Job, ...]
    section: SampleSection

    @property
    def num_pictures(self) -> int:
        """Pictures to draw."""
        return len(self.points) * len(self.jobs)

    @property
    def weights(self) -> str:
        """The weights of its adapters: as trained, or which edit of them."""
        return self.points[0].weights


def plan_edits(arms: Sequence[Arm], section: DiagnoseSection) -> dict[str, tuple[str, ...]]:
    """The edits that an arm's adapter is drawn with, by arm: `arms` are all of the study, of which those
    above the lowest rank are cut to it, and full fine-tuning to every rank of the others. T-LoRA, whose
    components are in an order, and DoRA, whose magnitudes belong to the whole update, are not edited, nor
    are LoHa and LoKr.
    """
    ranks = sorted({arm.rank for arm in arms if arm.kind != "full"}) or list(_RANKS_OF_FULL)
    scaled = (SCALED_INTRUDERS,) if section.scale_intruders else ()
    edits: dict[str, tuple[str, ...]] = {}
    for arm in arms:
        if arm.kind == "full":
            edits[arm.name] = tuple(map(cut_to, ranks)) if section.cut_rank else ()
        elif arm.has_factors and schedule_of(arm) is None:
            is_cut = section.cut_rank and arm.rank > ranks[0]
            edits[arm.name] = (*scaled, cut_to(ranks[0])) if is_cut else scaled
    return edits


def plan_sweep(
    arms: Mapping[str, Sequence[Epoch]],
    prompts: Sequence[Prompt],
    sample: SampleSection,
    section: DiagnoseSection,
    edits: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[Part]:
    """The sweep's parts: strengths at the study's guidance; then, of the last epoch at strength 1, the base's
    unconditional branch, other guidance scales, and each of `edits`.

    `arms` gives the epochs whose adapters an arm has, of those that `section.epochs` asks for, and `edits` is
    as of `plan_edits`. The base is a point of every guidance scale. Where guidance is off there is no
    unconditional branch to change.
    """
    drawn = sample.model_copy(update={"steps": section.steps, "scheduler": section.scheduler})
    jobs = tuple(plan_jobs(first_of_each(prompts, section.num_prompts), section.seeds))
    few = tuple(plan_jobs(first_of_each(prompts, section.num_guidance_prompts), section.seeds[:1]))
    num_tried = min(section.num_prompts, section.num_intervention_prompts)
    tried = tuple(plan_jobs(first_of_each(prompts, num_tried), section.seeds))
    guidance = sample.guidance
    last = [arm for arm, epochs in arms.items() if "last" in epochs]
    pairs = [(arm, epoch) for arm, epochs in arms.items() for epoch in epochs]
    strengths = [
        Point(arm, epoch, strength, guidance) for arm, epoch in pairs for strength in section.strengths
    ]
    parts = [Part((Point(BASE, "last", 0.0, guidance), *strengths), jobs, drawn)]
    if section.swap_unconditional and guidance != 1 and last:
        swapped = tuple(Point(arm, "last", 1.0, guidance, "base") for arm in last)
        parts.append(Part(swapped, tried, drawn))
    for scale in section.guidances:
        if scale != guidance:
            points = (Point(BASE, "last", 0.0, scale), *(Point(arm, "last", 1.0, scale) for arm in last))
            parts.append(Part(points, few, drawn.model_copy(update={"guidance": scale})))
    for edit in dict.fromkeys(edit for arm in last for edit in edits.get(arm, ())):
        edited = [
            Point(arm, "last", 1.0, guidance, weights=edit) for arm in last if edit in edits.get(arm, ())
        ]
        parts.append(Part(tuple(edited), tried, drawn))
    return parts


def first_of_each(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first so many prompts of each category, in their order."""
    return [prompt for prompt in prompts if prompt.index < count]


def draw_sweep(
    run: RunDir,
    base: Base,
    bank: Bank,
    places: Mapping[Slot, int],
    parts: Sequence[Part],
    latent_shape: tuple[int, ...],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Draw what is not drawn yet. `places` says where in the attached `bank` an arm's adapter lies, of an
    epoch and with such weights.

    Raises as `draw_all` does.
    """
    for part in parts:
        by_name = {name_of(point): point for point in part.points}
        models = [
            (name, Slice(0 if point.arm == BASE else places[point.slot], point.strength))
            for name, point in by_name.items()
        ]

        def path_of(name: str, job: Job) -> Path:
            return run.sweep_dir / name / job.file_name

        unconditional = part.points[0].unconditional
        draw_all(base, bank, models, part.jobs, latent_shape, part.section, path_of, progress, unconditional)


def is_drawn(run: RunDir, part: Part) -> bool:
    """Whether all pictures of a part are there."""
    names = [name_of(point) for point in part.points]
    return all((run.sweep_dir / name / job.file_name).exists() for name in names for job in part.jobs)


def score_sweep(
    run: RunDir, arms: Sequence[Arm], parts: Sequence[Part], prompts: Sequence[Prompt], encoder: StyleEncoder
) -> tuple[tuple[SweepRow, ...], dict[str, NDArray[np.float32]]]:
    """A row for every picture of the sweep, without style, and the base's against other prompts; and every
    picture's hidden features [d], by `image`.

    `encoder` keeps its features by picture. Raises `StorageError` where a picture is not there.
    """
    known = {arm.name: arm for arm in arms}
    texts = encoder.encode_texts([prompt.text for prompt in prompts])  # (P, D)
    position = {(prompt.category, prompt.index): n for n, prompt in enumerate(prompts)}
    jobs_at: dict[Point, tuple[Job, ...]] = {}
    for part in parts:
        for point in part.points:
            jobs_at.setdefault(point, part.jobs)
    rows: list[SweepRow] = []
    hidden: dict[str, NDArray[np.float32]] = {}
    for point, jobs in jobs_at.items():
        paths = [run.sweep_dir / name_of(point) / job.file_name for job in jobs]
        if missing := [path for path in paths if not path.exists()]:
            raise StorageError(f"{missing[0]}: not there: run `lorascope diagnose {run.path}` again")
        features, in_layer = encoder.encode_images_and_hidden(paths)  # (N, D), (N, H)
        own = [position[job.prompt.category, job.prompt.index] for job in jobs]
        drawn = [
            _row(point, known.get(point.arm), job, score, path.relative_to(run.path).as_posix(), digest)
            for job, score, path, digest in zip(
                jobs,
                clip_score(features, texts[own]).tolist(),
                paths,
                [encoder.digest_picture(path) for path in paths],
                strict=True,
            )
        ]
        rows += drawn
        hidden |= zip((row.image for row in drawn), in_layer, strict=True)
        if point == parts[0].points[0]:
            rows += _shuffled(drawn, jobs, features, texts, position)
    return order_rows(rows), hidden


def _row(point: Point, arm: Arm | None, job: Job, score: float, image: str, digest: str) -> SweepRow:
    return SweepRow(
        kind="point",
        arm=point.arm,
        rank=arm.rank if arm else 0,
        alpha=arm.alpha if arm else None,
        lr=arm.lr if arm else None,
        training_seed=arm.seed if arm else None,
        epoch=point.epoch,
        strength=point.strength,
        guidance=point.guidance,
        unconditional=point.unconditional,
        category=job.prompt.category,
        prompt_index=job.prompt.index,
        prompt=job.prompt.text,
        seed=job.seed,
        clip_score=score,
        style=None,
        image=image,
        image_digest=digest,
        weights=point.weights,
    )


def _shuffled(
    drawn: Sequence[SweepRow],
    jobs: Sequence[Job],
    features: NDArray[np.float32],
    texts: NDArray[np.float32],
    position: Mapping[tuple[str, int], int],
) -> list[SweepRow]:
    """The base's pictures against other prompts of the sweep; none where there are no two different ones."""
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    targets = derange([(prompt.category, prompt.text) for prompt in prompts])
    if targets is None:
        return []
    other = {prompt: prompts[target] for prompt, target in zip(prompts, targets, strict=True)}
    against = [position[other[job.prompt].category, other[job.prompt].index] for job in jobs]
    scores = clip_score(features, texts[against]).tolist()
    return [replace(row, kind="shuffled", clip_score=score) for row, score in zip(drawn, scores, strict=True)]
