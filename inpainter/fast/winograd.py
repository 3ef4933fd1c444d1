"""Minimal filtering (Winograd): convolutions of stride 1 with a fraction of the multiplications.

After Lavin and Gray 2016 (arXiv 1509.09308): tiles of m x m outputs from (m + r - 1)² products per
pair of channels instead of (m r)². Exact in real arithmetic; in fp32 about ten times the rounding
error of a direct convolution for m = 4 (2e-6 of the output's spread).
N samples, I and O input and output channels, r kernel size, T tiles, P = (m + r - 1)² points.
A dilated convolution is one with the pixels of every d-th row and column as an image of their own.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from inpainter.fast.toom_cook import Steps, evaluation, interpolation, kernel_matrix, outputs_for
from inpainter.fast.workspace import Workspace

LEAST_CHANNELS = 32

# Nanoseconds on one core with AVX-512, measured; only their ratios matter.
DIRECT_MAC, PRODUCT_MAC = 0.0175, 0.0225
POINT_IN, POINT_OUT = 0.6, 0.5
CALLS = 1.0e5
WORTH = 0.95


class Tiling(NamedTuple):
    """Outputs per tile along rows and columns, and how many tiles cover the output."""

    rows: int
    cols: int
    down: int
    across: int


@functools.lru_cache(maxsize=4096)
def tiling_for(
    out_hw: tuple[int, int], dilation: int, kernel: int, in_channels: int, out_channels: int
) -> Tiling | None:
    """The cheapest tiling of a convolution, none where the direct way is as good."""
    if min(in_channels, out_channels) < LEAST_CHANNELS:
        return None
    direct = math.prod(out_hw) * kernel**2 * in_channels * out_channels * DIRECT_MAC
    best, best_cost = None, WORTH * direct
    choices = outputs_for(kernel)
    for rows in choices:
        for cols in choices:
            down, across = (
                tiles_for(side, m, dilation) for side, m in zip(out_hw, (rows, cols), strict=True)
            )
            points = (rows + kernel - 1) * (cols + kernel - 1) * down * across * dilation**2
            cost = CALLS + points * (
                in_channels * out_channels * PRODUCT_MAC
                + in_channels * POINT_IN
                + out_channels * POINT_OUT
            )
            if cost < best_cost:
                best, best_cost = Tiling(rows, cols, down, across), cost
    return best


def tiles_for(side: int, m: int, dilation: int) -> int:
    """Tiles of m outputs that cover every dilation-th of `side` pixels."""
    return math.ceil(math.ceil(side / dilation) / m)


def transformed_kernel(weight: Tensor, tiling: Tiling) -> Tensor:
    """The convolution's weight (O, I, r, r) -> (P, I, O)."""
    out_channels, in_channels, r, _ = weight.shape
    flat = weight.permute(2, 3, 1, 0).reshape(r * r, in_channels * out_channels)
    matrix = _both_axes(tiling.rows, tiling.cols, r).to(weight.dtype)
    return (matrix @ flat).view(-1, in_channels, out_channels)


@functools.lru_cache(maxsize=64)
def _both_axes(rows: int, cols: int, kernel: int) -> Tensor:
    return torch.kron(kernel_matrix(rows, kernel), kernel_matrix(cols, kernel))


def winograd(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor,
    size: int,
    pads: tuple[int, int],
    out_hw: tuple[int, int],
    dilation: int,
    tiling: Tiling,
    workspace: Workspace,
) -> Tensor:
    """The convolution of x (N, I, h, w) by a transformed kernel (P, I, O), channels_last.

    size: r; pads: zeros above and to the left; below and to the right follow from out_hw. The
    result (N, O, *out_hw) lies in the workspace: the next convolution overwrites it.
    """
    sizes = (len(x), kernel.shape[1], kernel.shape[2], size, dilation)
    plan = workspace.planned(
        ("winograd", *sizes, tiling, x.dtype, x.device),
        lambda: _Plan(sizes, tiling, x, workspace),
    )
    _place(plan.padded, x.permute(0, 2, 3, 1), pads)
    for step in plan.before:
        step()
    torch.bmm(plan.spread, kernel, out=plan.products)
    # At the point 1 of both axes, whose powers are all 1, a number reaches every output.
    plan.products[tiling.cols + size] += bias
    for step in plan.after:
        step()
    return plan.image[:, : out_hw[0], : out_hw[1]].permute(0, 3, 1, 2)


class _Plan:
    """Memory of one size of convolution and the sums over it, all views made beforehand.

    sizes: N, I, O, r, d; tiles T = (N, tiles down, d, tiles across, d), d the phases of a dilated
    convolution. padded (N, h, w, I) -> steps `before` -> spread (P, T, I); products (P, T, O) ->
    steps `after` -> image (N, h', w', O) of whole tiles.
    """

    def __init__(
        self, sizes: tuple[int, ...], tiling: Tiling, like: Tensor, workspace: Workspace
    ) -> None:
        n, in_channels, out_channels, size, d = sizes
        m0, m1, down, across = tiling
        n0, n1 = m0 + size - 1, m1 + size - 1
        h, w = down * m0 + size - 1, across * m1 + size - 1  # of one phase

        def take(name: str, *shape: int) -> Tensor:
            return workspace.take(f"winograd {name}", shape, like)

        def scratch(of: Tensor) -> Tensor:
            return take("scratch", 4, *of.shape[1:])

        self.padded = take("image", n, h * d, w * d, in_channels)
        columns = _places(self.padded.view(n, h * d, w, d, in_channels), 2, n1, m1, across)
        by_column = take("a", *columns.shape)
        self.before: Steps = evaluation(columns, by_column, scratch(by_column))
        rows = _places(by_column.view(n1, n, h, d, -1), 2, n0, m0, down)
        values = take("b", *rows.shape)
        self.before += evaluation(rows, values, scratch(values))
        self.spread = values.view(n0 * n1, -1, in_channels)

        self.products = take("a", n0 * n1, self.spread.shape[1], out_channels)
        products = self.products.view(n0, n1, -1)
        by_row = take("b", m0, *products.shape[1:])
        self.after: Steps = interpolation(products, by_row, scratch(by_row))
        self.image = take("image", n, down * m0 * d, across * m1 * d, out_channels)
        # Row of the image: phase + d * (m0 * tile + place in the tile); columns likewise.
        image = self.image.view(n, down, m0, d, across, m1, d, out_channels)
        image = image.permute(5, 2, 0, 1, 3, 4, 6, 7)
        products = by_row.view(m0, n1, n, down, d, across, d, out_channels).transpose(0, 1)
        self.after += interpolation(products, image, scratch(image))


def _places(x: Tensor, dim: int, count: int, step: int, tiles: int) -> Tensor:
    """The same place of all tiles together: x with `dim` taken apart, (count, …, tiles, …).

    Tiles start `step` apart and overlap where they have more places, `count`.
    """
    return x.unfold(dim, count, step).narrow(dim, 0, tiles).movedim(-1, 0)


def _place(padded: Tensor, x: Tensor, pads: tuple[int, int]) -> None:
    """Copies x (N, h, w, C) into a larger tensor at (top, left), zeros around it."""
    top, left = pads
    h, w = x.shape[1:3]
    bottom, right = min(top + h, padded.shape[1]), min(left + w, padded.shape[2])
    if top:
        padded[:, :top] = 0
    if bottom < padded.shape[1]:
        padded[:, bottom:] = 0
    if left:
        padded[:, top:bottom, :left] = 0
    if right < padded.shape[2]:
        padded[:, top:bottom, right:] = 0
    padded[:, top:bottom, left:right] = x[:, : bottom - top, : right - left]
