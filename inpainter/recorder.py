"""What the main process of a training shows and writes: log lines, pictures, snapshots."""

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.devices import eval_mode
from common.images import to_unit
from common.run_log import RunLog
from common.training import TrainingError, require_finite, require_still_sole_writer
from inpainter.networks.generator import Generator
from inpainter.snapshots import (
    SELECTION_KEY,
    Progress,
    completion_error,
    prune_snapshots,
    save_snapshot,
)
from inpainter.step import LOWER_RATE, StepInputs, StepResult, TrainState

LOG = logging.getLogger(__name__)
SATURATED_SHARE = 0.9
LOGS_IN_A_ROW = 5


class CollapseWatch:
    """Recognises an output that stays at the clamp, where a hard clamp has no gradient."""

    def __init__(self, in_a_row: int = 0) -> None:
        self.in_a_row = in_a_row
        """Logged batches above the limit up to now."""

    def check(self, step: int, composite: Tensor, real: Tensor, mask: Tensor) -> float:
        """Takes in one batch; returns the share of the hole that wrongly sits at -1 or 1.

        composite, real: (N, C, H, W); mask: (N, 1, H, W), 1 = hole. Raises TrainingError after
        several logged batches in a row above 90 %.
        """
        hole = (mask != 0).expand_as(real)
        wrong = (composite.abs() >= 1) & (real.abs() < 1) & hole
        free = ((real.abs() < 1) & hole).sum().clamp(min=1)
        share = (wrong.sum() / free).item()
        self.in_a_row = self.in_a_row + 1 if share > SATURATED_SHARE else 0
        if self.in_a_row >= LOGS_IN_A_ROW:
            raise TrainingError(
                f"The generator collapsed: at step {step}, {share:.0%} of the hole is stuck at -1 "
                "or 1. Start again with another seed, train.init: he, train.warmup_steps: 500 and "
                "netG.output_clamp: leaky (all three are set in configs/default.yaml)."
            )
        return share


class Recorder:
    """Progress bar or log lines, log.jsonl, TensorBoard, snapshots.

    start: where the run goes on. crops: (n, C, H, W) on which every snapshot's error is measured;
    None measures none. skipped: images passed over so far. Close `bar` at the end.
    """

    def __init__(
        self,
        state: TrainState,
        folder: Path,
        log: RunLog,
        *,
        start: Progress,
        crops: Tensor | None,
        skipped: Mapping[Path, str],
    ) -> None:
        self.state, self.folder, self.log = state, folder, log
        self.crops, self.skipped = crops, skipped
        self.watch = CollapseWatch(start.saturated_in_a_row)
        self.latest = dict(start.losses)
        self.timer, self.timed_step = time.monotonic(), start.step
        self.bar = tqdm(
            total=state.n_steps,
            initial=start.step,
            unit="step",
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def on_step_end(self, step: int, result: StepResult) -> None:
        """Takes in the result of step number `step`, counted from 1.

        Raises TrainingError where the generator's output has collapsed.
        """
        train = self.state.config.train
        self.latest |= result.terms
        self.bar.update()
        if step % train.print_iter == 0 or step == 1:
            self.log_line(step, result)
        if train.viz_max_out and (step % train.viz_iter == 0 or step == self.state.n_steps):
            generator = self.state.networks.generator
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
            n_steps = self.state.n_steps
            left = (n_steps - step) / speed
            LOG.info("step %d/%d %s | %.1f steps/s, %.0f s left", step, n_steps, shown, speed, left)

    def save(self, step: int) -> None:
        """Records the step's selection error, saves its files, deletes what is not kept.

        Raises TrainingError, before anything is saved, where the error is not finite: then the
        weights are not either.
        """
        train = self.state.config.train
        if self.crops is not None:
            error = completion_error(self.state.networks.generator, self.crops, train.mask_shape)
            require_finite(step, {SELECTION_KEY: error}, LOWER_RATE)
            self.log.scalars(step, {SELECTION_KEY: error})
        require_still_sole_writer(self.folder)
        save_snapshot(self.folder, Progress(step, self.latest, self.watch.in_a_row), self.state)
        prune_snapshots(self.folder, train.keep_snapshots)


@torch.inference_mode()
def completion_grid(generator: Generator, inputs: StepInputs, max_rows: int) -> Tensor:
    """Pictures of a batch: (3, H, W) in [0, 1], rows of input, hole, coarse, fine, truth."""
    from torchvision.utils import make_grid  # slow to import

    real, mask = inputs.real[:max_rows], inputs.mask[:max_rows]
    known = real * (1 - mask)
    with eval_mode(generator):
        coarse, fine = (stage * mask + known for stage in generator(known, mask))
    holes = (mask * 2 - 1).expand_as(real)
    rows = torch.stack([known, holes, coarse, fine, real], dim=1)  # (N, 5, C, H, W)
    pictures = to_unit(rows.float().cpu()).flatten(0, 1)
    return make_grid(pictures, nrow=5, pad_value=1.0)
