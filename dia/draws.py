"""Random parameters of the augmentation: from a generator, per image, or as published.

Everything is computed from uniform numbers, DRAWS of them for each augmented image, so the three
sources share one meaning. B images.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dia.augment import Augmentation, AugmentationSettings, Jitter

CROP_TRIALS = 10
DRAWS = 9 + 2 * CROP_TRIALS
"""Uniform numbers that one augmented image takes."""
_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def keyed_uniforms(keys: Sequence[int], count: int) -> Tensor:
    """Uniform numbers that depend on each key alone: (len(keys), count) float64 in [0, 1).

    keys: integers, 64 bits of each count. SplitMix64 (Steele et al. 2014) with the key as the seed;
    so what is drawn for an image does not depend on the images beside it.
    """
    seeds = np.array([key % 2**64 for key in keys], dtype=np.uint64)[:, None]
    counters = np.arange(1, count + 1, dtype=np.uint64)[None]
    with np.errstate(over="ignore"):
        z = seeds + counters * _WEYL
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """n flips: (n,) float32 of -1 (mirror) and +1, on the generator's device."""
    # Drawn as the published layer draws them, so the same seed gives the same flips.
    half = torch.full((n,), 0.5, device=generator.device)
    return torch.bernoulli(half, generator=generator) * 2 - 1


def random_augmentation(
    n: int,
    size: tuple[int, int],
    settings: AugmentationSettings,
    generator: torch.Generator,
) -> Augmentation:
    """Draws an augmentation of n images of `size` (H, W) pixels, with one order of the jitter."""
    uniforms = torch.rand(
        (n, DRAWS), generator=generator, device=generator.device, dtype=torch.float64
    )
    uniforms[:, 1] = uniforms[:1, 1]  # the published coin is tossed once a batch
    return augmentation_from_uniforms(uniforms, size, settings)


def augmentation_from_uniforms(
    uniforms: Tensor, size: tuple[int, int], settings: AugmentationSettings
) -> Augmentation:
    """The augmentation that (B, DRAWS) uniform numbers in [0, 1) stand for.

    size: (H, W) pixels of the images. Differs between images in everything, the order too.
    """
    apply, coin, contrast, hue, saturation, value, grey, *bias = uniforms[:, :9].unbind(1)
    areas, ratios = uniforms[:, 9:].split(CROP_TRIALS, dim=1)
    jitter = Jitter(
        apply=apply < settings.jitter_probability,
        contrast_first=coin > 0.5,
        contrast=_between(contrast, 1, settings.contrast).float(),
        hue=_between(hue, 0, settings.hue).float(),
        saturation=_between(saturation, 1, settings.saturation).float(),
        value=_between(value, 1, settings.brightness).float(),
    )
    boxes = crop_boxes(areas, ratios, torch.stack(bias, dim=1), size, settings)
    return Augmentation(jitter, grey < settings.grey_probability, boxes)


def crop_boxes(
    areas: Tensor,
    ratios: Tensor,
    offsets: Tensor,
    size: tuple[int, int],
    settings: AugmentationSettings,
) -> Tensor:
    """Crop boxes (B, 4) from uniform numbers: areas and ratios (B, trials), offsets (B, 2).

    The first trial whose whole-pixel box fits is taken, else the whole image. Box as in
    `augment.crop`. The published sampler confuses width and height, which matters only for images
    that are not square.
    """
    height, width = size
    low, high = settings.crop_scale
    log_low, log_high = (math.log(ratio) for ratio in settings.crop_ratio)
    area = (low + (high - low) * areas) * (height * width)
    ratio = torch.exp(log_low + (log_high - log_low) * ratios)
    w, h = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()  # (B, trials)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    any_fits = fits.any(dim=1)
    w = torch.where(any_fits, w.gather(1, first)[:, 0], float(width))  # (B,)
    h = torch.where(any_fits, h.gather(1, first)[:, 0], float(height))
    # Whole pixels from -(width - w) to width - w, as offsets of the centre in half images.
    right = torch.floor(offsets[:, 0] * (2 * (width - w) + 1)) - (width - w)
    down = torch.floor(offsets[:, 1] * (2 * (height - h) + 1)) - (height - h)
    return torch.stack((w / width, h / height, right / width, down / height), dim=1).float()


def published_crop_boxes(
    n: int, side: int, settings: AugmentationSettings, rng: np.random.RandomState
) -> Tensor:
    """Crop boxes (n, 4) for square images from NumPy's legacy generator, as published.

    All trials of the batch form one queue from which the first n that fit are taken.
    """
    low, high = (math.log(ratio) for ratio in settings.crop_ratio)
    area = rng.uniform(*settings.crop_scale, n * CROP_TRIALS) * side**2
    ratio = np.exp(rng.uniform(low, high, n * CROP_TRIALS))
    w, h = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= side) & (h > 0) & (h <= side)
    whole = np.full(n, float(side))  # where too few fit, the whole image
    w, h = np.concatenate([w[fits], whole])[:n], np.concatenate([h[fits], whole])[:n]
    right, down = (rng.randint(s - side, side - s + 1) / side for s in (w, h))
    return torch.from_numpy(np.column_stack([w / side, h / side, right, down])).float()


def published_augmentation(
    n: int,
    side: int,
    settings: AugmentationSettings,
    generator: torch.Generator,
    rng: np.random.RandomState,
) -> Augmentation:
    """Draws an augmentation of n square images in the published order from the two generators."""

    def bernoulli(probability: float) -> Tensor:
        return torch.bernoulli(torch.full((n,), probability), generator=generator).bool()

    def uniform(centre: float, spread: float) -> Tensor:
        return torch.empty(n).uniform_(centre - spread, centre + spread, generator=generator)

    apply = bernoulli(settings.jitter_probability)
    contrast_first = bool(rng.rand() > 0.5)
    contrast = uniform(1, settings.contrast) if contrast_first else None
    hue, saturation, value = (
        uniform(0, settings.hue),
        uniform(1, settings.saturation),
        uniform(1, settings.brightness),
    )
    contrast = uniform(1, settings.contrast) if contrast is None else contrast
    order = torch.full((n,), contrast_first)
    grey = bernoulli(settings.grey_probability)
    boxes = published_crop_boxes(n, side, settings, rng)
    return Augmentation(Jitter(apply, order, contrast, hue, saturation, value), grey, boxes)


def _between(uniform: Tensor, centre: float, spread: float) -> Tensor:
    return centre + spread * (2 * uniform - 1)
