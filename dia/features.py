"""Features of augmented, shifted views of images: what the CSI scores are computed from.

N images, B per batch, S augmented samples of each, K shifts, T = K·S views, d features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.random_numbers import seed_from
from dia.augment import (
    DRAWS,
    Augmentation,
    CropScale,
    augment,
    augmentation_from_uniforms,
    flip,
    keyed_uniforms,
    published_augmentation,
    random_signs,
)
from dia.encoders import Encoder
from dia.settings import Seeding
from dia.shifts import Base, shift_each


@dataclass(frozen=True)
class ViewSettings:
    """How images are looked at in an evaluation."""

    base: Base
    """Shift transform, always undissolved; none is one unshifted view."""
    n_shifts: int
    """K."""
    n_samples: int
    """S."""
    crop_scale: CropScale
    """Range of the crops' areas, as fractions of the image's."""
    seeding: Seeding
    seed: int
    batch_size: int
    """Images per forward pass."""


class ViewDraws(NamedTuple):
    """What is random about one sample of B images under K shifts."""

    signs: Tensor | None
    """(K, B) flips, new ones for each shift; None where images are not flipped."""
    augmentation: Augmentation | None
    """Of the K·B rows, k-major; None where rows are not augmented."""


def draw_samples(
    views: ViewSettings, names: Sequence[str], size: tuple[int, int]
) -> list[ViewDraws]:
    """The draws of all S samples of a batch; names: (B,)   size: (H, W) pixels of the images."""
    samples = range(views.n_samples)
    if views.seeding == "published":
        return [published_draws(views, sample, len(names), size) for sample in samples]
    return [per_image_draws(views, sample, names, size) for sample in samples]


def per_image_draws(
    views: ViewSettings, sample: int, names: Sequence[str], size: tuple[int, int]
) -> ViewDraws:
    """Draws that depend on the seed, the image's name and the sample alone.

    So a score changes neither with the batch size nor with the order of the files.
    """
    keys = [seed_from("view", views.seed, name, sample) for name in names]
    uniforms = keyed_uniforms(keys, views.n_shifts * (DRAWS + 1))
    by_shift = uniforms.unflatten(1, (views.n_shifts, -1)).transpose(0, 1)  # (K, B, 1 + DRAWS)
    rows = by_shift[:, :, 1:].flatten(0, 1)  # (K·B, DRAWS)
    # As published, unshifted features (K = 1) are not flipped.
    signs = torch.where(by_shift[:, :, 0] < 0.5, -1.0, 1.0) if views.n_shifts > 1 else None
    return ViewDraws(signs, augmentation_from_uniforms(rows, size, views.crop_scale))


def published_draws(
    views: ViewSettings, sample: int, n_images: int, size: tuple[int, int]
) -> ViewDraws:
    """The published draws: all generators reset to the sample's number for every batch.

    They depend on an image's place in its batch and on the batch size (D11).
    """
    if size[0] != size[1]:
        raise ValueError(f"published seeding needs square images, got {size[0]}×{size[1]}")
    generator = torch.Generator().manual_seed(sample)
    rng, n_shifts = np.random.RandomState(sample), views.n_shifts
    signs = None
    if n_shifts > 1:
        signs = torch.stack([random_signs(n_images, generator) for _ in range(n_shifts)])
    rows = n_shifts * n_images
    return ViewDraws(signs, published_augmentation(rows, size[0], views.crop_scale, generator, rng))


def shifted_rows(images: Tensor, base: Base, n_shifts: int, draws: ViewDraws) -> Tensor:
    """One sample of a batch: (B, C, H, W) → (K·B, C, H, W), flipped, shifted by k, augmented."""
    copies = [images] * n_shifts
    if draws.signs is not None:
        copies = [flip(images, signs) for signs in draws.signs]
    rows = shift_each(copies, base)
    return rows if draws.augmentation is None else augment(rows, draws.augmentation)


@torch.no_grad()
def image_features(
    encoder: Encoder, images: Tensor, base: Base, n_shifts: int, samples: Sequence[ViewDraws]
) -> tuple[Tensor, Tensor]:
    """Features (B, K·S, d) and shift logits (B, K·S, K) of a batch under every shift and sample.

    encoder: in evaluation mode   images: (B, C, H, W) in [0, 1], on its device   samples: the draws
    of each sample. Shift-major: all samples of shift 0, then of shift 1, …
    """
    heads = [
        encoder(shifted_rows(images, base, n_shifts, draws), "simclr", "shift") for draws in samples
    ]
    by_head = [torch.stack([h.simclr for h in heads]), torch.stack([h.shift for h in heads])]
    # (S, K·B, d) → (S, K, B, d) → (B, K, S, d) → (B, K·S, d)
    simclr, shift = (
        values.unflatten(1, (n_shifts, -1)).permute(2, 1, 0, 3).flatten(1, 2) for values in by_head
    )
    return simclr, shift
