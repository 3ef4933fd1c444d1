"""SimCLR augmentation on batches: colour jitter, grey, resized crop, horizontal flip.

Every operation takes its parameters as arguments, so a batch can be augmented with recorded, seeded
or per-image parameters (see `dia.draws`). B images, C channels, H W pixels; RGB in [0, 1].
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HUE_UNITS = 255 / 360
"""The published code adds hue offsets in these units of a turn."""
GREY_WEIGHTS = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentationSettings:
    """Ranges and probabilities of the augmentation, published values."""

    jitter_probability: float = 0.8
    contrast: float = 0.4
    brightness: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey_probability: float = 0.2
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest cropped area, as a fraction of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest crop: width over height."""


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
        jitter = Jitter(*(values.to(device) for values in self.jitter))
        return Augmentation(jitter, self.grey.to(device), self.crop.to(device))


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
