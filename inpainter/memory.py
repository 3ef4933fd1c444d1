"""Least memory that a training needs, worked out before anything is allocated."""

import math

import torch
from torch import Tensor, nn

from common.runtime import memory_of, require_memory
from inpainter.critic import Critic
from inpainter.generator import Generator
from inpainter.settings import PicardConfig

BYTES = 4
"""Of a number in fp32."""
COPIES = 4
"""Of each weight: itself, its gradient and Adam's two moments."""
LAYERS = 40
"""Layers of full size and width whose outputs amount to at least the generator's; it has 34."""
CPU = torch.device("cpu")


def require_training_memory(config: PicardConfig, device: torch.device, world_size: int) -> None:
    """Raises RuntimeSetupError where weights or one batch cannot fit, whatever else there is.

    Lower bounds, from small to large, so that no size is too absurd to be worked out: crops, the
    largest layers, all weights, and what the generator's layers give for one batch.
    """
    train = config.train
    crop = math.prod(train.image_shape) * BYTES
    share = max(1, train.batch_size // world_size)
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
    step = share * math.prod(train.image_shape[:2]) * config.netG.ngf * LAYERS
    if (layers * COPIES + step) * BYTES < memory_of(device) / 16:
        return  # nowhere near; what follows costs the import of torch's shape functions
    with torch.device("meta"):  # shapes without contents
        generator = Generator(config.netG)
        critic = (config.netD.input_dim, config.netD.ndf)
        critics = [Critic(*critic, hw) for hw in (train.mask_shape, train.image_shape[:2])]
    numbers = sum(p.numel() for network in (generator, *critics) for p in network.parameters())
    weights = numbers * COPIES * BYTES
    require_memory(weights, f"The networks ({widths})", device, narrower)
    precision = 2 if train.precision == "bf16" else BYTES
    kept = activations(generator, train.image_shape) * share * precision
    what = f"The networks and one step ({batch}, {widths})"
    require_memory(weights + kept, what, device, f"{smaller[:-1]}, or netG.ngf.")


def activations(generator: Generator, image_shape: tuple[int, int, int]) -> int:
    """Numbers that the convolutions of a generator on `meta` give for one crop."""
    counts: list[int] = []

    def note(_: nn.Module, __: object, output: Tensor) -> None:
        counts.append(output.numel())

    hooks = [
        module.register_forward_hook(note)
        for module in generator.modules()
        if isinstance(module, nn.Conv2d)
    ]
    height, width, channels = image_shape
    crop = torch.empty(1, channels, height, width, device="meta")
    generator(crop, torch.empty(1, 1, height, width, device="meta"))
    for hook in hooks:
        hook.remove()
    return sum(counts)
