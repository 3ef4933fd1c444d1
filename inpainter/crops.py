"""What a training crop is: where it may lie, and whether it shows anything.

C H W of an image and h w of a crop, in pixels; values in [0, 1].
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch import Tensor

from common.image_store import StoredImage

TRIES = 50
"""Crops drawn from one image before it is given up."""
BACKGROUND_MAX = 0.005
"""A crop is background if its maximum is below this: -0.99 in [-1, 1], as published."""


def is_black(image: StoredImage) -> bool:
    """True where even the image's maximum is background, so that every crop of it would be."""
    return bool(image.values.max() < BACKGROUND_MAX * image.scale)


@dataclass(frozen=True)
class CropRule:
    """How crops are taken from an image."""

    crop_hw: tuple[int, int]
    """Height and width of a crop."""
    random_crop: bool = True
    """Crop at random, or resize the whole image to crop_hw."""
    flip: bool = False
    """Mirror left to right with probability 1/2."""
    min_tissue_fraction: float = 0.0
    """Smallest useful share of pixels that are brighter than tissue_threshold."""
    tissue_threshold: float = 0.005
    """Grey value (of RGB the largest) above which a pixel is tissue."""
    max_rotation: float = 0.0
    """Turn each crop about its centre by up to this many degrees, either way."""
    max_scale: float = 1.0
    """Show each crop larger or smaller by up to this factor, >= 1."""

    def fit(self, image: Tensor) -> Tensor:
        """Resizes (C, H, W), bilinear, as far as needed for a crop to fit; keeps the aspect ratio.

        Without random_crop: to the crop's size whatever the aspect ratio.
        """
        size = tuple(image.shape[1:])
        target = self.crop_hw
        if self.random_crop:
            factor = max(1.0, self.crop_hw[0] / size[0], self.crop_hw[1] / size[1])
            target = tuple(
                max(crop, round(side * factor))
                for crop, side in zip(self.crop_hw, size, strict=True)
            )
        if target == size:
            return image
        resized = F.interpolate(image[None], size=target, mode="bilinear", antialias=True)[0]
        return resized.clamp(0, 1)

    def draw(self, image: StoredImage, generator: torch.Generator) -> np.ndarray | None:
        """The first useful crop of TRIES, (C, h, w); None where none is.

        In the image's own type and range; float32 where crops are turned or scaled. The image must
        be as large as the crop (see fit). Each try draws three numbers, or five.
        """
        height, width = self.crop_hw
        rows, columns = image.values.shape[1] - height + 1, image.values.shape[2] - width + 1
        warps = self.max_rotation > 0 or self.max_scale > 1
        for _ in range(TRIES):
            u = torch.rand(5 if warps else 3, generator=generator, dtype=torch.float64).tolist()
            top, left = int(u[0] * rows), int(u[1] * columns)
            if warps:
                angle = math.radians((2 * u[3] - 1) * self.max_rotation)
                factor = self.max_scale ** (2 * u[4] - 1)
                crop = warped_crop(image.values, (top, left), self.crop_hw, angle, factor)
            else:
                crop = image.values[:, top : top + height, left : left + width]
            if self.is_useful(crop, image.scale):
                return crop[:, :, ::-1] if self.flip and u[2] < 0.5 else crop
            if rows == columns == 1 and not warps:
                break
        return None

    def is_useful(self, crop: np.ndarray, scale: float) -> bool:
        """False for background and for too small a share of tissue. scale: the value of 1.0."""
        if crop.max() < BACKGROUND_MAX * scale:
            return False
        if self.min_tissue_fraction <= 0:
            return True
        grey = crop[0] if len(crop) == 1 else crop.max(axis=0)
        tissue = np.count_nonzero(grey > self.tissue_threshold * scale)
        return tissue >= self.min_tissue_fraction * grey.size


def warped_crop(
    values: np.ndarray,
    corner: tuple[int, int],
    crop_hw: tuple[int, int],
    angle: float,
    factor: float,
) -> np.ndarray:
    """A crop turned and scaled about its centre, (C, h, w) float32, bilinear.

    values: image (C, H, W); beyond its border it goes on mirrored. corner: top, left of the crop
    before it is turned, in pixels. angle: radians. factor: > 1 shows things larger.
    """
    height, width = crop_hw
    down, right = np.meshgrid(
        np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij"
    )
    cosine, sine = math.cos(angle) / factor, math.sin(angle) / factor
    rows = corner[0] + (height - 1) / 2 + cosine * down - sine * right
    columns = corner[1] + (width - 1) / 2 + sine * down + cosine * right
    planes = [
        map_coordinates(plane, (rows, columns), output=np.float32, order=1, mode="reflect")
        for plane in values
    ]
    return np.stack(planes)
