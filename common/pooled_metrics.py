"""Metrics over the pixels of all images together, exact, one image in memory at a time.

Sorting all pixels at once, as scikit-learn would, takes tens of GiB for 100 images of 2000x2500.
But AUROC, AP and PRO are determined by how many pixels lie at or above each score that a *lesion*
pixel has, and that can be counted image by image. Legend: n images, U distinct lesion scores, K of
them used as thresholds per image, P = 2 K + 2 operating points from "no pixel found" over "above"
and "at or above" each threshold, in falling order, to "all pixels found".
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from common.metrics import (
    Interval,
    MetricError,
    PixelCase,
    bootstrap_intervals,
    counted_pixels,
    pixel_scores,
    trapezoid,
)

PRO_MAX_FPR = 0.3  # the usual limit of integration (Bergmann et al., MVTec AD, IJCV 2021)
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class LesionPixels(NamedTuple):
    """All lesion pixels that count, as steps of the curves."""

    steps: np.ndarray
    """(U,) distinct lesion scores, rising."""
    step_of: list[np.ndarray]
    """Per image (p,), each lesion pixel's place in steps."""
    shares: list[np.ndarray]
    """Per image (p,), 1 / size of each lesion pixel's region."""
    n_regions: list[int]
    """Lesion regions per image."""
    score_range: tuple[float, float]
    """Smallest and largest score of any pixel that counts."""


class ScoreHistogram(NamedTuple):
    """Pixels per score bin: edges (bins + 1,), lesion and background (bins,)."""

    edges: np.ndarray
    lesion: np.ndarray
    background: np.ndarray


class PooledMetrics(NamedTuple):
    """Metrics over all pixels together, each in [0, 1], and what intervals and plots need."""

    auroc: float
    ap: float
    pro: float
    found: np.ndarray
    """(n, 3, P) found in each image: lesion pixels, other pixels, lesion regions (a region counts
    by the fraction of it that is found)."""
    histogram: ScoreHistogram

    @property
    def totals(self) -> tuple[int, int, int]:
        """Lesion pixels, other pixels and lesion regions of all images."""
        return tuple(round(total) for total in self.found[:, :, -1].sum(axis=0))


class Curves(NamedTuple):
    """ROC, region-overlap and precision curves, (P,) each, thresholds falling."""

    fpr: np.ndarray
    tpr: np.ndarray
    overlap: np.ndarray
    precision: np.ndarray


def pool_pixels(
    cases: Iterable[PixelCase], *, max_thresholds: int = 1000, bins: int = 60
) -> PooledMetrics:
    """AUROC, AP and PRO over the pixels of all cases together; larger scores = more anomalous.

    AUROC and AP equal scikit-learn's on the concatenated pixels. PRO is the mean over lesion
    regions (8-connected) of the fraction found, averaged over false positive rates up to 0.3.
    The cases are gone through twice (so no generator); where they are read from disk each time,
    memory is one image plus some 200 bytes per lesion pixel.
    Raises ValueError and MetricError as `counted_pixels` does, MetricError also where no pixel is
    lesion or all are.
    """
    pool = gather_lesions(cases)
    U = pool.steps.size
    thresholds = np.unique(np.linspace(0, U - 1, max_thresholds).round().astype(int))[::-1]
    low, high = pool.score_range
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    histogram = ScoreHistogram(edges, np.zeros(bins, np.int64), np.zeros(bins, np.int64))
    at_or_above, exactly, totals = np.zeros((3, U)), np.zeros((3, U)), np.zeros(3)
    found = []
    per_image = zip(cases, pool.step_of, pool.shares, pool.n_regions, strict=True)
    for case, step_of, shares, n_regions in per_image:
        scores, labels = pixel_scores(case)
        n_lesion = np.bincount(step_of, minlength=U)
        share = np.bincount(step_of, weights=shares, minlength=U)
        between, tied = count_background(scores[~labels], pool.steps)
        in_steps = np.stack([n_lesion, between, share])
        here = in_steps[:, ::-1].cumsum(axis=1)[:, ::-1]  # at or above each step
        here_exactly = np.stack([n_lesion, tied, share])
        here_totals = np.array([step_of.size, labels.size - step_of.size, n_regions], float)
        found.append(operating_points(here, here_exactly, here_totals, thresholds))
        at_or_above += here
        exactly += here_exactly
        totals += here_totals
        histogram.lesion[:] += np.histogram(scores[labels], edges)[0]
        histogram.background[:] += np.histogram(scores[~labels], edges)[0]
    if totals[1] == 0:
        raise MetricError("all pixels that count are lesion: AUROC needs background too")
    every_step = np.arange(U)[::-1]
    pooled = operating_points(at_or_above, exactly, totals, every_step)
    areas = curve_areas(curves(pooled[None]))
    return PooledMetrics(**areas, found=np.stack(found), histogram=histogram)


def gather_lesions(cases: Iterable[PixelCase]) -> LesionPixels:
    """First pass: every lesion pixel's score and region. Raises MetricError if there is none."""
    scores_of, shares, n_regions, extremes = [], [], [], []
    for case in cases:
        scores, labels = pixel_scores(case)
        share, regions = region_shares(case)
        scores_of.append(scores[labels])
        shares.append(share)
        n_regions.append(regions)
        extremes += [float(scores.min()), float(scores.max())]
    if not any(n_regions):
        raise MetricError("no lesion pixel that counts in any image: pixel metrics need one")
    steps, step_of = np.unique(np.concatenate(scores_of), return_inverse=True)
    ends = np.cumsum([scores.size for scores in scores_of])[:-1]
    score_range = (min(extremes), max(extremes))
    return LesionPixels(steps, np.split(step_of, ends), shares, n_regions, score_range)


def region_shares(case: PixelCase) -> tuple[np.ndarray, int]:
    """1 / size of its region for each lesion pixel that counts (p,), and the number of regions.

    Ignored pixels belong to no region. The order is that of `pixel_scores`.
    """
    lesion = np.asarray(case.segmentation).astype(bool) & counted_pixels(case)
    regions, n_regions = ndimage.label(lesion, structure=EIGHT_NEIGHBOURS)
    region_of = regions[lesion]
    return 1.0 / np.bincount(region_of)[region_of], n_regions


def count_background(background: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the scores (N,), those from each step (U,) up to the next, and those equal to the step."""
    reached = np.searchsorted(steps, background, side="right")  # number of steps <= score
    between = np.bincount(reached, minlength=steps.size + 1)[1:]
    equal = background == steps[reached - 1]  # reached 0 wraps to the top step, which is larger
    return between, np.bincount(reached[equal] - 1, minlength=steps.size)


def operating_points(
    at_or_above: np.ndarray, exactly: np.ndarray, totals: np.ndarray, thresholds: np.ndarray
) -> np.ndarray:
    """(3, P) counts from none over `thresholds` (K,), places in the steps, to all.

    at_or_above, exactly: (3, U) counts by step; totals: (3,).
    """
    at = at_or_above[:, thresholds]
    above_and_at = np.stack([at - exactly[:, thresholds], at], axis=2).reshape(3, -1)
    return np.concatenate([np.zeros((3, 1)), above_and_at, totals[:, None]], axis=1)


def curves(found: np.ndarray, draw: np.ndarray | None = None) -> Curves:
    """Curves of the counts `found` (n, 3, P) over all images, or over drawn numbers (m,).

    A drawn number may repeat. False positive rate, true positive rate, mean region overlap and
    precision, from no pixel found (precision 1 by convention) to all. NaN where the drawn images
    lack lesion or background.
    """
    n = len(found)
    weights = np.ones(n) if draw is None else np.bincount(draw, minlength=n).astype(float)
    lesion, background, regions = np.tensordot(weights, found, axes=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as promised
        precision = lesion / np.maximum(lesion + background, 1)
        precision[0] = 1.0
        rates = (background / background[-1], lesion / lesion[-1], regions / regions[-1])
        return Curves(*rates, precision)


def curve_areas(curve: Curves) -> dict[str, float]:
    """AUROC, AP and PRO of curves; exact if no threshold was left out, else off by about 1 / K."""
    if not np.isfinite(curve.fpr[-1] + curve.tpr[-1]):
        return {"auroc": np.nan, "ap": np.nan, "pro": np.nan}
    end = int(np.argmax(curve.fpr >= PRO_MAX_FPR))  # the first point at or past the limit
    fpr = np.append(curve.fpr[:end], PRO_MAX_FPR)
    overlap = np.interp(fpr[-1:], curve.fpr[end - 1 : end + 1], curve.overlap[end - 1 : end + 1])
    precision = curve.precision[1:].copy()
    precision[::2] = (precision[::2] + curve.precision[:-1:2]) / 2  # from threshold to threshold
    return {
        "auroc": trapezoid(curve.fpr, curve.tpr),
        "ap": float((np.diff(curve.tpr) * precision).sum()),
        "pro": trapezoid(fpr, np.append(curve.overlap[:end], overlap)) / PRO_MAX_FPR,
    }


def pooled_intervals(pooled: PooledMetrics, *, n_resamples: int, seed: int) -> dict[str, Interval]:
    """The exact AUROC, AP and PRO with 95 % bootstrap intervals over images.

    The draws are evaluated at K thresholds only, which shifts them by less than 1 / K.
    """
    return bootstrap_intervals(
        {name: getattr(pooled, name) for name in ("auroc", "ap", "pro")},
        lambda draw: curve_areas(curves(pooled.found, draw)),
        len(pooled.found),
        n_resamples=n_resamples,
        seed=seed,
    )
