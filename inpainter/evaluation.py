"""Heatmaps against annotations: which pixels count, and every number on one kind of heatmap.

Larger heatmap values are more anomalous, as predict_heatmap.py writes them.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from common.annotations import (
    Annotations,
    BoxAnnotations,
    MaskAnnotations,
    ShapeAnnotations,
    find_masks,
    read_annotations,
)
from common.candidates import (
    ImageFindings,
    Region,
    find_candidates,
    find_in_image,
    regions_of_boxes,
    regions_of_mask,
    regions_of_shapes,
)
from common.cohort import PATIENT, Clusters, Metadata, cluster_images, read_metadata
from common.errors import UserError
from common.files import escaped
from common.froc import MEAN
from common.image_names import ImageNames
from common.images import read_image
from common.metrics import (
    MetricError,
    PixelCase,
    binary_intervals,
    bootstrap_intervals,
    mean_intervals,
    pixel_scores,
)
from common.pooled_metrics import (
    LesionScores,
    count_pixels,
    curve_areas,
    curves,
    pooled_intervals,
    score_pixels,
    thresholds_kept,
)
from inpainter.detection import Detection, Resampling, detect, first_images
from inpainter.evaluation_results import GroupResult, ImageRow, MetricResult
from inpainter.evaluation_settings import EvaluationSettings
from inpainter.heatmap_tables import (
    HEATMAP_LIST,
    LEFT_OUT,
    EvaluationError,
    HeatmapEntry,
    left_out,
    list_heatmaps,
    read_heatmap,
)
from inpainter.run_identity import scored_images

if TYPE_CHECKING:
    from inpainter.comparison import Comparison  # which builds on this module
    from inpainter.operating_statistics import OperatingStatistics  # so does it

LOG = logging.getLogger(__name__)
UNUSABLE = (UserError, OSError, MemoryError)  # what one bad image raises
MOST_GROUPS = 30
"""Values of a column by which results are split; a column of more is taken for a slip."""


@dataclass(frozen=True)
class Sources:
    """Where the images' labels come from."""

    settings: EvaluationSettings
    annotations: Annotations
    ignore_masks: MaskAnnotations | None
    metadata: Metadata | None
    clusters: Clusters

    def read(self, entry: HeatmapEntry) -> PixelCase:
        """Reads one heatmap with its labels. Raises one of UNUSABLE, naming the file."""
        heatmap = read_heatmap(entry.file)
        size, grey = heatmap.shape, self.settings.inside_tissue
        ignored = np.zeros(size, dtype=bool)
        if self.ignore_masks is not None:
            ignored |= self.ignore_masks.labels(entry.image, size)
        if grey is not None:
            ignored |= self.grey_values(entry.image, size) <= grey
        return PixelCase(heatmap, self.annotations.labels(entry.image, size), ignored)

    def regions(self, image: str, case: PixelCase) -> list[Region]:
        """The image's lesions: each box or shape, or each 8-connected region of its mask."""
        if isinstance(self.annotations, BoxAnnotations):
            return regions_of_boxes(self.annotations.boxes(image, case.heatmap.shape), case)
        if isinstance(self.annotations, ShapeAnnotations):
            return regions_of_shapes(self.annotations.shapes(image, case.heatmap.shape), case)
        return regions_of_mask(case)

    def findings(self, image: str, case: PixelCase) -> ImageFindings:
        """The heatmap's local maxima, and which lesions they hit."""
        settings = self.settings
        with_boxes = settings.hit_rule == "iou"
        return find_in_image(
            image,
            find_candidates(case, settings.min_distance, with_boxes=with_boxes),
            self.regions(image, case),
            settings.hit_rule,
            min_iou=settings.min_iou,
            volume_slices=self.annotations.volume_slices(image),
        )

    def resampling(self) -> Resampling:
        return Resampling(self.clusters, self.settings.n_resamples, self.settings.seed)

    def grey_values(self, image: str, size: tuple[int, int]) -> np.ndarray:
        """(H, W) in [0, 1]. Raises EvaluationError unless the image has its heatmap's size."""
        path = self.settings.image_dir / image
        shown = {"white_value": self.settings.white_value, "window": self.settings.window}
        grey = read_image(path, 1, **shown)[0].numpy()
        if grey.shape != size:
            raise EvaluationError(
                f"{path} is {grey.shape} pixels (height, width), its heatmap {size}. Is "
                "--image_dir the folder that was scored?"
            )
        return grey


@dataclass(frozen=True)
class StoredCases:
    """Cases that are read from disk each time they are gone through."""

    sources: Sources
    entries: Sequence[HeatmapEntry]

    def __iter__(self) -> Iterator[PixelCase]:
        return (self.sources.read(entry) for entry in self.entries)


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report needs."""

    settings: EvaluationSettings
    sources: Sources
    results: list[MetricResult]
    unscored: dict[str, str]
    """Annotated image that prediction left out -> why."""
    comparisons: "Sequence[Comparison]" = ()
    """With another folder of heatmaps, where inpainter/comparison.py made them."""
    at_operating_point: "Mapping[str, OperatingStatistics]" = field(default_factory=dict)
    """By metric, where the folder has verdicts."""


def evaluate_heatmaps(settings: EvaluationSettings) -> Evaluation:
    """Compares every heatmap of a folder with the annotations.

    Raises EvaluationError, and AnnotationError where annotations do not match the images.
    """
    if settings.image_dir is not None and not settings.image_dir.is_dir():
        raise EvaluationError(f"No folder of images {settings.image_dir}. Correct --image_dir.")
    by_metric = list_heatmaps(settings.heatmap_dir)
    images = dict.fromkeys(entry.image for entries in by_metric.values() for entry in entries)
    unscored = {
        image: why for image, why in left_out(settings.heatmap_dir).items() if image not in images
    }
    known, unknown = [*images, *unscored], settings.on_unknown_image
    remedy = "skip such annotations with --on_unknown_image skip"
    files = scored_images(settings.heatmap_dir, known)
    if settings.image_dir is not None:
        files = {name: settings.image_dir / name for name in known}
    annotations = read_annotations(
        settings.annotations,
        known,
        on_unknown=unknown,
        remedy=remedy,
        resize_masks=settings.resize_masks,
        files=files,
    )
    ignore_masks = None
    if settings.ignore_masks is not None:
        names = ImageNames(known, unknown, remedy)
        ignore_masks = find_masks(
            settings.ignore_masks, names, resize=settings.resize_masks, files=files
        )
    metadata = read_metadata(settings.metadata, images) if settings.metadata else None
    patients = metadata.values(PATIENT) if metadata and PATIENT in metadata.columns else {}
    clusters = cluster_images(images, patients.get, annotations.patient)
    for column in settings.groups:
        check_group(column, metadata)
    sources = Sources(settings, annotations, ignore_masks, metadata, clusters)
    unscored = {image: why for image, why in unscored.items() if image in annotations.of_image}
    if unscored:
        report_unscored(unscored, settings)
    results = [evaluate_metric(entries, sources) for entries in by_metric.values()]
    return Evaluation(settings, sources, results, unscored)


def check_group(column: str, metadata: Metadata) -> None:
    """Raises MetadataError or EvaluationError for a column by which results cannot be split."""
    values = set(metadata.values(column).values())
    if not 1 <= len(values) <= MOST_GROUPS:
        raise EvaluationError(
            f"--group {column}: {metadata.path} has {len(values)} values of it for these images, "
            f"1 to {MOST_GROUPS} can be told apart. Write bands, such as 40-49, into a column."
        )


def report_unscored(unscored: dict[str, str], settings: EvaluationSettings) -> None:
    """Says that annotated images have no heatmap; raises EvaluationError if that is an error."""
    message = (
        f"{len(unscored)} annotated images have no heatmap, for predict_heatmap.py left them out "
        f"({settings.heatmap_dir / LEFT_OUT} says why): {first_names(unscored)}"
    )
    if settings.on_unknown_image == "error":
        raise EvaluationError(
            f"{message}. Mend them and predict again, or evaluate without them: "
            "--on_unknown_image skip."
        )
    LOG.warning("%s", message)


def first_names(images: Iterable[str]) -> str:
    """The first five names, and a sign that there are more."""
    names = list(map(escaped, images))
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)


def evaluate_metric(entries: Sequence[HeatmapEntry], sources: Sources) -> MetricResult:
    """Compares all heatmaps of one metric with their labels.

    Raises EvaluationError where no image with a lesion can be evaluated, and for the first bad
    image if on_bad_image is error.
    """
    settings, metric = sources.settings, entries[0].metric
    usable, rows, findings, excluded = [], [], [], {}
    lesions = LesionScores()
    for entry in tqdm(entries, desc=metric, leave=False, disable=None):
        try:
            case = sources.read(entry)
            row, found = evaluate_image(entry, case, sources), sources.findings(entry.image, case)
        except UNUSABLE as error:
            name, reason = escaped(entry.image), str(error) or type(error).__name__
            if settings.on_bad_image == "error":
                raise EvaluationError(f"{name}, {metric}: {reason}") from error
            LOG.warning("left out: %s, %s: %s", name, metric, reason)
            excluded[entry.image] = reason
            continue
        lesions.add(case)
        usable.append(entry)
        rows.append(row)
        findings.append(found)
    scored = [row for row in rows if row.auroc is not None]
    if not scored:
        if excluded:
            reason = f"{len(excluded)} left out: {next(iter(excluded.values()))}"
        else:
            table = settings.heatmap_dir / HEATMAP_LIST
            reason = (
                f"Does {settings.annotations} mark the lesions of these images, by the names in "
                f"{table}?"
            )
        raise EvaluationError(
            f"{metric}: none of {len(entries)} images has a lesion that can be evaluated. {reason}"
        )
    resampling = sources.resampling()
    draws = resampling.of([row.image for row in rows])
    cases, kept = StoredCases(sources, usable), thresholds_kept(len(usable))
    pixels = count_pixels(cases, lesions, max_thresholds=kept)
    labels = np.array([row.has_lesion for row in rows])
    maxima = np.array([row.max_score for row in rows])
    per_image = {name: [getattr(row, name) for row in scored] for name in ("auroc", "ap")}
    result = MetricResult(
        metric=metric,
        rows=rows,
        entries=usable,
        excluded=excluded,
        per_image=mean_intervals(per_image, **resampling.of([row.image for row in scored])),
        pooled=pooled_intervals(pixels, **draws),
        image_level=None if labels.all() else binary_intervals(labels, maxima, **draws),
        pixels=pixels,
        detection=find_lesions(findings, sources),
        groups=[],
    )
    return replace(result, groups=evaluate_groups(result, sources))


def find_lesions(findings: Sequence[ImageFindings], sources: Sources) -> Detection:
    """FROC. Raises EvaluationError where false positives have nothing to be counted on."""
    settings = sources.settings
    try:
        return detect(
            findings,
            sources.resampling(),
            hit_rule=settings.hit_rule,
            counted_on=settings.false_positives_on,
            min_distance=settings.min_distance,
            size_bins=settings.size_bins,
        )
    except MetricError as error:
        raise EvaluationError(f"{error}. Pass --false_positives all.") from error


def evaluate_groups(result: MetricResult, sources: Sources) -> list[GroupResult]:
    """The results by each value of each column that is asked for, without images that have none."""
    groups = []
    for column in sources.settings.groups:
        value_of = sources.metadata.values(column)
        for value in sorted(set(value_of.values())):
            numbers = [n for n, row in enumerate(result.rows) if value_of.get(row.image) == value]
            if numbers:
                groups.append(evaluate_group(column, value, np.array(numbers), result, sources))
    return groups


def evaluate_group(
    column: str, value: str, numbers: np.ndarray, result: MetricResult, sources: Sources
) -> GroupResult:
    """The results on the images of these numbers."""
    rows, resampling = [result.rows[number] for number in numbers], sources.resampling()
    draws = resampling.of([row.image for row in rows])
    labels = np.array([row.has_lesion for row in rows])
    maxima = np.array([row.max_score for row in rows])

    def pixel_areas(draw: np.ndarray) -> Mapping[str, float]:
        return curve_areas(curves(result.pixels.found, numbers[draw]))

    pooled = image_level = sensitivity = None
    if labels.any():
        values = pixel_areas(np.arange(numbers.size))
        pooled = bootstrap_intervals(values, pixel_areas, numbers.size, **draws)
    if labels.any() and not labels.all():
        image_level = binary_intervals(labels, maxima, **draws)
    detection = result.detection
    units = detection.units_of([row.image for row in rows])
    if labels.any() and np.isfinite(detection.events.at_rates(units)[MEAN]):
        images = first_images(detection.found)
        draws = resampling.of([images[unit] for unit in units])
        sensitivity = detection.events.intervals(units=units, **draws)
    return GroupResult(
        column, value, len(rows), int(labels.sum()), pooled, image_level, sensitivity
    )


def evaluate_image(entry: HeatmapEntry, case: PixelCase, sources: Sources) -> ImageRow:
    """The numbers of one image. Raises one of UNUSABLE where it has none."""
    settings = sources.settings
    if settings.image_dir is not None and settings.inside_tissue is None:
        sources.grey_values(entry.image, case.heatmap.shape)  # compares the sizes
    scores, labels = pixel_scores(case)
    if case.segmentation.any() and not labels.any():
        raise EvaluationError("all its lesion pixels are ignored, so it is no normal image either")
    both = labels.any() and not labels.all()
    auroc, ap = score_pixels(scores, labels) if both else (None, None)
    low, high = float(scores.min()), float(scores.max())
    return ImageRow(
        image=entry.image,
        metric=entry.metric,
        has_lesion=bool(labels.any()),
        auroc=auroc,
        ap=ap,
        max_score=high,
        lesion_pixels=int(labels.sum()),
        pixels=labels.size,
        constant=low == high,
    )
