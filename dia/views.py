"""The two or three views of a training batch: flipped, dissolved or blurred, shifted.

B images, C channels, H W pixels, K shifts, V views; rows are view-major, within a view k-major.
How far view 3 is dissolved is drawn once per batch and shift: u from a uniform or Beta
distribution, and of that the diffusion step t (Shi et al. 2023, arXiv 2302.14696).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.datasets import Fit
from dia.augment import flip, random_signs
from dia.settings import DiffusionScheduler, Mode
from dia.shifts import ShiftType, blur_and_shift, shift_each
from diffusion_models.dissolve import from_dissolving_size, to_dissolving_size

STEP_SCALE = 100
"""Diffusion steps per unit of u."""


class BetaParameters(NamedTuple):
    """The two parameters of a Beta distribution on [0, 1]; (1, 1) is uniform."""

    alpha: float
    beta: float


class Draws(NamedTuple):
    """What is random about the views of B images."""

    signs12: Tensor
    """(2B,) flips of views 1 and 2."""
    signs3: Tensor
    """(K, B) flips of view 3, new ones for each shift."""
    t: Tensor
    """(K,) int64 diffusion steps of view 3, one for the whole batch and each shift."""

    def of_rows(self, rows: slice) -> "Draws":
        """The draws of these of the B images."""
        signs12 = self.signs12.unflatten(0, (2, -1))[:, rows].flatten()
        return Draws(signs12, self.signs3[:, rows], self.t)


@dataclass(frozen=True)
class NegativeViewConfig:
    """How view 3 is made before it is shifted."""

    dissolve: Callable[[Tensor, Tensor], Tensor] | None = None
    """(images (N, C, R, R), steps (N,)) → dissolved; needed for the diffusion shift types."""
    last_step: int | None = None
    """The last step t that it has; a draw of u = 1, which rounding can give, ends there."""
    resolution: int = 32
    """Side R in pixels at which images are dissolved, or blurred if resize_to_constant."""
    fit: Fit = "resize"
    """How images are brought to that size for dissolving."""
    kernel_size: int = 7
    """Side of the blur's kernel in pixels."""
    resize_to_constant: bool = False
    """Blur at `resolution` instead of the images' own size."""
    blur_all_views: bool = True
    """Blur the positive views too, as the published code does by accident."""


def views_in(mode: Mode) -> int:
    """V: how many views a training mode makes."""
    return 3 if mode == "simclr_DIA" else 2


def draw_views(
    n_images: int,
    n_shifts: int,
    *,
    beta: BetaParameters,
    offset: float,
    upper: float,
    generator: torch.Generator,
) -> Draws:
    """Draws flips and diffusion steps for one batch.

    beta: distribution of u   offset, upper: the range that u is mapped to, in hundreds of steps.
    """
    signs12 = random_signs(2 * n_images, generator)
    signs3 = torch.stack([random_signs(n_images, generator) for _ in range(n_shifts)])
    u = sample_beta(beta, n_shifts, generator)
    return Draws(signs12, signs3, timestep_from_uniform(u, offset, upper))


def make_views(
    images: Tensor, mode: Mode, shift_type: ShiftType, draws: Draws, negatives: NegativeViewConfig
) -> Tensor:
    """All views of a batch: (B, C, H, W) in [0, 1] → (V·K·B, C, H, W), not yet augmented.

    Views 1 and 2 are flips under every shift; view 3, of mode simclr_DIA alone, is dissolved or
    blurred before its shift. All K dissolved copies go through the network as one batch.
    """
    if mode == "simclr":
        shift_type = ShiftType("none", "none")
    n_shifts = shift_type.count
    blurs = shift_type.view.startswith("blur")
    blur_side = negatives.resolution if negatives.resize_to_constant else None
    flipped = flip(images.repeat(2, 1, 1, 1), draws.signs12).chunk(2)
    copies_by_view = [[view] * n_shifts for view in flipped]
    if views_in(mode) == 3:
        copies_by_view.append([flip(images, signs) for signs in draws.signs3])
    views: list[Tensor] = []
    for number, copies in enumerate(copies_by_view):
        third = number == 2
        if blurs and (third or negatives.blur_all_views):
            size = negatives.kernel_size
            views += [
                blur_and_shift(rows, k, shift_type, kernel_size=size, resolution=blur_side)
                for k, rows in enumerate(copies)
            ]
            continue
        if third and shift_type.view == "diffusion":
            copies = dissolve_copies(copies, draws.t, negatives)
        views.append(shift_each(copies, shift_type.base))
    return torch.cat(views)


def dissolve_copies(copies: list[Tensor], t: Tensor, negatives: NegativeViewConfig) -> list[Tensor]:
    """Dissolves the k-th of K batches (B, C, H, W) at step t[k], all in one network call."""
    if negatives.dissolve is None:
        raise ValueError(
            "a diffusion shift type needs a diffusion model; pass its checkpoint with "
            "--diffusion_model_path"
        )
    size = tuple(copies[0].shape[-2:])
    small = to_dissolving_size(torch.cat(copies), negatives.resolution, negatives.fit)
    steps = t if negatives.last_step is None else t.clamp(max=negatives.last_step)
    steps = steps.to(small.device).repeat_interleave(copies[0].shape[0])  # (K·B,)
    dissolved = negatives.dissolve(small, steps)
    return list(from_dissolving_size(dissolved, size, negatives.fit).chunk(len(copies)))


def shift_labels(n_images: int, n_shifts: int, n_views: int, device: torch.device) -> Tensor:
    """The shift of every row of `make_views`: (V·K·B,) int64."""
    one_view = torch.arange(n_shifts, device=device).repeat_interleave(n_images)
    return one_view.repeat(n_views)


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


def sample_beta(parameters: BetaParameters, n: int, generator: torch.Generator) -> Tensor:
    """n draws from a Beta distribution: (n,) float32 in [0, 1] on the CPU.

    PyTorch's Beta takes no generator, so NumPy draws, seeded from ours.
    """
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    return torch.from_numpy(np.random.default_rng(seed).beta(*parameters, size=n)).float()


def timestep_from_uniform(u: Tensor, offset: float, upper: float) -> Tensor:
    """Diffusion steps: floor(100·(u·(upper - offset) + offset)), in float32 as published.

    u: any shape, in [0, 1]   returns int64 of that shape.
    """
    return ((u.float() * (upper - offset) + offset) * STEP_SCALE).long()
