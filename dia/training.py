"""Contrastive training: the loop over epochs, its checkpoints, and which of them is the best.

B images, K shifts, V views. Everything random of a step comes from (seed, epoch, batch), so a run
that is resumed at an epoch goes on exactly as the uninterrupted one would have.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.checkpoint import (
    content_hash,
    load_module,
    load_optimiser,
    require_finite_weights,
    require_state_dict,
    save_atomic,
)
from common.config import config_to_dict, resolve_path
from common.datasets import dataset_row
from common.image_batches import (
    BadImages,
    Batch,
    batches_per_epoch,
    epoch_batches,
    reading,
)
from common.image_sets import ImageSet, set_identity
from common.run_log import RunLog
from common.runtime import (
    Processes,
    StopRequest,
    any_asked_to_stop,
    average_gradients,
    generator_for,
    joined_processes,
    require_memory,
    resolve_device,
    seed_everything,
    tf32_products,
)
from common.training import open_run, require_finite, require_finite_training
from dia.augment import AugmentationSettings, augment, random_augmentation
from dia.building import (
    build_negatives,
    build_optimizer,
    effective_shift,
    initial_encoder,
    layout_for,
)
from dia.data import hold_out, normal_train_set
from dia.encoders import Encoder
from dia.losses import Objective, contrastive_losses, heads_for, probe_loss
from dia.optim import learning_rate
from dia.run_folder import (
    check_resumed,
    load_state,
    refuse_to_overwrite,
    run_folder,
    save_models,
    save_state,
)
from dia.selection import Selection
from dia.settings import DiaConfig
from dia.views import beta_parameters, draw_views, make_views, shift_labels, views_in

LOG = logging.getLogger(__name__)
PROBE_RATE = 1.0e-3
FLOAT_BYTES = 4
LOWER_RATE = "Start a new run with a lower --lr_init, or with the other --optimizer."


class Trained(NamedTuple):
    """Where a run has left its checkpoints."""

    folder: Path
    epoch: int
    best: dict[str, float]
    """Best value of the selection so far, by its name."""
    exit_status: int
    """128 + the signal's number where one ended the run early, else 0."""


def train(
    config: DiaConfig, *, command: Sequence[str] = (), stop_after: int | None = None
) -> Trained:
    """Trains for `epochs`, from scratch, from load_path's weights, or on from resume_path.

    stop_after: epochs to do now. SIGINT and SIGTERM end the run with the epoch at hand, saved.
    """
    device = resolve_device(config.device)
    allowed = tf32_products(config.precision == "tf32")
    with allowed, joined_processes(device) as processes:
        require_training_memory(config, device)
        seed_everything(config.seed)
        folder = run_folder(config)
        if config.contrastive.resume_path is None:
            refuse_to_overwrite(folder)
        images, held = normal_train_set(config), None
        if config.contrastive.select_by == "val":
            images, held = hold_out(config, images)
        trainer = Trainer(config, images, device, processes)
        if config.contrastive.resume_path is not None:
            trainer.restore(load_state(folder), str(folder))
        selection = Selection(config, images, held, device)
        record = open_run(
            folder,
            folder / "events",
            config,
            processes=processes,
            command=command,
            resume_step=trainer.epoch * trainer.steps_per_epoch,
        )
        with record as log, StopRequest() as stop:
            trainer.run(folder, selection, log, stop, stop_after)
        if trainer.bad.found:
            LOG.warning("%d images could not be read.", len(trainer.bad.found))
        return Trained(folder, trainer.epoch, trainer.best, stop.exit_status)


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


class Trainer:
    """Encoder, optimisers and the place of one run."""

    def __init__(
        self, config: DiaConfig, images: ImageSet, device: torch.device, processes: Processes
    ) -> None:
        settings = config.contrastive
        self.config, self.images, self.device, self.processes = config, images, device, processes
        self.shift_type = effective_shift(settings)
        encoder = initial_encoder(settings, len(images.classes))
        if processes.world_size > 1 and device.type == "cuda":
            encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        layout = layout_for(device, settings.width)
        self.encoder: Encoder = encoder.to(device, memory_format=layout)
        self.negatives = build_negatives(config, device)
        self.objective = Objective(
            mode=settings.mode,
            loss_mode=settings.loss_mode,
            temperature=settings.temperature,
            sim_lambda=settings.sim_lambda,
            simsiam_lambda=settings.simsiam_lambda,
        )
        self.augmentation = AugmentationSettings(crop_scale=settings.crop_scale)
        self.optimizer = build_optimizer(self.encoder, settings)
        self.probe = torch.optim.Adam(
            self.encoder.linear.parameters(), lr=PROBE_RATE, weight_decay=settings.weight_decay
        )
        self.bad = BadImages(config.data.on_bad_image)
        self.data = self.data_facts()
        self.epoch = self.selected = 0
        """Epochs trained, and of these the last after which the best one was looked for."""
        self.best: dict[str, float] = {}
        self.batches = batches_per_epoch(len(images), settings.batch_size, processes)
        self.steps_per_epoch = min(self.batches, settings.max_batches or self.batches)

    def data_facts(self) -> dict[str, Any]:
        """What the run learns from, by contents: training images and diffusion model."""
        facts = {"images": set_identity(self.images), "diffusion_model": None}
        if self.negatives.dissolve is not None:
            path = self.config.contrastive.diffusion_model_path
            facts["diffusion_model"] = content_hash(
                resolve_path(path, "contrastive.diffusion_model_path")
            )
        return facts

    def state(self) -> dict[str, Any]:
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

    def restore(self, state: Mapping[str, Any], source: str) -> None:
        """Goes on from a state of this run, as load_state returns it.

        source: the run's folder, for messages. Raises CheckpointError where it is of another run.
        """
        check_resumed(state, self.config, self.data, source)
        model = require_state_dict(state["model"], f"{source}: model")
        require_finite_weights(model, f"{source}: model")
        load_module(self.encoder, model, f"{source}: model")
        stepped = state["epoch"] > 0
        load_optimiser(
            self.optimizer,
            state["optim"],
            f"{source}: optim",
            has_stepped=stepped,
        )
        load_optimiser(
            self.probe,
            state["probe"],
            f"{source}: probe",
            has_stepped=stepped,
        )
        self.epoch, self.best = state["epoch"], dict(state["best"])
        self.selected = state.get("selected", self.epoch)

    def run(
        self,
        folder: Path,
        selection: Selection,
        log: RunLog | None,
        stop: StopRequest,
        stop_after: int | None,
    ) -> None:
        """Trains the epochs that are left; log is None in all processes but the main one."""
        until = self.epoch + stop_after if stop_after is not None else None
        settings = self.config.contrastive
        eval_step = settings.eval_step or settings.save_step
        due = self.epoch % eval_step == 0 or self.epoch == settings.epochs
        if log is not None and due and self.selected < self.epoch and selection.sets is not None:
            self.select(folder, selection, log, {})  # it had been interrupted
        if self.epoch == settings.epochs:
            LOG.warning("Epoch %d of %d is done: nothing to train.", self.epoch, settings.epochs)
        ended = False
        while self.epoch < settings.epochs and not ended:
            started = time.perf_counter()
            means = self.one_epoch(self.epoch + 1, stop)
            self.epoch += 1
            ended = any_asked_to_stop(stop, self.processes, self.device) or self.epoch == until
            if log is None:
                continue
            last = self.epoch == settings.epochs
            step = self.epoch * self.steps_per_epoch
            seconds = (time.perf_counter() - started) / self.steps_per_epoch
            log.scalars(step, {**means, "train/seconds_per_step": seconds, "epoch": self.epoch})
            LOG.info("epoch %d: loss %.4f", self.epoch, means["train/loss"])
            due = self.epoch % eval_step == 0 or last
            if due or self.epoch % settings.save_step == 0 or ended:
                self.save(folder)  # first: a selection may meet an image that it cannot read
            if due:
                self.select(folder, selection, log, means)
        if stop.requested:
            LOG.warning("Saved epoch %d. Go on with --resume_path %s", self.epoch, folder)

    def save(self, folder: Path) -> None:
        """Writes the published files and the state; TrainingError where a weight is not finite."""
        weights = {"weights of the encoder": self.encoder.state_dict()}
        require_finite_training(f"after epoch {self.epoch}", weights, LOWER_RATE)
        save_models(folder, self.state())
        save_state(folder, self.state())

    def select(
        self, folder: Path, selection: Selection, log: RunLog, means: Mapping[str, float]
    ) -> None:
        """Looks whether this epoch is the best so far, and saves it as best_*.model if so."""
        values = selection.values(self.encoder, means.get("train/loss", float("inf")))
        for name, value in values.items():
            log.scalars(self.epoch * self.steps_per_epoch, {f"eval/{name}": value})
            if value > self.best.get(name, -float("inf")):
                self.best[name] = value
                save_atomic(self.encoder.state_dict(), folder / f"best_{name}.model")
        self.selected = self.epoch
        if values:
            save_models(folder, self.state())
            save_state(folder, self.state())

    def one_epoch(self, epoch: int, stop: StopRequest) -> dict[str, float]:
        """One pass (from 1), whole even where a stop is asked for: mean losses, rate at its end."""
        sums: dict[str, float] = {}
        batches = epoch_batches(
            self.images,
            batch_size=self.config.contrastive.batch_size,
            epoch=epoch,
            seed=self.config.seed,
            processes=self.processes,
            num_workers=self.config.data.num_workers,
            bad=self.bad,
        )
        self.encoder.train()
        told = False
        with reading(batches):
            for number, batch in zip(range(self.steps_per_epoch), batches, strict=False):
                losses = self.one_step(epoch, number, batch)
                step = (epoch - 1) * self.steps_per_epoch + number + 1
                require_finite(step, losses, LOWER_RATE)
                if stop.requested and not told:
                    LOG.warning(
                        "Asked to stop: epoch %d is finished first; Ctrl-C ends it now.", epoch
                    )
                    told = True
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value
        means = {f"train/{name}": total / self.steps_per_epoch for name, total in sums.items()}
        return {**means, "train/lr": self.optimizer.param_groups[0]["lr"]}

    def make_rows(self, epoch: int, number: int, images: Tensor) -> Tensor:
        """Augmented views of a batch: (B, C, H, W) → (V·K·B, C, H, W)."""
        settings, n_shifts = self.config.contrastive, self.shift_type.count
        generator = generator_for(self.config.seed, "views", epoch, number, self.processes.rank)
        draws = draw_views(
            len(images),
            n_shifts,
            beta=beta_parameters(settings.diffusion_scheduler, epoch),
            offset=settings.diffusion_offset,
            upper=settings.diffusion_upper_offset,
            generator=generator,
        )
        views = make_views(images, settings.mode, self.shift_type, draws, self.negatives)
        size = (views.shape[2], views.shape[3])
        return augment(views, random_augmentation(len(views), size, self.augmentation, generator))

    def one_step(self, epoch: int, number: int, batch: Batch) -> dict[str, float]:
        """One step of the encoder and one of the linear probe: their losses."""
        images, labels = batch.images.to(self.device), batch.labels.to(self.device)
        n_shifts = self.shift_type.count
        rows = self.make_rows(epoch, number, images)
        heads = self.encoder(rows, *heads_for(self.objective, self.encoder.simsiam))
        truth = shift_labels(len(images), n_shifts, views_in(self.objective.mode), self.device)
        losses = contrastive_losses(heads, truth, self.objective)

        optimise(losses.total, self.optimizer, self.processes)
        self.set_rate(epoch, number)
        probed = probe_loss(self.encoder.linear, heads.penultimate, labels, n_shifts)
        optimise(probed, self.probe, self.processes)
        terms = {"loss": losses.total, "loss_sim": losses.sim, "loss_shift": losses.shift}
        terms |= {"loss_simsiam": losses.simsiam, "loss_linear": probed}
        values = torch.stack([term.detach() for term in terms.values()]).tolist()  # one transfer
        return dict(zip(terms, values, strict=True))

    def set_rate(self, epoch: int, number: int) -> None:
        """The rate of the next step; the schedule counts all batches of a pass, as published."""
        settings = self.config.contrastive
        rate = learning_rate(
            epoch - 1 + number / self.batches,
            initial=settings.lr_init,
            warmup=settings.warmup,
            epochs=settings.epochs,
            batches=self.batches,
            schedule=settings.lr_scheduler,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def optimise(loss: Tensor, optimizer: Optimizer, processes: Processes | None = None) -> None:
    """One optimiser step down the gradient of a scalar loss, averaged over the processes."""
    optimizer.zero_grad()
    loss.backward()
    if processes is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        average_gradients(parameters, processes)
    optimizer.step()
