"""The anomaly heatmap of one image: score every window, then stitch. Larger = more anomalous."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from common.images import ImageError, to_signed
from common.runtime import tf32_products
from inpainter.completion import WindowScorer
from inpainter.fast.scorer import FastScorer
from inpainter.networks.dropout import ImageDropout
from inpainter.settings import Metric, TestConfig
from inpainter.windows import (
    WindowGrid,
    averaged_heatmap,
    cut_windows,
    filled_in,
    first_pass,
    heatmap_from_grid,
    pad_image,
    second_pass,
    tissue_fractions,
    window_grid,
)

CPU_PIXELS_PER_BATCH = 4 * 256 * 256
"""On a CPU small batches are fastest: they stay in the cache (measured at 1-4 windows of 256²)."""


@dataclass(frozen=True)
class Heatmaps:
    """One image's results, as far as they are computed, all on the CPU."""

    grid: WindowGrid
    test: TestConfig
    grids: dict[Metric, Tensor]
    """The window scores by metric, (gh, gw), larger = more anomalous; 0 where one was skipped."""
    n_scored: int = 0
    """Windows that were completed; the others hold too little tissue."""

    @property
    def n_windows(self) -> int:
        return len(self.grid)

    @cached_property
    def heatmaps(self) -> dict[Metric, Tensor]:
        """By metric, (H, W) float32, larger = more anomalous."""
        return {k: stitch(scores, self.grid, self.test) for k, scores in self.grids.items()}


def score_image(
    image: Tensor,
    scorer: WindowScorer | FastScorer,
    test: TestConfig,
    dropout: ImageDropout | None,
    device: torch.device,
) -> Iterator[Heatmaps]:
    """Scores one image; yields what is known after each batch of windows, and at last the whole.

    image: (C, H, W) in [0, 1]; dropout: what drops, None if nothing does. Raises WindowError for an
    image smaller than the window where test.heatmap_alignment is stretched, ImageError for
    scores that are not finite.
    """
    image_hw = (image.shape[1], image.shape[2])
    grid = window_grid(image_hw, test.patch_shape[:2], test.patch_stride, test.heatmap_alignment)
    padded = pad_image(image, grid)
    to_score = windows_to_score(padded, grid, test)
    scores = torch.zeros(len(scorer.metrics), len(grid))
    by_metric = dict(zip(scorer.metrics, scores.unflatten(1, grid.grid_hw), strict=True))
    heatmaps = Heatmaps(grid, test, by_metric)
    completed: list[int] = []
    K = 1 if test.refine == "off" else min(test.refine, max(grid.grid_hw))
    for numbers in batches_to_score(grid, to_score, K, scores, batch_size(test, device)):
        windows = cut_windows(padded, grid, numbers)
        if device.type == "cuda":
            windows = windows.pin_memory().to(device, non_blocking=True)
        masks = None if dropout is None else dropout.masks(numbers)
        with tf32_products(test.precision == "tf32"):
            values = scorer(to_signed(windows), masks)
        scores[:, numbers] = torch.stack([values[name].float() for name in scorer.metrics]).cpu()
        completed += numbers
        heatmaps = replace(heatmaps, n_scored=len(completed))
        yield heatmaps
    if K > 1:
        skipped = set(range(len(grid))).difference(to_score)
        scores.copy_(filled_in(scores, grid, K, [*completed, *skipped]))
    require_finite(by_metric)
    yield replace(heatmaps)  # a new one: a picture of the last may have been drawn before


def require_finite(grids: Mapping[Metric, Tensor]) -> None:
    """Raises ImageError where the score of a window is NaN or infinite."""
    for metric, grid in grids.items():
        n_bad = int((~grid.isfinite()).sum())
        if n_bad:
            raise ImageError(
                f"{metric} is NaN or infinite in {n_bad} of {grid.numel()} windows. Are the "
                "checkpoint's weights finite? test.precision: fp32 has the largest range."
            )


def batches_to_score(
    grid: WindowGrid, to_score: Sequence[int], K: int, scores: Tensor, size: int
) -> Iterator[list[int]]:
    """Yields batches of window numbers: every K-th of `to_score`, then those near high ones.

    scores: (metrics, windows), which has the first pass's when the second begins. With K = 1
    there is one pass, of all.
    """
    first = sorted(set(to_score).intersection(first_pass(grid, K)))
    yield from batched(first, size)
    if K > 1:
        second = second_pass(scores, grid, K, first)
        yield from batched(sorted(set(to_score).intersection(second)), size)


def windows_to_score(padded: Tensor, grid: WindowGrid, test: TestConfig) -> list[int]:
    """Numbers of the windows to complete: all, or those whose hole has enough tissue."""
    if not test.only_check_nonblack_pixels:
        return list(range(len(grid)))
    share = tissue_fractions(padded, grid, test.mask_shape, test.tissue_threshold)
    return ((share > 0) & (share >= test.min_tissue_fraction)).nonzero().flatten().tolist()


def stitch(scores: Tensor, grid: WindowGrid, test: TestConfig) -> Tensor:
    """Window scores (gh, gw) to a heatmap (H, W), as test.heatmap_type says."""
    match test.heatmap_type:
        case "nonaveraged":
            return heatmap_from_grid(scores, grid)
        case "averaged":
            return averaged_heatmap(scores, grid, grid.window_hw)
        case "averaged_hole":
            return averaged_heatmap(scores, grid, test.mask_shape)


def batch_size(test: TestConfig, device: torch.device) -> int:
    """test.parallel_batchsize, on a CPU no more than fits its caches."""
    if device.type != "cpu":
        return test.parallel_batchsize
    pixels = test.patch_shape[0] * test.patch_shape[1]
    return max(1, min(test.parallel_batchsize, CPU_PIXELS_PER_BATCH // pixels))


def batched(numbers: list[int], size: int) -> Iterator[list[int]]:
    return (numbers[i : i + size] for i in range(0, len(numbers), size))
