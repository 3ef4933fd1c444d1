"""One contrastive training step: losses of a batch of views, and the two optimiser steps.

B images, K shifts, V views, P = K·B rows per view, d features; rows as `views.make_views` has them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from common.loops import average_gradients
from common.runtime import Processes
from dia.encoders import Heads
from dia.losses import (
    LossMode,
    normalise,
    nt_xent,
    nt_xent_with_negatives,
    simsiam_loss,
)
from dia.views import Mode, views_in


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    mode: Mode = "simclr_DIA"
    loss_mode: LossMode = "shifted_removed"
    temperature: float = 0.5
    sim_lambda: float = 1.0
    """Weight of the contrastive loss; the shift loss has weight 1."""
    simsiam_lambda: float = 1.0
    """Weight of the SimSiam loss of the *_simsiam models."""


class Losses(NamedTuple):
    """The terms of one step, scalars; their sum `total` is differentiated."""

    total: Tensor
    sim: Tensor
    shift: Tensor
    simsiam: Tensor


def heads_for(objective: Objective, simsiam: bool) -> tuple[str, ...]:
    """The heads that `contrastive_losses` needs from an encoder."""
    shift = () if objective.mode == "simclr" else ("shift",)
    return ("simclr", *shift, *(("projector", "predictor") if simsiam else ()))


def contrastive_losses(heads: Heads, shift_labels: Tensor, objective: Objective) -> Losses:
    """Losses of the views of one batch: contrastive, shift classification, SimSiam.

    heads: of V·P rows   shift_labels: (V·P,) int64. Under torchrun the similarities are those of
    all processes' rows together, with gradients.
    """
    n_views = views_in(objective.mode)
    similarity = gathered_similarity(heads.simclr, n_views)
    if n_views == 3:
        sim = nt_xent_with_negatives(similarity, objective.temperature, objective.loss_mode)
    else:
        sim = nt_xent(similarity, objective.temperature)
    sim = objective.sim_lambda * sim
    zero = torch.zeros_like(sim)
    shift = zero if heads.shift is None else F.cross_entropy(heads.shift, shift_labels)
    simsiam = zero
    if heads.predictor is not None:
        simsiam = objective.simsiam_lambda * simsiam_loss(heads.predictor, heads.projector, n_views)
    return Losses(sim + shift + simsiam, sim, shift, simsiam)


class GatherRows(torch.autograd.Function):
    """The rows of all processes, in the order of their ranks: (n, d) → (W·n, d).

    A row's gradient is the sum of what all processes have for it.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gathered_similarity(features: Tensor, n_views: int) -> Tensor:
    """Cosine similarities of the rows of all processes: (V·P, d), raw → (V·W·P, V·W·P).

    W processes; view 1 of all of them comes first, then view 2, … A gathered row's gradient goes
    back to the process it came from.
    """
    unit = normalise(features)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        unit = torch.cat([GatherRows.apply(view) for view in unit.chunk(n_views)])
    return unit @ unit.T


def probe_loss(linear: nn.Module, penultimate: Tensor, labels: Tensor, n_shifts: int) -> Tensor:
    """Cross-entropy of the linear probe on the unshifted rows of views 1 and 2, detached.

    penultimate: (V·K·B, d)   labels: (B,) classes.
    """
    n = labels.shape[0]
    rows = torch.cat([penultimate[:n], penultimate[n_shifts * n : (n_shifts + 1) * n]])
    return F.cross_entropy(linear(rows.detach()), labels.repeat(2))


def optimise(loss: Tensor, optimizer: Optimizer, processes: Processes | None = None) -> None:
    """One optimiser step down the gradient of a scalar loss, averaged over the processes."""
    optimizer.zero_grad()
    loss.backward()
    if processes is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        average_gradients(parameters, processes)
    optimizer.step()
