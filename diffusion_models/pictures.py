"""Picture grids of a diffusion model: samples, and the same images dissolved further and further.

B images, C channels, H W pixels; pictures are (3, height, width) in [0, 1].
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
import torchvision
from torch import Tensor

from diffusion_models.diffusion import GaussianDiffusion, gaussian_noise
from diffusion_models.dissolve import Dissolver
from diffusion_models.settings import DissolveRange


def image_grid(images: Tensor, per_row: int) -> Tensor:
    """Lays out (B, C, H, W) in rows, two pixels apart; values are cut to [0, 1]."""
    return torchvision.utils.make_grid(images.clamp(0, 1).cpu(), nrow=per_row)


def dissolving_strip(dissolver: Dissolver, images: Tensor, steps: Sequence[int]) -> Tensor:
    """One row per image: dissolved at each of the steps. Images (B, C, H, W) in [0, 1]."""
    columns = [dissolver(images, t) for t in steps]
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # (B·steps, C, H, W)
    return image_grid(rows, len(steps))


@torch.no_grad()
def one_step_pictures(
    dissolver: Dissolver, images: Tensor, t: int, *, local_noise: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """What --mode eval shows: the input, the x0 estimate and the one-step sample, as grids."""
    diffusion: GaussianDiffusion = dissolver.diffusion
    fed = 2 * images - 1 if dissolver.dissolve_range == "signed" else images
    noise = gaussian_noise(
        tuple(images.shape), device=images.device, local=local_noise, generator=generator
    )
    previous, x0 = diffusion.step_back(fed, t, noise)
    if dissolver.dissolve_range == "signed":
        previous, x0 = (previous + 1) / 2, (x0 + 1) / 2
    per_row = max(1, int(len(images) ** 0.5))
    named = {"input": images, "x_start": x0, "pred_img": previous}
    return {name: image_grid(values, per_row) for name, values in named.items()}


def sample_picture(
    diffusion: GaussianDiffusion,
    *,
    n: int,
    side: int,
    sampling_steps: int,
    local_noise: bool,
    generator: torch.Generator,
) -> Tensor:
    """A grid of n new images."""
    images = diffusion.sample(
        (n, diffusion.model.channels, side, side),
        sampling_steps=min(sampling_steps, diffusion.steps),
        local_noise=local_noise,
        generator=generator,
    )
    return image_grid(images, max(1, int(n**0.5)))


def strip_dissolver(
    diffusion: GaussianDiffusion, side: int, dissolve_range: DissolveRange
) -> Dissolver:
    """A dissolver of a copy of a model, which training can go on changing."""
    return Dissolver(deepcopy(diffusion), image_size=side, dissolve_range=dissolve_range)
