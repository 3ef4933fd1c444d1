"""Slow changes of brightness and colour taken off an image: lighting, thickness, another eye's hue.

Shade correction as for fundus photographs (Spencer et al. 1996, Comput. Biomed. Res. 29): what is
left is how each pixel differs from its surroundings.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

GAIN = 2.0
"""Times the difference from the surroundings, of which little is left; beyond [0, 1] it is cut."""
DARKEST = 0.05
"""Of tissue, whatever its surroundings: it stays apart from background, which is 0."""
FLAT_TISSUE = DARKEST / 2
"""Grey value above which a pixel of a flattened image is tissue, resized ones, too."""
BLUR_PIXELS = 8.0
"""Standard deviation of the blur in the smaller image on which it is computed."""


@dataclass(frozen=True)
class Flattening:
    """Takes an image's own blur off its tissue, in each channel: 0.5 is like the surroundings."""

    share: float
    """Standard deviation of the Gaussian blur, as a share of the image's shorter side."""
    tissue_threshold: float
    """Grey value above which a pixel is tissue, in any channel; others neither count nor show."""

    def __call__(self, image: Tensor) -> Tensor:
        """(C, H, W) float32 in [0, 1] -> the same."""
        size = tuple(image.shape[1:])
        tissue = (image.amax(dim=0, keepdim=True) > self.tissue_threshold).to(image.dtype)
        deviation = self.share * min(size)
        factor = max(1.0, deviation / BLUR_PIXELS)
        small = tuple(max(1, round(side / factor)) for side in size)
        planes = torch.cat([image * tissue, tissue])[None]
        planes = F.interpolate(planes, size=small, mode="bilinear", antialias=True)[0]
        # Mirrored borders, so that an image without background has no darker rim.
        sigma = [deviation * now / before for now, before in zip(small, size, strict=True)]
        blurred = torch.from_numpy(gaussian_filter(planes.numpy(), [0, *sigma]))
        around = blurred[:-1] / blurred[-1:].clamp(min=1e-6)
        around = F.interpolate(around[None], size=size, mode="bilinear")[0]
        return (0.5 + GAIN * (image - around)).clamp(DARKEST, 1) * tissue
