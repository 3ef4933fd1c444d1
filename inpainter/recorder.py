"""What the main process of a training shows and writes: log lines, pictures, snapshots."""

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.images import to_unit
from common.run_log import RunLog
from common.runtime import eval_mode
from common.training import require_finite
from inpainter.networks import Networks
from inpainter.networks.generator import Generator
from inpainter.settings import PicardConfig
from inpainter.snapshots import (
    LOWER_RATE,
    Progress,
    completion_error,
    prune_snapshots,
    save_snapshot,
)
from inpainter.step import StepInputs
from inpainter.updates import Optimisers
from inpainter.watch import CollapseWatch

LOG = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """What became of one step."""

    terms: dict[str, float]
    """Losses by published name; the generator's only where it was updated."""
    rate: float
    """Learning rate."""
    inputs: StepInputs
    composite: Tensor
    """(N, C, H, W): the crops with their holes completed."""


class Recorder:
    """Progress bar or log lines, log.jsonl, TensorBoard, snapshots. Use it in a with statement.

    start: where the run goes on. n_steps: wanted in all. images: data_identity of the training
    images. crops: (n, C, H, W) on which every
    snapshot's error is measured, none = not measured. skipped: images passed over so far.
    """

    def __init__(
        self,
        config: PicardConfig,
        folder: Path,
        log: RunLog,
        *,
        start: Progress,
        n_steps: int,
        images: Mapping[str, Any],
        crops: Tensor | None,
        skipped: Mapping[Path, str],
    ) -> None:
        self.config, self.folder, self.log = config, folder, log
        self.n_steps, self.crops, self.skipped = n_steps, crops, skipped
        self.images = images
        self.watch = CollapseWatch(start.saturated_in_a_row)
        self.latest = dict(start.losses)
        self.timer, self.timed_step = time.monotonic(), start.step
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=n_steps, initial=start.step, unit="step", disable=hidden, leave=False)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        self.log.close()

    def note(self, step: int, result: StepResult, generator: Generator) -> None:
        """Notes that step number `step`, counted from 1, is done.

        Raises TrainingError where the generator's output has collapsed.
        """
        train = self.config.train
        self.latest |= result.terms
        self.bar.update()
        if step % train.print_iter == 0 or step == 1:
            self.log_line(step, result)
        if step % train.viz_iter == 0 or step == self.n_steps:
            picture = completion_grid(generator, result.inputs, train.viz_max_out)
            self.log.image(step, "train/completions", picture)

    def log_line(self, step: int, result: StepResult) -> None:
        """Losses as last computed since the line before (not every step has all), rate, speed."""
        now = time.monotonic()
        speed = (step - self.timed_step) / max(now - self.timer, 1e-9)
        self.timer, self.timed_step = now, step
        inputs = result.inputs
        values = {f"train/{name}": value for name, value in self.latest.items()}
        values |= {
            "train/lr": result.rate,
            "train/steps_per_second": speed,
            "train/saturated": self.watch.check(step, result.composite, inputs.real, inputs.mask),
            "train/skipped_images": len(self.skipped),
        }
        if inputs.real.is_cuda:
            values["train/peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        self.log.scalars(step, values)
        shown = " ".join(f"{name} {value:.4f}" for name, value in self.latest.items())
        self.latest = {}
        self.bar.set_postfix_str(shown)
        if self.bar.disable:
            left = (self.n_steps - step) / speed
            LOG.info(
                "step %d/%d %s | %.1f steps/s, %.0f s left", step, self.n_steps, shown, speed, left
            )

    def snapshot(self, step: int, networks: Networks, optimisers: Optimisers) -> None:
        """Records the step's selection error, saves its files, deletes what is not kept.

        Raises TrainingError, before anything is saved, where the error is not finite: then the
        weights are not either.
        """
        if self.crops is not None:
            error = completion_error(networks.generator, self.crops, self.config.train.mask_shape)
            require_finite(step, {"select_l1": error}, LOWER_RATE)
            self.log.scalars(step, {"select_l1": error})
        progress = Progress(step, self.latest, self.watch.in_a_row)
        save_snapshot(self.folder, progress, networks, optimisers, self.config, self.images)
        prune_snapshots(self.folder, self.config.train.keep_snapshots)


@torch.inference_mode()
def completion_grid(generator: Generator, inputs: StepInputs, max_rows: int) -> Tensor:
    """Pictures of a batch: (3, H, W) in [0, 1], rows of input, hole, coarse, fine, truth."""
    real, mask = inputs.real[:max_rows], inputs.mask[:max_rows]
    known = real * (1 - mask)
    with eval_mode(generator):
        coarse, fine = (stage * mask + known for stage in generator(known, mask))
    holes = (mask * 2 - 1).expand_as(real)
    rows = torch.stack([known, holes, coarse, fine, real], dim=1)  # (N, 5, C, H, W)
    return framed_grid(to_unit(rows.float().cpu()))


def framed_grid(pictures: Tensor, frame: int = 2) -> Tensor:
    """(rows, columns, 1 or 3, H, W) in [0, 1] -> one picture (3, …, …), white between them."""
    rows, columns, channels, height, width = pictures.shape
    framed = F.pad(pictures, (0, frame, 0, frame), value=1.0)
    grid = framed.permute(2, 0, 3, 1, 4)  # (C, rows, H + frame, columns, W + frame)
    grid = grid.reshape(channels, rows * (height + frame), columns * (width + frame))
    return F.pad(grid, (frame, 0, frame, 0), value=1.0).expand(3, -1, -1)
