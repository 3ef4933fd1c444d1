"""From settings to the state of a training run: images, encoder, optimisers, dissolver."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from common.checkpoint import content_hash
from common.config import config_to_dict, resolve_path
from common.config_types import require
from common.datasets import dataset_row, is_dataset
from common.devices import require_memory
from common.image_batches import BadImages, batches_per_epoch
from common.image_sets import ImageSet, set_identity
from common.processes import Processes
from common.training import flat, gradient_scaler
from dia.data import EvaluationSets, training_sets
from dia.encoders import Encoder, build_encoder, encoder_weights, layout_for, load_weights
from dia.optim import Lars
from dia.settings import ContrastiveConfig, DiaConfig
from dia.shifts import effective_shift, parse_shift
from dia.views import STEP_SCALE, NegativeViewConfig, views_in
from diffusion_models.dissolve import Dissolver, load_dissolver
from diffusion_models.settings import DataConfig, DdpmConfig

LOG = logging.getLogger(__name__)
MOMENTUM = 0.9
PROBE_RATE = 1.0e-3
FLOAT_BYTES = 4


class BatchNormOfAll(nn.SyncBatchNorm):
    """Batch norm by the rows of all processes on a CPU, for which torch's own is not written.

    All processes have equally many rows.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        if not self.training:
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce  # with gradients; not in all builds

        n_processes = torch.distributed.get_world_size()
        dims = [dim for dim in range(input.ndim) if dim != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        mean = all_reduce(input.mean(dims)) / n_processes
        centred = input - mean.view(shape)
        variance = all_reduce(centred.square().mean(dims)) / n_processes
        with torch.no_grad():
            count = input.numel() // input.shape[1] * n_processes
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(shape) + self.bias.view(shape)


@dataclass
class TrainState:
    """What a run trains, with what, and how far it has come."""

    config: DiaConfig
    device: torch.device
    processes: Processes
    images: ImageSet
    selection_sets: EvaluationSets | None
    """What select_by test and val evaluate; None where nothing of the kind is there."""
    data: dict[str, Any]
    """What the run learns from, by contents: training images and diffusion model."""
    negatives: NegativeViewConfig
    encoder: Encoder
    optimizer: Optimizer
    probe: Optimizer
    """Of the encoder's linear head alone."""
    scaler: GradScaler
    """Of the gradients, in fp16."""
    batches: int
    """Of this process in one pass over the images."""
    bad: BadImages
    epoch: int = 0
    """Epochs trained."""
    step: int = 0
    """Steps of those epochs."""
    batch: int = 0
    """Batches trained of the epoch after those."""
    sums: Counter[str] = field(default_factory=Counter)
    """Of those batches' losses, by name."""
    selected: int = 0
    """The last epoch after which the best one was looked for."""
    best: dict[str, float] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, which max_batches may end early."""
        return min(self.batches, self.config.contrastive.max_batches or self.batches)

    def is_due(self, every: int | None) -> bool:
        """Whether what is done every so many epochs (none = save_step), and at the end, is due."""
        settings = self.config.contrastive
        return self.epoch % (every or settings.save_step) == 0 or self.epoch == settings.epochs


def require_training_memory(config: DiaConfig, device: torch.device) -> None:
    """Raises RuntimeSetupError where encoder or one batch cannot fit, whatever else there is.

    Lower bounds: the last stage of a small-image encoder with gradients and momentum, and the rows
    of all views of a batch.
    """
    settings = config.contrastive
    last_stage = 3 * 9 * (8 * settings.width) ** 2 * 3
    what = f"The encoder (--width {settings.width})"
    require_memory(last_stage * FLOAT_BYTES, what, device, "Lower --width.")
    side = config.data.side
    views = views_in(settings.mode) * effective_shift(settings).count
    rows = settings.batch_size * views * 3 * side**2
    what = f"A batch (--batch_size {settings.batch_size}, {views} views of {side}² pixels)"
    require_memory(rows * FLOAT_BYTES, what, device, "Lower --batch_size or --resize_to.")


def initial_state(config: DiaConfig, device: torch.device, processes: Processes) -> TrainState:
    """Images, encoder, diffusion model and optimisers of a new run."""
    settings = config.contrastive
    images, selection_sets = training_sets(config)
    encoder = initial_encoder(settings, len(images.classes), device, processes)
    if config.compile:
        encoder.compile(dynamic=False)
    negatives = build_negatives(config, device)
    model_hash = None
    if negatives.dissolve is not None:
        model_hash = content_hash(negatives.dissolve.path)
        settings = replace(settings, diffusion_model_path=named_file(settings, negatives.dissolve))
        config = replace(config, contrastive=settings)
    kind, decay = Lars if settings.optimizer == "lars" else torch.optim.SGD, settings.weight_decay
    parameters, probed = encoder.parameters(), encoder.linear.parameters()
    return TrainState(
        config,
        device,
        processes,
        images,
        selection_sets,
        data={"images": set_identity(images), "diffusion_model": model_hash},
        negatives=negatives,
        encoder=encoder,
        optimizer=kind(parameters, lr=settings.lr_init, momentum=MOMENTUM, weight_decay=decay),
        probe=torch.optim.Adam(probed, lr=PROBE_RATE, weight_decay=decay),
        scaler=gradient_scaler(config.precision, device),
        batches=batches_per_epoch(len(images), settings.batch_size, processes),
        bad=BadImages(config.data.on_bad_image),
    )


def named_file(settings: ContrastiveConfig, dissolver: Dissolver) -> str:
    """diffusion_model_path as it is given, or with the name of the file used of a run folder."""
    given = settings.diffusion_model_path
    is_folder = resolve_path(given, "contrastive.diffusion_model_path").is_dir()
    return str(Path(given) / dissolver.path.name) if is_folder else given


def build_negatives(config: DiaConfig, device: torch.device) -> NegativeViewConfig:
    """How view 3 is made; loads the diffusion model where the shift type dissolves.

    Raises ConfigError where that model cannot dissolve as the settings want it to.
    """
    settings = config.contrastive
    dissolve, last_step = None, None
    kind = parse_shift(settings.shift_trans_type)
    if kind.view == "diffusion" and settings.mode == "simclr_DIA":
        require_own_size(config.data)
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
        for difference in data_differences(config, dissolve.trained_with or {}):
            LOG.warning("The diffusion model %s is of other images: %s.", dissolve.path, difference)
        last_step = dissolve.diffusion.steps - 1
    return NegativeViewConfig(
        dissolve=dissolve,
        last_step=last_step,
        resolution=settings.diff_resolution,
        fit=config.data.row.fit,
        kernel_size=settings.kernel_size,
        resize_to_constant=settings.resize_to_constant,
        blur_all_views=settings.blur_all_views,
    )


def require_own_size(data: DataConfig) -> None:
    """Raises ConfigError where images that are dissolved at their own size are to be resized.

    The diffusion model is trained on them as they are, or in a rim of zeros.
    """
    row = data.row
    if row.fit == "resize":
        return
    larger = f" (larger: {row.name}_64)" if row.source == "medmnist" else ""
    what = f"must be none or {row.size}, at which {row.name} is dissolved{larger}"
    require(data.resize_to in (None, row.size), "data.resize_to", data.resize_to, what)


def data_differences(config: DiaConfig, trained_with: Mapping[str, Any]) -> list[str]:
    """In words, how a diffusion model's images differ from the encoder's; nothing of a lone file.

    trained_with: see Dissolver.
    """
    if not trained_with:
        return []
    before = flat(config_to_dict(DdpmConfig())) | flat(trained_with)
    now, row, name = flat(config_to_dict(config)), config.data.row, before["data.dataset"]
    # either program's spelling
    before["data.dataset"] = dataset_row(name).name if is_dataset(str(name)) else name
    now["data.dataset"] = row.name
    keys = ["data.dataset", "data.white_value", "data.window"]
    if row.name == before["data.dataset"] and config.data.one_class_idx is not None:
        chosen = (before["diffusion.on_label"], before["data.one_class_idx"], row.normal)
        before["data.one_class_idx"] = next(number for number in chosen if number is not None)
        keys.append("data.one_class_idx")
    return [
        f"{key} {before[key]!r} when it was trained, {now[key]!r} now"
        for key in keys
        if before[key] != now[key]
    ]


def check_dissolving(settings: ContrastiveConfig, dissolver: Dissolver) -> None:
    """Raises ConfigError where a model lacks the steps or cannot take the size that is wanted."""
    steps = dissolver.diffusion.steps
    for name in ("diffusion_offset", "diffusion_upper_offset"):
        value = getattr(settings, name)
        require(
            value * STEP_SCALE <= steps,
            f"contrastive.{name}",
            value,
            f"the diffusion model has {steps} steps, so it must be at most {steps / STEP_SCALE:g}",
        )
    source, side = settings.diffusion_model_path, settings.diff_resolution
    dissolver.require_fitting(source, side, "contrastive.diff_resolution")


def initial_encoder(
    settings: ContrastiveConfig, n_classes: int, device: torch.device, processes: Processes
) -> Encoder:
    """The encoder that training starts with: fresh weights, or those of load_path.

    A run that goes on has its own, and load_path may be gone. Raises ConfigError where it cannot
    have the width, CheckpointError for weights of another.
    """
    settings.require_width()
    encoder = build_encoder(
        settings.model,
        n_classes=n_classes,
        n_shifts=effective_shift(settings).count,
        simclr_dim=settings.simclr_dim,
        width=settings.width,
    )
    if settings.load_path is not None and settings.resume_path is None:
        path = resolve_path(settings.load_path, "contrastive.load_path")
        state = encoder_weights(path)
        load_weights(encoder, state, source=str(path), strict=not settings.no_strict)
    if processes.world_size > 1:
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        for layer in encoder.modules() if device.type == "cpu" else ():
            if isinstance(layer, nn.SyncBatchNorm):
                layer.__class__ = BatchNormOfAll
    return encoder.to(device, memory_format=layout_for(device, settings.width))
