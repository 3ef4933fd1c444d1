"""The anomaly heatmap of one image: score every window, then stitch. Larger = more anomalous."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from common.devices import tf32_products
from common.images import ImageError, to_signed
from inpainter.calibration import DESCRIPTION, Calibration
from inpainter.completion import CELLS, DETAIL, WindowScorer
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
    resized,
    scaled_hw,
    second_pass,
    tissue_fractions,
    window_grid,
)

Item = TypeVar("Item")
CPU_PIXELS_PER_BATCH = 4 * 256 * 256
"""On a CPU small batches are fastest: they stay in the cache (measured at 1-4 windows of 256²)."""


class Scored(NamedTuple):
    """What was computed of some windows, on the CPU."""

    scores: Tensor
    """(metrics, n) float32, larger = more anomalous."""
    descriptions: Tensor | None
    """(n, d): what their surroundings look like; None where nothing is calibrated."""
    details: Tensor | None = None
    """(n, 2, CELLS, CELLS): where in their holes completions are off; None where nobody asks."""

    @classmethod
    def of(cls, values: Mapping[str, Tensor], metrics: Sequence[Metric]) -> "Scored":
        """From what a scorer says of a batch, on any device."""
        more = (values[key].cpu() if key in values else None for key in (DESCRIPTION, DETAIL))
        return cls(torch.stack([values[name].float() for name in metrics]).cpu(), *more)

    @classmethod
    def joined(cls, parts: Sequence["Scored"]) -> "Scored":
        """Several as one, in their order."""
        scores, descriptions, details = zip(*parts, strict=True)
        return cls(
            torch.cat(scores, dim=1),
            None if descriptions[0] is None else torch.cat(descriptions),
            None if details[0] is None else torch.cat(details),
        )


Compute = Callable[[list[int]], Scored]
"""Scores the windows of these numbers."""
Workers = Callable[[list[list[int]], Compute], Iterator[tuple[list[int], Scored]]]
"""Has batches of windows computed, and yields numbers and results in the order of the batches."""


def one_worker(batches: list[list[int]], compute: Compute) -> Iterator[tuple[list[int], Scored]]:
    """Computes one batch after the other, here."""
    return ((numbers, compute(numbers)) for numbers in batches)


class ScoreError(ImageError):
    """A window's score is NaN or infinite."""


@dataclass(frozen=True)
class Heatmaps:
    """One image's results, as far as they are computed, all on the CPU."""

    grid: WindowGrid
    test: TestConfig
    grids: dict[Metric, Tensor]
    """The window scores by metric, (gh, gw), larger = more anomalous; 0 where one was skipped."""
    n_scored: int = 0
    """Windows that were completed; the others hold too little tissue."""
    details: Tensor | None = None
    """(windows, CELLS, CELLS): factors of each window's score in its hole; None where all are 1."""

    @property
    def n_windows(self) -> int:
        return len(self.grid)

    @cached_property
    def heatmaps(self) -> dict[Metric, Tensor]:
        """By metric, (H, W) float32, larger = more anomalous."""
        parts = (self.grid, self.test, self.details)
        return {metric: stitch(scores, *parts) for metric, scores in self.grids.items()}

    def covered(self) -> Tensor:
        """(H, W), True in the areas of windows that have a score; smoothing reaches farther."""
        scores = next(iter(self.grids.values()))
        test = replace(self.test, heatmap_smooth=0.0)
        return stitch((scores != 0).to(scores.dtype), self.grid, test) != 0

    def by_scale(self) -> dict[float, "Heatmaps"]:
        """The same by the one scale at which the image was scored."""
        return {self.test.scales[0]: self}


@dataclass(frozen=True)
class ScaledHeatmaps:
    """The same of an image that was scored at several scales."""

    image_hw: tuple[int, int]
    n_windows: int
    """Of all scales, those to come included."""
    scales: tuple[Heatmaps, ...]
    """As far as they are computed."""

    @property
    def n_scored(self) -> int:
        return sum(part.n_scored for part in self.scales)

    def covered(self) -> Tensor:
        """(H, W), True in the areas of windows that have a score at any scale."""
        found = [part.covered()[None].float() for part in self.scales]
        return torch.cat([resized(each, self.image_hw) for each in found]).amax(dim=0) > 0

    def by_scale(self) -> dict[float, Heatmaps]:
        """Those of each scale that is computed, at their own size."""
        return dict(zip(self.scales[0].test.scales, self.scales, strict=False))

    @cached_property
    def heatmaps(self) -> dict[Metric, Tensor]:
        """By metric, (H, W) float32, the mean over the scales; larger = more anomalous."""
        maps = [part.heatmaps for part in self.scales]
        return {
            metric: torch.stack(
                [resized(each[metric][None], self.image_hw)[0] for each in maps]
            ).mean(dim=0)
            for metric in maps[0]
        }


def score_at_scales(
    image: Tensor,
    scorer: WindowScorer | FastScorer,
    test: TestConfig,
    dropout: ImageDropout | None,
    device: torch.device,
    calibrations: Mapping[float, Calibration],
    workers: Workers = one_worker,
) -> Iterator[Heatmaps | ScaledHeatmaps]:
    """Scores one image at every one of test.scales; yields and raises as score_image does.

    calibrations: by scale; empty where test.calibration is off.
    """
    parts = (scorer, test, dropout, device, workers)
    image_hw = (image.shape[1], image.shape[2])
    sizes = {scale: scaled_hw(image_hw, scale) for scale in test.scales}
    if list(sizes.values()) == [image_hw]:
        yield from score_image(image, *parts, calibrations.get(test.scales[0]))
        return
    window_hw, stride, alignment = test.patch_shape[:2], test.patch_stride, test.heatmap_alignment
    n_windows = sum(len(window_grid(hw, window_hw, stride, alignment)) for hw in sizes.values())
    done: tuple[Heatmaps, ...] = ()
    for scale, hw in sizes.items():
        small = resized(image, hw)
        for part in score_image(small, *parts, calibrations.get(scale)):
            yield ScaledHeatmaps(image_hw, n_windows, (*done, part))
        done = (*done, part)


def score_image(
    image: Tensor,
    scorer: WindowScorer | FastScorer,
    test: TestConfig,
    dropout: ImageDropout | None,
    device: torch.device,
    workers: Workers = one_worker,
    calibration: Calibration | None = None,
) -> Iterator[Heatmaps]:
    """Scores one image; yields what is known after each batch of windows, and at last the whole.

    image: (C, H, W) in [0, 1]; dropout: what drops, None if nothing does; workers: who computes the
    batches; calibration: what windows are compared with, at last (until then the scores are
    distances). Raises WindowError for an
    image smaller than the window where test.heatmap_alignment is stretched, ScoreError for
    scores that are not finite.
    """
    image_hw = (image.shape[1], image.shape[2])
    grid = window_grid(image_hw, test.patch_shape[:2], test.patch_stride, test.heatmap_alignment)
    padded = pad_image(image, grid)
    to_score = windows_to_score(padded, grid, test)
    scores = torch.zeros(len(scorer.metrics), len(grid))
    by_metric = dict(zip(scorer.metrics, scores.unflatten(1, grid.grid_hw), strict=True))
    details = unknown_details(test, len(grid))
    more = [DESCRIPTION] * (calibration is not None) + [DETAIL] * (details is not None)
    heatmaps = Heatmaps(grid, test, by_metric, details=details)
    completed: list[int] = []
    parts: list[Scored] = []
    K = 1 if test.refine == "off" else min(test.refine, max(grid.grid_hw))

    def compute(numbers: list[int]) -> Scored:
        windows = cut_windows(padded, grid, numbers)
        if device.type == "cuda":
            windows = windows.pin_memory().to(device, non_blocking=True)
        masks = None if dropout is None else dropout.masks(numbers)
        with tf32_products(test.precision == "tf32"):
            return Scored.of(scorer(to_signed(windows), masks, more=more), scorer.metrics)

    for batches in passes_to_score(grid, to_score, K, scores, batch_size(test, device)):
        for numbers, scored in workers(batches, compute):
            scores[:, numbers] = scored.scores
            if calibration is not None:
                parts.append(scored)
            if details is not None:
                details[numbers] = factors(scored.details, test)
            completed += numbers
            heatmaps = replace(heatmaps, n_scored=len(completed))
            yield heatmaps
    require_finite(by_metric)
    if calibration is not None and completed:
        # New ones, for those of the last are distances still.
        scored = Scored.joined(parts)
        scores, details = surprises(calibration, by_metric, scored, completed, test)
        by_metric = dict(zip(scorer.metrics, scores.unflatten(1, grid.grid_hw), strict=True))
    if K > 1:
        skipped = set(range(len(grid))).difference(to_score)
        scores.copy_(filled_in(scores, grid, K, [*completed, *skipped]))
    # A new one: the last may have been drawn before.
    yield replace(heatmaps, grids=by_metric, details=details)


def surprises(
    calibration: Calibration,
    grids: Mapping[Metric, Tensor],
    scored: Scored,
    completed: list[int],
    test: TestConfig,
) -> tuple[Tensor, Tensor | None]:
    """What an image's distances say, (metrics, windows), and the windows' factors.

    grids: the distances by metric; scored: those of the windows that are completed.
    """
    n_windows = next(iter(grids.values())).numel()
    near = calibration.neighbours(scored.descriptions)
    found = calibration.surprise(dict(zip(grids, scored.scores, strict=True)), near)
    scores = torch.zeros(len(grids), n_windows)
    scores[:, completed] = torch.stack([found[name] for name in grids])
    details = unknown_details(test, n_windows)
    if details is not None:
        cells = calibration.surprise_in_cells(scored.details.sum(dim=1), near)
        details[completed] = factors(scored.details, test, cells)
    return scores, details


def unknown_details(test: TestConfig, n_windows: int) -> Tensor | None:
    """The factors of windows that are not completed, (n, CELLS, CELLS); None where all are 1."""
    if test.heatmap_localise == 0 and test.heatmap_sign == "both":
        return None
    return torch.full((n_windows, CELLS, CELLS), 1.0 if test.heatmap_sign == "both" else 0.5)


def factors(detail: Tensor, test: TestConfig, surprise: Tensor | None = None) -> Tensor:
    """By what a window's score is multiplied in each cell of its hole: (n, CELLS, CELLS) >= 0.

    detail: (n, 2, CELLS, CELLS), as inpainter.completion.detail_of says; surprise: (n, CELLS,
    CELLS), how unlikely that is in normal windows, 1 on average; None where nobody knows.
    """
    total = detail.sum(dim=1)
    mean = total.mean(dim=(1, 2), keepdim=True)
    found = 1 + test.heatmap_localise * (torch.where(mean > 0, total / mean, 1.0) - 1)
    if surprise is not None and test.heatmap_localise > 0:
        found = found * surprise
    if test.heatmap_sign != "both":
        kept = detail[:, 0 if test.heatmap_sign == "brighter" else 1]
        found = found * torch.where(total > 0, kept / total, 0.0)
    return found


def require_finite(grids: Mapping[Metric, Tensor]) -> None:
    """Raises ScoreError where the score of a window is NaN or infinite."""
    for metric, grid in grids.items():
        n_bad = int((~grid.isfinite()).sum())
        if n_bad:
            raise ScoreError(
                f"{metric} is NaN or infinite in {n_bad} of {grid.numel()} windows. Are the "
                "checkpoint's weights finite? test.precision: fp32 has the largest range."
            )


def passes_to_score(
    grid: WindowGrid, to_score: Sequence[int], K: int, scores: Tensor, size: int
) -> Iterator[list[list[int]]]:
    """Yields batches of window numbers: of every K-th of `to_score`, then of those near high ones.

    scores: (metrics, windows), which has the first pass's when the second begins. With K = 1
    there is one pass, of all.
    """
    first = sorted(set(to_score).intersection(first_pass(grid, K)))
    yield batched(first, size)
    if K > 1:
        second = second_pass(scores, grid, K, first)
        yield batched(sorted(set(to_score).intersection(second)), size)


def windows_to_score(padded: Tensor, grid: WindowGrid, test: TestConfig) -> list[int]:
    """Numbers of the windows to complete: all, or those whose hole has enough tissue."""
    if not test.only_check_nonblack_pixels:
        return list(range(len(grid)))
    share = tissue_fractions(padded, grid, test.mask_shape, test.tissue_threshold)
    return ((share > 0) & (share >= test.min_tissue_fraction)).nonzero().flatten().tolist()


def stitch(
    scores: Tensor, grid: WindowGrid, test: TestConfig, details: Tensor | None = None
) -> Tensor:
    """Window scores (gh, gw) to a heatmap (H, W), as test.heatmap_type says, then smoothed.

    details: (windows, CELLS, CELLS), factors of the score in each hole's cells.
    """
    match test.heatmap_type:
        case "nonaveraged":
            heatmap = heatmap_from_grid(scores, grid)
        case "averaged":
            heatmap = averaged_heatmap(scores, grid, grid.window_hw)
        case "averaged_hole":
            heatmap = averaged_heatmap(scores, grid, test.mask_shape, details)
    if test.heatmap_smooth == 0:
        return heatmap
    deviations = [test.heatmap_smooth * side for side in test.mask_shape]
    return torch.from_numpy(gaussian_filter(heatmap.numpy(), deviations, mode="nearest"))


def batch_size(test: TestConfig, device: torch.device) -> int:
    """test.parallel_batchsize, on a CPU no more than fits its caches."""
    if device.type != "cpu":
        return test.parallel_batchsize
    pixels = test.patch_shape[0] * test.patch_shape[1]
    return max(1, min(test.parallel_batchsize, CPU_PIXELS_PER_BATCH // pixels))


def batched(items: list[Item], size: int) -> list[list[Item]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
