"""How far a batch is dissolved: from a uniform or Beta draw u to a diffusion step t.

Shi et al. 2023 (arXiv 2302.14696); u and t are one per call and per shift k.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

DiffusionScheduler = Literal[
    "uniform",
    "beta_skewed",
    "beta_skewed_reversed",
    "beta_by_epoch",
    "beta_by_epoch_reversed",
]
STEP_SCALE = 100
"""Diffusion steps per unit of u."""


class BetaParameters(NamedTuple):
    """The two parameters of a Beta distribution on [0, 1]; (1, 1) is uniform."""

    alpha: float
    beta: float


def beta_by_epoch(
    epoch: int, *, period: int = 30, mean: float = 20.0, reverse: bool = False
) -> BetaParameters:
    """Beta parameters that swing from strong to weak dissolving and back over `period` epochs.

    In the first half alpha is `mean` and beta climbs from 2 towards it; in the second beta is
    `mean` and alpha falls back to 2. `reverse` swaps the two.
    """
    slope = 2 * (mean - 2) / period
    phase = epoch % period
    if phase < period / 2:
        alpha, beta = mean, 2 + slope * phase
    else:
        alpha, beta = 2 + slope * (period - phase - 1), mean
    return BetaParameters(beta, alpha) if reverse else BetaParameters(alpha, beta)


def beta_parameters(scheduler: DiffusionScheduler, epoch: int) -> BetaParameters:
    """The distribution of u that a diffusion_scheduler uses in an epoch (counted from 1)."""
    match scheduler:
        case "uniform":
            return BetaParameters(1.0, 1.0)
        case "beta_skewed":
            return BetaParameters(1.0, 1.7)
        case "beta_skewed_reversed":
            return BetaParameters(1.7, 1.0)
        case "beta_by_epoch" | "beta_by_epoch_reversed":
            return beta_by_epoch(epoch, reverse=scheduler == "beta_by_epoch_reversed")
    raise ValueError(
        f"diffusion_scheduler must be uniform, beta_skewed, beta_skewed_reversed, beta_by_epoch or "
        f"beta_by_epoch_reversed, got {scheduler!r}"
    )


def draw_u(parameters: BetaParameters, n: int, generator: torch.Generator) -> Tensor:
    """n draws from a Beta distribution: (n,) float32 in [0, 1] on the CPU.

    PyTorch's Beta takes no generator, so NumPy draws, seeded from ours.
    """
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    return torch.from_numpy(np.random.default_rng(seed).beta(*parameters, size=n)).float()


def step_from_u(u: Tensor, offset: float, upper: float) -> Tensor:
    """Diffusion steps: floor(100·(u·(upper - offset) + offset)), in float32 as published.

    u: any shape, in [0, 1]   returns int64 of that shape.
    """
    return ((u.float() * (upper - offset) + offset) * STEP_SCALE).long()


def fixed_step(offset: float) -> int:
    """The step where nothing is drawn: 100·offset, cut off (0.29 gives 28, as published)."""
    return int(offset * STEP_SCALE)
