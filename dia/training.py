"""Contrastive training: the loop over epochs, its steps, its checkpoints, and the best of them.

B images, K shifts, V views. Everything random of a step comes from (seed, epoch, batch), so a run
that is resumed at an epoch goes on exactly as the uninterrupted one would have.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.checkpoint import (
    CheckpointError,
    content_hash,
    load_module,
    load_optimiser,
    load_tensors,
    require_finite_weights,
    require_mapping,
    require_state_dict,
    save_atomic,
)
from common.config import REPOSITORY, config_to_dict, resolve_path
from common.image_batches import BadImages, Batch, batches_per_epoch, epoch_batches, reading
from common.image_sets import ImageSet, set_identity
from common.run_log import RunLog
from common.runtime import (
    Processes,
    StopRequest,
    any_asked_to_stop,
    average_gradients,
    broadcast_weights,
    generator_for,
    joined_processes,
    resolve_device,
    seed_everything,
    tf32_products,
)
from common.training import (
    OWN_SETTINGS,
    check_resumed,
    open_run,
    refuse_to_overwrite,
    require_finite,
    require_finite_training,
)
from dia.augment import augment, random_augmentation
from dia.building import (
    build_negatives,
    build_optimizer,
    initial_encoder,
    layout_for,
    require_training_memory,
)
from dia.data import EvaluationSets, evaluation_sets, hold_out, normal_train_set
from dia.encoders import Encoder
from dia.losses import contrastive_losses, heads_for, probe_loss
from dia.optim import learning_rate
from dia.predictor import TrainedEncoder, bank_scores, extract_features, view_settings
from dia.results import NORMAL, compare
from dia.settings import DiaConfig
from dia.shifts import effective_shift
from dia.views import (
    NegativeViewConfig,
    beta_parameters,
    draw_views,
    make_views,
    shift_labels,
    views_in,
)

LOG = logging.getLogger(__name__)
STATE_NAME = "state.pt"
PROBE_RATE = 1.0e-3
SELECTION_CROP = (0.54, 1.0)
"""Crop areas of the evaluations during training, as published."""
LOWER_RATE = "Start a new run with a lower --lr_init, or with the other --optimizer."
MAY_CHANGE = (
    # Where things lie, and what the first epoch began with; images and diffusion model are known
    # by their contents.
    *("data.data_root", "contrastive.run_dir", "contrastive.resume_path", "contrastive.suffix"),
    *("contrastive.load_path", "contrastive.no_strict", "contrastive.diffusion_model_path"),
    # What computes, and how fast.
    *("device", "data.num_workers", "contrastive.local_rank"),
    # What is written or said, and how images are scored.
    *("contrastive.save_step", "contrastive.eval_step", "contrastive.error_step"),
    *("data.on_bad_image", "evaluation."),
    # The learning rate of the epochs to come follows the new length.
    "contrastive.epochs",
)
"""Settings that may differ when a run goes on; all else decides what is learnt or selected."""


class Trained(NamedTuple):
    """Where a run has left its checkpoints."""

    folder: Path
    epoch: int
    best: dict[str, float]
    """Best value of the selection so far, by its name."""
    exit_status: int
    """128 + the signal's number where one ended the run early, else 0."""


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
    batches: int
    """Of this process in one pass over the images."""
    bad: BadImages
    epoch: int = 0
    """Epochs trained."""
    selected: int = 0
    """The last epoch after which the best one was looked for."""
    best: dict[str, float] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, which max_batches may end early."""
        return min(self.batches, self.config.contrastive.max_batches or self.batches)

    def saved(self) -> dict[str, Any]:
        """Everything a resume needs."""
        return {
            "epoch": self.epoch,
            "selected": self.selected,
            "model": self.encoder.state_dict(),
            "optim": self.optimizer.state_dict(),
            "probe": self.probe.state_dict(),
            "best": self.best,
            "data": self.data,
            "config": config_to_dict(self.config),
        }


def train(config: DiaConfig, *, command: Sequence[str] = ()) -> Trained:
    """Trains for `epochs`, from scratch, from load_path's weights, or on from resume_path.

    SIGINT and SIGTERM end the run with the epoch at hand, saved.
    """
    device = resolve_device(config.device)
    allowed = tf32_products(config.precision == "tf32")
    with allowed, joined_processes(device) as processes:
        require_training_memory(config, device)
        seed_everything(config.seed)
        folder = run_folder(config)
        if config.contrastive.resume_path is None:
            remedy = f"Go on with --resume_path {folder}, or choose another --run_dir or --suffix"
            refuse_to_overwrite(folder, list(folder.glob(STATE_NAME)), remedy)
        state = set_up(config, device, processes)
        if config.contrastive.resume_path is not None:
            restore(state, folder)
        broadcast_weights(state.encoder, processes)
        record = open_run(
            folder,
            folder / "events",
            config,
            processes=processes,
            command=command,
            resume_step=state.epoch * state.steps_per_epoch,
        )
        with record as log, StopRequest() as stop:
            train_epochs(state, folder, log, stop)
        if state.bad.found:
            LOG.warning("%d images could not be read.", len(state.bad.found))
        return Trained(folder, state.epoch, state.best, stop.exit_status)


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


def set_up(config: DiaConfig, device: torch.device, processes: Processes) -> TrainState:
    """Images, encoder, diffusion model and optimisers of a new run."""
    settings = config.contrastive
    images, sets = normal_train_set(config), None
    if settings.select_by == "val":
        images, sets = hold_out(config, images)
        if sets is None:
            LOG.warning("no labelled anomalies to validate on: the training loss chooses")
    encoder = initial_encoder(settings, len(images.classes))
    if processes.world_size > 1 and device.type == "cuda":
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    encoder = encoder.to(device, memory_format=layout_for(device, settings.width))
    negatives = build_negatives(config, device)
    model_hash = None
    if negatives.dissolve is not None:
        path = resolve_path(settings.diffusion_model_path, "contrastive.diffusion_model_path")
        model_hash = content_hash(path)
    probe = torch.optim.Adam(
        encoder.linear.parameters(), lr=PROBE_RATE, weight_decay=settings.weight_decay
    )
    return TrainState(
        config,
        device,
        processes,
        images,
        evaluation_sets(config) if settings.select_by == "test" else sets,
        data={"images": set_identity(images), "diffusion_model": model_hash},
        negatives=negatives,
        encoder=encoder,
        optimizer=build_optimizer(encoder, settings),
        probe=probe,
        batches=batches_per_epoch(len(images), settings.batch_size, processes),
        bad=BadImages(config.data.on_bad_image),
    )


def train_epochs(state: TrainState, folder: Path, log: RunLog | None, stop: StopRequest) -> None:
    """Trains the epochs that are left; log is None in all processes but the main one."""
    settings = state.config.contrastive
    eval_step = settings.eval_step or settings.save_step
    due = state.epoch % eval_step == 0 or state.epoch == settings.epochs
    unselected = state.selection_sets is not None and state.selected < state.epoch
    if log is not None and due and unselected:
        select_best(state, folder, log)  # the run ended before this was done
    if state.epoch == settings.epochs:
        LOG.warning("Epoch %d of %d is done: nothing to train.", state.epoch, settings.epochs)
    ended = False
    while state.epoch < settings.epochs and not ended:
        started = time.perf_counter()
        means = train_epoch(state, stop)
        if log is not None:
            seconds = (time.perf_counter() - started) / state.steps_per_epoch
            values = {**means, "train/seconds_per_step": seconds, "epoch": state.epoch}
            log.scalars(state.epoch * state.steps_per_epoch, values)
            LOG.info("epoch %d: loss %.4f", state.epoch, means["train/loss"])
        ended = any_asked_to_stop(stop, state.processes, state.device)
        if log is None:
            continue
        due = state.epoch % eval_step == 0 or state.epoch == settings.epochs
        if due or state.epoch % settings.save_step == 0 or ended:
            save(state, folder)  # first: a selection may meet an image that it cannot read
        if due:
            select_best(state, folder, log, means["train/loss"])
    if stop.requested:
        LOG.warning("Saved epoch %d. Go on with --resume_path %s", state.epoch, folder)


def train_epoch(state: TrainState, stop: StopRequest) -> dict[str, float]:
    """One pass, whole even where a stop is asked for: mean losses, and the rate at its end."""
    sums: dict[str, float] = {}
    epoch, warned = state.epoch + 1, False
    batches = epoch_batches(
        state.images,
        batch_size=state.config.contrastive.batch_size,
        epoch=epoch,
        seed=state.config.seed,
        processes=state.processes,
        num_workers=state.config.data.num_workers,
        bad=state.bad,
    )
    state.encoder.train()
    with reading(batches):
        for number, batch in zip(range(state.steps_per_epoch), batches, strict=False):
            losses = training_step(state, epoch, number, batch)
            require_finite(state.epoch * state.steps_per_epoch + number + 1, losses, LOWER_RATE)
            if stop.requested and not warned:
                LOG.warning("Asked to stop: epoch %d is finished first; Ctrl-C ends it now.", epoch)
                warned = True
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value
    state.epoch = epoch
    means = {f"train/{name}": total / state.steps_per_epoch for name, total in sums.items()}
    return {**means, "train/lr": state.optimizer.param_groups[0]["lr"]}


def training_step(state: TrainState, epoch: int, number: int, batch: Batch) -> dict[str, float]:
    """One step of the encoder and one of the linear probe; returns their losses.

    epoch: from 1   number: of the batch in it, from 0.
    """
    settings, encoder = state.config.contrastive, state.encoder
    images, labels = batch.images.to(state.device), batch.labels.to(state.device)
    n_shifts, n_views = effective_shift(settings).count, views_in(settings.mode)

    # Views, shifted and augmented.
    rows = augmented_views(state, epoch, number, images)  # (V·K·B, C, H, W)

    # Losses of the encoder.
    heads = encoder(rows, *heads_for(settings, encoder.simsiam))
    truth = shift_labels(len(images), n_shifts, n_views, state.device)
    losses = contrastive_losses(heads, truth, settings)

    # Update of the encoder, and the learning rate of its next one.
    optimise(losses.total, state.optimizer, state.processes)
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
    optimise(probed, state.probe, state.processes)

    terms = {"loss": losses.total, "loss_sim": losses.sim, "loss_shift": losses.shift}
    terms |= {"loss_simsiam": losses.simsiam, "loss_linear": probed}
    values = torch.stack([term.detach() for term in terms.values()]).tolist()  # one transfer
    return dict(zip(terms, values, strict=True))


def augmented_views(state: TrainState, epoch: int, number: int, images: Tensor) -> Tensor:
    """Augmented views of a batch: (B, C, H, W) → (V·K·B, C, H, W)."""
    settings = state.config.contrastive
    shift_type = effective_shift(settings)
    generator = generator_for(state.config.seed, "views", epoch, number, state.processes.rank)
    draws = draw_views(
        len(images),
        shift_type.count,
        beta=beta_parameters(settings.diffusion_scheduler, epoch),
        offset=settings.diffusion_offset,
        upper=settings.diffusion_upper_offset,
        generator=generator,
    )
    views = make_views(images, settings.mode, shift_type, draws, state.negatives)
    size = (views.shape[2], views.shape[3])
    return augment(views, random_augmentation(len(views), size, settings.crop_scale, generator))


def optimise(loss: Tensor, optimizer: Optimizer, processes: Processes) -> None:
    """One optimiser step down the gradient of a scalar loss, averaged over the processes."""
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(parameters, processes)
    optimizer.step()


def select_best(state: TrainState, folder: Path, log: RunLog, train_loss: float = math.inf) -> None:
    """Looks whether this epoch is the best so far, and saves it as best_*.model if so."""
    values = selection_values(state, folder, train_loss)
    for name, value in values.items():
        log.scalars(state.epoch * state.steps_per_epoch, {f"eval/{name}": value})
        if value > state.best.get(name, -math.inf):
            state.best[name] = value
            save_atomic(state.encoder.state_dict(), folder / f"best_{name}.model")
    state.selected = state.epoch
    if values:
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
    tests = {
        name: extract_features(encoder, images, state.bad)
        for name, images in {NORMAL: sets.normal, **sets.others}.items()
    }
    return {score: compare(bank_scores(encoder, train, tests, score)).one_class_mean}


def save(state: TrainState, folder: Path) -> None:
    """Writes the published files and the state; TrainingError where a weight is not finite."""
    saved = state.saved()
    reached = f"after epoch {state.epoch}"
    require_finite_training(reached, {"weights of the encoder": saved["model"]}, LOWER_RATE)
    save_atomic(saved["model"], folder / "last.model")
    save_atomic(saved["optim"], folder / "last.optim")
    save_atomic({"epoch": state.epoch, "best": state.best}, folder / "last.config")
    save_atomic(saved, folder / STATE_NAME)


def restore(state: TrainState, folder: Path) -> None:
    """Goes on from the state that a run has left in its folder.

    Raises CheckpointError where there is none, or one of other settings, images or diffusion model.
    """
    saved, config = load_state(folder), state.config
    data = saved["data"] if isinstance(saved.get("data"), Mapping) else {}
    before = {"config": saved["config"], "images": data.get("images")}
    check_resumed(before, config, state.data["images"], source=str(folder), may_change=MAY_CHANGE)
    model_hash = state.data["diffusion_model"]
    if data.get("diffusion_model", model_hash) != model_hash:
        raise CheckpointError(
            f"{folder}: {config.contrastive.diffusion_model_path} is another diffusion model than "
            f"the run was started with (its contents differ). {OWN_SETTINGS}"
        )
    if saved["epoch"] > config.contrastive.epochs:
        raise CheckpointError(
            f"{folder} is of epoch {saved['epoch']}, beyond contrastive.epochs: "
            f"{config.contrastive.epochs}. Raise --epochs, or start a new run in another folder."
        )
    model = require_state_dict(saved["model"], f"{folder}: model")
    require_finite_weights(model, f"{folder}: model")
    load_module(state.encoder, model, f"{folder}: model")
    for name, optimizer in (("optim", state.optimizer), ("probe", state.probe)):
        source, stepped = f"{folder}: {name}", saved["epoch"] > 0
        load_optimiser(optimizer, saved[name], source, has_stepped=stepped)
    state.epoch, state.best = saved["epoch"], dict(saved["best"])
    state.selected = saved.get("selected", state.epoch)


def load_state(folder: Path) -> dict[str, Any]:
    """A run's state; CheckpointError where the folder has none, or one that holds other things."""
    path = folder / STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"no {STATE_NAME} in {folder} to resume from. Pass the folder of a run of "
            "train_dia.py; to start from weights alone, use --load_path last.model."
        )
    entries = ("epoch", "model", "optim", "probe", "best", "config")
    state = require_mapping(load_tensors(path), str(path), entries)
    best = require_mapping(state["best"], f"{path}: best")
    for name in ("epoch", "selected"):
        value = state.get(name, 0)
        if type(value) is not int or value < 0:
            raise damaged(path, name, value, "a whole number of 0 or more")
    for name, value in best.items():
        if not (isinstance(name, str) and isinstance(value, float) and math.isfinite(value)):
            raise damaged(path, "best", {name: value}, "finite numbers by name")
    return state


def damaged(path: Path, name: str, value: object, expected: str) -> CheckpointError:
    """The error for an entry of a state that does not hold what it should."""
    return CheckpointError(
        f"{path}: {name} is {str(value)[:60]!r}, expected {expected}. The file is damaged; copy it "
        "again."
    )
