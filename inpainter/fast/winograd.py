"""Minimal filtering (Winograd): convolutions of stride 1 with a fraction of the multiplications.

After Lavin and Gray 2016 (arXiv 1509.09308): tiles of m x m outputs from (m + r - 1)² products per
pair of channels instead of (m r)². Exact in real arithmetic; in fp32 with the points below about
seven times the rounding error of a direct convolution for m = 4 (1.5e-6 of the output's spread).
N samples, O and I output and input channels, r kernel size, T tiles, P = (m + r - 1)² points.
A dilated convolution is one with the pixels of every d-th row and column as an image of their own.
"""

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from inpainter.fast.workspace import Workspace

POINTS = tuple(map(Fraction, ("0", "1", "-1", "2", "-1/2")))
"""Where the polynomials are evaluated, beside infinity; chosen for small rounding errors."""
LEAST_CHANNELS = 32

# Nanoseconds on one core with AVX-512, measured; only their ratios matter.
DIRECT_MAC, PRODUCT_MAC = 0.0135, 0.0155
POINT_IN, POINT_OUT = 1.6, 0.9
WORTH = 0.9


class Tiling(NamedTuple):
    """Outputs per tile along rows and columns, and how many tiles cover the output."""

    rows: int
    cols: int
    down: int
    across: int


class Transforms(NamedTuple):
    """Matrices of a tile: input (P, P), kernel (P, r * r), output (m * m, P)."""

    into: Tensor
    kernel: Tensor
    out: Tensor


@functools.lru_cache(maxsize=4096)
def tiling_for(
    out_hw: tuple[int, int], dilation: int, kernel: int, in_channels: int, out_channels: int
) -> Tiling | None:
    """The cheapest tiling of a convolution, none where the direct way is as good."""
    if min(in_channels, out_channels) < LEAST_CHANNELS:
        return None
    direct = math.prod(out_hw) * kernel**2 * in_channels * out_channels * DIRECT_MAC
    best, best_cost = None, WORTH * direct
    choices = range(2, 7 - kernel + 1)
    for rows in choices:
        for cols in choices:
            down, across = (
                tiles_for(side, m, dilation) for side, m in zip(out_hw, (rows, cols), strict=True)
            )
            points = (rows + kernel - 1) * (cols + kernel - 1) * down * across * dilation**2
            cost = points * (
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


@functools.lru_cache(maxsize=64)
def transforms(rows: int, cols: int, kernel: int) -> Transforms:
    """The matrices of both axes together, fp32 on the CPU."""
    pairs = [
        torch.kron(a, b).float()
        for a, b in zip(_matrices(rows, kernel), _matrices(cols, kernel), strict=True)
    ]
    return Transforms(*pairs)


def _matrices(m: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Toom-Cook matrices along one axis: into (P, P), kernel (P, r), out (m, P), float64."""
    points = POINTS[: m + r - 2]
    out = [[point**j for point in points] + [Fraction(j == m - 1)] for j in range(m)]
    kernel, into = [], []
    for i, point in enumerate(points):
        others = points[:i] + points[i + 1 :]
        scale = math.prod((point - other for other in others), start=Fraction(1))
        kernel.append([point**k / scale for k in range(r)])
        into.append([*_polynomial(others), Fraction(0)])
    kernel.append([Fraction(k == r - 1) for k in range(r)])
    into.append(_polynomial(points))
    return tuple(
        torch.tensor([[float(x) for x in row] for row in matrix], dtype=torch.float64)
        for matrix in (into, kernel, out)
    )


def _polynomial(roots: tuple[Fraction, ...]) -> list[Fraction]:
    """Coefficients of the product of (x - root), lowest power first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        scaled = [*(-root * c for c in coefficients), Fraction(0)]
        coefficients = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients


def transformed_kernel(weight: Tensor, tiling: Tiling) -> Tensor:
    """(O, I, r, r) -> (P, I, O)."""
    out_channels, in_channels, r, _ = weight.shape
    matrix = transforms(tiling.rows, tiling.cols, r).kernel
    flat = weight.permute(2, 3, 1, 0).reshape(r * r, in_channels * out_channels)
    return (matrix @ flat).view(-1, in_channels, out_channels)


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
    result (N, O, *out_hw) is new memory.
    """
    n, in_channels = x.shape[:2]
    points, _, out_channels = kernel.shape
    m, d, r = (tiling.rows, tiling.cols), dilation, size
    tiles = (tiling.down, tiling.across)
    into, _, out_matrix = transforms(*m, r)
    padded_hw = [d * (t * step + r - 1) for t, step in zip(tiles, m, strict=True)]
    padded = workspace.take("winograd padded", (n, *padded_hw, in_channels), x)
    _place(padded, x.permute(0, 2, 3, 1), pads)
    row, col = padded.stride()[1:3]
    steps = (m[0] + r - 1, m[1] + r - 1)
    window = padded.as_strided(
        (*steps, n, d, tiles[0], d, tiles[1], in_channels),
        (d * row, d * col, padded.stride(0), row, m[0] * d * row, col, m[1] * d * col, 1),
    )
    count = n * d * tiles[0] * d * tiles[1]
    gathered = workspace.take("winograd a", (points, count * in_channels), x)
    gathered.view(window.shape).copy_(window)
    spread = workspace.take("winograd b", (points, count * in_channels), x)
    torch.mm(into, gathered, out=spread)
    products = workspace.take("winograd a", (points, count, out_channels), x)
    torch.bmm(spread.view(points, count, in_channels), kernel, out=products)
    tiled = workspace.take("winograd b", (m[0] * m[1], count * out_channels), x)
    torch.mm(out_matrix, products.view(points, -1), out=tiled)
    tiled = tiled.view(*m, n, d, tiles[0], d, tiles[1], out_channels)
    # Output row: phase + d * (m * tile + place in the tile).
    image = tiled.permute(2, 4, 0, 3, 6, 1, 5, 7)
    exact = (tiles[0] * m[0] * d, tiles[1] * m[1] * d)
    result = x.new_empty(n, *exact, out_channels)
    torch.add(image, bias, out=result.view(image.shape))
    return result[:, : out_hw[0], : out_hw[1]].permute(0, 3, 1, 2)


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
