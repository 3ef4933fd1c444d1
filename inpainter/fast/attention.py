"""Contextual attention for the queries that are needed, from one product of pixel features.

The arithmetic of `inpainter.networks.attention`, reordered: the correlation of 3x3 patches is a sum
of pixel correlations over diagonals, and so are the two fusings; pasting 4x4 patches with stride 2
is one matrix product for each parity of the output's rows and columns. N samples, C channels; keys
lie on a grid h x w of half the features' resolution, queries on a part of it.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.devices import upcast_to_fp32
from inpainter.fast.geometry import Region, Span, whole
from inpainter.networks.attention import NORM_EPSILON, SOFTMAX_SCALE

NEGLIGIBLE = 1e-30
PATCH_MARGIN = 2  # queries around the wanted ones: one for the 3x3 patch, one for the fusings


class FastAttention:
    """Attention of features over themselves, for one size of feature map and one hole.

    hw: size of the feature map (even); wanted: region of the output; hole: region of the window
    (four times hw), in multiples of 8 pixels; channels: those of the features before any were left
    out, on which the norm's epsilon depends.
    """

    def __init__(self, hw: tuple[int, int], wanted: Region, hole: Region, channels: int) -> None:
        self.grid = (hw[0] // 2, hw[1] // 2)
        self.wanted = wanted
        self.queries = Region(
            *(patches_over(*pair) for pair in zip(wanted, self.grid, strict=True))
        )
        inside = all(
            span.lo >= PATCH_MARGIN and span.hi + PATCH_MARGIN <= side
            for span, side in zip(self.queries, self.grid, strict=True)
        )
        if not inside:  # fused diagonals wrap around the grid of queries, so all are needed
            self.queries = whole(self.grid)
        self.inside = inside
        self.hidden = Region(*(keys_over(*pair) for pair in zip(hole, self.grid, strict=True)))
        self.channels = channels
        self.epsilon = 9 * channels * NORM_EPSILON

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W), channels_last -> (N, C, *wanted), channels_last."""
        pixels = features.permute(0, 2, 3, 1)[:, ::2, ::2]
        scores = self.patch_scores(pixels)
        scores = fuse_columns(fuse_rows(scores, self.inside), self.grid[1], self.inside)
        return self.paste(self.weights(scores), features)

    def patch_scores(self, pixels: Tensor) -> Tensor:
        """Correlation of query and key patches, keys normalised, times the softmax's scale.

        pixels: (N, h, w, C)   returns: (N, qh, qw, h * w) in fp32 or wider; with a margin of
        one query on each side where the queries are a part of the grid.
        """
        n, h, w, c = pixels.shape
        margin = PATCH_MARGIN if self.inside else 0
        rows, cols = (slice(span.lo - margin, span.hi + margin) for span in self.queries)
        queries = pixels[:, rows, cols]
        if not self.inside:
            queries = F.pad(queries, (0, 0, 1, 1, 1, 1))
        keys = F.pad(pixels, (0, 0, 1, 1, 1, 1))  # zeros around: diagonals end at the border
        qh, qw = queries.shape[1:3]
        gram = products(queries.reshape(n, qh * qw, c), keys.reshape(n, -1, c).transpose(1, 2))
        gram = upcast_to_fp32(gram).view(n, qh, qw, -1)  # (N, qh, qw, (h+2)*(w+2))
        width = w + 2
        length = h * width - 2
        n_keys = gram.shape[3]
        columns = sum_of_three(gram[:, :, d : qw - 2 + d, d : n_keys - 2 + d] for d in (0, 1, 2))
        patches = sum_of_three(
            columns[:, d : qh - 2 + d, :, d * width : d * width + length] for d in (0, 1, 2)
        )  # (N, qh - 2, qw - 2, length)
        energy = upcast_to_fp32(keys).square().sum(3)[:, None]
        norm = F.avg_pool2d(energy, 3, stride=1, divisor_override=1) + self.epsilon
        factor = norm.rsqrt_().mul_(SOFTMAX_SCALE)  # (N, 1, h, w)
        grid = patches.unfold(3, w, width)  # (N, qh - 2, qw - 2, h, w)
        return (grid * factor[:, None]).flatten(3)

    def weights(self, logits: Tensor) -> Tensor:
        """(N, qh, qw, h * w) -> (N, qh, qw, h, w + 1): softmax over keys, zeros in the last column.

        Hidden keys keep the logit 0 in the denominator and are zeroed afterwards (P17).
        """
        n, qh, qw, _ = logits.shape
        h, w = self.grid
        padded = logits.new_full((n, qh, qw, h, w + 1), -torch.inf)
        padded[..., :w] = logits.unflatten(3, (h, w))
        self.hide(padded)
        weights = torch.softmax(padded.flatten(3), dim=3)
        # Denormal weights would slow the products that follow a hundredfold.
        weights = F.threshold_(weights, NEGLIGIBLE, 0).unflatten(3, (h, w + 1))
        self.hide(weights)
        return weights

    def hide(self, x: Tensor) -> None:
        """Zeroes the hidden keys of x (N, qh, qw, h, w + 1)."""
        rows, cols = self.hidden
        x[..., rows.lo : rows.hi, cols.lo : cols.hi] = 0

    def paste(self, weights: Tensor, features: Tensor) -> Tensor:
        """Adds up the weighted 4x4 patches: output rows 2i take patches i and i - 1, and so on."""
        n, channels = features.shape[:2]
        h, w = self.grid
        top, left = (2 * span.lo for span in self.queries)
        if self.inside:
            top, left = top + 2, left + 2
            cells = (weights.shape[1] - 2, weights.shape[2] - 2)
        else:
            weights = F.pad(weights.flatten(3), (0, 0, 1, 1, 1, 1)).unflatten(3, (h, w + 1))
            cells = self.grid
        pixels = F.pad(features.permute(0, 2, 3, 1), (0, 0, 0, 2))  # column w of values is zero
        out = features.new_empty(n, cells[0], 2, cells[1], 2, channels)
        flat = weights.flatten(3)  # (N, qh, qw, h * (w + 1))
        for a in (0, 1):
            rows = along_rows(flat, a, w + 1)
            for b in (0, 1):
                both = along_columns(rows, b).view(n, cells[0] * cells[1], -1)
                values = pixels[:, a::2, b::2].reshape(n, h * (w + 1), channels)
                product = products(both.to(features.dtype), values)
                out[:, :, a, :, b] = product.view(n, *cells, channels)
        out = out.view(n, 2 * cells[0], 2 * cells[1], channels).permute(0, 3, 1, 2)
        region = Region(Span(top, top + 2 * cells[0]), Span(left, left + 2 * cells[1]))
        rows, cols = self.wanted.within(region)
        return out[:, :, rows, cols] / 4


def patches_over(span: Span, side: int) -> Span:
    """The patches, 4 wide at stride 2 from -1, that touch the pairs of outputs of a span."""
    return Span(max(span.lo // 2 - 1, 0), min((span.hi + 1) // 2 + 1, side))


def keys_over(hole: Span, side: int) -> Span:
    """Key positions (stride 8) whose 3x3 patch overlaps the hole."""
    return Span(max(hole.lo // 8 - 1, 0), min(-(-hole.hi // 8) + 1, side))


def sum_of_three(tensors: Iterable[Tensor]) -> Tensor:
    first, second, third = tensors
    return torch.add(first, second).add_(third)


def products(a: Tensor, b: Tensor) -> Tensor:
    """bmm; on a CPU as one product after the other, which use all threads and the faster kernel."""
    if a.device.type != "cpu":
        return torch.bmm(a, b)
    if len(a) == 1:
        return torch.mm(a[0], b[0])[None]
    return torch.stack([torch.mm(*pair) for pair in zip(a, b, strict=True)])


def fuse_rows(scores: Tensor, inside: bool) -> Tensor:
    """Adds both neighbours on the diagonal, positions counted row by row.

    (N, qh, qw, K) -> (N, qh, qw - 2, K) inside, else the same shape.
    """
    if not inside:
        flat = scores.flatten(1, 2)
        return fuse_rows(F.pad(flat, (0, 0, 1, 1))[:, None], True).view(scores.shape)
    fused = plus_shifted(scores[:, :, 1:-1], scores[:, :, :-2], 1)
    fused[..., :-1] += scores[:, :, 2:, 1:]
    return fused


def fuse_columns(scores: Tensor, width: int, inside: bool) -> Tensor:
    """Adds both neighbours on the diagonal, positions counted column by column.

    (N, qh, qw, K) -> (N, qh - 2, qw, K) inside, else the same shape. width: of the grid of keys.
    """
    if not inside:
        n, qh, qw, _ = scores.shape
        flat = F.pad(scores.transpose(1, 2).flatten(1, 2), (0, 0, 1, 1))
        return fuse_columns(flat[:, :, None], width, True).view(n, qw, qh, -1).transpose(1, 2)
    before, after = scores[:, :-2], scores[:, 2:]
    fused = plus_shifted(scores[:, 1:-1], before, width)
    # Above the first row is the end of the column before.
    fused[..., 1:width] += before[..., -width:-1]
    fused[..., :-width] += after[..., width:]
    fused[..., -width:-1] += after[..., 1:width]
    return fused


def along_rows(weights: Tensor, parity: int, width: int) -> Tensor:
    """Weights that fall on output rows 2i + parity: patch i and its neighbour, keys likewise.

    (N, qh, qw, K) -> (N, qh - 2, qw, K), K = h * width.
    """
    here = weights[:, 1:-1]
    if parity == 0:
        return plus_shifted(here, weights[:, :-2], width)
    return plus_shifted(here, weights[:, 2:], -width)


def along_columns(weights: Tensor, parity: int) -> Tensor:
    """The same for output columns; (N, qh, qw, K) -> (N, qh, qw - 2, K).

    The last column of keys must be zero, so that nothing passes from one row to the next.
    """
    here = weights[:, :, 1:-1]
    if parity == 0:
        return plus_shifted(here, weights[:, :, :-2], 1)
    return plus_shifted(here, weights[:, :, 2:], -1)


def plus_shifted(here: Tensor, other: Tensor, shift: int) -> Tensor:
    """here[..., k] + other[..., k - shift], zero beyond the K keys; a new contiguous tensor."""
    out = torch.empty_like(here, memory_format=torch.contiguous_format)
    K = here.shape[-1]
    to = slice(max(shift, 0), K + min(shift, 0))
    source = slice(max(-shift, 0), K - max(shift, 0))
    torch.add(here[..., to], other[..., source], out=out[..., to])
    rest = slice(0, shift) if shift > 0 else slice(K + shift, K)
    out[..., rest] = here[..., rest]
    return out
