"""Training a diffusion model on the normal class of a dataset.

B images, C channels, H W pixels. Everything random of a step comes from (seed, step), so a resumed
run goes on exactly as the uninterrupted one would have.
"""

import itertools
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.checkpoint import (
    CheckpointError,
    load_module,
    load_optimiser,
    require_mapping,
    save_atomic,
)
from common.config import REPOSITORY, config_to_dict, resolve_path
from common.datasets import DatasetError
from common.devices import require_memory
from common.image_batches import (
    BadImages,
    batches_per_epoch,
    epoch_batches,
    ordered_batches,
    reading,
)
from common.image_folders import SHOWN
from common.image_sets import ImageSet, set_identity
from common.processes import Processes, average_gradients, average_values, broadcast_weights
from common.random_numbers import generator_for
from common.run_log import RunLog
from common.stopping import StopRequest, any_asked_to_stop
from common.training import (
    autocast_to,
    check_resumed,
    gradient_scaler,
    joined_training,
    open_run,
    profiling,
    refuse_to_overwrite,
    require_as_many_processes,
    require_finite,
    require_finite_training,
    require_still_sole_writer,
    restore_scaler,
    saved_progress,
    scale_of,
    scaler_state,
    sole_writer,
)
from diffusion_models.diffusion import GaussianDiffusion, gaussian_noise
from diffusion_models.dissolve import (
    EMA_PREFIX,
    Dissolver,
    ImagesAtSide,
    checkpoint_weights,
    checkpoints,
    read_checkpoint,
    read_newest,
)
from diffusion_models.pictures import dissolving_strip, sample_picture
from diffusion_models.settings import DdpmConfig
from diffusion_models.unet import Unet

LOG = logging.getLogger(__name__)
EMA_START = 100
"""Steps during which the average is a copy, as in the published trainer's EMA."""
STRIP_IMAGES = 4
FLOAT_BYTES = 4
LOWER_RATE = "Start a new run with a lower --train_lr or --clip_norm."

MAY_CHANGE = (
    # Where things lie, and what the first step began with; images are known by their contents.
    *("data.data_root", "diffusion.output_dir", "diffusion.state_dict_path"),
    # What computes, and how fast.
    *("device", "data.num_workers", "peer_timeout", "compile"),
    # What is written, drawn or said; data.resize_to is train_dia.py's and eval.py's alone. Not
    # save_every, by which files are numbered: a later step could get a lower number.
    *("diffusion.log_every", "diffusion.sampling_timesteps"),
    *("diffusion.num_samples", "diffusion.steps", "diffusion.strip_steps", "diffusion.strip_range"),
    *("diffusion.ddpm_weights", "data.on_bad_image", "data.resize_to"),
    "diffusion.train_num_steps",
)
"""What may differ when a run goes on, named in the log; all else decides what is learnt, or where
it lies."""


class TrainResult(NamedTuple):
    """Where a run has left its checkpoints."""

    folder: Path
    step: int
    exit_status: int
    """128 + the signal's number where one ended the run early, else 0."""


@dataclass
class TrainState:
    """What a run trains, with what, and how far it has come."""

    config: DdpmConfig
    device: torch.device
    processes: Processes
    images: ImageSet
    bad: BadImages
    identity: dict[str, object]
    """Of the images, by which a resumed run knows them again."""
    model: GaussianDiffusion
    average: GaussianDiffusion
    """Exponential moving average (EMA) of the model's weights."""
    optimizer: torch.optim.Adam
    scaler: GradScaler
    """Of the gradients, in fp16."""
    step: int = 0
    """Steps made."""


def train(
    config: DdpmConfig,
    *,
    command: Sequence[str] = (),
    resume: Path | None = None,
    profile: bool = False,
) -> TrainResult:
    """Trains until train_num_steps, from scratch or from the newest checkpoint of a run folder.

    profile: writes a profile of 20 steps to the folder. SIGINT and SIGTERM end the run with the
    step at hand, saved.
    """
    total, folder = config.diffusion.train_num_steps, resume or new_folder(config)
    with (
        joined_training(config) as (device, processes),
        sole_writer(folder, processes, "choose another --output_dir"),
    ):
        # Set-up.
        require_training_memory(config, device)
        if resume is None:
            refuse_used_folder(folder)

        # State.
        state = initial_state(config, device, processes)
        if resume is not None:
            restore(state, *read_newest(resume))
        elif config.diffusion.state_dict_path is not None:
            start_from(state)
        broadcast_weights(nn.ModuleList([state.model, state.average]), processes)
        if state.step == total:
            LOG.warning("Step %d of %d is done: nothing to train.", total, total)

        # Steps.
        record = open_run(
            folder,
            events_folder(config, folder),
            config,
            processes=processes,
            command=command,
            resume_step=state.step,
        )
        profiled = profiling(folder if profile and processes.is_main else None, device)
        with record as log, StopRequest() as stop, profiled as on_step_end:
            train_steps(state, folder, log, stop, on_step_end)
        if state.bad.found:
            LOG.warning("%d images could not be read.", len(state.bad.found))
        return TrainResult(folder, state.step, stop.exit_status)


def refuse_used_folder(folder: Path) -> None:
    """Raises CheckpointError where the folder of a new run has one of this or another program."""
    remedy = f"Go on with --resume {folder}, or choose another --output_dir"
    refuse_to_overwrite(folder, checkpoints(folder), remedy)
    others = list(folder.glob("state*.pt"))
    refuse_to_overwrite(folder, others, "Choose another --output_dir", reached=" of train_dia.py")


def train_steps(
    state: TrainState,
    folder: Path,
    log: RunLog | None,
    stop: StopRequest,
    on_step_end: Callable[[], None],
) -> None:
    """Trains the steps that are left; log is None in all processes but the main one."""
    settings, started, stopping = state.config.diffusion, time.perf_counter(), False
    with reading(endless_batches(state)) as batches:
        while state.step < settings.train_num_steps and not stopping:
            loss = training_step(state, batches)
            on_step_end()
            require_finite(state.step, {"loss": loss}, LOWER_RATE)
            stopping = any_asked_to_stop(stop, state.processes, state.device)
            last = stopping or state.step == settings.train_num_steps
            if log is not None and (state.step % settings.log_every == 0 or last):
                seconds = time.perf_counter() - started
                values = {"loss": loss, "seconds": seconds, **scale_of(state.scaler)}
                log.scalars(state.step, {f"train/{name}": value for name, value in values.items()})
            if log is not None and (state.step % settings.save_every == 0 or last):
                require_still_sole_writer(folder)
                save(state, folder / f"model-{-(-state.step // settings.save_every)}.pt")
                stop.unless_asked(partial(show_pictures, state, log))  # minutes on a CPU
    if stopping or stop.requested:
        LOG.warning("Asked to stop: saved step %d. Go on with --resume %s", state.step, folder)


def training_step(state: TrainState, batches: Iterator[Tensor]) -> float:
    """One optimiser step and, every ema_update_every steps, one of the average: the loss.

    batches: (B, 3, side, side) in [0, 1], of which gradient_accumulate_every are taken.
    """
    settings, model = state.config.diffusion, state.model
    total = torch.zeros((), device=state.device)
    # Accumulate gradients.
    state.optimizer.zero_grad()
    for part in range(settings.gradient_accumulate_every):
        x0 = next(batches).to(state.device, non_blocking=True)
        mirrored, t, noise = draw_noise(state, part, x0.shape)
        x0 = torch.where(mirrored.to(x0.device)[:, None, None, None], x0.flip(3), x0)
        with autocast_to(state.config.precision, state.device):
            loss = model.p_losses(2 * x0 - 1, t, noise)
        loss = loss / settings.gradient_accumulate_every
        state.scaler.scale(loss).backward()
        total = total + loss.detach()
    # Update weights.
    average_gradients(list(model.parameters()), state.processes)
    state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    # Update EMA.
    if state.step % settings.ema_update_every == 0:
        update_average(state, settings.ema_decay)
    return average_values(total, state.processes).item()


def draw_noise(state: TrainState, part: int, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """What is random of a batch: mirrored (B,) bool, steps t (B,), noise (B, C, H, W).

    part: of the step, from 0. shape: of this process's images (B, C, H, W). Drawn for the images of
    all processes together, so that what happens to an image does not depend on who has it.
    """
    generator = generator_for(state.config.seed, "noise", state.step, part, 0)
    total, rows = shape[0] * state.processes.world_size, state.processes.rows
    mirrored = torch.rand(total, generator=generator) < 0.5
    t = torch.randint(state.model.steps, (total,), generator=generator)
    noise = gaussian_noise(
        (total, *shape[1:]),
        device=state.device,
        local=state.config.diffusion.local_randn,
        generator=generator,
        rows=rows,
    )
    return mirrored[rows], t[rows].to(state.device), noise


def update_average(state: TrainState, largest_decay: float) -> None:
    """Moves the average towards the weights; the decay grows with the step to largest_decay."""
    age = max(0, state.step - EMA_START - 1)
    decay = min(largest_decay, 1 - (1 + age) ** (-2 / 3))
    # Not an AveragedModel: its first update copies, also after a resume, and it counts updates.
    average, current = list(state.average.parameters()), list(state.model.parameters())
    get_ema_multi_avg_fn(decay)(average, current, None)


def show_pictures(state: TrainState, log: RunLog) -> None:
    """Samples of the average and the dissolving strip of the model, in TensorBoard."""
    settings = state.config.diffusion
    generator = generator_for(state.config.seed, "pictures")
    samples = sample_picture(state.average, settings, settings.side, generator)
    log.image(state.step, "eval/samples", samples)
    with reading(ordered_batches(state.images, STRIP_IMAGES, bad=state.bad)) as batches:
        shown = next(batches).images
    # A copy: a dissolver takes its model over.
    dissolver = Dissolver(deepcopy(state.model), dissolve_range=settings.strip_range)
    strip = dissolving_strip(dissolver, shown, settings.strip_steps)
    log.image(state.step, "eval/dissolving", strip)


def endless_batches(state: TrainState) -> Generator[Tensor, None, None]:
    """Batches (B, 3, side, side) without end, from the one that the next step takes."""
    # The place in the endless row follows from the step, so a resume finds it again.
    config, settings = state.config, state.config.diffusion
    per_epoch = batches_per_epoch(len(state.images), settings.ddpm_batch_size, state.processes)
    first, skip = divmod(state.step * settings.gradient_accumulate_every, per_epoch)
    for epoch in itertools.count(first):
        batches = epoch_batches(
            state.images,
            batch_size=settings.ddpm_batch_size,
            epoch=epoch,
            seed=config.seed,
            processes=state.processes,
            num_workers=config.data.num_workers,
            bad=state.bad,
            pin_memory=state.device.type == "cuda",
        )
        for batch in itertools.islice(batches, skip, None):
            yield batch.images
        skip = 0


def training_images(config: DdpmConfig) -> ImagesAtSide:
    """The normal training images; DatasetError where there are fewer than two."""
    whole = config.data.images("train")
    normal = whole.of_classes([config.normal_class])
    if config.diffusion.ratio < 1:
        order = torch.randperm(len(normal), generator=generator_for(config.seed, "ratio"))
        normal = normal.subset(order[: int(len(normal) * config.diffusion.ratio)].numpy())
    if len(normal) < 2:
        raise DatasetError(
            f"{len(normal)} training image(s) of class {config.normal_class} in "
            f"{config.data.dataset}: at least 2 are needed. Check --data_root, --one_class_idx and "
            "--ratio."
        )
    say_class(config, whole, len(normal))
    return ImagesAtSide(normal, config.diffusion.side, config.data.row.fit)


def say_class(config: DdpmConfig, whole: ImageSet, count: int) -> None:
    """Says of which class the images are that are trained on.

    That is a warning where no setting and no table of classes says which of several is normal.
    """
    number, row = config.normal_class, config.data.row
    others = sorted(set(whole.labels.tolist()) - {number})
    trained = f"class {number} ({whole.classes[number]}), {count} images"
    chosen = (config.diffusion.on_label, config.data.one_class_idx) != (None, None)
    if chosen or not others or row.classes is not None:
        LOG.info("Trained on: %s.", trained)
        return
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    LOG.warning(
        "data.one_class_idx is none: trained on is %s, and not %s%s. If another class is the "
        "normal one, pass its number as --one_class_idx.",
        trained, ", ".join(f"{n} ({whole.classes[n]})" for n in others[:SHOWN]), more,
    )  # fmt: skip


def require_training_memory(config: DdpmConfig, device: torch.device) -> None:
    """Raises RuntimeSetupError where the U-Net, a batch or a picture of samples cannot fit.

    Lower bounds: the middle blocks five times (weights, average, gradients, Adam's moments), and
    the first layer's output.
    """
    settings = config.diffusion
    widest = settings.dim * max(settings.dim_mults)
    what = f"The U-Net (--dim {settings.dim}, --dim_mults up to {max(settings.dim_mults)})"
    blocks = 4 * 9 * widest**2 * 5
    require_memory(blocks * FLOAT_BYTES, what, device, "Lower --dim or --dim_mults.")
    for name in ("ddpm_batch_size", "num_samples"):
        images = getattr(settings, name)
        first_layer = images * (3 + settings.dim) * settings.side**2
        what = f"{images} images of {settings.side}² pixels (--{name})"
        require_memory(first_layer * FLOAT_BYTES, what, device, f"Lower --{name} or --image_size.")


def initial_state(config: DdpmConfig, device: torch.device, processes: Processes) -> TrainState:
    """Images, fresh weights from PyTorch's global generator, and a new optimiser."""
    settings, images = config.diffusion, training_images(config)
    unet = Unet(settings.dim, settings.dim_mults, dilation=settings.dilation_factor)
    model = GaussianDiffusion(unet, steps=settings.timesteps, schedule=settings.beta_schedule)
    model = model.to(device)
    average = deepcopy(model).requires_grad_(False)
    if config.compile:
        unet.compile(dynamic=False)
    return TrainState(
        config,
        device,
        processes,
        images,
        bad=BadImages(config.data.on_bad_image),
        identity=set_identity(images),
        model=model,
        average=average,
        optimizer=torch.optim.Adam(
            model.parameters(), lr=settings.train_lr, betas=settings.adam_betas
        ),
        scaler=gradient_scaler(config.precision, device),
    )


def save(state: TrainState, path: Path) -> None:
    """Writes the published entries and the run's facts; TrainingError if a weight is not finite."""
    weights, settings = state.model.state_dict(), state.config.diffusion
    reached = f"after step {state.step}"
    require_finite_training(reached, {"weights of the U-Net": weights}, LOWER_RATE)
    saved = {
        "step": state.step,
        "model": weights,
        "ema": {EMA_PREFIX + name: tensor for name, tensor in state.average.state_dict().items()},
        "opt": state.optimizer.state_dict(),
        **scaler_state(state.scaler),
        "dilation": settings.dilation_factor,
        "image_size": settings.side,
        "processes": state.processes.world_size,
        "images": state.identity,
        "config": config_to_dict(state.config),
    }
    save_atomic(saved, path)


def load_weights(state: TrainState, saved: Mapping[str, Any], source: str) -> None:
    """Takes a checkpoint's weights, and not its step, into model and average."""
    weights = checkpoint_weights(saved, "raw", source)
    load_module(state.model, weights, f"{source}: model")
    state.average.load_state_dict(weights)


def start_from(state: TrainState) -> None:
    """Takes the weights of state_dict_path; CheckpointError where they are of other sizes."""
    settings = state.config.diffusion
    path = resolve_path(settings.state_dict_path, "diffusion.state_dict_path")
    sizes = {"dilation": settings.dilation_factor, "image_size": settings.side}
    load_weights(state, read_checkpoint(path, **sizes), str(path))


def restore(state: TrainState, path: Path, saved: Mapping[str, Any]) -> None:
    """Goes on from a checkpoint of this run, as read from a file; CheckpointError for another's."""
    source = str(path)
    if "opt" not in saved:
        raise CheckpointError(f"{path} has no optimiser; use it as --state_dict_path instead")
    require_mapping(saved, source, ("step", "ema", "config"))
    check_resumed(saved, state.config, state.identity, source=source, may_change=MAY_CHANGE)
    batch = "diffusion.ddpm_batch_size"
    require_as_many_processes(saved, state.processes, batch, source=source)
    steps = (state.config.diffusion.train_num_steps, "diffusion.train_num_steps")
    state.step = saved_progress(saved, "step", *steps, source=source)
    load_weights(state, saved, source)
    load_module(state.average, checkpoint_weights(saved, "ema", source), f"{source}: ema")
    load_optimiser(state.optimizer, saved["opt"], f"{source}: opt", has_stepped=state.step > 0)
    restore_scaler(state.scaler, saved, source)


def new_folder(config: DdpmConfig) -> Path:
    """The run folder: output_dir, or a dated one below ddpm_models/."""
    settings = config.diffusion
    if settings.output_dir is not None:
        return resolve_path(settings.output_dir, "diffusion.output_dir")
    ratio = "" if settings.ratio == 1 else f"_r{settings.ratio}"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return REPOSITORY / "ddpm_models" / f"{config.data.dataset}-{settings.side}-{stamp}{ratio}"


def events_folder(config: DdpmConfig, folder: Path) -> Path:
    """Where TensorBoard's events go: logs/<run>, or into the folder that output_dir names.

    A run that goes on writes where it has written before, whether or not --output_dir is given.
    """
    named = config.diffusion.output_dir is not None or (folder / "events").is_dir()
    return folder / "events" if named else REPOSITORY / "logs" / folder.name
