"""From settings to what a training run needs: encoder, optimiser, dissolver."""

import torch
from torch import nn

from common.checkpoint import CheckpointError
from common.config import resolve_path
from common.config_types import require
from common.datasets import dataset_row
from common.runtime import require_memory
from dia.encoders import Encoder, build_encoder, encoder_weights, load_weights
from dia.optim import Lars
from dia.settings import ContrastiveConfig, DiaConfig
from dia.shifts import effective_shift, parse_shift
from dia.views import STEP_SCALE, NegativeViewConfig, views_in
from diffusion_models.dissolve import Dissolver, load_dissolver

MOMENTUM = 0.9
IMAGE_CHANNELS = 3
FLOAT_BYTES = 4


def layout_for(device: torch.device, width: int = 64) -> torch.memory_format:
    """How a network's kernels lie in memory; width: channels of its first layer.

    Channels last on a CPU where the network is narrower than the published ones: that is faster
    there (1.3 to 1.7 times), and at width 64 it is not (0.7 to 1.1 times).
    """
    narrow = width < 64 and device.type == "cpu"
    return torch.channels_last if narrow else torch.contiguous_format


def require_training_memory(config: DiaConfig, device: torch.device) -> None:
    """Raises RuntimeSetupError where encoder or one batch cannot fit, whatever else there is.

    Lower bounds: the last stage of a small-image encoder with gradients and momentum, and the rows
    of all views of a batch.
    """
    settings = config.contrastive
    last_stage = 3 * 9 * (8 * settings.width) ** 2 * 3
    what = f"The encoder (--width {settings.width})"
    require_memory(last_stage * FLOAT_BYTES, what, device, "Lower --width.")
    side = config.data.resize_to or dataset_row(config.data.dataset).size
    views = views_in(settings.mode) * effective_shift(settings).count
    rows = settings.batch_size * views * 3 * side**2
    what = f"A batch (--batch_size {settings.batch_size}, {views} views of {side}² pixels)"
    require_memory(rows * FLOAT_BYTES, what, device, "Lower --batch_size or --resize_to.")


def build_negatives(config: DiaConfig, device: torch.device) -> NegativeViewConfig:
    """How view 3 is made; loads the diffusion model where the shift type dissolves.

    Raises ConfigError where that model cannot dissolve as the settings want it to.
    """
    settings = config.contrastive
    dissolve, last_step = None, None
    kind = parse_shift(settings.shift_trans_type)
    if kind.view == "diffusion" and settings.mode == "simclr_DIA":
        dissolve = load_dissolver(
            resolve_path(settings.diffusion_model_path, "contrastive.diffusion_model_path"),
            device=device,
            weights=settings.dissolve_weights,
            dissolve_range=settings.dissolve_range,
            image_size=settings.diff_resolution,
        )
        width = dissolve.diffusion.model.init_conv.out_channels
        dissolve = dissolve.to(memory_format=layout_for(device, width))
        check_dissolving(settings, dissolve)
        last_step = dissolve.diffusion.steps - 1
    return NegativeViewConfig(
        dissolve=dissolve,
        last_step=last_step,
        resolution=settings.diff_resolution,
        fit=dataset_row(config.data.dataset).fit,
        kernel_size=settings.kernel_size,
        resize_to_constant=settings.resize_to_constant,
        blur_all_views=settings.blur_all_views,
    )


def check_dissolving(settings: ContrastiveConfig, dissolver: Dissolver) -> None:
    """Raises ConfigError where a model lacks the steps or cannot take the size that is wanted."""
    steps, unet = dissolver.diffusion.steps, dissolver.diffusion.model
    for name in ("diffusion_offset", "diffusion_upper_offset"):
        value = getattr(settings, name)
        require(
            value * STEP_SCALE <= steps,
            f"contrastive.{name}",
            value,
            f"the diffusion model has {steps} steps, so it must be at most {steps / STEP_SCALE:g}",
        )
    require(
        settings.diff_resolution % unet.shrinks_by == 0,
        "contrastive.diff_resolution",
        settings.diff_resolution,
        f"must be a multiple of {unet.shrinks_by} pixels, which the diffusion model halves maps to",
    )
    if unet.channels != IMAGE_CHANNELS:
        raise CheckpointError(
            f"{settings.diffusion_model_path}: a diffusion model of {unet.channels} channels; "
            f"images here have {IMAGE_CHANNELS}. Pass one of train_eval_ddpm.py."
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
        state = encoder_weights(path)
        load_weights(encoder, state, source=str(path), strict=not settings.no_strict)
    return encoder
