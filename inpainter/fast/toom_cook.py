"""Fast polynomial products along one axis, as few sums over large arrays.

m outputs of a filter of r taps from n = m + r - 1 inputs by n products: the inputs' polynomial is
evaluated at n - 1 points and infinity (Toom-Cook; Lavin and Gray 2016, arXiv 1509.09308). The
points are 0, 1, -1 and for n = 6 also 2, -2: opposite points share most of their sums.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

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
