"""The numbers of an evaluation of heatmaps: of an image, of a group, of one kind of heatmap."""

from dataclasses import dataclass
from typing import NamedTuple

from common.metrics import Interval
from common.pooled_metrics import PooledMetrics
from inpainter.detection import Detection
from inpainter.heatmap_tables import HeatmapEntry


class ImageRow(NamedTuple):
    """One image's numbers; a row of per_image.csv."""

    image: str
    metric: str
    has_lesion: bool
    auroc: float | None
    """Over its pixels, as is AP; None unless lesion and other pixels both count."""
    ap: float | None
    max_score: float
    lesion_pixels: int
    pixels: int
    constant: bool
    """All pixels score the same, so that AUROC is 0.5 whatever the image shows."""


@dataclass(frozen=True)
class GroupResult:
    """The results on the images that have one value of a column of the metadata."""

    column: str
    value: str
    images: int
    images_with_lesion: int
    pooled: dict[str, Interval] | None
    """auroc, ap, pro over their pixels, at the thresholds kept; None without lesion."""
    image_level: dict[str, Interval] | None
    """auroc, ap of max_score; None unless both kinds of image are there."""
    sensitivity: dict[str, Interval] | None
    """FROC, as Detection.sensitivity, with their own false positives; None without lesion or
    without images to count these on."""


@dataclass(frozen=True)
class MetricResult:
    """All numbers on one kind of heatmap; intervals are 95 % bootstrap ones over images, or over
    the volumes or patients that Evaluation.clusters tells."""

    metric: str
    rows: list[ImageRow]
    entries: list[HeatmapEntry]
    """Where the rows' heatmaps are."""
    excluded: dict[str, str]
    """Image that could not be evaluated -> reason."""
    per_image: dict[str, Interval]
    """auroc, ap: mean over the images whose rows have them."""
    pooled: dict[str, Interval]
    """auroc, ap, pro over the pixels of all images together; pro is AUPRO at 30 %."""
    image_level: dict[str, Interval] | None
    """auroc, ap of max_score, lesion against normal images; None without normal ones."""
    pixels: PooledMetrics
    """Curves and histogram behind pooled; best Dice and F1 with their thresholds."""
    detection: Detection
    """FROC: lesions found at false positives per image or volume."""
    groups: list[GroupResult]
    """By column and value of the metadata, where asked for."""
