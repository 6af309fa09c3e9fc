"""The score stage: CLIP similarity of every picture and of the calibration rows.

Scores are 100 x cosine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lorascope.arms import Arm
from lorascope.errors import RunError, StorageError
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.scores import (
    BASE,
    CAPTIONS,
    NOISE,
    REAL,
    SHUFFLED,
    Generated,
    ScoreRow,
    Scores,
    check_same_prompts,
    picture_order,
    write_scores,
)
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig

if TYPE_CHECKING:
    from lorascope.evaluation.sampling import Job

MAX_REAL = 50


class Encoder(Protocol):
    """What scoring needs of `features.ClipEncoder` or `features.CachedEncoder`; features are float32 [n, d]
    of unit norm.

    A picture is a path, a PIL image or a uint8 array [height, width, 3].
    """

    @property
    def identity(self) -> dict[str, Any]: ...

    def encode_images(self, pictures: Sequence[Any]) -> NDArray[np.float32]: ...

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]: ...

    def count_truncated(self, texts: Sequence[str]) -> int: ...

    def digest_picture(self, picture: Any) -> str: ...

    def cached(self, path: Path) -> "Encoder": ...


def clip_score(image_features: ArrayLike, text_features: ArrayLike) -> NDArray[np.float64]:
    """100 x cosine of each picture [n, d] with its own text [n, d]; float64 [n] in [-100, 100], negative
    values kept.

    This is torchmetrics' scale (Hessel et al. 2021 multiply by 2.5 instead) without its floor at 0.
    """
    images, texts = np.asarray(image_features, np.float64), np.asarray(text_features, np.float64)
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(
            f"features must be two arrays [n, d] of one shape, got {images.shape} and {texts.shape}"
        )
    products = np.einsum("nd,nd->n", images, texts)
    cosine = products / (np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1))
    return np.asarray(100.0 * np.clip(cosine, -1.0, 1.0))


def likeness(image_features: ArrayLike, pictures: ArrayLike) -> NDArray[np.float64]:
    """The mean cosine of each drawing [n, d] with all pictures [m, d]: float64 [n] in [-1, 1].

    That is the image similarity of studies on single subjects (DreamBooth's CLIP-I).
    """
    images, others = np.asarray(image_features, np.float64), np.asarray(pictures, np.float64)
    if images.ndim != 2 or others.ndim != 2 or images.shape[1] != others.shape[1] or not len(others):
        raise ValueError(
            f"features must be [n, d] and [m, d] with m of at least 1, got {images.shape} and {others.shape}"
        )
    images, others = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (images, others))
    return np.asarray(np.clip(images @ others.mean(axis=0), -1.0, 1.0))


def derange(prompts: Sequence[tuple[str, str]]) -> list[int] | None:
    """For each (category, prompt) the position of a different prompt: half the category's list further on.

    Where a category has no two different prompts the whole list is shifted instead; None where that fails
    too.
    """
    places = range(len(prompts))
    groups = [
        [i for i in places if prompts[i][0] == category]
        for category in dict.fromkeys(category for category, _ in prompts)
    ]
    for split in (groups, [list(places)]):
        shifted = [_shift([prompts[i][1] for i in group]) for group in split]
        if prompts and all(shift is not None for shift in shifted):
            target = {
                i: group[shift[n]]
                for group, shift in zip(split, shifted, strict=True)
                if shift
                for n, i in enumerate(group)
            }
            return [target[i] for i in places]
    return None


def _shift(texts: Sequence[str]) -> list[int] | None:
    """Positions shifted by half the length, or by the nearest other step that gives no text itself."""
    n = len(texts)
    for step in sorted(range(1, n), key=lambda step: (abs(step - n // 2), step)):
        moved = [(i + step) % n for i in range(n)]
        if all(texts[i] != texts[j] for i, j in enumerate(moved)):
            return moved
    return None


def draw_noise(count: int, side_px: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """`count` pictures of uniform noise, uint8 [side_px, side_px, 3]; each a function of (seed, position)."""
    return [
        np.random.default_rng([seed, i]).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
        for i in range(count)
    ]


def list_pictures(run: RunDir, arms: Sequence[Arm], jobs: Sequence["Job"]) -> list[Generated]:
    """The sampled pictures of the base and of `arms`; raise `StorageError` where one is not there."""
    generated = []
    for arm in (None, *arms):
        name = arm.name if arm else BASE
        for job in jobs:
            path = run.image_path(name, job.file_name)
            if not path.exists():
                raise StorageError(f"{path}: not there: run `lorascope sample {run.path}` first")
            item = Generated(
                arm=name,
                rank=arm.rank if arm else 0,
                alpha=arm.alpha if arm else None,
                lr=arm.lr if arm else None,
                training_seed=arm.seed if arm else None,
                category=job.prompt.category,
                prompt_index=job.prompt.index,
                prompt=job.prompt.text,
                seed=job.seed,
                image=path.relative_to(run.path).as_posix(),
            )
            generated.append(item)
    return generated


def score_run(
    run: RunDir,
    config: StudyConfig,
    encoder: Encoder,
    generated: Sequence[Generated],
    heldout: Sequence[tuple[Any, str]],
    prompts: Sequence[Prompt],
) -> Scores:
    """Score every sampled picture and the calibration rows, and write `scores.parquet`.

    `heldout` are real held-out pictures (PIL, uint8 array or path) with their captions; the first 50 are
    used. `prompts` are all the study's prompts. An arm without pictures is left out. Calibration: `noise`
    scores uniform noise against every prompt, `shuffled prompts` the base's pictures against other prompts
    (`derange`), `real held-out` real pictures against their own captions. Features are kept in
    `features.safetensors`; every arm is encoded in batches of its own, so that neither other arms nor an
    interruption changes its numbers. Raises `RunError` if there is no picture at all, or if arms differ in
    prompts or seeds.
    """
    by_arm = _by_arm(run, generated, prompts)
    encoder = encoder.cached(run.features_safetensors)
    texts = encoder.encode_texts([prompt.text for prompt in prompts])  # (P, D)
    rows = _rows_of_arms(run, encoder, by_arm, prompts, texts)
    rows += _rows_of_noise(encoder, prompts, texts, config.data.resolution_px)
    rows += _rows_of_real_pictures(encoder, heldout[:MAX_REAL])
    shown = [*(prompt.text for prompt in prompts), *(caption for _, caption in heldout[:MAX_REAL])]
    scores = Scores.from_rows(rows, encoder.identity, encoder.count_truncated(shown))
    write_scores(run, scores)
    return scores


def _by_arm(
    run: RunDir, generated: Sequence[Generated], prompts: Sequence[Prompt]
) -> dict[str, list[Generated]]:
    """The pictures of every arm in order; refused where arms or the study's prompts do not go together."""
    if not generated:
        raise RunError(f"{run.path}: no pictures to score: sample this run first")
    by_arm: dict[str, list[Generated]] = {}
    for item in sorted(generated, key=picture_order):
        by_arm.setdefault(item.arm, []).append(item)
    check_same_prompts(
        {arm: [(i.category, i.prompt_index, i.seed) for i in items] for arm, items in by_arm.items()}
    )
    known = {(prompt.category, prompt.index) for prompt in prompts}
    for item in generated:
        if (item.category, item.prompt_index) not in known:
            raise RunError(
                f"{item.image}: {item.category} prompt {item.prompt_index} is not in the study's list: "
                "sample this run again"
            )
    return by_arm


def _rows_of_arms(
    run: RunDir,
    encoder: Encoder,
    by_arm: Mapping[str, Sequence[Generated]],
    prompts: Sequence[Prompt],
    texts: NDArray[np.float32],
) -> list[ScoreRow]:
    """Every picture with its own prompt, the base's with another one too; `texts` [P, D] are the prompts'."""
    position = {(prompt.category, prompt.index): n for n, prompt in enumerate(prompts)}
    targets = derange([(prompt.category, prompt.text) for prompt in prompts])
    rows: list[ScoreRow] = []
    for arm, items in by_arm.items():
        paths = [run.path / item.image for item in items]
        features = encoder.encode_images(paths)  # (N, D)
        digests = [encoder.digest_picture(path) for path in paths]
        own = [position[item.category, item.prompt_index] for item in items]
        matched = clip_score(features, texts[own]).tolist()
        for item, digest, score in zip(items, digests, matched, strict=True):
            values = {key: value for key, value in asdict(item).items() if key != "image"}
            rows.append(
                ScoreRow(kind="arm", **values, clip_score=score, image=item.image, image_digest=digest)
            )
        if arm == BASE and targets is not None:
            other = [targets[place] for place in own]
            shuffled = clip_score(features, texts[other]).tolist()
            for item, place, digest, score in zip(items, other, digests, shuffled, strict=True):
                rows.append(_calibration_row(SHUFFLED, prompts[place], score, digest, item.seed, item.image))
    return rows


def _rows_of_noise(
    encoder: Encoder, prompts: Sequence[Prompt], texts: NDArray[np.float32], side_px: int
) -> list[ScoreRow]:
    """A picture of noise with every prompt."""
    noise = draw_noise(len(prompts), side_px)
    scores = clip_score(encoder.encode_images(noise), texts).tolist()
    return [
        _calibration_row(NOISE, prompt, score, encoder.digest_picture(picture))
        for picture, prompt, score in zip(noise, prompts, scores, strict=True)
    ]


def _rows_of_real_pictures(encoder: Encoder, heldout: Sequence[tuple[Any, str]]) -> list[ScoreRow]:
    """Every held-out picture with its own caption; none where there are none."""
    if not heldout:
        return []
    pictures, captions = zip(*heldout, strict=True)
    scores = clip_score(encoder.encode_images(pictures), encoder.encode_texts(captions)).tolist()
    return [
        _calibration_row(REAL, Prompt(CAPTIONS, n, caption), score, encoder.digest_picture(picture))
        for n, (picture, caption, score) in enumerate(zip(pictures, captions, scores, strict=True))
    ]


def _calibration_row(
    name: str, prompt: Prompt, score: float, digest: str, seed: int = 0, image: str = ""
) -> ScoreRow:
    return ScoreRow(
        kind="calibration",
        arm=name,
        rank=None,
        alpha=None,
        lr=None,
        training_seed=None,
        category=prompt.category,
        prompt_index=prompt.index,
        prompt=prompt.text,
        seed=seed,
        clip_score=score,
        image=image,
        image_digest=digest,
    )
