"""What the text encoder's and the scorer's training share: which caption fits which drawing."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.pocket.captions import subject_captions
from recipes.pocket.drawings import Subject


def caption_table(subjects: list[Subject], seed: int) -> tuple[list[str], Tensor]:
    """All captions, subject by subject, and which subjects each one fits.

    Returns S * V captions and a (S * V, S) bool tensor: a caption with a name fits the subjects of
    that name, a caption of keywords alone fits every subject that has them all.
    """
    captions: list[str] = []
    fits: list[np.ndarray] = []
    words = [{subject.name, *subject.keywords} for subject in subjects]
    having: dict[str, np.ndarray] = {}
    for word in set().union(*words):
        having[word] = np.array([word in of_subject for of_subject in words])
    names = np.array([subject.name for subject in subjects])
    for subject in subjects:
        for caption in subject_captions(subject, seed):
            captions.append(caption)
            parts = caption.split(", ")
            if parts[0] == subject.name:
                fits.append(names == subject.name)
            else:
                fits.append(np.logical_and.reduce([having[part] for part in parts]))
    return captions, torch.from_numpy(np.stack(fits))


def contrastive_loss(text: Tensor, image: Tensor, scale: Tensor, fits: Tensor) -> Tensor:
    """CLIP's loss with every fitting pair as a target.

    `text` and `image` are (B, D) unit vectors, `fits` is (B, B) bool: does text i fit image j.
    """
    logits = scale * text @ image.T  # (B, B)
    target = fits.float()
    by_text = -(F.log_softmax(logits, 1) * target).sum(1) / target.sum(1)
    by_image = -(F.log_softmax(logits, 0) * target).sum(0) / target.sum(0)
    return (by_text.mean() + by_image.mean()) / 2


def recall_at(text: Tensor, image: Tensor, own: Tensor, k: int) -> float:
    """The share of images, (N, D) unit vectors, whose own caption is among the `k` nearest of (C, D)."""
    nearest = (image @ text.T).topk(k, dim=1).indices  # (N, k)
    return (nearest == own[:, None]).any(1).float().mean().item()


def augment(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Distort (B, 3, H, W) images in 0..1 on white so that no drawing style can be learnt by heart.

    Shift, scale, turn, mirror, colours, grey, blur, noise, and tinted paper. `strength`, 0..1.5,
    scales the ranges.
    """
    batch = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator) * (high - low) + low

    def chance(share: float) -> Tensor:
        return (torch.rand(batch, 1, 1, 1, generator=generator) < share).float()

    angle, size = uniform(-0.3, 0.3) * strength, 1 + uniform(-0.15, 0.4) * strength
    mirror = torch.sign(uniform(-1, 1))
    stretch = 1 + uniform(-0.12, 0.14) * strength
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    shift_x, shift_y = strength * uniform(-0.2, 0.2), strength * uniform(-0.2, 0.2)
    rows = torch.stack([cos * mirror * stretch, -sin, shift_x, sin * mirror * stretch, cos, shift_y], 1)
    grid = F.affine_grid(rows.view(batch, 2, 3), list(images.shape), align_corners=False)
    images = 1 - F.grid_sample(1 - images, grid, align_corners=False)

    grey = images.mean(1, keepdim=True)
    saturation = (1 + uniform(-0.7, 0.5, 1, 1, 1) * strength) * (1 - chance(0.15 * strength))
    images = grey + (images - grey) * saturation
    # A random mixing of the channels that keeps white white: hue, within reason.
    mixing = (
        torch.eye(3)
        + 0.25 * torch.randn(batch, 3, 3, generator=generator) * chance(0.6 * strength)[:, :, :, 0]
    )
    mixing = mixing + (1 - mixing.sum(2, keepdim=True)) / 3
    images = 1 - torch.einsum("bij,bjhw->bihw", mixing, 1 - images)
    images = 1 - (1 - images) * uniform(0.6, 1.25, 1, 1, 1)
    blurred = F.avg_pool2d(
        F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), 3, 1, 1, count_include_pad=False
    )
    images = torch.lerp(images, blurred, chance(0.4 * strength) * uniform(0, 1, 1, 1, 1))
    images = images * (1 - chance(0.3 * strength) * uniform(0, 0.5, 3, 1, 1))
    noise = torch.randn(images.shape, generator=generator)
    images = images + noise * uniform(0, 0.1, 1, 1, 1) * chance(0.5 * strength)
    return images.clamp(0, 1)
