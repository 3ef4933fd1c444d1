"""A training run: from settings to a folder of checkpoints."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import steps_in
from common.config import config_to_yaml, resolve_path
from common.image_folders import list_images
from common.image_sets import data_identity
from common.run_log import RunLog
from common.runtime import (
    Processes,
    StopRequest,
    joined_processes,
    resolve_device,
    seed_everything,
    supports_bf16,
    tf32_products,
)
from common.training import refuse_to_overwrite
from inpainter.loop import Trainee, train_steps
from inpainter.networks import build_networks, require_training_memory
from inpainter.patches import NormalPatches, fixed_crops
from inpainter.recorder import Recorder
from inpainter.settings import PicardConfig
from inpainter.snapshots import Progress, restore_snapshot, tidy_snapshots
from inpainter.step_inputs import InputMaker
from inpainter.updates import broadcast_weights, build_optimisers

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to."""

    folder: Path
    """Where its checkpoints are."""
    step: int
    """Steps done, earlier runs' included."""
    exit_status: int
    """0, or 128 + the number of the signal that stopped it."""
    skipped: Mapping[Path, str]
    """Images passed over, and why."""


def run_name(config: PicardConfig) -> Path:
    """<dataset_name>/<mask_type>_<expname>, below the checkpoints and the logs folder."""
    name = f"{config.train.mask_type}_{config.expname}"
    return Path(config.dataset_name or "unnamed", name)


def run_folder(config: PicardConfig) -> Path:
    """Folder of the run's checkpoints."""
    return resolve_path(config.checkpoints_dir, "checkpoints_dir") / run_name(config)


def train(
    config: PicardConfig, *, resume: int | str | None = None, command: Sequence[str] = ()
) -> TrainingResult:
    """Trains the generator (and critics) on a folder of normal images.

    resume: a step or "latest" of this run; none starts anew, in a folder without checkpoints, or
    from the folder train.resume. command: what the user typed, for the record. Raises ConfigError,
    ImageError, CheckpointError and TrainingError, all with their remedy.
    """
    device = resolve_device(config.device, allow_gpu=config.cuda, gpu=config.gpu_ids[0])
    with joined_processes(device) as processes:
        require_training_memory(config, device, processes.world_size)
        with tf32_products(config.train.precision == "tf32"):
            return _train(config, device, processes, resume, command)


def _train(
    config: PicardConfig,
    device: torch.device,
    processes: Processes,
    resume: int | str | None,
    command: Sequence[str],
) -> TrainingResult:
    seed_everything(config.seed)
    config = with_precision(config, device)
    folder = run_folder(config)
    snapshot = starting_point(config, folder, resume)
    dataset = training_patches(config)
    n_steps = total_steps(config, len(dataset.paths))
    networks = build_networks(config, device)
    optimisers = build_optimisers(networks, config.train)
    images = data_identity(dataset.paths, resolve_path(config.train_data_path, "train_data_path"))
    start = Progress(0, {}, 0)
    if snapshot is not None:
        same_run = snapshot[0].resolve() == folder.resolve()
        start = restore_snapshot(*snapshot, networks, optimisers, config, images, same_run=same_run)
    warn_of_lengths(config, start.step, n_steps)
    for network in networks:
        broadcast_weights(network, processes)
    inputs = InputMaker(config, networks.generator, processes)
    trainee = Trainee(config, device, processes, networks, optimisers, inputs, n_steps)
    with contextlib.ExitStack() as stack:
        recorder = None
        if processes.is_main:
            recorder = stack.enter_context(
                start_record(trainee, folder, dataset, images, start, command)
            )
        stop = stack.enter_context(StopRequest())
        step = train_steps(trainee, dataset, start.step, stop, recorder)
    if dataset.skipped:
        LOG.warning("%d of %d images were skipped.", len(dataset.skipped), len(dataset.paths))
    return TrainingResult(folder, step, stop.exit_status, dataset.skipped)


def starting_point(
    config: PicardConfig, folder: Path, resume: int | str | None
) -> tuple[Path, int | str] | None:
    """Folder and step of the snapshot to start from; none = start anew.

    `latest` of a run that was stopped before its first snapshot starts anew. Raises CheckpointError
    where checkpoints of another training would be mixed with this one's.
    """
    steps = steps_in(folder, "gen")
    if resume is not None:
        if resume != "latest" or steps:
            return folder, resume
        LOG.warning("%s holds no snapshot yet: starting at step 0.", folder)
        return None
    source = None
    if config.train.resume is not None:
        source = resolve_path(config.train.resume, "train.resume")
        if steps and source.resolve() == folder.resolve():
            return folder, "latest"
    refuse_to_overwrite(folder, steps, "Go on with --resume, or change expname")
    return None if source is None else (source, "latest")


def with_precision(config: PicardConfig, device: torch.device) -> PicardConfig:
    """The settings with train.precision: auto replaced by what suits the device."""
    if config.train.precision != "auto":
        return config
    precision = "bf16" if supports_bf16(device) else "fp32"
    LOG.info("train.precision: auto is %s on this machine.", precision)
    return replace(config, train=replace(config.train, precision=precision))


def training_patches(config: PicardConfig) -> NormalPatches:
    """The crops of the images in train_data_path."""
    train = config.train
    folder = resolve_path(config.train_data_path, "train_data_path")
    return NormalPatches(
        list_images(
            folder,
            recursive=config.data_with_subfolder,
            on_bad=train.on_bad_image,
            remedy="set data_with_subfolder: true",
        ),
        image_shape=train.image_shape,
        seed=config.seed,
        random_crop=train.random_crop,
        flip=train.flip,
        min_tissue_fraction=train.min_tissue_fraction,
        tissue_threshold=train.tissue_threshold,
        max_rotation=train.max_rotation,
        max_scale=train.max_scale,
        on_bad_image=train.on_bad_image,
        cache_mb=train.cache_mb,
        subset_frac=train.subset_frac,
        white_value=config.white_value,
    )


def total_steps(config: PicardConfig, n_images: int) -> int:
    """train.n_steps, or as published n_epochs * images / batch_size, at least 1."""
    train = config.train
    return train.n_steps or max(1, train.n_epochs * n_images // train.batch_size)


def warn_of_lengths(config: PicardConfig, start: int, n_steps: int) -> None:
    """Says where nothing is left to train, or the warm-up is longer than the run."""
    if start >= n_steps:
        LOG.warning("Step %d of %d is done: nothing to train.", start, n_steps)
    if config.train.warmup_steps > n_steps:
        LOG.warning(
            "train.warmup_steps: %d is more than the %d steps of the run, so the rate never "
            "reaches train.lr. Lower train.warmup_steps, or raise train.n_steps or train.n_epochs.",
            config.train.warmup_steps,
            n_steps,
        )


def start_record(
    trainee: Trainee,
    folder: Path,
    dataset: NormalPatches,
    images: Mapping[str, Any],
    start: Progress,
    command: Sequence[str],
) -> Recorder:
    """The record of a run that goes on at `start`; what later steps left is set aside."""
    config = trainee.config
    n = config.train.select_crops
    crops = fixed_crops(dataset, n).to(trainee.device) if n else None
    tidy_snapshots(folder, start.step)
    log = RunLog(
        folder,
        resolve_path(config.logs_dir, "logs_dir") / run_name(config),
        config_yaml=config_to_yaml(config),
        command=command,
        resume_step=start.step,
    )
    return Recorder(
        config,
        folder,
        log,
        start=start,
        n_steps=trainee.n_steps,
        images=images,
        crops=crops,
        skipped=dataset.skipped,
    )
