"""The operating point: which score means abnormal, from normal images alone.

A threshold per metric for an image's largest score, at a chosen specificity, and one for pixels.
Larger scores are more anomalous, for every metric; abnormal is what is above the threshold. One
threshold holds for all images: scores are compared between images as they are, never rescaled by
the image's own smallest and largest.

The image's threshold is the k-th smallest maximum of n normal images, k = ⌈(n + 1) specificity⌉:
split conformal prediction (Vovk, Gammerman, Shafer 2005; Lei et al. 2018). Whatever the scores'
distribution, a further normal image, drawn as they were, is then called normal with at least that
probability, and the specificity that this very threshold has is distributed as Beta(k, n + 1 - k).
The pixels' threshold is below or at the image's, so that every abnormal image has such pixels.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import beta

from common.checkpoint import CheckpointError, save_text_atomic
from common.errors import UserError
from common.files import read_regular
from common.metrics import CONFIDENCE, Interval, format_interval
from inpainter.predictor import Predictor
from inpainter.run_identity import Identity, differences, influential_settings
from inpainter.settings import Metric

LEVELS = 1000
"""Values that stand for all of an image's, or of all images', pixels or windows."""
MAKE = "Run eval.py --mode calibrate on normal images, which writes it"
METRICS_KEY = "test.heatmap_metrics"
OF_FEATURES = frozenset({"dis", "feature_space"})
"""Weights that the `_feature` metrics alone depend on."""


class OperatingPointError(UserError):
    """Normal images do not allow the operating point that was asked for."""


@dataclass(frozen=True)
class NormalScores:
    """One metric's scores of normal images, larger = more anomalous; each image weighs the same."""

    maxima: np.ndarray
    """(n,) ascending: each image's largest score."""
    pixels: np.ndarray
    """(LEVELS,) ascending: quantiles of the scores of pixels, those of windows that were left out
    for want of tissue (which are exactly 0) not counted."""
    windows: Mapping[str, np.ndarray]
    """By scale, (LEVELS,) ascending: quantiles of the scores of windows."""

    def deviations(self, score: float) -> float:
        """How far a score is above the mean maximum of normal images, in standard deviations."""
        return float((score - self.maxima.mean()) / self.maxima.std(ddof=1))

    def chance(self, score: float) -> float:
        """The chance that a normal image's largest score is as large or larger, in (0, 1].

        The conformal p-value, (1 + those of the n that are) / (n + 1).
        """
        n = len(self.maxima)
        return (1 + n - int(np.searchsorted(self.maxima, score, side="left"))) / (n + 1)


@dataclass(frozen=True)
class MetricPoint:
    """The operating point of one metric."""

    image_threshold: float
    """An image is abnormal if its largest score is above."""
    pixel_threshold: float
    """A finding is a region of pixels above, whose largest score is above image_threshold."""
    image_specificity: Interval
    """Share of further normal images that are called normal: what is expected, and the 95 %
    interval of what it is."""
    pixel_specificity: Interval
    """Share of a normal image's pixels, those without a score left aside, that are at or below
    pixel_threshold: mean over images, 95 % by the normal approximation."""
    normal: NormalScores


@dataclass(frozen=True)
class OperatingPoint:
    """What operating_point_%08d.json holds."""

    asked: dict[str, float]
    """The specificities that were asked for, "image" and "pixel"."""
    made_for: Identity
    """The weights, by role, and the settings that the scores depend on, by dotted key."""
    normals: dict[str, Any]
    """How many normal images, from where, a hash of their names and contents, which were left out.
    """
    metrics: dict[Metric, MetricPoint]

    def text(self) -> str:
        """The file's content, JSON."""
        content = {
            "polarity": "larger scores are more anomalous; abnormal = above the threshold",
            "scale": "one for all images",
            **asdict(self),
        }
        return json.dumps(content, default=np.ndarray.tolist, ensure_ascii=False) + "\n"

    def save(self, path: Path) -> None:
        save_text_atomic(self.text(), path)

    def summary(self) -> str:
        """What was found, a line per metric, for the terminal."""
        n = self.normals["scored"]
        lines = [
            f"{metric}: an image is abnormal above {each.image_threshold:.6g} (specificity, from "
            f"{n} normal images: {format_interval(each.image_specificity)}); its findings reach "
            f"down to {each.pixel_threshold:.6g} (pixels: "
            f"{format_interval(each.pixel_specificity)})"
            for metric, each in self.metrics.items()
        ]
        left_out = self.normals["left_out"]
        return "\n".join([*lines, *[f"{len(left_out)} images left out"] * bool(left_out)])


def image_rank(n: int, specificity: float) -> int:
    """k: the k-th smallest of n normal images' maxima is the threshold.

    Raises OperatingPointError where n are too few to promise that specificity.
    """
    k = math.ceil((n + 1) * specificity - 1e-9)
    if k > n:
        needed = math.ceil(specificity / (1 - specificity) - 1e-9)
        most = f"{n} of them allow {n / (n + 1):.4g} at most" if n else "there is none"
        raise OperatingPointError(
            f"A specificity of {specificity:g} needs {needed} normal images or more that can be "
            f"scored: {most}. Give more images, or a lower specificity."
        )
    return max(k, 1)


def thresholds(
    metric: str, scores: Sequence["ImageScores"], asked: Mapping[str, float]
) -> MetricPoint:
    """The operating point of one metric from its scores of normal images, one each.

    asked: specificities in (0, 1), "image" and "pixel". Raises OperatingPointError for too few
    images, or where their largest scores are all the same.
    """
    normal = pooled(scores)
    n = len(normal.maxima)
    k = image_rank(n, asked["image"])
    if normal.maxima[0] == normal.maxima[-1]:
        raise OperatingPointError(
            f"{metric}: all {n} normal images have the same largest score, {normal.maxima[0]:g}, "
            "so it tells nothing apart. Are the images, or the heatmaps, constant?"
        )
    image_threshold = float(normal.maxima[k - 1])
    pool = np.concatenate([each.pixels for each in scores])
    pixel_threshold = float(np.quantile(pool, asked["pixel"], method="inverted_cdf"))
    pixel_threshold = min(pixel_threshold, image_threshold)
    below = [np.mean(each.pixels <= pixel_threshold) for each in scores]
    tail = (1 - CONFIDENCE) / 2
    low, high = beta.ppf([tail, 1 - tail], k, n + 1 - k)
    image_share = Interval(k / (n + 1), float(low), float(high))
    error = 1.96 * float(np.std(below, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    mean = float(np.mean(below))
    ends = (max(mean - error, 0.0), min(mean + error, 1.0)) if n > 1 else (None, None)
    return MetricPoint(image_threshold, pixel_threshold, image_share, Interval(mean, *ends), normal)


class ImageScores(NamedTuple):
    """One metric's scores of one image."""

    largest: float
    pixels: np.ndarray
    """(LEVELS,) ascending: quantiles of the pixels that windows with tissue say something of."""
    windows: Mapping[str, np.ndarray]
    """The same of the windows, by scale."""


def quantiles(values: np.ndarray) -> np.ndarray:
    """LEVELS values that stand for all: the middles of as many equal parts of the sorted values."""
    places = (np.arange(LEVELS) + 0.5) / LEVELS
    return np.quantile(values, places, method="inverted_cdf")


def pooled(scores: Sequence[ImageScores]) -> NormalScores:
    """The scores of all images, each of the same weight."""
    scales = dict.fromkeys(scale for each in scores for scale in each.windows)
    windows = {
        s: quantiles(np.concatenate([each.windows[s] for each in scores if s in each.windows]))
        for s in scales
    }
    pixels = quantiles(np.concatenate([each.pixels for each in scores]))
    return NormalScores(np.sort([each.largest for each in scores]), pixels, windows)


def scores_depend_on(predictor: Predictor) -> Identity:
    """What an operating point is bound to: the hashes of the weights, and the settings."""
    return {**predictor.weights, **influential_settings(predictor.config)}


def unfit(point: OperatingPoint, predictor: Predictor) -> list[str]:
    """Why an operating point is not one of this predictor's scores, in words; [] where it is.

    One of more metrics than the predictor has fits, too.
    """
    metrics = predictor.config.test.heatmap_metrics
    missing = [metric for metric in metrics if metric not in point.metrics]
    if missing:
        return [f"no {', '.join(missing)} there"]
    ignored = {METRICS_KEY}
    if not any(metric.endswith("_feature") for metric in metrics):
        ignored |= OF_FEATURES
    old, new = (
        {key: value for key, value in of.items() if key not in ignored}
        for of in (point.made_for, scores_depend_on(predictor))
    )
    return differences(old, new)


def load_operating_point(path: Path) -> OperatingPoint:
    """Reads operating_point_%08d.json. Raises CheckpointError where it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"There is no {path}. {MAKE}.")
    try:
        saved = json.loads(read_regular(path))
        metrics = {name: _metric_point(value) for name, value in saved["metrics"].items()}
        parts = {key: dict(saved[key]) for key in ("asked", "made_for", "normals")}
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:100]}). {MAKE}."
        ) from None
    return OperatingPoint(**parts, metrics=metrics)


def _metric_point(saved: Mapping[str, Any]) -> MetricPoint:
    """Raises LookupError, TypeError or ValueError for what is no metric's operating point."""
    normal = saved["normal"]
    scores = NormalScores(
        _ascending(normal["maxima"]),
        _ascending(normal["pixels"]),
        {scale: _ascending(values) for scale, values in normal["windows"].items()},
    )
    numbers = [float(saved[key]) for key in ("image_threshold", "pixel_threshold")]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"thresholds {numbers}")
    shares = [Interval(*saved[key]) for key in ("image_specificity", "pixel_specificity")]
    return MetricPoint(*numbers, *shares, scores)


def _ascending(values: object) -> np.ndarray:
    array = np.array(values, dtype=float)
    if (
        array.ndim != 1
        or len(array) < 2
        or not np.isfinite(array).all()
        or (np.diff(array) < 0).any()
    ):
        raise ValueError("expected a list of finite numbers, ascending")
    return array
