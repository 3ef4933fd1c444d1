"""Patches of grey images: drawing a bank of them, and scoring every patch of an image.

N patches, P side of a patch in pixels, D = P * P, gh x gw grid of patches.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def patch_bank(images: Sequence[Tensor], patch: int, size: int, seed: int) -> Tensor:
    """Patches drawn uniformly from the images' tissue.

    A patch counts as tissue when at least a quarter of its pixels are brighter than 0.02.
    images: (1, H, W) each   patch: side in pixels   size: patches wanted   seed: of the draw
    returns: (N, patch * patch), N <= size; raises ValueError where no image has tissue.
    """
    if not images:
        raise ValueError("no training images: a baseline needs at least one")
    generator = torch.Generator().manual_seed(seed)
    share = -(-size // len(images))
    kept = []
    for image in images:
        plane = check_image(image)
        if min(plane.shape) < patch:
            raise ValueError(f"image {tuple(plane.shape)} is smaller than the patch, {patch} px")
        windows = plane.unfold(0, patch, 1).unfold(1, patch, 1)  # (H-P+1, W-P+1, P, P), a view
        tissue = F.avg_pool2d((plane > 0.02).float()[None, None], patch, 1)[0, 0]
        rows, columns = torch.nonzero(tissue >= 0.25, as_tuple=True)
        pick = torch.randperm(len(rows), generator=generator)[:share].to(rows.device)
        kept.append(windows[rows[pick], columns[pick]].flatten(1))
    bank = torch.cat(kept)[:size]
    if len(bank) == 0:
        raise ValueError(
            "no patch of the training images has tissue (a quarter brighter than 0.02)"
        )
    return bank


def dense_heatmap(
    image: Tensor, patch: int, stride: int, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """Scores patches on a regular grid and upsamples the scores to the image.

    The image is padded by reflection so that patches are centred in the stride x stride cells
    that they stand for, up to the border.
    image: (1, H, W)   patch, stride: pixels, patch - stride even   score: (N, D) -> (N,)
    returns: (H, W)
    """
    plane = check_image(image)
    H, W = plane.shape
    gh, gw = -(-H // stride), -(-W // stride)
    before = (patch - stride) // 2
    after = [(g - 1) * stride + patch - before - side for g, side in ((gw, W), (gh, H))]
    padded = F.pad(plane[None, None], (before, after[0], before, after[1]), mode="reflect")
    patches = F.unfold(padded, patch, stride=stride)[0].T  # (gh * gw, D)
    grid = score(patches).reshape(1, 1, gh, gw)
    full = F.interpolate(grid, scale_factor=stride, mode="bicubic", align_corners=False)
    return full[0, 0, :H, :W]


def check_image(image: Tensor) -> Tensor:
    """Returns the (H, W) plane of a (1, H, W) float image; raises ValueError for other shapes."""
    if image.ndim != 3 or image.shape[0] != 1 or not image.is_floating_point():
        raise ValueError(
            f"image must be a float tensor of shape (1, H, W), got {image.dtype} "
            f"{tuple(image.shape)}; convert colour to grey first"
        )
    return image[0]
