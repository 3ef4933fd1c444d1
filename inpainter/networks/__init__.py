"""The networks of a training: building them, and the least memory that they need."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.devices import memory_of, require_memory
from common.training import HALF
from inpainter.networks.critic import Critic
from inpainter.networks.generator import Generator, he_init
from inpainter.settings import PicardConfig, TrainConfig

BYTES = 4
"""Of a number in fp32."""
COPIES = 4
"""Of each weight: itself, its gradient and Adam's two moments."""
LAYERS = 40
"""Layers of full size and width whose outputs amount to at least the generator's; it has 34."""
CPU = torch.device("cpu")


class Networks(NamedTuple):
    """The generator, the critic of the hole's box and the critic of the whole crop."""

    generator: Generator
    local_critic: Critic
    global_critic: Critic

    def critics(self) -> nn.ModuleList:
        return nn.ModuleList([self.local_critic, self.global_critic])


def build_networks(config: PicardConfig, device: torch.device) -> Networks:
    """Fresh generator and critics on the device; train.init: default is torch's initialisation."""
    generator = Generator(config.netG)
    if config.train.init == "he":
        he_init(generator)
    channels, d = config.netD.input_dim, config.netD.ndf
    local = Critic(channels, d, config.train.mask_shape)
    networks = Networks(generator, local, Critic(channels, d, config.train.image_shape[:2]))
    for network in networks:
        network.to(device, memory_format=layout_of(config.train, device))
    return networks


def layout_of(train: TrainConfig, device: torch.device) -> torch.memory_format:
    """How crops and weights lie in memory; channels last, if asked for, on GPUs alone.

    On a CPU the critics' weights' gradients take longer that way, up to five times, and the
    generator's convolutions choose for themselves.
    """
    last = train.channels_last and device.type != "cpu"
    return torch.channels_last if last else torch.contiguous_format


def require_training_memory(config: PicardConfig, device: torch.device, world_size: int) -> None:
    """Raises RuntimeSetupError where weights or one batch cannot fit, whatever else there is.

    Lower bounds, from small to large, so that no size is too absurd to be worked out: crops, the
    largest layers, all weights, and what the generator's layers give for one batch.
    """
    train = config.train
    crop = math.prod(train.image_shape) * BYTES
    share = max(1, train.batch_size // world_size)
    at_once = max(1, share // train.accumulate)
    batch = f"train.batch_size {train.batch_size}, image_shape {list(train.image_shape)}"
    smaller = "Lower train.batch_size or train.image_shape."
    require_memory(share * crop, f"The crops of a step ({batch})", CPU, smaller)
    require_memory(
        train.select_crops * crop,
        f"The crops that compare checkpoints (train.select_crops {train.select_crops})",
        CPU,
        "Lower train.select_crops.",
    )
    widths = f"netG.ngf {config.netG.ngf}, netD.ndf {config.netD.ndf}"
    layers = (4 * config.netG.ngf) ** 2 * 9 + (4 * config.netD.ndf) ** 2 * 25
    narrower = "Lower netG.ngf or netD.ndf."
    require_memory(layers * COPIES * BYTES, f"The networks ({widths})", device, narrower)
    step = at_once * math.prod(train.image_shape[:2]) * config.netG.ngf * LAYERS
    if (layers * COPIES + step) * BYTES < memory_of(device) / 16:
        return  # nowhere near; what follows costs the import of torch's shape functions
    with torch.device("meta") as meta:  # shapes without contents
        networks = build_networks(config, meta)
    numbers = sum(p.numel() for network in networks for p in network.parameters())
    weights = numbers * COPIES * BYTES
    require_memory(weights, f"The networks ({widths})", device, narrower)
    precision = 2 if train.precision in HALF else BYTES
    outputs = activations(networks.generator, train.image_shape) * at_once * precision
    what = f"The networks and one step ({batch}, {widths})"
    remedy = f"{smaller[:-1]}, or netG.ngf, or raise train.accumulate."
    require_memory(weights + outputs, what, device, remedy)


def activations(generator: Generator, image_shape: tuple[int, int, int]) -> int:
    """Numbers that the convolutions of a generator on `meta` give for one crop."""
    counts: list[int] = []

    def count(_: nn.Module, __: object, output: Tensor) -> None:
        counts.append(output.numel())

    for module in generator.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    height, width, channels = image_shape
    crop = torch.empty(1, channels, height, width, device="meta")
    generator(crop, torch.empty(1, 1, height, width, device="meta"))
    return sum(counts)
