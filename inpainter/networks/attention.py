"""Contextual attention (Yu et al. 2018, arXiv 1801.07892, section 4.1), batched over samples.

N samples, C channels; keys live on a grid h x w = (H/2, W/2) with L = h * w positions, queries on a
grid of the same kind taken from the foreground features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.devices import upcast_to_fp32

SOFTMAX_SCALE = 10.0
NORM_EPSILON = 1e-4  # added once per element of a key, inside the sum (P16)


class Attention(NamedTuple):
    """`output` (N, C, H, W); `weights` (N, L keys, L queries), columns sum to at most 1."""

    output: Tensor
    weights: Tensor


def contextual_attention(
    foreground: Tensor, background: Tensor, mask: Tensor | None = None
) -> Attention:
    """Rebuilds the foreground from 4x4 background patches, weighted by 3x3 patch similarity.

    foreground: (N, C, Hf, Wf), background: (N, C, H, W), all sides even. mask: (1 or N, 1, 4H, 4W),
    1 = hole, one for all samples or one each; background patches that touch it are never copied.
    Raises ValueError for odd sides or a mask of another size.
    """
    for name, features in (("foreground", foreground), ("background", background)):
        if features.shape[2] % 2 or features.shape[3] % 2:
            raise ValueError(f"{name} needs even height and width, got {tuple(features.shape)}")
    device = "cpu" if background.is_meta else background.device.type  # autocast knows no meta
    with torch.autocast(device, enabled=False):
        weights = _weights(upcast_to_fp32(foreground), upcast_to_fp32(background), mask)
        output = _paste(weights, upcast_to_fp32(background)).to(background.dtype)
    return Attention(output, weights.flatten(3).flatten(1, 2))


def _weights(foreground: Tensor, background: Tensor, mask: Tensor | None) -> Tensor:
    """(N, h, w, h, w): what each key counts for each query."""
    logits = _fuse(_fuse(_similarity(foreground, background)))
    usable = _usable_keys(background, mask)[..., None, None]
    # Unusable keys keep the logit 0 in the denominator and are zeroed afterwards (P17).
    scaled = logits * usable * SOFTMAX_SCALE
    return torch.softmax(scaled.flatten(1, 2), dim=1).view(logits.shape) * usable


def _similarity(foreground: Tensor, background: Tensor) -> Tensor:
    """(N, h, w, h, w): correlation of every normalised key with every query, 3x3 patches.

    A correlation of patches is the sum of the correlations of their pixels.
    """
    keys, queries = background[:, :, ::2, ::2], foreground[:, :, ::2, ::2]
    pixels = torch.bmm(keys.flatten(2).transpose(1, 2), queries.flatten(2))
    pixels = pixels.unflatten(2, queries.shape[2:]).unflatten(1, keys.shape[2:])
    patches = _with_diagonals(_with_diagonals(pixels, (1, 3), (1, -1)), (2, 4), (1, -1))
    energy = keys.square().sum(dim=1, keepdim=True)
    energy = F.avg_pool2d(energy, 3, stride=1, padding=1, divisor_override=1)
    norm = (energy + 9 * keys.shape[1] * NORM_EPSILON).sqrt()
    return patches / norm[:, 0, :, :, None, None]


def _fuse(logits: Tensor) -> Tensor:
    """Adds both diagonal neighbours in row-major order of positions; exchanges rows and columns."""
    rows_first = logits.flatten(3).flatten(1, 2)
    fused = _with_diagonals(rows_first, (1, 2), (1, -1)).view(logits.shape)
    return fused.permute(0, 2, 1, 4, 3)


def _paste(weights: Tensor, background: Tensor) -> Tensor:
    """The sum of the 4x4 background patches that weights (N, h, w, h, w) put 2 pixels apart, / 4.

    Pixel 2q of the output has patch q, with pixel 2k of the background for key k, and patch q - 1,
    with 2k + 2; pixel 2q + 1 has q and q + 1. So for each parity of rows and of columns, background
    pixels are multiplied by sums of weights over diagonals.
    """
    queries_hw, rows = weights.shape[3:], []
    for row, down in enumerate((1, -1)):
        by_row = _with_diagonals(weights, (1, 3), (down,))
        columns = []
        for column, right in enumerate((1, -1)):
            both = _with_diagonals(by_row, (2, 4), (right,)).flatten(3).flatten(1, 2)
            pixels = background[:, :, row::2, column::2].flatten(2)
            columns.append(torch.bmm(pixels, both).unflatten(2, queries_hw))
        rows.append(torch.stack(columns, dim=4))
    return torch.stack(rows, dim=3).flatten(4, 5).flatten(2, 3) / 4


class _Diagonals(torch.autograd.Function):
    """x plus itself moved by each of `steps` along both of `dims` at once, zeros coming in."""

    @staticmethod
    def forward(ctx, x: Tensor, dims: tuple[int, int], steps: tuple[int, ...]) -> Tensor:
        ctx.dims, ctx.steps = dims, steps
        y = x.clone(memory_format=torch.contiguous_format)
        for step in steps:
            to, of = y, x
            for dim in dims:
                count = x.shape[dim] - abs(step)
                to, of = to.narrow(dim, max(step, 0), count), of.narrow(dim, max(-step, 0), count)
            to += of
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Diagonals.apply(grad, ctx.dims, tuple(-step for step in ctx.steps)), None, None


def _with_diagonals(x: Tensor, dims: tuple[int, int], steps: tuple[int, ...]) -> Tensor:
    return _Diagonals.apply(x, dims, steps)


def _usable_keys(background: Tensor, mask: Tensor | None) -> Tensor:
    """(1 or N, h, w): 1 where a key's 3x3 patch holds no pixel of the hole."""
    h, w = background.shape[2] // 2, background.shape[3] // 2
    if mask is None:
        return background.new_ones(1, h, w)
    if mask.shape[2:] != (8 * h, 8 * w):
        raise ValueError(f"the mask must be (_, 1, {8 * h}, {8 * w}), got {tuple(mask.shape)}")
    hole = F.max_pool2d((mask[:, :, ::8, ::8] != 0).to(background.dtype), 3, stride=1, padding=1)
    return (hole[:, 0] == 0).to(background.dtype)
