"""Activation, gate and pixel shuffle in as few passes over memory as torch's operators allow."""

import math

import torch
from torch import Tensor

from inpainter.blocks import Activation
from inpainter.fast.workspace import Workspace

LOG2_E = 1 / math.log(2)
CHUNK = 131072
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
    features = places[..., 0, :]  # (N, h, w, side, side, C)
    if out is None and in_place and phases == 1 and gates == 1:
        out, target = y, features
    else:
        if out is None:
            out = y.new_empty(n, h * side, w * side, channels).permute(0, 3, 1, 2)
        target = out.permute(0, 2, 3, 1).unflatten(2, (w, side)).unflatten(1, (h, side))
        target = target.permute(0, 1, 3, 2, 4, 5)  # like features
    if activation == "none":
        target.copy_(features)
        return out
    inputs = [features, target] + ([places[..., 1, :]] if gates == 2 else [])
    rows = max(1, CHUNK * torch.get_num_threads() // (w * c)) if y.device.type == "cpu" else n * h
    if rows >= n * h:
        _activate(activation, workspace, *inputs)
        return out
    for sample in range(n):
        parts = [x[sample].split(rows) for x in inputs]
        for part in zip(*parts, strict=True):
            _activate(activation, workspace, *part)
    return out


def _activate(
    activation: Activation,
    workspace: Workspace,
    features: Tensor,
    out: Tensor,
    gate: Tensor | None = None,
) -> None:
    """Activates features into out, times the gate's sigmoid if there is one; overwrites both.

    As few calls as there are passes: threads that score side by side wait for each other at calls.
    """
    target = out if gate is None else features
    if activation == "relu":
        torch.clamp(features, min=0, out=target)
    else:  # max(x, 2**(min(x, 0) / ln 2) - 1): within 1e-7 of ELU, without its slow expm1
        scratch = workspace.planned(
            ("elu", features.shape, features.dtype, features.device),
            lambda: workspace.take("elu", features.shape, features),
        )
        torch.clamp(features, max=0, out=scratch)
        torch.maximum(features, scratch.mul_(LOG2_E).exp2_().sub_(1), out=target)
    if gate is not None:
        torch.mul(features, gate.sigmoid_(), out=out)
