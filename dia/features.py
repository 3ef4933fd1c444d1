"""Features of augmented, shifted views of images: what the CSI scores are computed from.

N images, B per batch, S augmented samples of each, K shifts, T = K·S views, d features.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.runtime import seed_from
from dia.augment import (
    DRAWS,
    Augmentation,
    AugmentationSettings,
    augment,
    augmentation_from_uniforms,
    flip,
    keyed_uniforms,
    published_augmentation,
    random_signs,
)
from dia.shifts import Base, shift_each

Encode = Callable[[Tensor], Mapping[str, Tensor]]


class ViewDraws(NamedTuple):
    """What is random about one sample of B images under K shifts."""

    signs: Tensor | None
    """(K, B) flips, new ones for each shift; None = not flipped."""
    augmentation: Augmentation | None
    """Of the K·B rows, k-major; None = not augmented."""


DrawViews = Callable[[Sequence[str], int, int, tuple[int, int]], ViewDraws]
"""(image names (B,), sample 0 … S - 1, K, (H, W)) → ViewDraws."""


def per_image_draws(settings: AugmentationSettings, seed: int) -> DrawViews:
    """Draws that depend on the seed, the image's name and the sample alone.

    So a score changes neither with the batch size nor with the order of the files.
    """

    def draw(names: Sequence[str], sample: int, n_shifts: int, size: tuple[int, int]) -> ViewDraws:
        keys = [seed_from("view", seed, name, sample) for name in names]
        uniforms = keyed_uniforms(keys, n_shifts * (DRAWS + 1))
        by_shift = uniforms.unflatten(1, (n_shifts, -1)).transpose(0, 1)  # (K, B, 1 + DRAWS)
        rows = by_shift[:, :, 1:].flatten(0, 1)  # (K·B, DRAWS)
        # As published, unshifted features (K = 1) are not flipped.
        signs = torch.where(by_shift[:, :, 0] < 0.5, -1.0, 1.0) if n_shifts > 1 else None
        return ViewDraws(signs, augmentation_from_uniforms(rows, size, settings))

    return draw


def published_draws(settings: AugmentationSettings) -> DrawViews:
    """The published draws: all generators reset to the sample's number for every batch.

    They depend on an image's place in its batch and on the batch size (D11).
    """

    def draw(names: Sequence[str], sample: int, n_shifts: int, size: tuple[int, int]) -> ViewDraws:
        if size[0] != size[1]:
            raise ValueError(f"published seeding needs square images, got {size[0]}×{size[1]}")
        generator = torch.Generator().manual_seed(sample)
        rng = np.random.RandomState(sample)
        n = len(names)
        signs = None
        if n_shifts > 1:
            signs = torch.stack([random_signs(n, generator) for _ in range(n_shifts)])
        drawn = published_augmentation(n_shifts * n, size[0], settings, generator, rng)
        return ViewDraws(signs, drawn)

    return draw


def shifted_rows(images: Tensor, base: Base, n_shifts: int, draws: ViewDraws) -> Tensor:
    """One sample of a batch: (B, C, H, W) → (K·B, C, H, W), flipped, shifted by k, augmented."""
    copies = [images] * n_shifts
    if draws.signs is not None:
        copies = [flip(images, signs) for signs in draws.signs]
    rows = shift_each(copies, base)
    return rows if draws.augmentation is None else augment(rows, draws.augmentation)


@torch.no_grad()
def extract_features(
    encode: Encode,
    batches: Iterable[tuple[Tensor, Sequence[str]]],
    *,
    base: Base,
    n_shifts: int,
    n_samples: int,
    draw: DrawViews,
    device: torch.device,
) -> dict[str, Tensor]:
    """Features of every image under every shift and sample, on the CPU.

    encode: rows (K·B, C, H, W) → named features (K·B, d), in evaluation mode   batches: images
    (B, C, H, W) in [0, 1] with their names. Returns {name: (N, K·S, d)}, shift-major: all samples
    of shift 0, then of shift 1, … Raises ValueError where there are no images.
    """
    collected: dict[str, list[Tensor]] = {}
    for images, names in batches:
        images = images.to(device)
        samples: dict[str, list[Tensor]] = {}
        for sample in range(n_samples):
            drawn = draw(names, sample, n_shifts, tuple(images.shape[-2:]))
            outputs = encode(shifted_rows(images, base, n_shifts, drawn))
            for name, values in outputs.items():
                # (K·B, d) → (B, K, d)
                by_image = values.unflatten(0, (n_shifts, -1)).transpose(0, 1)
                samples.setdefault(name, []).append(by_image)
        for name, parts in samples.items():
            views = torch.stack(parts, dim=2).flatten(1, 2)  # (B, K·S, d)
            collected.setdefault(name, []).append(views.cpu())
    if not collected:
        raise ValueError("no images to take features of: the set is empty")
    return {name: torch.cat(parts) for name, parts in collected.items()}
