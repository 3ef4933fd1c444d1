"""Multiply-accumulate operations of one image through the encoder and through dissolving.

Counted on PyTorch's meta device: no arithmetic is done. G = 10⁹.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.config import resolve_path
from dia.encoders import build_encoder
from dia.settings import DiaConfig
from dia.shifts import parse_shift
from diffusion_models.dissolve import load_dissolver
from diffusion_models.unet import Unet

BATCH_NORM_OPERATIONS = 4
"""Operations per value of a batch norm in the published counter (thop)."""


class Macs(NamedTuple):
    """Two ways to count the same networks."""

    every: int
    """Every convolution and matrix product."""
    published: int
    """As the published column: layers of plain types alone (see `count_macs`)."""


def count_macs(module: nn.Module, run: Callable[[], object]) -> Macs:
    """Counts what `run` makes a module on the meta device do.

    The published column is a hook counter's (thop), which knows layers by their exact type: it
    misses the U-Net's weight-standardised convolutions and the attention's products, and adds the
    encoder's batch norms.
    """
    published = 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal published
        if type(layer) is nn.Conv2d:
            published += output.numel() * layer.weight[0].numel()
        elif type(layer) is nn.Linear:
            published += output.numel() * layer.in_features
        elif type(layer) is nn.BatchNorm2d:
            published += BATCH_NORM_OPERATIONS * output.numel()

    hooks = [layer.register_forward_hook(count) for layer in module.modules()]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return Macs(counter.get_total_flops() // 2, published)


def encoder_macs(config: DiaConfig) -> Macs:
    """The encoder on one image of the dataset's size, without the heads but `linear`."""
    settings = config.contrastive
    kind = parse_shift(settings.shift_trans_type)
    with torch.device("meta"):
        encoder = build_encoder(
            settings.model, n_classes=2, n_shifts=kind.count, width=settings.width
        ).eval()
    image = torch.empty(1, 3, config.data.side, config.data.side, device="meta")
    return count_macs(encoder, lambda: encoder(image))


def dissolving_macs(config: DiaConfig) -> Macs:
    """Dissolving one image at diff_resolution, by the checkpoint or else the published U-Net."""
    settings = config.contrastive
    if settings.diffusion_model_path is None:
        with torch.device("meta"):
            unet = Unet()
    else:
        path = resolve_path(settings.diffusion_model_path, "contrastive.diffusion_model_path")
        unet = load_dissolver(path, device="cpu").diffusion.model.to("meta")
    side = settings.diff_resolution
    image = torch.empty(1, 3, side, side, device="meta")
    step = torch.zeros(1, dtype=torch.int64, device="meta")
    return count_macs(unet, lambda: unet(image, step))


def describe_macs(config: DiaConfig) -> str:
    """Lines for --print_macs: encoder, dissolving, their sum."""
    parts = {config.contrastive.model: encoder_macs(config)}
    if parse_shift(config.contrastive.shift_trans_type).view == "diffusion":
        parts[f"dissolving at {config.contrastive.diff_resolution}²"] = dissolving_macs(config)
    total = Macs(*(sum(counts) for counts in zip(*parts.values(), strict=True)))
    lines = ["G MACs of one image".ljust(28) + "every product   as published"]
    for name, macs in {**parts, "total": total}.items():
        lines.append(f"{name:<28}{macs.every / 1e9:13.2f}{macs.published / 1e9:15.2f}")
    return "\n".join(lines)
