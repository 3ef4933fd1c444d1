"""The two or three views of a training batch: flipped, dissolved or blurred, shifted.

B images, C channels, H W pixels, K shifts, V views; rows are view-major, within a view k-major.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.datasets import Fit
from dia.augment import flip
from dia.draws import random_signs
from dia.shifts import (
    ShiftType,
    blur_and_shift,
    shift_each,
)
from dia.steps import BetaParameters, draw_u, step_from_u
from diffusion_models.dissolve import from_dissolving_size, to_dissolving_size

Mode = Literal["simclr", "simclr_CSI", "simclr_DIA"]


class Draws(NamedTuple):
    """What is random about the views of B images."""

    signs12: Tensor
    """(2B,) flips of views 1 and 2."""
    signs3: Tensor
    """(K, B) flips of view 3, new ones for each shift."""
    t: Tensor
    """(K,) int64 diffusion steps of view 3, one for the whole batch and each shift."""


@dataclass(frozen=True)
class Negatives:
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
    return Draws(signs12, signs3, step_from_u(draw_u(beta, n_shifts, generator), offset, upper))


def make_views(
    images: Tensor, mode: Mode, shift_type: ShiftType, draws: Draws, negatives: Negatives
) -> Tensor:
    """All views of a batch: (B, C, H, W) in [0, 1] → (V·K·B, C, H, W), not yet augmented.

    Views 1 and 2 are flips under every shift; view 3, of mode simclr_DIA alone, is dissolved or
    blurred before its shift. All K dissolved copies go through the network as one batch.
    """
    if mode == "simclr":
        shift_type = ShiftType("none", "none")
    n_shifts = shift_type.count
    blurs = shift_type.view.startswith("blur")
    views = []
    for flipped in flip(images.repeat(2, 1, 1, 1), draws.signs12).chunk(2):
        if blurs and negatives.blur_all_views:
            views.append(_blurred([flipped] * n_shifts, shift_type, negatives))
        else:
            views.append(shift_each([flipped] * n_shifts, shift_type.base))
    if views_in(mode) == 3:
        copies = [flip(images, signs) for signs in draws.signs3]
        if blurs:
            views.append(_blurred(copies, shift_type, negatives))
        else:
            if shift_type.view == "diffusion":
                copies = dissolve_copies(copies, draws.t, negatives)
            views.append(shift_each(copies, shift_type.base))
    return torch.cat(views)


def dissolve_copies(copies: list[Tensor], t: Tensor, negatives: Negatives) -> list[Tensor]:
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


def _blurred(copies: list[Tensor], shift_type: ShiftType, negatives: Negatives) -> Tensor:
    resolution = negatives.resolution if negatives.resize_to_constant else None
    return torch.cat(
        [
            blur_and_shift(
                images, k, shift_type, kernel_size=negatives.kernel_size, resolution=resolution
            )
            for k, images in enumerate(copies)
        ]
    )
