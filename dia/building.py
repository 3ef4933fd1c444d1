"""From settings to what a training run needs: encoder, optimiser, dissolver."""

import torch
from torch import nn

from common.checkpoint import load_tensors, strip_module_prefix
from common.config import resolve_path
from common.datasets import dataset_row
from dia.encoders import Encoder, build_encoder, load_weights
from dia.optim import Lars
from dia.settings import ContrastiveConfig, DiaConfig
from dia.shifts import ShiftType, parse_shift
from dia.views import Negatives
from diffusion_models.dissolve import load_dissolver

MOMENTUM = 0.9


def layout_for(device: torch.device) -> torch.memory_format:
    """How a network's kernels lie in memory: channels last on a CPU, which is faster there."""
    return torch.channels_last if device.type == "cpu" else torch.preserve_format


def build_negatives(config: DiaConfig, device: torch.device) -> Negatives:
    """How view 3 is made; loads the diffusion model where the shift type dissolves."""
    settings = config.contrastive
    dissolve = None
    kind = parse_shift(settings.shift_trans_type)
    if kind.view == "diffusion" and settings.mode == "simclr_DIA":
        dissolve = load_dissolver(
            resolve_path(settings.diffusion_model_path, "contrastive.diffusion_model_path"),
            weights=settings.dissolve_weights,
            dissolve_range=settings.dissolve_range,
            image_size=settings.diff_resolution,
        ).to(device, memory_format=layout_for(device))
    return Negatives(
        dissolve=dissolve,
        resolution=settings.diff_resolution,
        fit=dataset_row(config.data.dataset).fit,
        kernel_size=settings.kernel_size,
        resize_to_constant=settings.resize_to_constant,
        blur_all_views=settings.blur_all_views,
    )


def build_optimizer(encoder: nn.Module, settings: ContrastiveConfig) -> torch.optim.Optimizer:
    """LARS or SGD over all parameters of the encoder."""
    kind = Lars if settings.optimizer == "lars" else torch.optim.SGD
    return kind(
        encoder.parameters(),
        lr=settings.lr_init,
        momentum=MOMENTUM,
        weight_decay=settings.weight_decay,
    )


def effective_shift(settings: ContrastiveConfig) -> ShiftType:
    """The shift type of a run; mode simclr has none."""
    name = "none" if settings.mode == "simclr" else settings.shift_trans_type
    return parse_shift(name)


def initial_encoder(settings: ContrastiveConfig, n_classes: int) -> Encoder:
    """The encoder that training starts with: fresh weights, or those of load_path."""
    encoder = build_encoder(
        settings.model,
        n_classes=n_classes,
        n_shifts=effective_shift(settings).count,
        simclr_dim=settings.simclr_dim,
        width=settings.width,
    )
    if settings.load_path is not None:
        path = resolve_path(settings.load_path, "contrastive.load_path")
        state = strip_module_prefix(load_tensors(path))
        load_weights(encoder, state, source=str(path), strict=not settings.no_strict)
    return encoder
