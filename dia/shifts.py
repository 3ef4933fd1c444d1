"""Shift transforms (the K = 4 views that the shift head tells apart) and blurs.

A published name is a base (rotation or cutperm) and what happens to the third view (nothing,
dissolving, a blur). B images, C channels, H W pixels, K shifts; shifted batches are k-major.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dia.settings import ContrastiveConfig, ShiftName

SHIFT_NAMES: tuple[ShiftName, ...] = get_args(ShiftName)
Base = Literal["none", "rotation", "cutperm"]
View = Literal["none", "diffusion", "blurgaussian", "blurmedian", "blurnone"]
# OpenCV's fixed binomial-like tables for a non-positive sigma; larger kernels use a formula.
OPENCV_KERNELS = {
    1: (1.0,),
    3: (1 / 4, 1 / 2, 1 / 4),
    5: (1 / 16, 1 / 4, 3 / 8, 1 / 4, 1 / 16),
    7: (1 / 32, 7 / 64, 7 / 32, 9 / 32, 7 / 32, 7 / 64, 1 / 32),
    9: tuple(n / 256 for n in (4, 13, 30, 51, 60, 51, 30, 13, 4)),
}
MEDIAN_CHUNK_VALUES = 2**25


@dataclass(frozen=True)
class ShiftType:
    """A parsed --shift_trans_type."""

    base: Base
    """What tells the K views apart."""
    view: View
    """What is done to the third view before its shift; see training."""

    @property
    def count(self) -> int:
        """K: 4 shifts, or 1 without any."""
        return 1 if self.base == "none" else 4


def parse_shift(name: ShiftName) -> ShiftType:
    """Reads a shift type: none, rotation, cutperm, <view> or <view>_<base>."""
    if name not in SHIFT_NAMES:
        raise ValueError(f"shift_trans_type {name!r} is unknown; choose from {SHIFT_NAMES}")
    if name in get_args(Base):
        return ShiftType(name, "none")
    view, _, base = name.partition("_")
    return ShiftType(base or "rotation", view)


def effective_shift(settings: ContrastiveConfig) -> ShiftType:
    """The shift type of a run; mode simclr has none."""
    name = "none" if settings.mode == "simclr" else settings.shift_trans_type
    return parse_shift(name)


def rotate(images: Tensor, k: int) -> Tensor:
    """Turns (B, C, H, W) by 90°·k, counter-clockwise; H and W swap for odd k."""
    return torch.rot90(images, k % 4, (2, 3))


def cut_and_permute(images: Tensor, k: int) -> Tensor:
    """Swaps the halves of (B, C, H, W): top and bottom if k // 2, left and right if k % 2."""
    height, width = images.shape[-2:]
    k = k % 4
    # Cutting at int(n / 2) and swapping is a roll by that much, backwards.
    shifts = (-(height // 2) if k // 2 else 0, -(width // 2) if k % 2 else 0)
    return torch.roll(images, shifts, (2, 3))


def shift(images: Tensor, k: int, base: Base) -> Tensor:
    """Applies shift k of a base to (B, C, H, W); `none` returns the images."""
    if base == "none":
        return images
    return rotate(images, k) if base == "rotation" else cut_and_permute(images, k)


def shift_each(batches: list[Tensor], base: Base) -> Tensor:
    """Shifts the k-th batch by k and stacks them: K of (B, C, H, W) → (K·B, C, H, W), k-major.

    Rotation needs square images; a ValueError says so.
    """
    height, width = batches[0].shape[-2:]
    if base == "rotation" and height != width and len(batches) > 1:
        raise ValueError(f"rotation needs square images, got {height}×{width}; resize or crop them")
    return torch.cat([shift(images, k, base) for k, images in enumerate(batches)])


def gaussian_kernel(size: int) -> Tensor:
    """OpenCV's Gaussian for sigma <= 0: (size, size) float32 that sums to 1; size odd."""
    if size in OPENCV_KERNELS:
        row = torch.tensor(OPENCV_KERNELS[size], dtype=torch.float64)
    else:
        sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
        offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        row = torch.exp(-(offsets**2) / (2 * sigma**2))
        row = row / row.sum()
    return torch.outer(row, row).float()


def gaussian_blur(images: Tensor, size: int) -> Tensor:
    """Blurs each channel of (B, C, H, W) by the Gaussian of `size` pixels, with zeros outside."""
    channels = images.shape[1]
    kernel = gaussian_kernel(size).to(images).expand(channels, 1, size, size)
    return F.conv2d(images, kernel, padding=size // 2, groups=channels)


def median_blur(images: Tensor, size: int) -> Tensor:
    """Median of each size × size neighbourhood of (B, C, H, W), with zeros outside; size odd."""
    planes = images.flatten(0, 1)[:, None]  # (B·C, 1, H, W)
    at_once = max(1, MEDIAN_CHUNK_VALUES // (planes[0].numel() * size**2))
    medians = [
        F.unfold(part, size, padding=size // 2).median(dim=1).values.view_as(part)
        for part in planes.split(at_once)
    ]
    return torch.cat(medians).view_as(images)


def blur_and_shift(
    images: Tensor,
    k: int,
    kind: ShiftType,
    *,
    kernel_size: int = 7,
    resolution: int | None = None,
) -> Tensor:
    """Blurs (B, C, H, W) and shifts by k; with a resolution, both happen at resolution².

    Resizing there and back is by nearest pixel, as published.
    """
    size = images.shape[-2:]
    if resolution is not None:
        images = F.interpolate(images, (resolution, resolution), mode="nearest")
    if kind.view == "blurgaussian":
        images = gaussian_blur(images, kernel_size)
    elif kind.view == "blurmedian":
        images = median_blur(images, kernel_size)
    images = shift(images, k, kind.base)
    return images if resolution is None else F.interpolate(images, size, mode="nearest")
