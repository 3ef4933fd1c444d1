"""Metrics over the pixels of all images together, exact, one image in memory at a time.

Sorting all pixels at once, as scikit-learn would, takes tens of GiB for 100 images of 2000x2500.
But AUROC, AP and PRO are determined by how many pixels lie at or above each score that a *lesion*
pixel has, and that can be counted image by image. Legend: n images, U distinct lesion scores, K of
them kept as thresholds per image.
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
    n_regions: np.ndarray
    """(n,) lesion regions per image."""
    score_range: tuple[float, float]
    """Smallest and largest score of any pixel that counts."""


class ThresholdCounts(NamedTuple):
    """What each image has above, and at or above, each of K falling thresholds: 2 K columns."""

    lesion: np.ndarray
    """(n, 2 K) lesion pixels."""
    background: np.ndarray
    """(n, 2 K) other pixels."""
    overlap: np.ndarray
    """(n, 2 K) sum over the image's lesion regions of the fraction of the region."""
    totals: np.ndarray
    """(n, 3) all its lesion pixels, other pixels, lesion regions."""


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
    counts: ThresholdCounts
    histogram: ScoreHistogram


class Curves(NamedTuple):
    """ROC, region-overlap and precision curves, (2 K + 2,) each, thresholds falling."""

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
    memory is one image plus some 100 bytes per lesion pixel.
    Raises ValueError and MetricError as `counted_pixels` does, MetricError also where no pixel is
    lesion or all are.
    """
    pool = gather_lesions(cases)
    kept = np.unique(np.linspace(0, pool.steps.size - 1, max_thresholds).round().astype(int))[::-1]
    low, high = pool.score_range
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    above, tied = np.zeros(pool.steps.size, np.int64), np.zeros(pool.steps.size, np.int64)
    histogram = ScoreHistogram(edges, np.zeros(bins, np.int64), np.zeros(bins, np.int64))
    rows, n_background = [], []
    for case, step_of, share in zip(cases, pool.step_of, pool.shares, strict=True):
        scores, labels = pixel_scores(case)
        at, tied_here = count_background(scores[~labels], pool.steps)
        above += at
        tied += tied_here
        lesion_at = np.bincount(step_of, minlength=pool.steps.size)
        share_at = np.bincount(step_of, weights=share, minlength=pool.steps.size)
        tables = ((lesion_at, lesion_at), (at, tied_here), (share_at, share_at))
        rows.append(
            [around(from_above(counts), exactly)[kept].ravel() for counts, exactly in tables]
        )
        n_background.append(labels.size - step_of.size)
        histogram.lesion[:] += np.histogram(scores[labels], edges)[0]
        histogram.background[:] += np.histogram(scores[~labels], edges)[0]
    if not any(n_background):
        raise MetricError("all pixels that count are lesion: AUROC needs background too")
    n_lesion = [step_of.size for step_of in pool.step_of]
    totals = np.stack([n_lesion, n_background, pool.n_regions], axis=1)
    counts = ThresholdCounts(*(np.stack(column) for column in zip(*rows, strict=True)), totals)
    auroc, ap, pro = exact_areas(pool, from_above(above), tied, sum(n_background))
    return PooledMetrics(auroc, ap, pro, counts, histogram)


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
    return LesionPixels(steps, np.split(step_of, ends), shares, np.array(n_regions), score_range)


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
    at = np.bincount(reached, minlength=steps.size + 1)[1:]
    equal = background == steps[reached - 1]  # reached 0 wraps to the top step, which is larger
    return at, np.bincount(reached[equal] - 1, minlength=steps.size)


def from_above(counts: np.ndarray) -> np.ndarray:
    """Sums counts (U,) from the end: what lies at or above each step."""
    return counts[::-1].cumsum()[::-1]


def around(at_or_above: np.ndarray, exactly: np.ndarray) -> np.ndarray:
    """(U, 2) counts above, and at or above, each step."""
    return np.stack([at_or_above - exactly, at_or_above], axis=1)


def exact_areas(
    pool: LesionPixels, above: np.ndarray, tied: np.ndarray, n_background: int
) -> tuple[float, float, float]:
    """AUROC, AP and PRO. above, tied: (U,) background pixels at or above, and at, each step.

    A lesion pixel lifts the curves between the false positive rates just above its score and at it,
    linearly where background pixels tie with it.
    """
    step_of = np.concatenate(pool.step_of)
    lesion_at = np.bincount(step_of)
    share_at = np.bincount(step_of, weights=np.concatenate(pool.shares))
    start, end = (above - tied) / n_background, above / n_background
    found = from_above(lesion_at)
    auroc = (lesion_at * (1 - (start + end) / 2)).sum() / lesion_at.sum()
    ap = (lesion_at * found / (found + above)).sum() / lesion_at.sum()
    limit = PRO_MAX_FPR
    within = np.clip(limit - start, 0, None)  # width of the area that lies right of the step
    ramp = np.minimum(within, end - start)
    risen = np.divide(ramp, end - start, out=np.ones_like(ramp), where=end > start)
    area = within - ramp + ramp * risen / 2
    pro = (share_at * area).sum() / (pool.n_regions.sum() * limit)
    return float(auroc), float(ap), float(pro)


def curves(counts: ThresholdCounts, draw: np.ndarray | None = None) -> Curves:
    """Curves over all images, or over drawn image numbers (m,), which may repeat.

    False positive rate, true positive rate, mean region overlap and precision, from no pixel found
    (precision 1 by convention) to all. NaN where the drawn images lack lesion or background.
    """
    n = len(counts.totals)
    weights = np.ones(n) if draw is None else np.bincount(draw, minlength=n).astype(float)
    n_lesion, n_background, n_regions = weights @ counts.totals
    lesion, background, overlap = (weights @ table for table in counts[:3])
    lesion = np.concatenate([[0], lesion, [n_lesion]])
    background = np.concatenate([[0], background, [n_background]])
    overlap = np.concatenate([[0], overlap, [n_regions]])
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as promised
        precision = lesion / np.maximum(lesion + background, 1)
        precision[0] = 1.0
        return Curves(background / n_background, lesion / n_lesion, overlap / n_regions, precision)


def curve_areas(curve: Curves) -> dict[str, float]:
    """AUROC, AP and PRO of curves; exact if no threshold was left out, else off by about 1 / K."""
    if not np.isfinite(curve.fpr[-1] + curve.tpr[-1]):
        return {"auroc": np.nan, "ap": np.nan, "pro": np.nan}
    end = int(np.argmax(curve.fpr >= PRO_MAX_FPR))  # the first point at or past the limit
    (x0, x1), (y0, y1) = curve.fpr[end - 1 : end + 1], curve.overlap[end - 1 : end + 1]
    fpr = np.append(curve.fpr[:end], PRO_MAX_FPR)
    overlap = np.append(curve.overlap[:end], y0 + (y1 - y0) * (PRO_MAX_FPR - x0) / (x1 - x0))
    precision = curve.precision[1:].copy()
    precision[::2] = (precision[::2] + curve.precision[:-1:2]) / 2  # from threshold to threshold
    return {
        "auroc": trapezoid(curve.fpr, curve.tpr),
        "ap": float((np.diff(curve.tpr) * precision).sum()),
        "pro": trapezoid(fpr, overlap) / PRO_MAX_FPR,
    }


def pooled_intervals(pooled: PooledMetrics, *, n_resamples: int, seed: int) -> dict[str, Interval]:
    """The exact AUROC, AP and PRO with 95 % bootstrap intervals over images.

    The draws are evaluated at the kept thresholds only, which shifts them by less than 1 / K.
    """
    return bootstrap_intervals(
        {name: getattr(pooled, name) for name in ("auroc", "ap", "pro")},
        lambda draw: curve_areas(curves(pooled.counts, draw)),
        len(pooled.counts.totals),
        n_resamples=n_resamples,
        seed=seed,
    )
