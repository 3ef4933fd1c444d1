"""The anomaly heatmap of one image: score every window, then stitch. Larger = more anomalous."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.images import to_signed
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
    """One image's results, all on the CPU."""

    heatmaps: dict[Metric, Tensor]
    """By metric, (H, W) float32, larger = more anomalous."""
    grids: dict[Metric, Tensor]
    """The window scores behind them, (gh, gw); 0 where a window was skipped."""
    n_windows: int
    n_scored: int
    """Windows that were completed; the others hold too little tissue."""


def score_image(
    image: Tensor,
    scorer: WindowScorer | FastScorer,
    test: TestConfig,
    dropout: ImageDropout | None,
    device: torch.device,
    progress: Callable[[dict[Metric, Tensor], WindowGrid, int], None] = lambda *_: None,
) -> Heatmaps:
    """Heatmaps of one image by every metric of the scorer.

    image: (C, H, W) in [0, 1]; dropout: what drops, None = nothing; progress: called
    after each batch with the scores so far (by metric, one per window), the grid and the number of
    windows newly done. Raises WindowError for an image smaller than the window where
    test.heatmap_alignment is stretched.
    """
    image_hw = (image.shape[1], image.shape[2])
    window_hw = test.patch_shape[:2]
    grid = window_grid(image_hw, window_hw, test.patch_stride, test.heatmap_alignment)
    padded = pad_image(image, grid)
    numbers = windows_to_score(padded, grid, test)
    scores = {metric: torch.zeros(len(grid)) for metric in scorer.metrics}

    def score(wanted: list[int]) -> None:
        for batch in batched(wanted, batch_size(test, device)):
            windows = cut_windows(padded, grid, batch)
            if device.type == "cuda":
                windows = windows.pin_memory().to(device, non_blocking=True)
            masks = None if dropout is None else dropout.masks(batch)
            found = scorer(to_signed(windows), masks)
            together = torch.stack([found[metric].float() for metric in scores]).cpu()
            for metric, values in zip(scores, together, strict=True):
                scores[metric][batch] = values
            progress(scores, grid, len(batch))

    if test.refine == "off":
        score(numbers)
    else:
        numbers = refine(score, scores, grid, numbers, test.refine)
    progress(scores, grid, len(grid) - len(numbers))
    grids = {metric: values.view(grid.grid_hw) for metric, values in scores.items()}
    maps = {metric: stitch(values, grid, test) for metric, values in grids.items()}
    return Heatmaps(maps, grids, len(grid), len(numbers))


def refine(
    score: Callable[[list[int]], None],
    scores: dict[Metric, Tensor],
    grid: WindowGrid,
    numbers: list[int],
    K: int,
) -> list[int]:
    """Scores every K-th window and those near high ones, interpolates the rest of `numbers`.

    Returns the numbers of the windows that were completed.
    """
    K = min(K, max(grid.grid_hw))  # a larger one would take the same windows
    wanted = set(numbers)
    done = sorted(wanted.intersection(first_pass(grid, K)))
    score(done)
    closer = sorted(wanted.intersection(second_pass(scores, grid, K, done)))
    score(closer)
    skipped = sorted(set(range(len(grid))) - wanted)
    for values in scores.values():
        values.copy_(filled_in(values, grid, K, [*done, *closer, *skipped]))
    return [*done, *closer]


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


def batched(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]
