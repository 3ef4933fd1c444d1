"""Minimal filtering (Winograd): convolutions of stride 1 with a fraction of the multiplications.

After Lavin and Gray 2016 (arXiv 1509.09308): tiles of m x m outputs from (m + r - 1)² products per
pair of channels instead of (m r)². Along one axis, m outputs of a filter of r taps come from
n = m + r - 1 inputs by n products: the inputs' polynomial is evaluated at n - 1 points and infinity
(Toom-Cook). The points are 0, 1, -1 and for n = 6 also 2, -2: opposite points share most of their
sums. Exact in real arithmetic; in fp32 about ten times the rounding error of a direct convolution
for m = 4 (2e-6 of the output's spread).
N samples, I and O input and output channels, r kernel size, T tiles, P = (m + r - 1)² points.
A dilated convolution is one with the pixels of every d-th row and column as an image of their own.
"""

import functools
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")
MOST_PLANS = 1024


class Workspace(threading.local):
    """Named scratch memory that grows to the largest request; every thread has its own."""

    def __init__(self) -> None:
        self.blocks: dict[tuple, Tensor] = {}
        self.plans: dict[Hashable, object] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised contiguous memory of the type and device of `like`.

        Whatever was taken under the same name before is overwritten by whoever writes to it.
        """
        numel = math.prod(shape)
        key = (name, like.dtype, like.device)
        block = self.blocks.get(key)
        if block is None or block.numel() < numel:
            block = like.new_empty(numel)
            self.blocks[key] = block
            self.plans.clear()  # they hold parts of the block that this one replaces
        return block[:numel].view(*shape)

    def planned(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """What `make` made for this key: views of taken memory, worth keeping for the next call."""
        if key in self.plans:
            return self.plans[key]
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        plan = make()
        plan = make()  # now that all blocks are large enough, so that none is held twice
        self.plans[key] = plan
        return plan


POINTS = (0, 1, -1, 2, -2)
"""Beside infinity."""

Steps = list[Callable[[], object]]
"""To be called in order; each fills a part of the memory that it was made for."""


def outputs_for(r: int) -> tuple[int, ...]:
    """The numbers m of outputs that a filter of r taps can have: n = 4 or 6."""
    return 5 - r, 7 - r


def kernel_matrix(m: int, r: int) -> Tensor:
    """(n, r) float64: a filter's values at the points, scaled as `evaluation` leaves them."""
    points = POINTS[: m + r - 2]
    rows = []
    for i, point in enumerate(points):
        scale = math.prod(point - other for j, other in enumerate(points) if j != i)
        rows.append([point**k / scale for k in range(r)])
    rows.append([float(k == r - 1) for k in range(r)])
    return torch.tensor(rows, dtype=torch.float64)


def evaluation(x: Tensor, out: Tensor, scratch: Tensor) -> Steps:
    """Makes x (n, ...) into out (n, ...): what is multiplied, for each point, then infinity.

    That of a point p is the inner product of x with the product of (z - q) over all other points q,
    of infinity with that over all points. scratch: (4, ...). All may be views.
    """
    n = len(x)
    ends = out[:: n - 1]  # 0 and infinity: the same even powers, from x[0] and from x[1] on
    if n == 4:  # z² - 1; for both signs z² ± z
        signs = _factors([[1, -1]], x)[0]
        return [
            partial(torch.sub, x[2:4], x[0:2], out=ends),
            partial(torch.addcmul, x[2], x[1], signs, out=out[1:3]),
        ]
    halves = scratch.unflatten(0, (2, 2))  # of both pairs: odd and even powers
    rests = _factors([[-4], [-1]], x)  # the pair 1 has the factor z² - 4, the pair 2 z² - 1
    values = _factors([[1, -1], [2, -2]], x)
    return [  # z⁴ - 5 z² + 4
        partial(torch.add, x[4:6], x[2:4], alpha=-5, out=scratch[:2]),
        partial(torch.add, scratch[:2], x[0:2], alpha=4, out=ends),
        partial(torch.addcmul, x[3:5], x[1:3], rests, out=halves),
        partial(
            torch.addcmul, halves[:, 1:], halves[:, :1], values, out=out[1:5].unflatten(0, (2, 2))
        ),
    ]


def interpolation(products: Tensor, out: Tensor, scratch: Tensor) -> Steps:
    """Makes products (n, ...) into out (m, ...): out[j] = sum over points p of p**j * product.

    The last output also has infinity's product. scratch: (4, ...). All may be views.
    """
    n, m = len(products), len(out)
    pairs = products[1 : n - 1].unflatten(0, (-1, 2))
    halves = scratch[: n - 2].unflatten(0, (-1, 2))  # of every pair: for even and for odd powers
    signs = _factors([[1, -1]], products)
    steps: Steps = [partial(torch.addcmul, pairs[:, :1], pairs[:, 1:], signs, out=halves)]
    if n == 6:
        powers = _factors([[1, 2], [4, 8]], products)
        first_four = out[:4].unflatten(0, (2, 2))
        steps.append(partial(torch.addcmul, halves[0], halves[1], powers, out=first_four))
        if m == 5:
            steps.append(partial(torch.add, halves[0, 0], halves[1, 0], alpha=16, out=out[4]))
    else:
        steps.append(partial(out[:2].copy_, halves[0]))
        if m == 3:
            steps.append(partial(out[2].copy_, halves[0, 0]))
    ends = out[:: m - 1]
    steps.append(partial(torch.add, ends, products[:: n - 1], out=ends))
    return steps


def _factors(values: list[list[int]], like: Tensor) -> Tensor:
    """(pairs, signs or powers, 1, …), to multiply arrays with two leading dimensions by."""
    factors = torch.tensor(values, dtype=like.dtype, device=like.device)
    return factors[(...,) + (None,) * (like.dim() - 1)]


LEAST_CHANNELS = 32


class Costs(NamedTuple):
    """Nanoseconds on one core, measured; only their ratios matter."""

    direct_mac: float
    """A multiplication of a direct convolution, and of the product of a point's matrices."""
    product_mac: float
    point_in: float
    """Making one number of a point, and taking one up."""
    point_out: float


# By the processor's instructions, not by a clock: all processes of a job must choose alike, for the
# choice changes the rounding.
COSTS = {"AVX512": Costs(0.0175, 0.0225, 0.6, 0.5)}
WITHOUT_AVX512 = Costs(0.026, 0.033, 1.9, 1.5)
CALLS = 1.0e5
WORTH = 0.95


class Tiling(NamedTuple):
    """Outputs per tile along rows and columns, and how many tiles cover the output."""

    rows: int
    cols: int
    down: int
    across: int


def tiling_for(
    out_hw: tuple[int, int], dilation: int, kernel: int, in_channels: int, out_channels: int
) -> Tiling | None:
    """The tiling of a convolution that is cheapest on this kind of processor.

    None where the direct way is as good.
    """
    costs = COSTS.get(torch.backends.cpu.get_cpu_capability(), WITHOUT_AVX512)
    return _cheapest(costs, out_hw, dilation, kernel, in_channels, out_channels)


@functools.lru_cache(maxsize=4096)
def _cheapest(
    costs: Costs,
    out_hw: tuple[int, int],
    dilation: int,
    kernel: int,
    in_channels: int,
    out_channels: int,
) -> Tiling | None:
    if min(in_channels, out_channels) < LEAST_CHANNELS:
        return None
    direct = math.prod(out_hw) * kernel**2 * in_channels * out_channels * costs.direct_mac
    best, best_cost = None, WORTH * direct
    choices = outputs_for(kernel)
    for rows in choices:
        for cols in choices:
            down, across = (
                tiles_for(side, m, dilation) for side, m in zip(out_hw, (rows, cols), strict=True)
            )
            points = (rows + kernel - 1) * (cols + kernel - 1) * down * across * dilation**2
            cost = CALLS + points * (
                in_channels * out_channels * costs.product_mac
                + in_channels * costs.point_in
                + out_channels * costs.point_out
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
    plan = _spread(x, (kernel.shape[1], kernel.shape[2]), size, pads, dilation, tiling, workspace)
    torch.bmm(plan.spread, kernel, out=plan.products)
    # At the point 1 of both axes, whose powers are all 1, a number reaches every output.
    plan.products[tiling.cols + size] += bias
    for step in plan.after:
        step()
    return plan.image[:, : out_hw[0], : out_hw[1]].permute(0, 3, 1, 2)


def weight_gradient(
    x: Tensor,
    grad: Tensor,
    size: int,
    pads: tuple[int, int],
    dilation: int,
    tiling: Tiling,
    workspace: Workspace,
) -> Tensor:
    """The gradient of `winograd`'s weight (O, I, r, r), from x and that of its result (N, O, …)."""
    in_channels, out_channels = x.shape[1], grad.shape[1]
    plan = _spread(x, (in_channels, out_channels), size, pads, dilation, tiling, workspace)
    rows, cols = tiling.rows, tiling.cols
    whole_tiles = workspace.take("winograd gradient", plan.image.shape, x)
    _place(whole_tiles, grad.permute(0, 2, 3, 1), (0, 0))
    tiles = plan.by_place(whole_tiles).reshape(rows * cols, -1)
    values = (_both_powers(rows, cols, size).to(x.dtype) @ tiles).view(*plan.spread.shape[:2], -1)
    products = torch.bmm(plan.spread.transpose(1, 2), values)  # (P, I, O)
    matrix = _both_axes(rows, cols, size).to(x.dtype).t()
    flat = matrix @ products.view(len(products), -1)
    return flat.view(size, size, in_channels, out_channels).permute(3, 2, 0, 1)


@functools.lru_cache(maxsize=64)
def _both_powers(rows: int, cols: int, kernel: int) -> Tensor:
    """(P, m²) float64: what `interpolation` multiplies, transposed."""
    both = []
    for m in (rows, cols):
        points = POINTS[: m + kernel - 2]
        powers = [[float(point**j) for j in range(m)] for point in points]
        both.append(torch.tensor([*powers, [float(j == m - 1) for j in range(m)]]).double())
    return torch.kron(*both)


def _spread(
    x: Tensor,
    channels: tuple[int, int],
    size: int,
    pads: tuple[int, int],
    dilation: int,
    tiling: Tiling,
    workspace: Workspace,
) -> "_Plan":
    """The plan of a convolution from I to O channels, with the values of x in its `spread`."""
    sizes = (len(x), *channels, size, dilation)
    plan = workspace.planned(
        ("winograd", *sizes, tiling, x.dtype, x.device),
        lambda: _Plan(sizes, tiling, x, workspace),
    )
    _place(plan.padded, x.permute(0, 2, 3, 1), pads)
    for step in plan.before:
        step()
    return plan


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
        self.tiles = (down, m0, d, across, m1, d)
        image = self.by_place(self.image).transpose(0, 1)
        products = by_row.view(m0, n1, n, down, d, across, d, out_channels).transpose(0, 1)
        self.after += interpolation(products, image, scratch(image))

    def by_place(self, image: Tensor) -> Tensor:
        """An image of whole tiles (N, h', w', C) by the place in a tile: (m, m, N, tiles …, C)."""
        # Row of the image: phase + d * (m0 * tile + place in the tile); columns likewise.
        apart = image.view(len(image), *self.tiles, -1)
        return apart.permute(2, 5, 0, 1, 3, 4, 6, 7)


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
    edges = (padded[:, :top], padded[:, bottom:])
    edges += (padded[:, top:bottom, :left], padded[:, top:bottom, right:])
    for edge in edges:
        if edge.numel() > 0:
            edge.zero_()
    padded[:, top:bottom, left:right] = x[:, : bottom - top, : right - left]
