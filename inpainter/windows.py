"""The window grid of an image and how window scores become a heatmap.

H x W image, h x w window, stride s, gh x gw grid of windows; all in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from inpainter.settings import TestConfig

Alignment = Literal["stretched", "centred"]
QUANTILE = 0.8
"""Windows of the first pass that score above this quantile, by any metric, draw the second."""


class WindowError(UserError):
    """An image has no place for a single window, or windows leave gaps."""


@dataclass(frozen=True)
class WindowGrid:
    """Where the windows lie: window (i, j) starts at (i * stride - pad_top, j * stride - pad_left).

    With pad > 0 windows reach over the image's border into its mirror image.
    """

    image_hw: tuple[int, int]
    window_hw: tuple[int, int]
    stride: int
    grid_hw: tuple[int, int]
    pad: tuple[int, int, int, int]
    """left, right, top, bottom: pixels mirrored on each side."""

    def __len__(self) -> int:
        return self.grid_hw[0] * self.grid_hw[1]

    def corner(self, number: int) -> tuple[int, int]:
        """Top and left of a window in the padded image; windows are counted row by row."""
        row, col = divmod(number, self.grid_hw[1])
        return row * self.stride, col * self.stride


def check_stride(test: TestConfig) -> None:
    """Raises WindowError where the stride is so large that pixels lie between what is scored.

    As published, heatmaps that are neither averaged nor centred may have any stride.
    """
    over_holes = test.heatmap_type == "averaged_hole"
    what, sides = ("holes", test.mask_shape) if over_holes else ("windows", test.patch_shape)
    published = test.heatmap_type == "nonaveraged" and test.heatmap_alignment == "stretched"
    largest = min(sides[:2])
    if test.patch_stride > largest and not published:
        raise WindowError(
            f"test.patch_stride {test.patch_stride} would leave gaps between the {what} of "
            f"{sides[0]} x {sides[1]} pixels, where no score says anything (test.heatmap_type: "
            f"{test.heatmap_type}). Use a stride of {largest} or less."
        )


def window_grid(
    image_hw: tuple[int, int], window_hw: tuple[int, int], stride: int, alignment: Alignment
) -> WindowGrid:
    """The grid of an image.

    stretched: the (H - h) // s + 1 rows of windows that fit (the published code counts one short
    where the stride divides H - h, P8). centred: one window for every s x s cell of the
    image, centred on the cell. Raises WindowError where no window fits; see also check_stride.
    """
    if alignment == "stretched":
        if any(side < window for side, window in zip(image_hw, window_hw, strict=True)):
            raise WindowError(
                f"an image of {image_hw[0]} x {image_hw[1]} pixels is smaller than the window, "
                f"{window_hw[0]} x {window_hw[1]}; set test.heatmap_alignment: centred, which pads "
                "it, or a smaller test.patch_shape"
            )
        rows, cols = ((side - w) // stride + 1 for side, w in zip(image_hw, window_hw, strict=True))
        return WindowGrid(image_hw, window_hw, stride, (rows, cols), (0, 0, 0, 0))
    pads = []
    grid = []
    for side, window in zip(image_hw, window_hw, strict=True):
        cells = math.ceil(side / stride)
        before = (window - stride + 1) // 2  # the window's centre on the cell's
        end = (cells - 1) * stride - before + window
        pads.append((max(before, 0), max(end - side, 0)))
        grid.append(cells)
    return WindowGrid(image_hw, window_hw, stride, (grid[0], grid[1]), (*pads[1], *pads[0]))


def scaled_hw(image_hw: tuple[int, int], scale: float) -> tuple[int, int]:
    """The size of an image that is shown smaller by this factor in (0, 1]; at least a pixel."""
    return max(1, round(image_hw[0] * scale)), max(1, round(image_hw[1] * scale))


def resized(image: Tensor, image_hw: tuple[int, int]) -> Tensor:
    """An image, or a heatmap, of another size: (C, H, W) -> (C, *image_hw), antialiased bilinear.

    The same where the size is the same.
    """
    if tuple(image.shape[1:]) == tuple(image_hw):
        return image
    return F.interpolate(image[None], size=image_hw, mode="bilinear", antialias=True)[0]


def pad_image(image: Tensor, grid: WindowGrid) -> Tensor:
    """Mirrors the image's borders as the grid needs; (C, H, W) -> (C, H + ..., W + ...)."""
    left, right, top, bottom = grid.pad
    if not any(grid.pad):
        return image
    pads = ((0, 0), (top, bottom), (left, right))
    return torch.from_numpy(np.pad(image.numpy(), pads, mode="reflect"))  # however far they reach


def cut_windows(padded: Tensor, grid: WindowGrid, numbers: list[int]) -> Tensor:
    """Windows of a padded image (C, H', W') by number: (N, C, h, w)."""
    h, w = grid.window_hw
    corners = [grid.corner(number) for number in numbers]
    return torch.stack([padded[:, top : top + h, left : left + w] for top, left in corners])


def tissue_fractions(image: Tensor, grid: WindowGrid, hole_hw: tuple[int, int], threshold: float):
    """Share of each window's hole that is brighter than `threshold`; (C, H', W') -> (gh*gw,).

    image: padded, in [0, 1]; colour counts where any channel is bright. What is mirrored at the
    image's border does not count: it is no tissue, and hard to complete. Of an image smaller than
    the hole it is the share of what the fullest hole has of it.
    """
    H, W = grid.image_hw
    inside = F.pad(torch.ones(H, W, dtype=torch.float64), grid.pad)
    bright = _in_holes((image.amax(dim=0) > threshold) * inside, grid, hole_hw)
    return (bright / _in_holes(inside, grid, hole_hw).amax()).flatten()


def _in_holes(values: Tensor, grid: WindowGrid, hole_hw: tuple[int, int]) -> Tensor:
    """Sums over each window's hole: (H', W') -> (gh, gw)."""
    sums = F.pad(values.cumsum(0).cumsum(1), (1, 0, 1, 0))  # summed-area table
    (h, w), (gh, gw) = hole_hw, grid.grid_hw
    top = torch.arange(gh)[:, None] * grid.stride + (grid.window_hw[0] - h) // 2
    left = torch.arange(gw)[None, :] * grid.stride + (grid.window_hw[1] - w) // 2
    return sums[top + h, left + w] - sums[top, left + w] - sums[top + h, left] + sums[top, left]


def heatmap_from_grid(scores: Tensor, grid: WindowGrid) -> Tensor:
    """Bicubic upsampling of window scores, not clamped: (gh, gw) -> (H, W).

    stretched: over the whole image, as published; centred: each score at its window's centre.
    """
    rows, cols = grid.grid_hw
    centred = any(grid.pad)
    size = (rows * grid.stride, cols * grid.stride) if centred else grid.image_hw
    heat = F.interpolate(scores[None, None], size=size, mode="bicubic", align_corners=False)
    return heat[0, 0, : grid.image_hw[0], : grid.image_hw[1]]


def averaged_heatmap(
    scores: Tensor,
    grid: WindowGrid,
    area_hw: tuple[int, int],
    details: Tensor | None = None,
) -> Tensor:
    """Each pixel's mean score over the central areas that cover it.

    scores: (gh, gw); area_hw: the window or the hole; details: factors of each window's score in
    equal cells of its area, (gh*gw, rows, columns). Returns (H, W). A pixel at the border that no
    window covers is 0, as published. One that a window covers, but no hole, has the score of the
    nearest that a hole covers: 0 would say that nothing could be more normal. The stride leaves no
    gaps between areas; see check_stride.
    """
    left, right, top, bottom = grid.pad
    padded_hw = (grid.image_hw[0] + top + bottom, grid.image_hw[1] + left + right)
    total = scores.new_zeros(padded_hw, dtype=torch.float64)
    count = scores.new_zeros(padded_hw, dtype=torch.float64)
    (h, w) = area_hw
    inset = ((grid.window_hw[0] - h) // 2, (grid.window_hw[1] - w) // 2)
    for number, score in enumerate(scores.flatten().tolist()):
        y, x = grid.corner(number)
        area = (slice(y + inset[0], y + inset[0] + h), slice(x + inset[1], x + inset[1] + w))
        if details is None:
            total[area] += score
        else:
            total[area] += score * F.interpolate(details[number][None, None], size=(h, w))[0, 0]
        count[area] += 1
    mean = (total / count.clamp(min=1)).to(scores.dtype)
    if tuple(area_hw) != tuple(grid.window_hw):
        last = grid.corner(len(grid) - 1)
        rows, cols = (  # each place along an axis, or the nearest one that an area covers
            torch.arange(padded_hw[i]).clamp(inset[i], last[i] + inset[i] + area_hw[i] - 1)
            for i in (0, 1)
        )
        mean = mean[rows][:, cols]
    return mean[top : top + grid.image_hw[0], left : left + grid.image_hw[1]]


def leaves_border(test: TestConfig, image_hw: tuple[int, int]) -> bool:
    """Whether an averaged heatmap of such an image has pixels that no window covers."""
    if test.heatmap_type != "averaged" or test.heatmap_alignment != "stretched":
        return False
    rest = ((i - w) % test.patch_stride for i, w in zip(image_hw, test.patch_shape, strict=False))
    return any(rest)


def centre_mask(
    image_hw: tuple[int, int], mask_hw: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Mask of a hole of mask_hw pixels in the image's centre: (1, 1, H, W) float, 1 = hole."""
    mask = torch.zeros(1, 1, *image_hw, device=device)
    centre_crop(mask, mask_hw).fill_(1)
    return mask


def centre_crop(x: Tensor, mask_hw: tuple[int, int]) -> Tensor:
    """The central mask_hw pixels: (..., H, W) -> (..., h, w), a view."""
    top, left = centre_corner((x.shape[-2], x.shape[-1]), mask_hw)
    return x[..., top : top + mask_hw[0], left : left + mask_hw[1]]


def centre_corner(image_hw: Sequence[int], mask_hw: Sequence[int]) -> tuple[int, int]:
    """Top and left pixel of the central mask_hw; an odd remainder goes to the bottom and right."""
    if min(mask_hw) < 1 or mask_hw[0] > image_hw[0] or mask_hw[1] > image_hw[1]:
        raise ValueError(
            f"A hole of {tuple(mask_hw)} does not fit into an image of {tuple(image_hw)} pixels"
        )
    return (image_hw[0] - mask_hw[0]) // 2, (image_hw[1] - mask_hw[1]) // 2


def first_pass(grid: WindowGrid, K: int) -> list[int]:
    """Numbers of every K-th window along rows and columns, and of the last ones."""
    rows, cols = (_every(side, K) for side in grid.grid_hw)
    return [row * grid.grid_hw[1] + col for row in rows for col in cols]


def second_pass(scores: Tensor, grid: WindowGrid, K: int, scored: Sequence[int]) -> list[int]:
    """Numbers of the windows closer than K to one that scored high in the first pass.

    So are those closer than K to a window of the first pass that was not scored, for it lacks
    tissue: its 0 says nothing about its neighbours. scores: (metrics, gh * gw), of which the first
    pass's are read; scored: numbers of the first pass's windows that have a score.
    """
    done = torch.tensor(first_pass(grid, K))
    tissue = torch.tensor(sorted(scored), dtype=torch.long)
    draws = torch.zeros(len(grid), dtype=torch.bool)
    draws[done] = True
    draws[tissue] = False
    for values in scores[:, tissue] if len(tissue) else ():
        draws[tissue] |= values > values.quantile(QUANTILE)
    near = F.max_pool2d(draws.view(1, 1, *grid.grid_hw).float(), 2 * K - 1, 1, K - 1).flatten() > 0
    near[done] = False
    return near.nonzero().flatten().tolist()


def filled_in(scores: Tensor, grid: WindowGrid, K: int, final: list[int]) -> Tensor:
    """Scores of all windows, (metrics, gh * gw): those that were not computed are interpolated.

    Between windows of the first pass linearly along rows and columns; final: numbers of those that
    keep their scores.
    """
    full = scores.unflatten(1, grid.grid_hw).numpy()
    for axis, side in enumerate(grid.grid_hw, start=1):
        lines = partial(_between, np.array(_every(side, K)))
        full = np.apply_along_axis(lines, axis, full)
    full = torch.from_numpy(full).to(scores.dtype).flatten(1)
    full[:, final] = scores[:, final]
    return full


def _every(side: int, K: int) -> list[int]:
    return sorted({*range(0, side, K), side - 1})


def _between(places: np.ndarray, line: np.ndarray) -> np.ndarray:
    """A line whose values between `places` are interpolated linearly."""
    return np.interp(np.arange(len(line)), places, line[places])
