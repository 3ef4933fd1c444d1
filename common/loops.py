"""What the training loops of several steps and processes share."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from common.errors import UserError
from common.interrupts import StopRequest
from common.run_log import RunLog
from common.runtime import Processes, start_processes, stop_processes


class TrainingError(UserError):
    """A training that cannot go on: a loss is not finite, or the network collapsed."""


@contextlib.contextmanager
def joined_processes(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started, left at the end whatever happens."""
    processes = start_processes(device)
    try:
        yield processes
    finally:
        stop_processes()


@contextlib.contextmanager
def main_log(
    processes: Processes,
    folder: Path,
    events: Path,
    *,
    config_yaml: str,
    command: Sequence[str],
    resume_step: int,
) -> Iterator[RunLog | None]:
    """The log of a run in the main process, closed at the end; None in the others. See RunLog."""
    if not processes.is_main:
        yield None
        return
    log = RunLog(folder, events, config_yaml=config_yaml, command=command, resume_step=resume_step)
    with contextlib.closing(log):
        yield log


def any_asked_to_stop(stop: StopRequest, processes: Processes, device: torch.device) -> bool:
    """Whether any of the processes was asked to; all get the same answer, so they stop together.

    Every process has to call it equally often.
    """
    if processes.world_size == 1:
        return stop.requested
    asked = torch.tensor(int(stop.requested), device=device)
    torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
    return bool(asked.item())


def require_finite(
    step: int,
    losses: Mapping[str, float],
    remedy: str = "Go on from the last checkpoint with a lower learning rate.",
) -> None:
    """Raises TrainingError, with the step, all losses and the remedy, unless all are numbers."""
    if not all(math.isfinite(value) for value in losses.values()):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise TrainingError(f"The loss is not finite at step {step}: {shown}. {remedy}")


def average_gradients(parameters: list[Tensor], processes: Processes) -> None:
    """Replaces every gradient by its mean over the processes; alone, does nothing.

    DistributedDataParallel expects one forward per backward; GAN critics have three and a double
    backward, and contrastive losses are gathered first, so gradients are averaged here.
    """
    if processes.world_size == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat)
    flat /= processes.world_size
    parts = flat.split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))
