"""Contrastive training: the loop over epochs, its steps, and the selection of the best encoder.

B images, K shifts, V views. Everything random of a step comes from (seed, epoch, batch), so a run
that is resumed goes on exactly as the uninterrupted one would have.
"""

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from common.checkpoint import save_atomic
from common.config import REPOSITORY, resolve_path
from common.image_batches import Batch, epoch_batches, reading
from common.processes import Processes, average_gradients, average_values, broadcast_weights
from common.random_numbers import generator_for
from common.run_log import RunLog
from common.stopping import StopRequest, any_asked_to_stop
from common.training import (
    autocast_to,
    joined_training,
    open_run,
    profiling,
    refuse_to_overwrite,
    require_finite,
    require_still_sole_writer,
    scale_of,
    sole_writer,
)
from dia.augment import augment, random_augmentation
from dia.building import TrainState, initial_state, require_training_memory
from dia.losses import contrastive_losses, heads_for, probe_loss
from dia.optim import learning_rate
from dia.predictor import TrainedEncoder, bank_scores, extract_features, view_settings
from dia.results import compare
from dia.settings import DiaConfig
from dia.shifts import effective_shift
from dia.snapshots import LOWER_RATE, require_finite_encoder, restore, save
from dia.views import beta_parameters, draw_views, make_views, shift_labels, views_in
from diffusion_models.dissolve import checkpoints

LOG = logging.getLogger(__name__)
UNSCALED = GradScaler(enabled=False)
SELECTION_CROP = (0.54, 1.0)
"""Crop areas of the evaluations during training, as published."""


class TrainResult(NamedTuple):
    """Where a run has left its checkpoints."""

    folder: Path
    epoch: int
    best: dict[str, float]
    """Best value of the selection so far, by its name."""
    exit_status: int
    """128 + the signal's number where one ended the run early, else 0."""


def train(config: DiaConfig, *, command: Sequence[str] = (), profile: bool = False) -> TrainResult:
    """Trains for `epochs`, from scratch, from load_path's weights, or on from resume_path.

    profile: writes a profile of 20 steps to the folder. SIGINT and SIGTERM end the run with the
    batch at hand, saved.
    """
    folder, resumes = run_folder(config), config.contrastive.resume_path is not None
    with (
        joined_training(config) as (device, processes),
        sole_writer(folder, processes, "choose another --run_dir or --suffix"),
    ):
        # Set-up.
        require_training_memory(config, device)
        if not resumes:
            refuse_used_folder(folder)

        # State.
        state = initial_state(config, device, processes)
        if resumes:
            restore(state, folder)
        broadcast_weights(state.encoder, processes)
        if state.epoch == config.contrastive.epochs:
            LOG.warning("Epoch %d of %d is done: nothing to train.", state.epoch, state.epoch)

        # Epochs.
        record = open_run(
            folder,
            folder / "events",
            state.config,
            processes=processes,
            command=command,
            resume_step=state.step,
        )
        profiled = profiling(folder if profile and processes.is_main else None, device)
        with record as log, StopRequest() as stop, profiled as on_step_end:
            train_epochs(state, folder, log, stop, on_step_end)
        if state.bad.found:
            LOG.warning("%d images could not be read.", len(state.bad.found))
        return TrainResult(folder, state.epoch, state.best, stop.exit_status)


def run_folder(config: DiaConfig) -> Path:
    """The run's folder: resume_path, run_dir, or a name of its settings below logs/."""
    settings = config.contrastive
    for key in ("resume_path", "run_dir"):
        if getattr(settings, key) is not None:
            return resolve_path(getattr(settings, key), f"contrastive.{key}")
    parts = [config.data.dataset, settings.model, "unsup", settings.mode]
    parts += ["shift", settings.shift_trans_type, f"res{settings.diff_resolution}"]
    if config.data.one_class_idx is not None:
        parts.append(f"one_class_{config.data.one_class_idx}")
    if settings.suffix:
        parts.append(settings.suffix)
    return REPOSITORY / "logs" / "_".join(parts)


def refuse_used_folder(folder: Path) -> None:
    """Raises CheckpointError where the folder of a new run has one of this or another program."""
    another = "hoose another --run_dir or --suffix"
    remedy = f"Go on with --resume_path {folder}, or c{another}"
    refuse_to_overwrite(folder, list(folder.glob("state*.pt")), remedy)
    models = checkpoints(folder)
    refuse_to_overwrite(folder, models, f"C{another}", reached=" of train_eval_ddpm.py")


def train_epochs(
    state: TrainState,
    folder: Path,
    log: RunLog | None,
    stop: StopRequest,
    on_step_end: Callable[[], None],
) -> None:
    """Trains the epochs that are left; log is None in all processes but the main one."""
    settings = state.config.contrastive
    unselected = state.selection_sets is not None and state.selected < state.epoch
    if log is not None and unselected and state.is_due(settings.eval_step):
        # the run ended before this was done
        stop.unless_asked(partial(select_and_save, state, folder, log))
    ended = False
    while state.epoch < settings.epochs and not ended:
        started, earlier = time.perf_counter(), state.batch
        ended = train_batches(state, stop, on_step_end)
        if ended:
            if log is not None:
                save(state, folder)
            break
        seconds = (time.perf_counter() - started) / (state.batch - earlier)
        means = finish_epoch(state)
        if log is not None:
            values = {**means, "train/seconds_per_step": seconds, "epoch": state.epoch}
            log.scalars(state.step, values)
            LOG.info("epoch %d: loss %.4f", state.epoch, means["train/loss"])
        ended = any_asked_to_stop(stop, state.processes, state.device)
        if log is None:
            continue
        selects = state.is_due(settings.eval_step)
        if selects and state.selection_sets is None:  # by the loss, which no later run would know
            select_best(state, folder, log, means["train/loss"])
        if selects or ended or state.is_due(settings.save_step):
            save(state, folder)
        if selects and state.selection_sets is not None:  # may meet an image that cannot be read
            stop.unless_asked(partial(select_and_save, state, folder, log))
    if stop.requested:
        further = f" and {state.batch} batches" if state.batch else ""
        LOG.warning("Saved epoch %d%s. Go on with --resume_path %s", state.epoch, further, folder)


def train_batches(state: TrainState, stop: StopRequest, on_step_end: Callable[[], None]) -> bool:
    """The batches that are left of the epoch at hand; whether a stop was asked for before its end.

    Losses are added to state.sums.
    """
    epoch, first = state.epoch + 1, state.batch
    stream = epoch_batches(
        state.images,
        batch_size=state.config.contrastive.batch_size,
        epoch=epoch,
        seed=state.config.seed,
        processes=state.processes,
        num_workers=state.config.data.num_workers,
        bad=state.bad,
        pin_memory=state.device.type == "cuda",
    )
    state.encoder.train()
    with reading(stream) as batches:
        left = itertools.islice(batches, first, None)
        for number, batch in zip(range(first, state.steps_per_epoch), left, strict=False):
            losses = training_step(state, epoch, number, batch)
            on_step_end()
            require_finite(state.step + number + 1, losses, LOWER_RATE)
            state.sums.update(losses)
            state.batch = number + 1
            is_last = state.batch == state.steps_per_epoch
            if not is_last and any_asked_to_stop(stop, state.processes, state.device):
                return True
    return False


def finish_epoch(state: TrainState) -> dict[str, float]:
    """Counts the epoch at hand as trained: its mean losses, and the rate at its end."""
    means = {f"train/{name}": total / state.batch for name, total in state.sums.items()}
    state.epoch, state.step = state.epoch + 1, state.step + state.batch
    state.batch, state.sums = 0, Counter()
    return {**means, "train/lr": state.optimizer.param_groups[0]["lr"]}


def training_step(state: TrainState, epoch: int, number: int, batch: Batch) -> dict[str, float]:
    """One step of the encoder and one of the linear probe; returns their losses.

    epoch: from 1   number: of the batch in it, from 0.
    """
    settings, encoder = state.config.contrastive, state.encoder
    images, labels = (
        part.to(state.device, non_blocking=True) for part in (batch.images, batch.labels)
    )
    n_shifts, n_views = effective_shift(settings).count, views_in(settings.mode)

    with autocast_to(state.config.precision, state.device):
        # Views, shifted and augmented.
        rows = augmented_views(state, epoch, number, images)  # (V·K·B, C, H, W)

        # Losses of the encoder.
        heads = encoder(rows, *heads_for(settings, encoder.simsiam)).in_fp32()
    truth = shift_labels(len(images), n_shifts, n_views, state.device)
    losses = contrastive_losses(heads, truth, settings)

    # Update of the encoder, and the learning rate of its next one.
    optimise(losses.total, state.optimizer, state.processes, state.scaler)
    done = epoch - 1 + number / state.batches  # counts batches that max_batches leaves out, too
    rate = learning_rate(
        done,
        initial=settings.lr_init,
        warmup=settings.warmup,
        epochs=settings.epochs,
        batches=state.batches,
        schedule=settings.lr_scheduler,
    )
    for group in state.optimizer.param_groups:
        group["lr"] = rate

    # Update of the linear probe.
    probed = probe_loss(encoder.linear, heads.penultimate, labels, n_shifts)
    optimise(probed, state.probe, state.processes, state.scaler)
    state.scaler.update()

    terms = {"loss": losses.total, "loss_sim": losses.sim, "loss_shift": losses.shift}
    terms |= {"loss_simsiam": losses.simsiam, "loss_linear": probed}
    values = torch.stack([term.detach() for term in terms.values()])
    means = average_values(values, state.processes).tolist()  # one transfer
    return dict(zip(terms, means, strict=True)) | scale_of(state.scaler)


def augmented_views(state: TrainState, epoch: int, number: int, images: Tensor) -> Tensor:
    """Augmented views of a batch: (B, C, H, W) → (V·K·B, C, H, W).

    All that is random is drawn for the images of all processes together, so that what happens to an
    image does not depend on who has it.
    """
    settings, rows = state.config.contrastive, state.processes.rows
    shift_type, total = effective_shift(settings), len(images) * state.processes.world_size
    generator = generator_for(state.config.seed, "views", epoch, number, 0)
    draws = draw_views(
        total,
        shift_type.count,
        beta=beta_parameters(settings.diffusion_scheduler, epoch),
        offset=settings.diffusion_offset,
        upper=settings.diffusion_upper_offset,
        generator=generator,
    )
    views = make_views(images, settings.mode, shift_type, draws.of_rows(rows), state.negatives)
    size, blocks = (views.shape[2], views.shape[3]), len(views) // len(images)
    drawn = random_augmentation(blocks * total, size, settings.crop_scale, generator)
    return augment(views, drawn.of_rows(blocks, rows))


def optimise(
    loss: Tensor, optimizer: Optimizer, processes: Processes, scaler: GradScaler = UNSCALED
) -> None:
    """One optimiser step down the gradient of a scalar loss, averaged over the processes."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(parameters, processes)
    scaler.step(optimizer)


def select_best(state: TrainState, folder: Path, log: RunLog, train_loss: float = math.inf) -> None:
    """Looks whether this epoch is the best so far, and saves it as best_*.model if so."""
    for name, value in selection_values(state, folder, train_loss).items():
        log.scalars(state.step, {f"eval/{name}": value})
        if value > state.best.get(name, -math.inf):
            state.best[name] = value
            require_finite_encoder(state)
            require_still_sole_writer(folder)
            save_atomic(state.encoder.state_dict(), folder / f"best_{name}.model")
    state.selected = state.epoch


def select_and_save(state: TrainState, folder: Path, log: RunLog) -> None:
    """The same by images, and saves what was found."""
    select_best(state, folder, log)
    save(state, folder)


def selection_values(state: TrainState, folder: Path, train_loss: float) -> dict[str, float]:
    """Mean one-class AUROC as {"CSI": …}, or minus the training loss as {"loss": …}.

    Larger is better; nothing where select_by is last.
    """
    config, sets = state.config, state.selection_sets
    if config.contrastive.select_by == "last":
        return {}
    if sets is None:
        return {"loss": -train_loss}
    shift_type = effective_shift(config.contrastive)
    n_samples = config.evaluation.select_ood_samples
    views = view_settings(config, shift_type, n_samples, SELECTION_CROP)
    encoder = TrainedEncoder(state.encoder, config, views, state.device, folder / "last.model")
    score = "simclr" if shift_type.count == 1 else "CSI"
    train = extract_features(encoder, state.images, state.bad)
    tests = {n: extract_features(encoder, images, state.bad) for n, images in sets.items()}
    return {score: compare(bank_scores(encoder, train, tests, score)).one_class_mean}
