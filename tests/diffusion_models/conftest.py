"""A small diffusion model and images for it."""

import pytest
import torch

from diffusion_models.diffusion import GaussianDiffusion
from diffusion_models.unet import Unet


@pytest.fixture
def diffusion() -> GaussianDiffusion:
    torch.manual_seed(0)
    return GaussianDiffusion(Unet(8, (1, 2)), steps=100).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
