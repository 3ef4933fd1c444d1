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
Where images are slices, volumes have a threshold of their own, from the largest scores of normal
volumes: slices of one volume are not drawn independently, and the more there are, the larger is the
largest.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    volumes: np.ndarray = field(default_factory=lambda: np.empty(0))
    """(v,) ascending: each volume's largest score, of all its slices; v = 0 without slices."""

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
    volume_threshold: float | None = None
    """A volume is abnormal if the largest score of all its slices is above; None without normal
    volumes, or with too few for the specificity that was asked for."""
    volume_specificity: Interval | None = None
    """Share of further normal volumes that are called normal, as image_specificity."""


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
        lines += [
            line for name, each in self.metrics.items() for line in self._of_volumes(name, each)
        ]
        left_out = self.normals["left_out"]
        return "\n".join([*lines, *[f"{len(left_out)} images left out"] * bool(left_out)])

    def _of_volumes(self, metric: Metric, point: MetricPoint) -> list[str]:
        """What there is to say of volumes: nothing where no image is a slice."""
        v = len(point.normal.volumes)
        if point.volume_threshold is not None:
            share = format_interval(point.volume_specificity)
            return [
                f"{metric}: a volume is abnormal above {point.volume_threshold:.6g} (specificity, "
                f"from {v} normal volumes: {share})"
            ]
        asked = self.asked["image"]
        too_few = f"a specificity of {asked:g} needs {fewest(asked)} normal volumes, and {v} are"
        return [f"{metric}: no threshold for volumes: {too_few} here"] * (v > 0)


def fewest(specificity: float) -> int:
    """How many normal images, or volumes, can promise a specificity."""
    return math.ceil(specificity / (1 - specificity) - 1e-9)


def image_rank(n: int, specificity: float) -> int:
    """k: the k-th smallest of n normal images' maxima is the threshold.

    Raises OperatingPointError where n are too few to promise that specificity.
    """
    k = math.ceil((n + 1) * specificity - 1e-9)
    if k > n:
        most = f"{n} of them allow {n / (n + 1):.4g} at most" if n else "there is none"
        raise OperatingPointError(
            f"A specificity of {specificity:g} needs {fewest(specificity)} normal images or more "
            f"that can be scored: {most}. Give more images, or a lower specificity."
        )
    return max(k, 1)


def conformal(maxima: np.ndarray, specificity: float) -> tuple[float, Interval]:
    """The threshold of n ascending maxima of normal images or volumes, and its specificity.

    Raises OperatingPointError for too few.
    """
    n = len(maxima)
    k = image_rank(n, specificity)
    tail = (1 - CONFIDENCE) / 2
    low, high = beta.ppf([tail, 1 - tail], k, n + 1 - k)
    return float(maxima[k - 1]), Interval(k / (n + 1), float(low), float(high))


def thresholds(
    metric: str, scores: Sequence["ImageScores"], asked: Mapping[str, float]
) -> MetricPoint:
    """The operating point of one metric from its scores of normal images, one each.

    asked: specificities in (0, 1), "image" (of volumes, too) and "pixel". Raises
    OperatingPointError for too few images, or where their largest scores are all the same.
    """
    normal = pooled(scores)
    image_threshold, image_share = conformal(normal.maxima, asked["image"])
    n = len(normal.maxima)
    if normal.maxima[0] == normal.maxima[-1]:
        raise OperatingPointError(
            f"{metric}: all {n} normal images have the same largest score, {normal.maxima[0]:g}, "
            "so it tells nothing apart. Are the images, or the heatmaps, constant?"
        )
    pool = np.concatenate([each.pixels for each in scores])
    pixel_threshold = float(np.quantile(pool, asked["pixel"], method="inverted_cdf"))
    pixel_threshold = min(pixel_threshold, image_threshold)
    below = [np.mean(each.pixels <= pixel_threshold) for each in scores]
    error = 1.96 * float(np.std(below, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    mean = float(np.mean(below))
    ends = (max(mean - error, 0.0), min(mean + error, 1.0)) if n > 1 else (None, None)
    of_volumes: tuple[float | None, Interval | None] = (None, None)
    if len(normal.volumes) >= max(fewest(asked["image"]), 1):
        of_volumes = conformal(normal.volumes, asked["image"])
    pixel_share = Interval(mean, *ends)
    return MetricPoint(
        image_threshold, pixel_threshold, image_share, pixel_share, normal, *of_volumes
    )


class ImageScores(NamedTuple):
    """One metric's scores of one image."""

    largest: float
    pixels: np.ndarray
    """(LEVELS,) ascending: quantiles of the pixels that windows with tissue say something of."""
    windows: Mapping[str, np.ndarray]
    """The same of the windows, by scale."""
    volume: str | None = None
    """The volume that the image is a slice of; None for a whole file."""


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
    volumes: dict[str, float] = {}
    for each in scores:
        if each.volume is not None:
            volumes[each.volume] = max(each.largest, volumes.get(each.volume, -math.inf))
    maxima = np.sort([each.largest for each in scores])
    return NormalScores(maxima, pixels, windows, np.sort([*volumes.values()]))


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
        _ascending(normal.get("volumes", []), fewest=0),  # written before volumes were told apart
    )
    numbers = [float(saved[key]) for key in ("image_threshold", "pixel_threshold")]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"thresholds {numbers}")
    shares = [Interval(*saved[key]) for key in ("image_specificity", "pixel_specificity")]
    above, share = saved.get("volume_threshold"), saved.get("volume_specificity")
    if (above is None) != (share is None) or not math.isfinite(above or 0):
        raise ValueError(f"volumes' threshold {above} of specificity {share}")
    of_volumes = (None, None) if share is None else (float(above), Interval(*share))
    return MetricPoint(*numbers, *shares, scores, *of_volumes)


def _ascending(values: object, fewest: int = 2) -> np.ndarray:
    array = np.array(values, dtype=float)
    if (
        array.ndim != 1
        or len(array) < fewest
        or not np.isfinite(array).all()
        or (np.diff(array) < 0).any()
    ):
        raise ValueError("expected a list of finite numbers, ascending")
    return array
