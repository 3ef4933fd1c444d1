"""The training loop: random normal crops, a hole in each, WGAN-GP steps, snapshots."""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from common.checkpoint import CheckpointError, steps_in
from common.config import REPOSITORY, config_to_yaml, resolve_path
from common.images import list_images, to_unit
from common.interrupts import StopRequest
from common.run_log import RunLog
from common.runtime import (
    Processes,
    evaluating,
    generator_for,
    resolve_device,
    seed_everything,
    start_processes,
    stop_processes,
)
from inpainter.dropout import ChannelDropout, ElementDropout, draw_keep_masks, live_layers
from inpainter.generator import Generator
from inpainter.masks import discount_weights, random_boxes, shrunken_masks
from inpainter.networks import build_networks
from inpainter.patches import NormalPatches, batches, fixed_crops
from inpainter.settings import PicardConfig
from inpainter.snapshots import completion_error, prune_snapshots, restore_snapshot, save_snapshot
from inpainter.step import Networks, StepInputs, StepLosses, step_losses
from inpainter.updates import (
    Optimisers,
    broadcast_weights,
    build_optimisers,
    learning_rate,
    update,
)
from inpainter.watch import CollapseWatch, require_finite

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Where the run lies, the step it reached, and the exit status (0, or 128 + signal)."""

    folder: Path
    step: int
    exit_status: int


def run_name(config: PicardConfig) -> Path:
    """<dataset_name>/<mask_type>_<expname>, below the checkpoints and the logs folder."""
    name = f"{config.train.mask_type}_{config.expname}"
    return Path(config.dataset_name or "unnamed", name)


def run_folder(config: PicardConfig) -> Path:
    """Folder of the run's checkpoints."""
    return REPOSITORY / config.checkpoints_dir / run_name(config)


def train(
    config: PicardConfig, *, resume: int | str | None = None, command: Sequence[str] = ()
) -> TrainingResult:
    """Trains the generator (and critics) on a folder of normal images.

    resume: a step or "latest"; none starts anew, in a folder without checkpoints. command: what
    the user typed, for the record. Raises ConfigError, ImageError, CheckpointError and
    TrainingError, all with their remedy.
    """
    device = resolve_device(config.device, allow_gpu=config.cuda)
    processes = start_processes(device)
    try:
        return _train(config, device, processes, resume, command)
    finally:
        stop_processes()


def _train(
    config: PicardConfig,
    device: torch.device,
    processes: Processes,
    resume: int | str | None,
    command: Sequence[str],
) -> TrainingResult:
    seed_everything(config.seed)
    folder = run_folder(config)
    if resume is None and (steps := steps_in(folder)):
        raise CheckpointError(
            f"{folder} already holds checkpoints up to step {steps[-1]}. Go on with --resume, "
            "or change expname, or move the folder away."
        )
    dataset = training_patches(config)
    n_steps = total_steps(config, len(dataset.paths))
    networks = build_networks(config, device)
    optimisers = build_optimisers(networks, config.train)
    start = 0
    if resume is not None:
        start = restore_snapshot(folder, resume, networks, optimisers, config)
    for network in networks:
        broadcast_weights(network, processes)
    log = None
    if processes.is_main:
        log = RunLog(
            folder,
            REPOSITORY / config.logs_dir / run_name(config),
            config_yaml=config_to_yaml(config),
            command=command,
            resume_step=start,
        )
    try:
        loop = Loop(config, device, processes, folder, dataset, networks, optimisers, log, n_steps)
        with StopRequest() as stop:
            step = loop.run(start, stop)
        return TrainingResult(folder, step, stop.exit_status)
    finally:
        if log is not None:
            log.close()


def training_patches(config: PicardConfig) -> NormalPatches:
    """The crops of the images in train_data_path."""
    train = config.train
    folder = resolve_path(config.train_data_path, "train_data_path")
    return NormalPatches(
        list_images(folder, recursive=config.data_with_subfolder),
        image_shape=train.image_shape,
        seed=config.seed,
        random_crop=train.random_crop,
        flip=train.flip,
        min_tissue_fraction=train.min_tissue_fraction,
        tissue_threshold=train.tissue_threshold,
        on_bad_image=train.on_bad_image,
        cache_mb=train.cache_mb,
        subset_frac=train.subset_frac,
    )


def total_steps(config: PicardConfig, n_images: int) -> int:
    """train.n_steps, or as published n_epochs * images / batch_size, at least 1."""
    train = config.train
    return train.n_steps or max(1, train.n_epochs * n_images // train.batch_size)


class Loop:
    """One process's part of a training run."""

    def __init__(
        self,
        config: PicardConfig,
        device: torch.device,
        processes: Processes,
        folder: Path,
        dataset: NormalPatches,
        networks: Networks,
        optimisers: Optimisers,
        log: RunLog | None,
        n_steps: int,
    ) -> None:
        self.config, self.device, self.processes, self.folder = config, device, processes, folder
        self.dataset, self.networks, self.optimisers, self.log = dataset, networks, optimisers, log
        self.n_steps = n_steps
        self.inputs = InputMaker(config, device, processes, networks.generator)
        self.watch = CollapseWatch()
        n = config.train.select_crops
        self.crops = fixed_crops(dataset, n).to(device) if n and processes.is_main else None
        self.timer = time.monotonic()
        self.logged_step = 0

    def run(self, start: int, stop: StopRequest) -> int:
        """Trains from step `start` to the end or until asked to stop; returns the last step."""
        train = self.config.train
        self.logged_step = start
        stream = batches(
            self.dataset,
            train.batch_size,
            start,
            self.n_steps,
            self.config.num_workers,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            pin_memory=self.device.type == "cuda",
        )
        hidden = not (self.processes.is_main and sys.stderr.isatty())
        bar = tqdm(total=self.n_steps, initial=start, unit="step", disable=hidden, leave=False)
        step = start
        with bar:
            for real in stream:
                self.one_step(step, real.to(self.device, non_blocking=True), bar)
                step += 1
                bar.update()
                if step % train.snapshot_save_iter == 0 or step == self.n_steps or stop.requested:
                    self.snapshot(step)
                if stop.requested:
                    LOG.warning("Asked to stop: saved step %d. Go on with --resume.", step)
                    break
        return step

    def one_step(self, step: int, real: Tensor, bar: tqdm) -> None:
        """Step number `step`, counted from 0: losses, update, log line, pictures."""
        train = self.config.train
        rate = learning_rate(train, step, self.n_steps)
        for group in (*self.optimisers.gen.param_groups, *self.optimisers.dis.param_groups):
            group["lr"] = rate
        with_generator = not train.critic or step % train.n_critic == 0
        if train.channels_last:
            real = real.contiguous(memory_format=torch.channels_last)
        inputs = self.inputs.make(step, real)
        losses = step_losses(self.networks, inputs, self.config, with_generator=with_generator)
        terms = {name: value.item() for name, value in losses.named().items()}
        require_finite(step, terms)
        update(self.networks, self.optimisers, losses, self.config, self.processes)
        if self.log is None:
            return
        if (step + 1) % train.print_iter == 0 or step == 0:
            self.log_scalars(step, terms, rate, inputs, losses, bar)
        if (step + 1) % train.viz_iter == 0 or step + 1 == self.n_steps:
            self.log.image(step + 1, "train/completions", self.picture(inputs))

    def log_scalars(
        self,
        step: int,
        terms: dict[str, float],
        rate: float,
        inputs: StepInputs,
        losses: StepLosses,
        bar: tqdm,
    ) -> None:
        now = time.monotonic()
        speed = (step + 1 - self.logged_step) / max(now - self.timer, 1e-9)
        self.timer, self.logged_step = now, step + 1
        saturated = self.watch.check(step, losses.composite, inputs.real, inputs.mask)
        values = {f"train/{name}": value for name, value in terms.items()}
        values |= {"train/lr": rate, "train/steps_per_second": speed, "train/saturated": saturated}
        self.log.scalars(step + 1, values)
        shown = " ".join(f"{name} {value:.4f}" for name, value in terms.items())
        bar.set_postfix_str(shown)
        if bar.disable:
            remaining = (self.n_steps - step - 1) / speed
            LOG.info("step %d/%d %s | %.1f steps/s, %.0f s left",
                     step + 1, self.n_steps, shown, speed, remaining)  # fmt: skip

    def snapshot(self, step: int) -> None:
        """Saves the step's files, records its selection error, deletes what is not kept."""
        if self.log is None:
            return
        save_snapshot(self.folder, step, self.networks, self.optimisers, self.config)
        if self.crops is not None:
            error = completion_error(
                self.networks.generator, self.crops, self.config.train.mask_shape
            )
            self.log.scalars(step, {"select_l1": error})
        prune_snapshots(self.folder, self.config.train.keep_snapshots)

    @torch.inference_mode()
    def picture(self, inputs: StepInputs) -> Tensor:
        """(3, H, W) in [0, 1]: rows of input, hole, coarse, fine, truth."""
        n = self.config.train.viz_max_out
        real, mask = inputs.real[:n], inputs.mask[:n]
        hole = real * (1 - mask)
        with evaluating(self.networks.generator) as generator:
            coarse, fine = (stage * mask + hole for stage in generator(hole, mask))
        holes = (mask * 2 - 1).expand_as(real)
        rows = torch.stack([hole, holes, coarse, fine, real], dim=1).flatten(0, 1)
        return make_grid(to_unit(rows.float().cpu()), nrow=5, padding=2, pad_value=1.0)


class InputMaker:
    """Draws boxes, holes, penalties' alphas and dropout of each step, from (seed, step) alone."""

    def __init__(
        self, config: PicardConfig, device: torch.device, processes: Processes, generator: Generator
    ) -> None:
        self.config, self.device, self.processes = config, device, processes
        train = config.train
        gamma = train.spatial_discounting_gamma if train.discounted_mask else 1.0
        self.discount = discount_weights(train.mask_shape, gamma, device)
        layers = generator.droppable_layers()
        names = list(layers)
        if config.netG.train_drop_layers == "as_in_test":
            names = live_layers(config.netG, names)
        self.layers = {name: layers[name] for name in names}

    def make(self, step: int, real: Tensor) -> StepInputs:
        """real: (n, C, H, W), this process's share. Draws are made for the whole batch."""
        config, train = self.config, self.config.train
        total = len(real) * self.processes.world_size
        mine = slice(self.processes.rank * len(real), (self.processes.rank + 1) * len(real))
        generator = generator_for(config.seed, "step", step)
        image_hw = train.image_shape[:2]
        boxes = random_boxes(
            total, image_hw, train.mask_shape, train.margin, train.mask_batch_same, generator
        )
        mask = shrunken_masks(boxes, image_hw, train.max_delta_shape, generator)
        alphas = torch.rand(2, total, generator=generator)
        p = config.netG.droprate
        drop = None
        if p:
            if config.netG.dropout_type == "2D":
                keep = draw_keep_masks(self.layers, total, p, generator)
                mine_only = {name: rows[mine].to(self.device) for name, rows in keep.items()}
                drop = ChannelDropout(mine_only, p)
            else:
                numbers = range(total)[mine]
                drops = [generator_for(config.seed, "elements", step, i) for i in numbers]
                drop = ElementDropout(list(self.layers), p, drops)
        return StepInputs(
            real=real,
            boxes=boxes[mine],
            mask=mask[mine].to(self.device),
            discount=self.discount,
            alpha_local=alphas[0, mine].to(self.device),
            alpha_global=alphas[1, mine].to(self.device),
            drop=drop,
        )
