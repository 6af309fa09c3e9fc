"""Measure the finished world on what its models did not see.

Stage 7. Writes `quality.json`, which the product's report reads.
"""

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from recipes.pocket.captions import prompt_of
from recipes.pocket.contrastive import recall_at
from recipes.pocket.drawings import Drawings, Subject
from recipes.pocket.scorer import embed_captions, embed_images

NUM_CAPTIONS = 100


def choose_subjects(known: list[Subject], normal_names: tuple[str, ...]) -> list[Subject]:
    """The normal prompts' subjects, then others in the order of their digests: 100 in all."""
    normal = [subject for subject in known if subject.name in normal_names]
    others = [subject for subject in known if subject.name not in normal_names]
    others.sort(key=lambda subject: hashlib.sha256(subject.id.encode()).hexdigest())
    return (normal + others)[:NUM_CAPTIONS]


def score_drawings(
    scorer: CLIPModel, tokenizer: CLIPTokenizer, drawings: Drawings, vendor: str, subjects: list[Subject]
) -> tuple[float, float]:
    """Recall at 1 and at 5 of one vendor's drawings among the subjects' captions."""
    row_of = {drawings.subject_id[row]: row for row in drawings.rows_of((vendor,))}
    pixels = drawings.pixels[[row_of[subject.id] for subject in subjects]]
    return score_pixels(scorer, tokenizer, torch.from_numpy(pixels).permute(0, 3, 1, 2), subjects)


def score_images(
    scorer: CLIPModel, tokenizer: CLIPTokenizer, images: list[Image.Image], subjects: list[Subject]
) -> tuple[float, float]:
    """Recall at 1 and at 5 of generated images, one per subject, among the subjects' captions."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return score_pixels(scorer, tokenizer, pixels, subjects)


def score_pixels(
    scorer: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, subjects: list[Subject]
) -> tuple[float, float]:
    """Recall at 1 and at 5 of (N, 3, 64, 64) uint8 images, image i showing subject i."""
    text = embed_captions(scorer, tokenizer, [prompt_of(subject) for subject in subjects])
    image = embed_images(scorer, pixels)
    own = torch.arange(len(subjects))
    return recall_at(text, image, own, 1), recall_at(text, image, own, 5)


def samples_seen(records: list[dict[str, object]]) -> dict[str, int]:
    """Drawings shown in each stage, from the lines of `metrics.jsonl`."""
    seen: dict[str, int] = {}
    for record in records:
        if isinstance(record.get("samples"), int):
            seen[str(record["stage"])] = int(str(record["samples"]))
    return seen


def seconds_spent(records: list[dict[str, object]]) -> dict[str, int]:
    """Seconds of training in each stage, summed over interrupted runs."""
    spent: dict[str, float] = {}
    latest: dict[str, float] = {}
    for record in records:
        stage, seconds = str(record["stage"]), record.get("seconds")
        if not isinstance(seconds, float):
            continue
        before = latest.get(stage, 0.0)
        spent[stage] = spent.get(stage, 0.0) + (seconds - before if seconds > before else seconds)
        latest[stage] = seconds
    return {stage: round(seconds) for stage, seconds in spent.items()}
