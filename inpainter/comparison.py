"""Two folders of heatmaps on the same images: what one finds that the other does not."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.froc import MEAN, FrocEvents
from common.image_folders import shown_names
from common.image_names import volume_of
from common.metrics import AurocDifference, Interval, MetricError, bootstrap_intervals, delong
from common.pooled_metrics import curve_areas, curves
from inpainter.evaluation import Evaluation, Sources, evaluate_metric
from inpainter.evaluation_results import ImageRow, MetricResult
from inpainter.heatmap_tables import EvaluationError, HeatmapEntry, list_heatmaps

LOG = logging.getLogger(__name__)
NAMES = {
    "per_image_auroc": "mean pixel AUROC of images",
    "per_image_ap": "mean pixel AP of images",
    "pixel_auroc": "AUROC over all pixels",
    "pixel_ap": "AP over all pixels",
    "aupro": "AUPRO at 30 %",
    "froc_mean": "FROC mean",
}


@dataclass(frozen=True)
class Comparison:
    """One kind of heatmap of a folder against one of another folder, on the images of both."""

    metric: str
    other_metric: str
    other_folder: Path
    images: int
    only_one_has: list[str]
    """Images that one of the two lacks, or that could not be evaluated there."""
    values: dict[str, float]
    """Of this folder, by NAMES; at the thresholds kept, as are the others'."""
    other_values: dict[str, float]
    differences: dict[str, Interval]
    """This folder's less the other's: 95 % paired bootstrap intervals, over the same draws."""
    image_auroc: AurocDifference | None
    """The same of the image-level AUROC, by DeLong's test, which takes images for independent; None
    with fewer than two images of a kind."""


def compare(evaluation: Evaluation, other_folder: Path) -> list[Comparison]:
    """Compares each kind of heatmap with that of the same name, or the only one with the only one.

    Raises EvaluationError where there is no such pair, or no common image with a lesion.
    """
    if other_folder.resolve() == evaluation.settings.heatmap_dir.resolve():
        raise EvaluationError(f"--compare {other_folder} is --heatmap_dir itself. Pass another.")
    other = list_heatmaps(other_folder)
    ours = {result.metric: result for result in evaluation.results}
    pairs = [(result, other[metric]) for metric, result in ours.items() if metric in other]
    if not pairs and len(ours) == len(other) == 1:
        pairs = [(*ours.values(), *other.values())]
    if not pairs:
        raise EvaluationError(
            f"--compare: {evaluation.settings.heatmap_dir} has {', '.join(ours)}, {other_folder} "
            f"has {', '.join(other)}: no kind of heatmap is in both."
        )
    return [compare_metric(*pair, other_folder, evaluation.sources) for pair in pairs]


def compare_metric(
    ours: MetricResult, entries: Sequence[HeatmapEntry], other_folder: Path, sources: Sources
) -> Comparison:
    """Evaluates the other folder's heatmaps of our images, and both on the images that they share.

    Raises EvaluationError where they share no image with a lesion, or where pixels differ.
    """
    known = {row.image: number for number, row in enumerate(ours.rows)}
    here = [entry for entry in entries if entry.image in known]
    if not here:
        raise EvaluationError(f"--compare {other_folder} has none of the {len(known)} images.")
    bare = replace(sources, settings=replace(sources.settings, n_resamples=0, groups=()))
    theirs = evaluate_metric(here, bare)
    names = [row.image for row in theirs.rows]
    numbers = np.array([known[name] for name in names])
    check_same_pixels([ours.rows[number] for number in numbers], theirs.rows)
    apart = sorted(({entry.image for entry in entries} | set(known)) - set(names))
    if apart:
        LOG.warning("left out of the comparison: %d images: %s", len(apart), shown_names(apart))
    one, other = Side.of(ours, numbers, apart), Side.of(theirs, np.arange(len(names)), apart)

    def differences(draw: np.ndarray) -> dict[str, float]:
        ours_on, theirs_on = one.values(draw), other.values(draw)
        return {name: ours_on[name] - theirs_on[name] for name in NAMES}

    every = np.arange(len(names))
    return Comparison(
        metric=ours.metric,
        other_metric=theirs.metric,
        other_folder=other_folder,
        images=len(names),
        only_one_has=apart,
        values=one.values(every),
        other_values=other.values(every),
        differences=bootstrap_intervals(
            differences(every), differences, len(names), **sources.resampling().of(names)
        ),
        image_auroc=image_difference([ours.rows[number] for number in numbers], theirs.rows),
    )


def image_difference(
    ours: Sequence[ImageRow], theirs: Sequence[ImageRow]
) -> AurocDifference | None:
    """Of the image-level AUROCs of the same images; None with fewer than two of a kind."""
    labels = np.array([row.has_lesion for row in ours])
    maxima = [np.array([row.max_score for row in rows]) for rows in (ours, theirs)]
    try:
        return delong(labels, *maxima)
    except MetricError:
        return None


def check_same_pixels(ours: Sequence[ImageRow], theirs: Sequence[ImageRow]) -> None:
    """Raises EvaluationError for an image of which other pixels count in the other folder."""
    for one, other in zip(ours, theirs, strict=True):
        if (one.pixels, one.lesion_pixels) != (other.pixels, other.lesion_pixels):
            raise EvaluationError(
                f"{one.image}: its two heatmaps have {one.pixels} and {other.pixels} pixels that "
                "count. Compare heatmaps of the same images in the same size."
            )


@dataclass(frozen=True)
class Side:
    """One folder's results on the images that both have, (n,) in the same order."""

    found: np.ndarray
    """(n, 3, P), as PooledMetrics.found."""
    per_image: dict[str, np.ndarray]
    """auroc, ap: (n,), NaN for images that have none."""
    events: FrocEvents
    image_of_unit: np.ndarray
    """An image of each unit of FROC, by its place below n; -1: not wholly in both folders."""

    @classmethod
    def of(cls, result: MetricResult, numbers: np.ndarray, apart: Sequence[str]) -> "Side":
        """numbers: (n,) the rows of the images; apart: images that are not in both."""
        rows = [result.rows[number] for number in numbers]
        partly = set(map(volume_of, apart))
        places = {volume_of(row.image): place for place, row in enumerate(rows)}
        units = result.detection.found.units
        return cls(
            result.pixels.found[numbers],
            {
                name: np.array([getattr(row, name) for row in rows], dtype=float)
                for name in ("auroc", "ap")
            },
            result.detection.events,
            np.array([-1 if unit in partly else places.get(unit, -1) for unit in units]),
        )

    def values(self, draw: np.ndarray) -> dict[str, float]:
        """The values by NAMES on drawn images (m,), which are places below n; NaN: undefined."""
        areas = curve_areas(curves(self.found, draw))
        means = {name: values[draw] for name, values in self.per_image.items()}
        means = {name: values[np.isfinite(values)] for name, values in means.items()}
        times = np.append(np.bincount(draw, minlength=len(self.found)), 0)  # -1: not at all
        curve = self.events.curve(times[self.image_of_unit].astype(float))
        return {
            **{f"per_image_{k}": float(v.mean()) if v.size else np.nan for k, v in means.items()},
            "pixel_auroc": areas["auroc"],
            "pixel_ap": areas["ap"],
            "aupro": areas["pro"],
            "froc_mean": curve.at_rates()[MEAN],
        }
