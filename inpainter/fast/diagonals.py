"""Sums along diagonals of (queries x keys): the fusings and the pasting of contextual attention.

N samples, K = h * w keys in row-major order, queries on a grid qh x qw. "Inside" means that the
queries are a part of a larger grid and carry a margin of one, which the sum uses up; else they are
the whole grid, and a diagonal runs on from the end of one line of queries to the start of the next.
"""

import torch
from torch import Tensor


def fuse_rows(scores: Tensor, inside: bool) -> Tensor:
    """Adds both neighbours on the diagonal, positions counted row by row.

    (N, qh, qw, K) -> (N, qh, qw - 2, K) inside, else the same shape.
    """
    if inside:
        return _shifted_by_one(scores[:, :, :-2], scores[:, :, 1:-1], scores[:, :, 2:])
    flat = scores.flatten(1, 2)
    return _ends_kept(flat, _add_previous_key, _add_next_key).view(scores.shape)


def fuse_columns(scores: Tensor, grid: tuple[int, int], inside: bool) -> Tensor:
    """Adds both neighbours on the diagonal, positions counted column by column.

    (N, qh, qw, K) -> (N, qh - 2, qw, K) inside, else the same shape. grid: of the keys.
    """
    w = grid[1]

    def add_previous(out: Tensor, x: Tensor) -> None:
        out[..., w:] += x[..., :-w]
        out[..., 1:w] += x[..., -w:-1]  # above the first row is the end of the column before

    def add_next(out: Tensor, x: Tensor) -> None:
        out[..., :-w] += x[..., w:]
        out[..., -w:-1] += x[..., 1:w]

    if inside:
        before, here, after = scores[:, :-2], scores[:, 1:-1], scores[:, 2:]
        out = torch.empty_like(here, memory_format=torch.contiguous_format)
        torch.add(here[..., w:], before[..., :-w], out=out[..., w:])
        out[..., :w] = here[..., :w]
        out[..., 1:w] += before[..., -w:-1]
        add_next(out, after)
        return out
    n, qh, qw, _ = scores.shape
    flat = scores.transpose(1, 2).flatten(1, 2)
    return _ends_kept(flat, add_previous, add_next).view(n, qw, qh, -1).transpose(1, 2)


def _shifted_by_one(before: Tensor, here: Tensor, after: Tensor) -> Tensor:
    """here[k] + before[k - 1] + after[k + 1], zero outside the keys."""
    out = torch.empty_like(here, memory_format=torch.contiguous_format)
    torch.add(here[..., 1:], before[..., :-1], out=out[..., 1:])
    out[..., 0] = here[..., 0]
    out[..., :-1] += after[..., 1:]
    return out


def _ends_kept(x: Tensor, add_previous, add_next) -> Tensor:
    """Adds to every query what the one before and the one after it give, (N, Q, K)."""
    out = x.clone()
    add_previous(out[:, 1:], x[:, :-1])
    add_next(out[:, :-1], x[:, 1:])
    return out


def _add_previous_key(out: Tensor, x: Tensor) -> None:
    out[..., 1:] += x[..., :-1]


def _add_next_key(out: Tensor, x: Tensor) -> None:
    out[..., :-1] += x[..., 1:]


def along_rows(weights: Tensor, parity: int, width: int) -> Tensor:
    """Weights that fall on output rows 2i + parity: patch i and its neighbour, keys likewise.

    (N, qh, qw, K) -> (N, qh - 2, qw, K), K = h * width.
    """
    here = weights[:, 1:-1]
    out = torch.empty_like(here, memory_format=torch.contiguous_format)
    if parity == 0:
        torch.add(here[..., width:], weights[:, :-2, :, :-width], out=out[..., width:])
        out[..., :width] = here[..., :width]
    else:
        torch.add(here[..., :-width], weights[:, 2:, :, width:], out=out[..., :-width])
        out[..., -width:] = here[..., -width:]
    return out


def along_columns(weights: Tensor, parity: int) -> Tensor:
    """The same for output columns; (N, qh, qw, K) -> (N, qh, qw - 2, K).

    The last column of keys must be zero, so that nothing passes from one row to the next.
    """
    here = weights[:, :, 1:-1]
    out = torch.empty_like(here, memory_format=torch.contiguous_format)
    if parity == 0:
        torch.add(here[..., 1:], weights[:, :, :-2, :-1], out=out[..., 1:])
        out[..., 0] = here[..., 0]
    else:
        torch.add(here[..., :-1], weights[:, :, 2:, 1:], out=out[..., :-1])
        out[..., -1] = here[..., -1]
    return out
