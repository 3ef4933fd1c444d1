"""Anomaly metrics of one image or of a list of images: arrays in, floats out.

Larger scores always mean more anomalous. The arithmetic is scikit-learn's. Metrics over the pixels
of all images together are in `pooled_metrics.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from common.errors import UserError

CONFIDENCE = 0.95


class MetricError(UserError):
    """Scores or labels on which a metric is not defined."""


class Score(NamedTuple):
    """Area under the ROC curve and average precision, both in [0, 1]; chance is 0.5 and the share
    of anomalous entries."""

    auroc: float
    ap: float


class Interval(NamedTuple):
    """A value with its bootstrap interval; low and high are None where none can be given."""

    value: float
    low: float | None
    high: float | None


def share_interval(count: int, total: int) -> Interval | None:
    """count of total as a share, with Wilson's 95 % interval; None of none."""
    if total == 0:
        return None
    low, high = stats.binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(count / total, float(low), float(high))


def format_interval(
    interval: Interval | None, digits: int = 3, *, deviation: float | None = None
) -> str:
    """`0.912 ± 0.010 [0.880, 0.934]`, without the parts that are None; `-` for no interval."""
    if interval is None:
        return "-"
    text = f"{interval.value:.{digits}f}"
    if deviation is not None:
        text += f" ± {deviation:.{digits}f}"
    if interval.low is not None:
        text += f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    return text


class PixelCase(NamedTuple):
    """One image's heatmap with what is known about its pixels."""

    heatmap: np.ndarray
    """(H, W) float, larger = more anomalous."""
    segmentation: np.ndarray
    """(H, W), non-zero where there is a lesion."""
    ignore_mask: np.ndarray | None = None
    """(H, W), non-zero where pixels do not count; None = all count."""


def binary_score(labels: np.ndarray, scores: np.ndarray) -> Score:
    """AUROC and AP of scores (n,), larger = more anomalous, for labels (n,), non-zero = anomalous.

    Raises MetricError unless both kinds of label occur and all scores are finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import

    labels = np.asarray(labels).astype(bool)
    n_anomalous = int(labels.sum())
    if n_anomalous in (0, labels.size):
        raise MetricError(
            f"AUROC needs anomalous and normal scores, got {n_anomalous} anomalous of {labels.size}"
        )
    require_finite(scores)
    order = np.argsort(scores)  # scikit-learn's two stable sorts are fast on sorted scores
    labels, scores = labels[order], np.asarray(scores)[order]
    return Score(
        float(roc_auc_score(labels, scores)), float(average_precision_score(labels, scores))
    )


def require_finite(scores: np.ndarray) -> None:
    """Raises MetricError, with their number, where scores are NaN or infinite."""
    bad = int(np.count_nonzero(~np.isfinite(scores)))
    if bad:
        raise MetricError(f"{bad} of {np.size(scores)} scores are NaN or infinite")


def counted_pixels(case: PixelCase) -> np.ndarray:
    """(H, W) bool, True where pixels are not ignored.

    Raises ValueError where shapes differ, MetricError where no pixel is left or a score that counts
    is not finite.
    """
    ignored = np.zeros_like(case.heatmap) if case.ignore_mask is None else case.ignore_mask
    shapes = [np.shape(array) for array in (case.heatmap, case.segmentation, ignored)]
    if len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise ValueError(
            "heatmap, segmentation and ignore mask must be (H, W) of the same size, "
            "got {}, {} and {}".format(*shapes)
        )
    counted = ~np.asarray(ignored).astype(bool)
    if not counted.any():
        raise MetricError(f"all pixels of {shapes[0]} are ignored, none is left to evaluate")
    require_finite(np.asarray(case.heatmap)[counted])
    return counted


def pixel_scores(case: PixelCase) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n,) and labels (n,) bool, True = lesion, of the pixels that are not ignored.

    Raises ValueError and MetricError as `counted_pixels` does.
    """
    counted = counted_pixels(case)
    labels = np.asarray(case.segmentation).astype(bool)
    return np.asarray(case.heatmap)[counted], labels[counted]


def score_heatmap(
    heatmap: np.ndarray, segmentation: np.ndarray, ignore_mask: np.ndarray | None = None
) -> Score:
    """Pixel AUROC and AP of one heatmap (H, W), larger = more anomalous.

    segmentation, ignore_mask: (H, W), non-zero = lesion, = does not count. The published code drops
    the masked heatmap (P9); here both are masked, as was intended. Raises ValueError where
    shapes differ, MetricError where scores are not finite or the pixels that count are all lesion
    or all normal.
    """
    scores, labels = pixel_scores(PixelCase(heatmap, segmentation, ignore_mask))
    return binary_score(labels, scores)


def bootstrap_draws(
    n_images: int, clusters: np.ndarray | None, *, n_resamples: int, seed: int
) -> Iterator[np.ndarray]:
    """Image numbers drawn with replacement, (n_images,) each time, the same for the same seed.

    clusters: (n_images,) numbers from 0 without gaps, such as patients; then as many whole clusters
    are drawn as there are, so that a draw has about n_images numbers.
    """
    generator = np.random.default_rng(seed)
    if clusters is None:
        for _ in range(n_resamples):
            yield generator.integers(n_images, size=n_images)
        return
    ends = np.cumsum(np.bincount(clusters))
    members = np.split(np.argsort(clusters, kind="stable"), ends[:-1])
    for _ in range(n_resamples):
        drawn = generator.integers(ends.size, size=ends.size)
        yield np.concatenate([members[cluster] for cluster in drawn])


def bootstrap_intervals(
    values: Mapping[str, float],
    statistic: Callable[[np.ndarray], Mapping[str, float]],
    n_images: int,
    *,
    n_resamples: int,
    seed: int,
    clusters: np.ndarray | None = None,
) -> dict[str, Interval]:
    """95 % percentile intervals of values over images, which are drawn with replacement.

    statistic: from drawn image numbers to the same values on them; NaN where undefined (for
    instance no normal image was drawn), and such draws are left out. There is no interval for fewer
    than two images or where more than half of the draws are undefined. The same seed and n_images
    give the same draws, so that metrics are compared on the same ones. clusters: as in
    `bootstrap_draws`; fewer than two clusters give no interval either.
    """
    n_drawn = n_images if clusters is None else len(np.unique(clusters))
    if n_drawn < 2 or n_resamples < 1:
        return {name: Interval(value, None, None) for name, value in values.items()}
    draws = bootstrap_draws(n_images, clusters, n_resamples=n_resamples, seed=seed)
    drawn = [statistic(draw) for draw in draws]
    intervals = {}
    for name, value in values.items():
        of_draws = np.array([draw[name] for draw in drawn])
        defined = of_draws[np.isfinite(of_draws)]
        tail = (1 - CONFIDENCE) / 2
        ends = (None, None)
        if 2 * defined.size >= n_resamples:
            ends = map(float, np.quantile(defined, [tail, 1 - tail]))
        intervals[name] = Interval(value, *ends)
    return intervals


def mean_intervals(
    columns: Mapping[str, np.ndarray],
    *,
    n_resamples: int,
    seed: int,
    clusters: np.ndarray | None = None,
) -> dict[str, Interval]:
    """Means of columns of one value per image (n,) with bootstrap intervals.

    clusters: (n,), as in `bootstrap_draws`. Raises MetricError for n = 0.
    """
    table = {name: np.asarray(column, dtype=float) for name, column in columns.items()}
    n = min(column.size for column in table.values())
    if n == 0:
        raise MetricError("the mean over images needs at least one image")

    def means(draw: np.ndarray | slice) -> dict[str, float]:
        return {name: float(column[draw].mean()) for name, column in table.items()}

    settings = {"n_resamples": n_resamples, "seed": seed, "clusters": clusters}
    return bootstrap_intervals(means(slice(None)), means, n, **settings)


def binary_intervals(
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    n_resamples: int,
    seed: int,
    clusters: np.ndarray | None = None,
) -> dict[str, Interval]:
    """`binary_score` of images (n,) with bootstrap intervals, as {"auroc": …, "ap": …}.

    clusters: (n,), as in `bootstrap_draws`.
    """
    labels, scores = np.asarray(labels).astype(bool), np.asarray(scores)
    values = binary_score(labels, scores)._asdict()
    order = np.argsort(-scores)
    last_of_tie = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))

    def on_draw(draw: np.ndarray) -> dict[str, float]:
        """The same as binary_score of the drawn images, some hundred times faster."""
        times = np.bincount(draw, minlength=labels.size)[order]
        found = np.append(0, np.cumsum(times * labels[order])[last_of_tie])
        false = np.append(0, np.cumsum(times * ~labels[order])[last_of_tie])
        if found[-1] == 0 or false[-1] == 0:
            return dict.fromkeys(values, np.nan)
        precision = found[1:] / np.maximum(found[1:] + false[1:], 1)
        return {
            "auroc": trapezoid(false, found) / (found[-1] * false[-1]),
            "ap": float((np.diff(found) * precision).sum() / found[-1]),
        }

    settings = {"n_resamples": n_resamples, "seed": seed, "clusters": clusters}
    return bootstrap_intervals(values, on_draw, labels.size, **settings)


class AurocDifference(NamedTuple):
    """AUROC of one score less that of another on the same images, with its 95 % interval."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided, of no difference."""


def delong(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> AurocDifference:
    """DeLong's test (Biometrics 1988) of two scores (n,) of the same images, which it takes for
    independent of each other; larger = more anomalous, labels (n,) non-zero = anomalous.

    By ranks (Sun and Xu, IEEE SPL 2014). Raises MetricError for fewer than two images of a kind.
    """
    anomalous = np.asarray(labels).astype(bool)
    m, n = int(anomalous.sum()), int((~anomalous).sum())
    if min(m, n) < 2:
        raise MetricError(f"DeLong's test needs two images of each kind, got {m} and {n} normal")
    areas, of_anomalous, of_normal = [], [], []
    for scores in (np.asarray(one), np.asarray(other)):
        require_finite(scores)
        rank = stats.rankdata(scores)
        beaten = rank[anomalous] - stats.rankdata(scores[anomalous])  # normal ones, per anomalous
        beats = rank[~anomalous] - stats.rankdata(scores[~anomalous])
        areas.append(beaten.sum() / (m * n))
        of_anomalous.append(beaten / n)
        of_normal.append(1 - beats / m)
    contrast = np.array([1.0, -1.0])
    covariance = np.cov(of_anomalous) / m + np.cov(of_normal) / n
    deviation = float(np.sqrt(max(contrast @ covariance @ contrast, 0.0)))
    difference = float(areas[0] - areas[1])
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * deviation
    if deviation > 0:
        p = float(2 * stats.norm.sf(abs(difference) / deviation))
    else:
        p = float(difference == 0)
    return AurocDifference(difference, difference - half, difference + half, p)


def trapezoid(x: np.ndarray, y: np.ndarray) -> float:
    """Area under the straight lines between points (n,), as np.trapezoid of NumPy 2."""
    return float((np.diff(x) * (y[1:] + y[:-1])).sum() / 2)
