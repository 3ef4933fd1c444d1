"""Training a diffusion model on the normal class of a dataset.

B images, C channels, H W pixels. Everything random of a step comes from (seed, step), so a resumed
run goes on exactly as the uninterrupted one would have.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.checkpoint import (
    CheckpointError,
    load_module,
    load_optimiser,
    load_tensors,
    require_finite_weights,
    require_mapping,
    require_state_dict,
    save_atomic,
)
from common.config import config_to_dict, resolve_path
from common.image_batches import (
    BadImages,
    batches_per_epoch,
    epoch_batches,
    ordered_batches,
    reading,
)
from common.image_sets import set_identity
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
from diffusion_models.data import NormalImages, training_images
from diffusion_models.diffusion import GaussianDiffusion, gaussian_noise
from diffusion_models.pictures import dissolving_strip, sample_picture, strip_dissolver
from diffusion_models.run_folder import (
    check_resumed,
    events_folder,
    new_folder,
    newest_checkpoint,
    refuse_to_overwrite,
)
from diffusion_models.settings import DdpmConfig
from diffusion_models.unet import Unet

LOG = logging.getLogger(__name__)
EMA_START = 100
"""Steps during which the average is a copy, as in the published trainer's EMA."""
STRIP_IMAGES = 4
FLOAT_BYTES = 4
LOWER_RATE = "Start a new run with a lower --train_lr or --clip_norm."


class Trained(NamedTuple):
    """Where a run has left its checkpoints."""

    folder: Path
    step: int
    exit_status: int
    """128 + the signal's number where one ended the run early, else 0."""


def build_diffusion(config: DdpmConfig) -> GaussianDiffusion:
    """A diffusion model of the configured size with fresh weights."""
    settings = config.diffusion
    unet = Unet(settings.dim, settings.dim_mults, dilation=settings.dilation_factor)
    return GaussianDiffusion(unet, steps=settings.timesteps, schedule=settings.beta_schedule)


def train(
    config: DdpmConfig, *, command: Sequence[str] = (), resume: Path | None = None
) -> Trained:
    """Trains until train_num_steps, from scratch or from the newest checkpoint of a run folder."""
    device = resolve_device(config.device)
    allowed = tf32_products(config.precision == "tf32")
    with allowed, joined_processes(device) as processes:
        require_training_memory(config, device)
        seed_everything(config.seed)
        folder = resume or new_folder(config)
        if resume is None:
            refuse_to_overwrite(folder)
        images = training_images(config)
        trainer = Trainer(config, images, device, processes)
        if resume is not None:
            trainer.resume(newest_checkpoint(resume))
        elif config.diffusion.state_dict_path is not None:
            trainer.start_from(resolve_path(config.diffusion.state_dict_path, "state_dict_path"))
        record = open_run(
            folder,
            events_folder(config, folder, resumed=resume is not None),
            config,
            processes=processes,
            command=command,
            resume_step=trainer.step,
        )
        with record as log, StopRequest() as stop:
            trainer.run(folder, log, stop)
        if trainer.bad.found:
            LOG.warning("%d images could not be read.", len(trainer.bad.found))
        return Trained(folder, trainer.step, stop.exit_status)


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


class Trainer:
    """Model, averaged copy and optimiser of one run."""

    def __init__(
        self,
        config: DdpmConfig,
        images: NormalImages,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.config, self.images, self.device, self.processes = config, images, device, processes
        self.bad = BadImages(config.data.on_bad_image)
        self.identity = set_identity(images)
        self.model = build_diffusion(config).to(device)
        self.average = deepcopy(self.model).requires_grad_(False)
        settings = config.diffusion
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=settings.train_lr, betas=settings.adam_betas
        )
        self.step = 0

    def state(self) -> dict[str, Any]:
        """The checkpoint: the published entries, and what a resume or a check needs."""
        average = {f"ema_model.{n}": v for n, v in self.average.state_dict().items()}
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": average,
            "opt": self.optimizer.state_dict(),
            "dilation": self.config.diffusion.dilation_factor,
            "image_size": self.config.diffusion.side,
            "images": self.identity,
            "config": config_to_dict(self.config),
        }

    def start_from(self, path: Path) -> None:
        """Takes the weights of a checkpoint, not its step."""
        self._load_weights(require_mapping(load_tensors(path), str(path), ("model",)), path)

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint of this run; CheckpointError for another's or a broken one."""
        state = require_mapping(load_tensors(path), str(path), ("model", "step"))
        if "opt" not in state:
            raise CheckpointError(f"{path} has no optimiser; use it as --state_dict_path instead")
        require_mapping(state, str(path), ("ema", "config"))
        check_resumed(state, self.config, self.identity, path)
        self._load_weights(state, path)
        averaged = require_mapping(state["ema"], f"{path}: ema")
        averaged = {str(n).removeprefix("ema_model."): v for n, v in averaged.items()}
        averaged = require_state_dict(averaged, f"{path}: ema")
        require_finite_weights(averaged, f"{path}: ema")
        load_module(self.average, averaged, f"{path}: ema")
        load_optimiser(
            self.optimizer,
            state["opt"],
            f"{path}: opt",
            has_stepped=state["step"] > 0,
        )
        self.step = state["step"]

    def _load_weights(self, state: dict[str, Any], path: Path) -> None:
        stored = (state.get("dilation"), state.get("image_size"))
        wanted = (self.config.diffusion.dilation_factor, self.config.diffusion.side)
        if any(s is not None and s != w for s, w in zip(stored, wanted, strict=True)):
            raise CheckpointError(
                f"{path} has (dilation, image size) {stored}, the settings have {wanted}"
            )
        weights = require_state_dict(state["model"], f"{path}: model")
        require_finite_weights(weights, f"{path}: model")
        load_module(self.model, weights, f"{path}: model")
        self.average.load_state_dict(weights)

    def run(self, folder: Path, log: RunLog | None, stop: StopRequest) -> None:
        """Steps until train_num_steps or a signal; log is None in all processes but the main."""
        total = self.config.diffusion.train_num_steps
        if self.step >= total:
            LOG.warning("Step %d of %d is done: nothing to train.", self.step, total)
            return
        with reading(self._batches()) as batches:
            self._run(batches, folder, log, stop)

    def _run(
        self, batches: Iterator[Tensor], folder: Path, log: RunLog | None, stop: StopRequest
    ) -> None:
        settings = self.config.diffusion
        started = time.perf_counter()
        stopping = False
        while self.step < settings.train_num_steps and not stopping:
            loss = self.one_step(batches)
            require_finite(self.step, {"loss": loss}, LOWER_RATE)
            stopping = any_asked_to_stop(stop, self.processes, self.device)
            last = stopping or self.step == settings.train_num_steps
            if log is None:
                continue
            if self.step % settings.log_every == 0 or last:
                seconds = time.perf_counter() - started
                log.scalars(self.step, {"train/loss": loss, "train/seconds": seconds})
            if self.step % settings.save_every == 0 or last:
                number = -(-self.step // settings.save_every)
                self.save(folder / f"model-{number}.pt")
                if not stopping:  # sampling takes minutes on a CPU, and somebody waits
                    self.draw(log)
        if stopping:
            LOG.warning("Asked to stop: saved step %d. Go on with --resume %s", self.step, folder)

    def save(self, path: Path) -> None:
        """Writes the checkpoint; TrainingError where a weight is not finite."""
        weights = {"weights of the U-Net": self.model.state_dict()}
        require_finite_training(f"after step {self.step}", weights, LOWER_RATE)
        save_atomic(self.state(), path)

    def one_step(self, batches: Iterator[Tensor]) -> float:
        """One optimiser step and, every ema_update_every steps, one of the average: the loss."""
        settings, total = self.config.diffusion, 0.0
        self.optimizer.zero_grad()
        for part in range(settings.gradient_accumulate_every):
            draws = generator_for(self.config.seed, "noise", self.step, part, self.processes.rank)
            x0 = next(batches)
            mirrored = torch.rand(len(x0), generator=draws) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0).to(self.device)
            t = torch.randint(self.model.steps, (len(x0),), generator=draws).to(self.device)
            noise = gaussian_noise(
                tuple(x0.shape), device=self.device, local=settings.local_randn, generator=draws
            )
            loss = self.model.loss(2 * x0 - 1, t, noise) / settings.gradient_accumulate_every
            loss.backward()
            total += loss.item()
        average_gradients(list(self.model.parameters()), self.processes)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.optimizer.step()
        self.step += 1
        if self.step % settings.ema_update_every == 0:
            self.update_average()
        return total

    @torch.no_grad()
    def update_average(self) -> None:
        """Moves the average towards the weights; the decay grows to ema_decay."""
        age = max(0, self.step - EMA_START - 1)
        decay = min(self.config.diffusion.ema_decay, 1 - (1 + age) ** (-2 / 3))
        ours = list(self.model.parameters())
        torch._foreach_lerp_(list(self.average.parameters()), ours, 1 - decay)

    def draw(self, log: RunLog) -> None:
        """Shows samples of the average and the dissolving strip in TensorBoard."""
        settings = self.config.diffusion
        generator = generator_for(self.config.seed, "pictures")
        picture = sample_picture(
            self.average,
            n=settings.num_samples,
            side=settings.side,
            sampling_steps=settings.sampling_timesteps,
            local_noise=settings.local_randn,
            generator=generator,
        )
        log.image(self.step, "eval/samples", picture)
        with reading(ordered_batches(self.images, STRIP_IMAGES, bad=self.bad)) as batches:
            shown = next(batches).images
        dissolver = strip_dissolver(self.model, settings.side, settings.strip_range)
        strip = dissolving_strip(dissolver, shown.to(self.device), settings.strip_steps)
        log.image(self.step, "eval/dissolving", strip)

    def _batches(self) -> Iterator[Tensor]:
        """Batches without end, from the one that the current step would take."""
        # The place in the endless row follows from the step, so a resume finds it again.
        settings, processes = self.config.diffusion, self.processes
        per_epoch = batches_per_epoch(len(self.images), settings.ddpm_batch_size, processes)
        epoch, skip = divmod(self.step * settings.gradient_accumulate_every, per_epoch)
        while True:
            for i, batch in enumerate(
                epoch_batches(
                    self.images,
                    batch_size=settings.ddpm_batch_size,
                    epoch=epoch,
                    seed=self.config.seed,
                    processes=processes,
                    num_workers=self.config.data.num_workers,
                    bad=self.bad,
                )
            ):
                if i >= skip:
                    yield batch.images
            epoch, skip = epoch + 1, 0
