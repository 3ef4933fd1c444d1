"""Activation, gate and pixel shuffle in as few passes over memory as torch's operators allow."""

import math

import torch
from torch import Tensor

from inpainter.blocks import Activation
from inpainter.fast.workspace import Workspace

LOG2_E = 1 / math.log(2)
CHUNK = 65536
"""Numbers per thread that are activated at a time on a CPU, so that they stay in its cache."""


def finish(
    y: Tensor,
    activation: Activation,
    gates: int,
    phases: int,
    workspace: Workspace,
    out: Tensor | None = None,
    in_place: bool = True,
) -> Tensor:
    """Activates a convolution's result, gates it, and puts its phases in their places.

    y: (N, P*G*C, h, w) channels_last, overwritten; out: (N, C, h, w) or (N, C, 2h, 2w) where P = 4,
    the place of the result, none = a new tensor, or y if `in_place`. Returns the result,
    channels_last.
    """
    n, c, h, w = y.shape
    side = 2 if phases == 4 else 1
    channels = c // (gates * phases)
    places = y.permute(0, 2, 3, 1).unflatten(3, (side, side, gates, channels))
    if out is None and in_place and phases == 1 and gates == 1:
        out, target = y, places[..., 0, :]
    else:
        if out is None:
            out = y.new_empty(n, h * side, w * side, channels).permute(0, 3, 1, 2)
        target = out.permute(0, 2, 3, 1).unflatten(2, (w, side)).unflatten(1, (h, side))
        target = target.permute(0, 1, 3, 2, 4, 5)  # (N, h, w, side, side, C), like places
    if activation == "none":
        target.copy_(places[..., 0, :])
        return out
    rows = max(1, CHUNK * torch.get_num_threads() // (w * c)) if y.device.type == "cpu" else h
    if rows * n >= n * h:
        _activate(places, target, activation, workspace)
        return out
    for sample, sample_target in zip(places, target, strict=True):
        for part, part_target in zip(sample.split(rows), sample_target.split(rows), strict=True):
            _activate(part, part_target, activation, workspace)
    return out


def _activate(y: Tensor, out: Tensor, activation: Activation, workspace: Workspace) -> None:
    """y (..., G, C) -> out (..., C), activated and gated."""
    features = y[..., 0, :]
    gated = y.shape[-2] == 2
    target = features if gated else out
    if activation == "relu":
        torch.clamp(features, min=0, out=target)
    else:  # max(x, 2**(min(x, 0) / ln 2) - 1): within 1e-7 of ELU, without its slow expm1
        scratch = workspace.take("elu", features.shape, features)
        torch.clamp(features, max=0, out=scratch)
        torch.maximum(features, scratch.mul_(LOG2_E).exp2_().sub_(1), out=target)
    if gated:
        torch.mul(features, y[..., 1, :].sigmoid_(), out=out)
