"""Small networks with weights that make every part matter."""

import torch

from inpainter.networks.critic import Critic
from inpainter.networks.generator import Generator, he_init
from inpainter.settings import (
    CriticConfig,
    GeneratorConfig,
    PicardConfig,
    TestConfig,
    TrainConfig,
)

SMALL = GeneratorConfig(ngf=4)
TRAINING = PicardConfig(
    train=TrainConfig(
        image_shape=(32, 32, 1), mask_shape=(16, 16), max_delta_shape=(4, 4), init="he"
    ),
    test=TestConfig(patch_shape=(32, 32, 1), mask_shape=(16, 16)),
    netG=SMALL,
    netD=CriticConfig(ndf=4),
)
"""Crops of 32 x 32 with boxes of 16 x 16."""


def lively_generator(config: GeneratorConfig = SMALL, seed: int = 0) -> Generator:
    """A generator whose output varies: torch's default weights lose the signal on the way."""
    torch.manual_seed(seed)
    generator = Generator(config)
    he_init(generator)
    for parameter in generator.parameters():
        parameter.data *= 1.3
    return generator.eval()


def small_critic(hw: tuple[int, int] = (32, 32), channels: int = 1, seed: int = 0) -> Critic:
    torch.manual_seed(seed)
    return Critic(channels, 4, hw).eval()


def random_window(n: int, hw: tuple[int, int], channels: int = 1, seed: int = 0) -> torch.Tensor:
    """(n, channels, H, W) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, *hw, generator=generator) * 2 - 1
