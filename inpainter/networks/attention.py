"""Contextual attention (Yu et al. 2018, arXiv 1801.07892, section 4.1), batched over samples.

N samples, C channels; keys live on a grid h x w = (H/2, W/2) with L = h * w positions, queries on a
grid of the same kind taken from the foreground features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    logits = _similarity(foreground, background)
    logits = _fuse(logits, _key_grid(background), _key_grid(foreground))
    usable = _usable_keys(background, mask)  # (1 or N, L, 1)
    # Unusable keys keep the logit 0 in the denominator and are zeroed afterwards (P17).
    weights = torch.softmax(logits * usable * SOFTMAX_SCALE, dim=1) * usable
    values = F.unfold(background, 4, stride=2, padding=1)  # (N, C*16, L)
    patches = torch.bmm(values, weights)  # (N, C*16, L queries)
    output = F.fold(patches, foreground.shape[2:], 4, stride=2, padding=1) / 4
    return Attention(output, weights)


def _key_grid(features: Tensor) -> tuple[int, int]:
    return features.shape[2] // 2, features.shape[3] // 2


def _similarity(foreground: Tensor, background: Tensor) -> Tensor:
    """(N, L keys, L queries): correlation of every query with every normalised key, 3x3 patches."""
    keys = F.unfold(background[:, :, ::2, ::2], 3, padding=1)  # (N, C*9, L)
    queries = F.unfold(foreground[:, :, ::2, ::2], 3, padding=1)
    norm = (keys.square() + NORM_EPSILON).sum(dim=1, keepdim=True).sqrt()
    return torch.bmm((keys / norm).transpose(1, 2), queries)


def _fuse(logits: Tensor, keys_hw: tuple[int, int], queries_hw: tuple[int, int]) -> Tensor:
    """Adds both diagonal neighbours, once in row-major, once in column-major order of positions."""
    logits = _add_diagonal_neighbours(logits)
    (h, w), (qh, qw) = keys_hw, queries_hw
    columns_first = logits.unflatten(2, (qh, qw)).unflatten(1, (h, w)).permute(0, 2, 1, 4, 3)
    fused = _add_diagonal_neighbours(columns_first.reshape(logits.shape))
    rows_first = fused.unflatten(2, (qw, qh)).unflatten(1, (w, h)).permute(0, 2, 1, 4, 3)
    return rows_first.reshape(logits.shape)


def _add_diagonal_neighbours(x: Tensor) -> Tensor:
    """x[i, j] + x[i-1, j-1] + x[i+1, j+1], zero outside: a 3x3 identity kernel."""
    y = x.clone()
    y[:, 1:, 1:] += x[:, :-1, :-1]
    y[:, :-1, :-1] += x[:, 1:, 1:]
    return y


def _usable_keys(background: Tensor, mask: Tensor | None) -> Tensor:
    """(1 or N, L, 1): 1 where a key's 3x3 patch holds no pixel of the hole."""
    h, w = _key_grid(background)
    if mask is None:
        return background.new_ones(1, h * w, 1)
    if mask.shape[2:] != (8 * h, 8 * w):
        raise ValueError(f"the mask must be (_, 1, {8 * h}, {8 * w}), got {tuple(mask.shape)}")
    hole = F.max_pool2d((mask[:, :, ::8, ::8] != 0).to(background.dtype), 3, stride=1, padding=1)
    return (hole == 0).flatten(2).transpose(1, 2).to(background.dtype)
