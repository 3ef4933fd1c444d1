"""Metrics over the pixels of all images together, one image in memory at a time.

Sorting all pixels at once, as scikit-learn would, takes tens of GiB for 100 images of 2000x2500.
But AUROC, AP and PRO are determined by how many pixels lie at or above each score that a *lesion*
pixel has, and that can be counted image by image. Legend: n images, U distinct lesion scores, K of
them used as thresholds per image, P = 2 K + 2 operating points from "no pixel found" over "above"
and "at or above" each threshold, in falling order, to "all pixels found".
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from common.metrics import (
    Interval,
    MetricError,
    PixelCase,
    Score,
    bootstrap_intervals,
    counted_pixels,
    pixel_scores,
    trapezoid,
)

PRO_MAX_FPR = 0.3  # the usual limit of integration (Bergmann et al., MVTec AD, IJCV 2021)
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
MOST_STEPS = 2**20
"""Distinct lesion scores beyond which every second one is used: areas are then off by < 1e-6."""
MOST_COUNTS = 4_000_000
"""Thresholds times images that are kept for intervals: 200 MB."""
FEWEST_THRESHOLDS = 250


class LesionScores:
    """The first of two passes: which scores the lesion pixels have, in bounded memory."""

    def __init__(self, most_steps: int = MOST_STEPS) -> None:
        self.most_steps = most_steps
        self.exact = True
        """Whether every distinct score is among the steps."""
        self.low, self.high = np.inf, -np.inf
        self._steps: list[np.ndarray] = []
        self._n_waiting = 0

    def add(self, case: PixelCase) -> None:
        """Notes one image's lesion scores, and the range of all scores that count."""
        scores, labels = pixel_scores(case)
        self.low, self.high = min(self.low, scores.min()), max(self.high, scores.max())
        if labels.any():
            self._steps.append(np.unique(scores[labels]))
            self._n_waiting += self._steps[-1].size
            if self._n_waiting > 2 * self.most_steps:
                self._merge()

    def _merge(self) -> None:
        steps = np.unique(np.concatenate(self._steps))
        while steps.size > self.most_steps:
            steps = np.append(steps[:-1:2], steps[-1])
            self.exact = False
        self._steps, self._n_waiting = [steps], steps.size

    def steps(self) -> np.ndarray:
        """(U,) distinct lesion scores, rising. Raises MetricError if no image has a lesion."""
        if not self._steps:
            raise MetricError("no lesion pixel that counts in any image: pixel metrics need one")
        self._merge()
        return self._steps[0]


class ScoreHistogram(NamedTuple):
    """Pixels per score bin: edges (bins + 1,), lesion and background (bins,)."""

    edges: np.ndarray
    lesion: np.ndarray
    background: np.ndarray


class BestThreshold(NamedTuple):
    """The largest value that any threshold gives, which is chosen on the test set, and which does.

    Pixels of a score >= threshold are taken for lesion.
    """

    value: float
    threshold: float


class PooledMetrics(NamedTuple):
    """Metrics over all pixels together, each in [0, 1], and what intervals and plots need."""

    auroc: float
    ap: float
    pro: float
    """AUPRO at 30 %: mean overlap of regions over false positive rates up to 0.3, divided by it."""
    found: np.ndarray
    """(n, 3, P) found in each image: lesion pixels, other pixels, lesion regions (a region counts
    by the fraction of it that is found)."""
    histogram: ScoreHistogram
    best_f1: BestThreshold
    """Over all pixels together."""
    best_dice: BestThreshold
    """Mean over images with a lesion, one threshold for all, of the K thresholds."""
    exact: bool
    """Whether all distinct lesion scores were counted at; else areas are off by < 1e-6."""

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

    The cases are gone through twice (so no generator); where they are read from disk each time,
    memory is bounded. See `count_pixels`.
    """
    lesions = LesionScores()
    for case in cases:
        lesions.add(case)
    return count_pixels(cases, lesions, max_thresholds=max_thresholds, bins=bins)


def count_pixels(
    cases: Iterable[PixelCase],
    lesions: LesionScores,
    *,
    max_thresholds: int = 1000,
    bins: int = 60,
) -> PooledMetrics:
    """The second pass: counts at every lesion score of the same cases that `lesions` has seen.

    AUROC and AP equal scikit-learn's on the concatenated pixels. PRO is the mean over lesion
    regions (8-connected) of the fraction found, averaged over false positive rates up to 0.3.
    Memory is one image plus some 200 bytes per step and 50 per image and threshold.
    Raises ValueError and MetricError as `counted_pixels` does, MetricError also where no pixel is
    lesion or all are.
    """
    steps = lesions.steps()
    U = steps.size
    places = np.unique(np.linspace(0, U - 1, max_thresholds).round().astype(int))[::-1]
    low, high = float(lesions.low), float(lesions.high)
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    histogram = ScoreHistogram(edges, np.zeros(bins, np.int64), np.zeros(bins, np.int64))
    at_or_above, exactly, totals = np.zeros((3, U)), np.zeros((3, U)), np.zeros(3)
    found = []
    for case in cases:
        scores, labels = pixel_scores(case)
        shares, n_regions = region_shares(case)
        counts = [
            count_from(scores[labels], steps),
            count_from(scores[~labels], steps),
            count_from(scores[labels], steps, shares),
        ]
        here, here_exactly = map(np.stack, zip(*counts, strict=True))
        here_totals = np.array([labels.sum(), (~labels).sum(), n_regions], float)
        found.append(operating_points(here, here_exactly, here_totals, places))
        at_or_above += here
        exactly += here_exactly
        totals += here_totals
        histogram.lesion[:] += np.histogram(scores[labels], edges)[0]
        histogram.background[:] += np.histogram(scores[~labels], edges)[0]
    if totals[1] == 0:
        raise MetricError("all pixels that count are lesion: AUROC needs background too")
    areas = curve_areas(
        curves(operating_points(at_or_above, exactly, totals, np.arange(U)[::-1])[None])
    )
    return PooledMetrics(
        **areas,
        found=np.stack(found),
        histogram=histogram,
        best_f1=_best(dice(at_or_above[0], at_or_above[1], totals[0]), steps),
        best_dice=best_mean_dice(found, steps[places]),
        exact=lesions.exact,
    )


def score_pixels(scores: np.ndarray, labels: np.ndarray) -> Score:
    """AUROC and AP of scores (n,), as `binary_score` gives them, several times faster for millions.

    labels: (n,) bool of both kinds; scores finite, larger = more anomalous.
    """
    steps = np.unique(scores[labels])
    lesion, background = (count_from(scores[kind], steps) for kind in (labels, ~labels))
    at_or_above, exactly = map(np.stack, zip(lesion, background, lesion, strict=True))
    totals = np.array([labels.sum(), (~labels).sum(), labels.sum()], float)
    every_step = np.arange(steps.size)[::-1]
    areas = curve_areas(curves(operating_points(at_or_above, exactly, totals, every_step)[None]))
    return Score(areas["auroc"], areas["ap"])


def thresholds_kept(n_images: int) -> int:
    """How many thresholds' counts are kept per image for intervals: fewer where images are many."""
    return int(np.clip(MOST_COUNTS // max(n_images, 1), FEWEST_THRESHOLDS, 1000))


def region_shares(case: PixelCase) -> tuple[np.ndarray, int]:
    """1 / size of its region for each lesion pixel that counts (p,), and the number of regions.

    Ignored pixels belong to no region. The order is that of `pixel_scores`.
    """
    lesion = np.asarray(case.segmentation).astype(bool) & counted_pixels(case)
    regions, n_regions = ndimage.label(lesion, structure=EIGHT_NEIGHBOURS)
    region_of = regions[lesion]
    return 1.0 / np.bincount(region_of)[region_of], n_regions


def count_from(
    scores: np.ndarray, steps: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """How many of the scores (N,), or which weight of them, are >= and == each step (U,)."""
    if weights is None:
        scores, below = np.sort(scores), np.arange(scores.size + 1.0)
    else:
        order = np.argsort(scores)
        scores, below = scores[order], np.append(0.0, np.cumsum(weights[order]))
    first, end = (below[np.searchsorted(scores, steps, side)] for side in ("left", "right"))
    return below[-1] - first, end - first


def dice(lesion: np.ndarray, background: np.ndarray, n_lesion: np.ndarray) -> np.ndarray:
    """Dice, which is F1, of found lesion and background pixels, of n_lesion; shapes broadcast."""
    return 2 * lesion / (lesion + background + n_lesion)


def best_mean_dice(found: Sequence[np.ndarray], thresholds: np.ndarray) -> BestThreshold:
    """The largest mean Dice of the images with a lesion at one threshold (K,), falling, for all.

    found: (3, P) per image.
    """
    sums, n = np.zeros(thresholds.size), 0
    for counts in found:
        if counts[0, -1] > 0:
            sums += dice(counts[0, 2:-1:2], counts[1, 2:-1:2], counts[0, -1])
            n += 1
    return _best(sums / n, thresholds)


def _best(values: np.ndarray, thresholds: np.ndarray) -> BestThreshold:
    place = int(np.argmax(values))
    return BestThreshold(float(values[place]), float(thresholds[place]))


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


def pooled_intervals(
    pooled: PooledMetrics, *, n_resamples: int, seed: int, clusters: np.ndarray | None = None
) -> dict[str, Interval]:
    """The exact AUROC, AP and PRO with 95 % bootstrap intervals over images, or over clusters (n,)
    of them, as in `common.metrics.bootstrap_draws`.

    The draws are evaluated at K thresholds only, which shifts them by less than 1 / K.
    """
    return bootstrap_intervals(
        {name: getattr(pooled, name) for name in ("auroc", "ap", "pro")},
        lambda draw: curve_areas(curves(pooled.found, draw)),
        len(pooled.found),
        n_resamples=n_resamples,
        seed=seed,
        clusters=clusters,
    )
