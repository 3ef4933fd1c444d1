"""Small random networks and dropout for comparing the fast engine with the plain one."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from inpainter.completion import WindowScorer
from inpainter.fast.scorer import FastScorer
from inpainter.networks.critic import Critic
from inpainter.networks.dropout import (
    ChannelMasks,
    ImageDropout,
    WindowMasks,
    active_dropout_layers,
)
from inpainter.networks.generator import Generator
from inpainter.settings import GeneratorConfig
from tests.inpainter.weights import lively_generator

METRICS = ("MCD_image", "MCD_feature", "MeanCD_image", "MedCD_feature", "no_dropout")


def with_gain(module: nn.Module, gain: float, seed: int) -> nn.Module:
    """Weights drawn with a standard deviation of gain / sqrt(fan in), biases with 0.1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        std = gain / parameter[0].numel() ** 0.5 if parameter.ndim == 4 else 0.1
        with torch.no_grad():
            parameter.normal_(std=std, generator=generator)
    return module.eval()


@dataclass(frozen=True)
class Case:
    """One comparison: sizes in pixels, p the dropout rate, `settings` the generator's."""

    window: tuple[int, int]
    hole: tuple[int, int]
    channels: int = 1
    N: int = 2
    M: int = 2
    p: float = 0.5
    critic_channels: int = 1
    gain: float = 1.3
    """Of the weights; 0 = He's initialisation times 1.3."""
    ngf: int = 4
    """Minimal filtering pays from 32 on."""
    settings: tuple[tuple[str, object], ...] = ()

    def networks(self) -> tuple[Generator, Critic]:
        generator = Generator(self.config())
        critic = with_gain(Critic(self.critic_channels, 4, self.hole), 1.3, 2)
        if self.gain == 0:
            return lively_generator(self.config(), seed=1), critic
        return with_gain(generator, self.gain, 1), critic

    def config(self) -> GeneratorConfig:
        return GeneratorConfig(input_dim=self.channels, ngf=self.ngf, **dict(self.settings))

    def windows(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.rand(self.N, self.channels, *self.window, generator=generator) * 2 - 1

    def masks(self, generator: Generator) -> ChannelMasks:
        """Channel dropout of all windows."""
        channels = generator.droppable_layers()
        active = active_dropout_layers(self.config(), list(channels))
        layers = {name: channels[name] for name in active}
        return ImageDropout(layers, self.M, self.p, 5, "image.png").masks(range(self.N))

    def scores(self, masks: WindowMasks | None = None, **options) -> tuple[dict, dict]:
        """Scores of the plain and of the fast engine, fed the same masks."""
        networks = self.networks()
        parts = (*networks, METRICS, self.hole)
        if masks is None:
            masks, plain = self.masks(networks[0]), plain_scores(self)
        else:
            plain = WindowScorer(*parts)(self.windows(), masks)
        return plain, FastScorer(*parts, **options)(self.windows(), masks)

    def exact_scores(self, **options) -> tuple[dict, dict]:
        """Scores of both engines with networks and windows in float64."""
        generator, critic = self.networks()
        masks = self.masks(generator)
        parts = (generator.double(), critic.double(), METRICS, self.hole)
        fast = FastScorer(*parts, precision="fp64", **options)(self.windows().double(), masks)
        return plain_scores(self, torch.float64), fast


@cache
def plain_scores(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Scores of the plain engine, made once for all that is compared with them."""
    generator, critic = case.networks()
    masks = case.masks(generator)
    parts = (generator.to(dtype), critic.to(dtype), METRICS, case.hole)
    return WindowScorer(*parts)(case.windows().to(dtype), masks)


def worst_error(plain: dict[str, Tensor], fast: dict[str, Tensor]) -> float:
    """Largest relative difference of any score; the plain ones must be worth comparing."""
    assert plain.keys() == fast.keys()
    assert all(bool((values > 1e-3).all()) for values in plain.values())
    return max(float(((fast[k] - v) / v).abs().max()) for k, v in plain.items())
