"""Scoring in two passes: every K-th window first, the others only where those look anomalous.

gh x gw grid of windows, K the refinement factor.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inpainter.windows import WindowGrid

QUANTILE = 0.8
"""Windows of the first pass that score above this quantile, by any metric, draw the second."""


def first_pass(grid: WindowGrid, K: int) -> list[int]:
    """Numbers of every K-th window along rows and columns, and of the last ones."""
    rows, cols = (_every(side, K) for side in grid.grid_hw)
    return [row * grid.grid_hw[1] + col for row in rows for col in cols]


def second_pass(
    scores: dict[str, Tensor], grid: WindowGrid, K: int, scored: Sequence[int]
) -> list[int]:
    """Numbers of the windows closer than K to one that scored high in the first pass.

    So are those closer than K to a window of the first pass that was not scored, for it lacks
    tissue: its 0 says nothing about its neighbours. scores: by metric, (gh * gw,), of which the
    first pass's are read; scored: numbers of the first pass's windows that have a score.
    """
    done = torch.tensor(first_pass(grid, K))
    known = torch.tensor(sorted(scored), dtype=torch.long)
    draws = torch.zeros(len(grid), dtype=torch.bool)
    draws[done] = True
    draws[known] = False
    for values in scores.values() if len(known) else ():
        seen = values[known]
        draws[known] |= seen > seen.quantile(QUANTILE)
    near = F.max_pool2d(draws.view(1, 1, *grid.grid_hw).float(), 2 * K - 1, 1, K - 1).flatten() > 0
    near[done] = False
    return near.nonzero().flatten().tolist()


def filled_in(values: Tensor, grid: WindowGrid, K: int, known: list[int]) -> Tensor:
    """Scores of all windows, (gh * gw,): those that were not computed are interpolated.

    Between windows of the first pass linearly along rows and columns; known: numbers that stay.
    """
    rows, cols = (_every(side, K) for side in grid.grid_hw)
    coarse = values.view(grid.grid_hw)[rows][:, cols]
    full = _stretched(_stretched(coarse, rows).t(), cols).t().flatten()
    full[known] = values[known]
    return full


def _every(side: int, K: int) -> list[int]:
    return sorted({*range(0, side, K), side - 1})


def _stretched(values: Tensor, places: list[int]) -> Tensor:
    """Linear interpolation of rows that lie at `places` to all rows in between."""
    at = torch.tensor(places)
    wanted = torch.arange(places[-1] + 1)
    right = torch.searchsorted(at, wanted).clamp(min=min(1, len(places) - 1))
    left = (right - 1).clamp(min=0)
    share = (wanted - at[left]) / (at[right] - at[left]).clamp(min=1)
    return torch.lerp(values[left], values[right], share[:, None].to(values.dtype))
