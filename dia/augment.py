"""SimCLR augmentation on batches: colour jitter, grey, resized crop, horizontal flip.

Every operation takes its parameters as arguments, so a batch can be augmented with recorded, seeded
or per-image parameters. They are drawn below: from a generator, per image, or as published. The
first two turn uniform numbers, DRAWS of them for each image, into parameters by the same function.
B images, C channels, H W pixels; RGB in [0, 1].
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HUE_UNITS = 255 / 360
"""The published code adds hue offsets in these units of a turn."""
GREY_WEIGHTS = (0.299, 0.587, 0.114)
JITTER_PROBABILITY, GREY_PROBABILITY = 0.8, 0.2
FACTOR_SPREAD = 0.4
"""Factors of contrast, saturation and value lie within 1 ± this."""
HUE_SPREAD = 0.1
CROP_RATIO = (3 / 4, 4 / 3)
"""Narrowest and widest crop: width over height."""
CropScale = tuple[float, float]
"""Smallest and largest cropped area, as a fraction of the image's."""
CROP_TRIALS = 10
DRAWS = 9 + 2 * CROP_TRIALS
"""Uniform numbers that one augmented image takes."""


class Jitter(NamedTuple):
    """Colour jitter of each image, all (B,)."""

    apply: Tensor
    """bool: jitter this image at all."""
    contrast_first: Tensor
    """bool: contrast before hue, saturation and value, or after."""
    contrast: Tensor
    """Factor about each channel's mean."""
    hue: Tensor
    """Offset, in 255/360 of a turn."""
    saturation: Tensor
    """Factor."""
    value: Tensor
    """Factor."""


class Augmentation(NamedTuple):
    """Parameters of one augmentation of B images."""

    jitter: Jitter
    grey: Tensor
    """(B,) bool: replace the colours by luma."""
    crop: Tensor
    """(B, 4): width, height, and offset right and down of the crop's centre; see `crop`."""

    def to(self, device: torch.device) -> "Augmentation":
        """The same parameters on another device."""
        return self._each(lambda values: values.to(device))

    def of_rows(self, blocks: int, rows: slice) -> "Augmentation":
        """The parameters of these rows of each of so many equal, contiguous blocks of images."""
        return self._each(lambda values: values.unflatten(0, (blocks, -1))[:, rows].flatten(0, 1))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Augmentation":
        jitter = Jitter(*map(change, self.jitter))
        return Augmentation(jitter, change(self.grey), change(self.crop))


def augment(images: Tensor, parameters: Augmentation) -> Tensor:
    """Jitters, greys and crops (B, 3, H, W); the size stays. The published order."""
    parameters = parameters.to(images.device)
    images = colour_jitter(images, parameters.jitter)
    images = torch.where(_column(parameters.grey), to_grey(images), images)
    return crop(images, parameters.crop)


def colour_jitter(images: Tensor, jitter: Jitter) -> Tensor:
    """Contrast and HSV jitter of (B, 3, H, W), in each image's own order; result in [0, 1].

    Images that are not jittered stay as they are, even outside [0, 1].
    """
    first = _column(jitter.contrast_first)
    jittered = torch.where(first, adjust_contrast(images, jitter.contrast), images)
    jittered = adjust_hsv(jittered, jitter.hue, jitter.saturation, jitter.value)
    jittered = torch.where(first, jittered, adjust_contrast(jittered, jitter.contrast))
    return torch.where(_column(jitter.apply), jittered, images)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Stretches (B, C, H, W) about each channel's mean by factor (B,), then clamps to [0, 1]."""
    means = images.mean(dim=(2, 3), keepdim=True)
    return ((images - means) * _column(factor) + means).clamp(0, 1)


def adjust_hsv(images: Tensor, hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Turns the hue of (B, 3, H, W), scales saturation and value, each (B,); result in [0, 1]."""
    h, s, v = rgb_to_hsv(images).unbind(1)
    h = (h + hue[:, None, None] * HUE_UNITS) % 1
    s, v = s * saturation[:, None, None], v * value[:, None, None]
    return hsv_to_rgb(torch.stack((h, s, v), dim=1).clamp(0, 1))


def rgb_to_hsv(rgb: Tensor) -> Tensor:
    """HSV of (B, 3, H, W), hue as a fraction of a turn by atan2, hue and saturation of grey 0."""
    red, green, blue = rgb.unbind(1)
    highest, lowest = rgb.amax(1), rgb.amin(1)
    angle = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    hue = (angle % (2 * math.pi)) / (2 * math.pi)
    saturation = torch.nan_to_num((highest - lowest) / highest, nan=0.0, posinf=0.0, neginf=0.0)
    return torch.stack((hue, saturation, highest), dim=1)


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """RGB of (B, 3, H, W) HSV in [0, 1]; the closed form with one ramp per channel."""
    hue, saturation, value = hsv.split(1, dim=1)
    offsets = hsv.new_tensor((5.0, 3.0, 1.0))[:, None, None]
    k = (offsets + hue * 6) % 6  # (B, 3, H, W)
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def to_grey(images: Tensor) -> Tensor:
    """Luma (ITU-R 601) of (B, 3, H, W) in all three channels."""
    weights = images.new_tensor(GREY_WEIGHTS)[:, None, None]
    return (images * weights).sum(1, keepdim=True).expand_as(images)


def crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Resized crop of (B, C, H, W) to the same size: bilinear, reflecting at the borders.

    boxes: (B, 4) width and height as fractions of the image (negative mirrors), then the offset of
    the crop's centre to the right and down, where ±1 is the image's border.
    """
    boxes = boxes.to(images)
    width, height, right, down = boxes.unbind(1)
    zero = torch.zeros_like(width)
    theta = torch.stack((width, zero, right, zero, height, down), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def flip(images: Tensor, signs: Tensor) -> Tensor:
    """Mirrors those of (B, C, H, W) left to right whose sign (B,) is negative."""
    # The reference flips by grid sampling, which differs from this exact flip by 1e-6.
    return torch.where(_column(signs.to(images.device) < 0), images.flip(3), images)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def keyed_uniforms(keys: Sequence[int], count: int) -> Tensor:
    """Uniform numbers that depend on each key alone: (len(keys), count) float64 in [0, 1).

    keys: integers, 64 bits of each count. Philox is a counter-based generator, so what is drawn for
    an image does not depend on the images beside it.
    """
    generators = (np.random.Generator(np.random.Philox(key=key % 2**64)) for key in keys)
    return torch.from_numpy(np.stack([generator.random(count) for generator in generators]))


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """n flips: (n,) float32 of -1 (mirror) and +1, on the generator's device."""
    # Drawn as the published layer draws them, so the same seed gives the same flips.
    half = torch.full((n,), 0.5, device=generator.device)
    return torch.bernoulli(half, generator=generator) * 2 - 1


def random_augmentation(
    n: int,
    size: tuple[int, int],
    crop_scale: CropScale,
    generator: torch.Generator,
) -> Augmentation:
    """Draws an augmentation of n images of `size` (H, W) pixels, with one order of the jitter."""
    uniforms = torch.rand(
        (n, DRAWS), generator=generator, device=generator.device, dtype=torch.float64
    )
    uniforms[:, 1] = uniforms[:1, 1]  # the published coin is tossed once a batch
    return augmentation_from_uniforms(uniforms, size, crop_scale)


def augmentation_from_uniforms(
    uniforms: Tensor, size: tuple[int, int], crop_scale: CropScale
) -> Augmentation:
    """The augmentation that (B, DRAWS) uniform numbers in [0, 1) stand for.

    size: (H, W) pixels of the images. Differs between images in everything, the order too.
    """
    apply, coin, contrast, hue, saturation, value, grey, *bias = uniforms[:, :9].unbind(1)
    areas, ratios = uniforms[:, 9:].split(CROP_TRIALS, dim=1)
    jitter = Jitter(
        apply=apply < JITTER_PROBABILITY,
        contrast_first=coin > 0.5,
        contrast=_between(contrast, 1, FACTOR_SPREAD).float(),
        hue=_between(hue, 0, HUE_SPREAD).float(),
        saturation=_between(saturation, 1, FACTOR_SPREAD).float(),
        value=_between(value, 1, FACTOR_SPREAD).float(),
    )
    boxes = crop_boxes(areas, ratios, torch.stack(bias, dim=1), size, crop_scale)
    return Augmentation(jitter, grey < GREY_PROBABILITY, boxes)


def crop_boxes(
    areas: Tensor,
    ratios: Tensor,
    offsets: Tensor,
    size: tuple[int, int],
    crop_scale: CropScale,
) -> Tensor:
    """Crop boxes (B, 4) from uniform numbers: areas and ratios (B, trials), offsets (B, 2).

    The first trial whose whole-pixel box fits is taken, else the whole image. Box as in
    `augment.crop`. The published sampler confuses width and height, which matters only for images
    that are not square.
    """
    height, width = size
    low, high = crop_scale
    log_low, log_high = (math.log(ratio) for ratio in CROP_RATIO)
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
    n: int, side: int, crop_scale: CropScale, rng: np.random.RandomState
) -> Tensor:
    """Crop boxes (n, 4) for square images from NumPy's legacy generator, as published.

    All trials of the batch form one queue from which the first n that fit are taken.
    """
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    area = rng.uniform(*crop_scale, n * CROP_TRIALS) * side**2
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
    crop_scale: CropScale,
    generator: torch.Generator,
    rng: np.random.RandomState,
) -> Augmentation:
    """Draws an augmentation of n square images in the published order from the two generators."""

    def bernoulli(probability: float) -> Tensor:
        return torch.bernoulli(torch.full((n,), probability), generator=generator).bool()

    def uniform(centre: float, spread: float) -> Tensor:
        return torch.empty(n).uniform_(centre - spread, centre + spread, generator=generator)

    apply = bernoulli(JITTER_PROBABILITY)
    contrast_first = bool(rng.rand() > 0.5)
    contrast = uniform(1, FACTOR_SPREAD) if contrast_first else None
    hue = uniform(0, HUE_SPREAD)
    saturation, value = uniform(1, FACTOR_SPREAD), uniform(1, FACTOR_SPREAD)
    contrast = uniform(1, FACTOR_SPREAD) if contrast is None else contrast
    order = torch.full((n,), contrast_first)
    grey = bernoulli(GREY_PROBABILITY)
    boxes = published_crop_boxes(n, side, crop_scale, rng)
    return Augmentation(Jitter(apply, order, contrast, hue, saturation, value), grey, boxes)


def _between(uniform: Tensor, centre: float, spread: float) -> Tensor:
    return centre + spread * (2 * uniform - 1)
