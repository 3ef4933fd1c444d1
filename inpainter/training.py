"""A training run: from settings to a folder of checkpoints."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.checkpoint import checkpoint_path, steps_in
from common.config import resolve_path
from common.devices import memory_of, resolve_device, supports_bf16, tf32_products
from common.image_batches import reading
from common.image_folders import list_images
from common.image_sets import data_identity
from common.processes import Processes, broadcast_weights, joined_processes
from common.random_numbers import seed_everything
from common.stopping import StopRequest, any_asked_to_stop
from common.training import (
    HALF,
    gradient_scaler,
    open_run,
    profiling,
    refuse_to_overwrite,
    sole_writer,
)
from inpainter.calibrate import calibrate
from inpainter.data import (
    CropRule,
    NormalCrops,
    crop_batches,
    fixed_crops,
    split_held_out,
)
from inpainter.fast.holes import HoleCompleter
from inpainter.networks import build_networks, require_training_memory
from inpainter.networks.pretrained import load_pretrained
from inpainter.normal_scores import normals_for_operating_point, set_operating_point
from inpainter.predictor import feature_space
from inpainter.recorder import Recorder
from inpainter.settings import PicardConfig, input_path
from inpainter.snapshots import (
    RESUME_OPTION,
    ROLES,
    Progress,
    resolve_step,
    restore_snapshot,
    run_folder,
    run_name,
    tidy_snapshots,
)
from inpainter.step import TrainState, build_optimisers, training_step

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    folder: Path
    """Where its checkpoints are."""
    step: int
    """Steps done, earlier runs' included."""
    exit_status: int
    """0, or 128 + the number of the signal that stopped it."""
    skipped: Mapping[Path, str]
    """Images passed over, and why."""


def train(
    config: PicardConfig,
    *,
    resume: int | str | None = None,
    command: Sequence[str] = (),
    profile: bool = False,
) -> TrainResult:
    """Trains the generator (and critics) on a folder of normal images.

    resume: a step or "latest" of this run; None starts anew, in a folder without checkpoints, or
    from the folder train.resume. command: what the user typed, for the record. profile: writes a
    profile of 20 steps to the run's folder. Raises ConfigError, ImageError, CheckpointError and
    TrainingError, all with their remedy.
    """
    device = resolve_device(config.device, allow_gpu=config.cuda, gpu=config.gpu_ids[0])
    folder = run_folder(config)
    if resume not in (None, "latest"):
        resolve_step(folder, resume, ROLES, option=RESUME_OPTION)  # before the folder is made
    with (
        tf32_products(precision_of(config, device) == "tf32"),
        joined_processes(device, config.peer_timeout) as processes,
        sole_writer(folder, processes, "change expname"),
    ):
        # Set-up.
        require_training_memory(config, device, processes.world_size)
        seed_everything(config.seed)
        config = with_precision(config, device)
        snapshot = starting_point(config, folder, resume)
        crops = training_crops(config)

        space = feature_space(config.test) if config.test.calibration == "knn" else None
        if isinstance(space, Path):
            load_pretrained(space)  # its faults now, not after the last step

        if config.test.specificity is not None:
            normals_for_operating_point(config, Path())  # whether there are enough

        # State.
        state = initial_state(config, device, processes, crops)
        start = Progress(0, {}, 0)
        if snapshot is not None:
            same_run = snapshot[0].resolve() == folder.resolve()
            start = restore_snapshot(*snapshot, state, same_run=same_run)
        for network in state.networks:
            broadcast_weights(network, processes)
        warn_of_lengths(config, start.step, state.n_steps)

        # Steps.
        with (
            recording(state, folder, crops, start, command) as recorder,
            StopRequest() as stop,
            profiling(folder if profile and processes.is_main else None, device) as profiled,
        ):
            step = train_steps(state, crops, start.step, stop, recorder, profiled)
        if crops.skipped:
            LOG.warning("%d of %d images were skipped.", len(crops.skipped), len(crops.paths))
        is_main = processes.is_main
    if is_main and stop.exit_status == 0:
        measure_normals(config, folder)
    return TrainResult(folder, step, stop.exit_status, crops.skipped)


def measure_normals(config: PicardConfig, folder: Path) -> None:
    """After training: what test.calibration and test.specificity ask for, of the steps to use."""
    test = config.test
    if test.calibration != "knn" and test.specificity is None:
        return
    kinds = ("latest", "best") if config.train.select_crops else ("latest",)
    for step in sorted({resolve_step(folder, kind) for kind in kinds}):
        if test.calibration == "knn":
            calibrate(config, folder, step)
        if test.specificity is not None:
            normals = normals_for_operating_point(config, checkpoint_path(folder, "state", step))
            path, point = set_operating_point(
                config, folder, step, *normals, specificity=test.specificity
            )
            LOG.info("%s: %s", path, point.summary())


def train_steps(
    state: TrainState,
    crops: NormalCrops,
    start: int,
    stop: StopRequest,
    recorder: Recorder | None,
    profiled: Callable[[], None],
) -> int:
    """Trains from step `start` to the last or until asked to stop; returns the steps done.

    recorder: None in all processes but the main one. profiled: called after each step.
    """
    train, processes = state.config.train, state.processes
    stream = crop_batches(
        crops,
        train.batch_size,
        start,
        state.n_steps,
        state.config.num_workers,
        rank=processes.rank,
        world_size=processes.world_size,
        pin_memory=state.device.type == "cuda",
        parts=train.accumulate,
    )
    step = start
    with reading(stream) as batches:
        for real in batches:
            result = training_step(state, step, real)
            step += 1
            profiled()
            stopping = any_asked_to_stop(stop, processes, state.device)
            if recorder is not None:
                recorder.on_step_end(step, result)
                if step % train.snapshot_save_iter == 0 or step == state.n_steps or stopping:
                    recorder.save(step)
            if stopping:
                LOG.warning("Asked to stop: saved step %d. Go on with --resume.", step)
                break
    return step


def with_precision(config: PicardConfig, device: torch.device) -> PicardConfig:
    """The settings with train.precision: auto replaced by what suits the device."""
    precision = precision_of(config, device)
    if config.train.precision == "auto":
        LOG.info("train.precision: auto is %s on this machine.", precision)
    return replace(config, train=replace(config.train, precision=precision))


def precision_of(config: PicardConfig, device: torch.device) -> str:
    """train.precision; auto is tf32 on a GPU, which bf16 is slower than there (docs/speed.md)."""
    if config.train.precision != "auto":
        return config.train.precision
    if device.type == "cuda":
        return "tf32"
    return "bf16" if supports_bf16(device) else "fp32"


def starting_point(
    config: PicardConfig, folder: Path, resume: int | str | None
) -> tuple[Path, int | str] | None:
    """Folder and step of the snapshot to start from; None starts anew.

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
        source = input_path(config.train.resume, "train.resume")
        if steps and source.resolve() == folder.resolve():
            return folder, "latest"
    reached = f" up to step {max(steps, default=0)}"
    remedy = "Go on with --resume, or change expname"
    refuse_to_overwrite(folder, steps, remedy, reached=reached)
    return None if source is None else (source, "latest")


def training_crops(config: PicardConfig) -> NormalCrops:
    """The crops of the images in train_data_path."""
    train = config.train
    paths = list_images(
        input_path(config.train_data_path, "train_data_path"),
        recursive=config.data_with_subfolder,
        on_bad=train.on_bad_image,
        remedy="set data_with_subfolder: true",
        slices=config.slices,
    )
    paths, held_out = split_held_out(paths, train.held_out, config.seed)
    if held_out:
        LOG.info("%d images are kept from training, %d are trained on.", len(held_out), len(paths))
    rule = CropRule(
        train.image_shape[:2],
        train.random_crop,
        train.flip,
        train.min_tissue_fraction,
        config.seen_tissue(train.tissue_threshold),
        train.max_rotation,
        train.max_scale,
    )
    return NormalCrops(
        paths,
        rule,
        channels=train.image_shape[2],
        seed=config.seed,
        on_bad_image=train.on_bad_image,
        cache_mb=cache_of_each(train.cache_mb, config.num_workers + 1),
        subset_frac=train.subset_frac,
        white_value=config.white_value,
        window=config.window,
        flattening=config.flattening(),
        scales=train.scales,
    )


def cache_of_each(cache_mb: int, n_readers: int) -> int:
    """MiB of decoded images that each reading process may keep: half of the memory in all.

    cache_mb: as set. n_readers: the processes that read, the training one among them.
    """
    room = memory_of(torch.device("cpu")) // 2 // 2**20 // n_readers
    if cache_mb > room:
        LOG.warning(
            "train.cache_mb: %d in each of %d processes is more than half of the memory; each "
            "keeps %d. Lower num_workers to keep more.",
            cache_mb,
            n_readers,
            room,
        )
    return min(cache_mb, room)


def initial_state(
    config: PicardConfig, device: torch.device, processes: Processes, crops: NormalCrops
) -> TrainState:
    """New networks, the same in every process, and how long they are to be trained.

    The length is train.n_steps, or as published n_epochs * images / batch_size, at least 1.
    """
    train = config.train
    networks = build_networks(config, device)
    if train.compile:
        networks.generator.compile(dynamic=False)
    return TrainState(
        config,
        device,
        processes,
        networks,
        build_optimisers(networks, train),
        n_steps=train.n_steps or max(1, train.n_epochs * len(crops.paths) // train.batch_size),
        images=data_identity(crops.paths, input_path(config.train_data_path, "train_data_path")),
        scaler=gradient_scaler(train.precision, device),
        completer=None if train.precision in HALF else HoleCompleter(networks.generator),
    )


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


@contextlib.contextmanager
def recording(
    state: TrainState,
    folder: Path,
    crops: NormalCrops,
    start: Progress,
    command: Sequence[str],
) -> Iterator[Recorder | None]:
    """The recorder of a run that goes on at `start`, in the main process; None in the others.

    What later steps of an earlier run left is set aside.
    """
    config, processes = state.config, state.processes
    select_from = None
    if processes.is_main:
        if config.train.select_crops:
            select_from = fixed_crops(crops, config.train.select_crops).to(state.device)
        tidy_snapshots(folder, start.step)
    events = resolve_path(config.logs_dir, "logs_dir") / run_name(config)
    opened = open_run(
        folder, events, config, processes=processes, command=command, resume_step=start.step
    )
    with opened as log:
        if log is None:
            yield None
            return
        recorder = Recorder(
            state, folder, log, start=start, crops=select_from, skipped=crops.skipped
        )
        with contextlib.closing(recorder.bar):
            yield recorder
