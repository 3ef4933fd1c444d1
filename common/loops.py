"""What the training loops of several steps and processes share."""

import math
from collections.abc import Mapping

import torch
import torch.distributed
from torch import Tensor

from common.runtime import Processes


class TrainingFailedError(RuntimeError):
    """A loss stopped being a number."""


def require_finite(step: int, losses: Mapping[str, float]) -> None:
    """Raises TrainingFailedError, with the step and all losses, unless all are numbers."""
    if not all(math.isfinite(value) for value in losses.values()):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise TrainingFailedError(
            f"step {step}: a loss is not finite ({shown}). Lower the learning rate, or go on from "
            "an earlier checkpoint with another seed."
        )


def average_gradients(parameters: list[Tensor], processes: Processes) -> None:
    """Replaces every gradient by its mean over the processes; alone, does nothing."""
    if processes.world_size == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat)
    flat /= processes.world_size
    parts = flat.split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))
