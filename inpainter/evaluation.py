"""Heatmaps against annotations: which pixels count, and every number on one kind of heatmap.

Larger heatmap values are more anomalous, as predict_heatmap.py writes them.
"""

import argparse
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from common.annotations import Annotations, MaskAnnotations, find_masks, read_annotations
from common.cli import add_common_arguments
from common.errors import UserError
from common.files import escaped
from common.html_report import GALLERY_IMAGES
from common.image_names import ImageNames, OnUnknown
from common.images import read_image
from common.metrics import (
    Interval,
    PixelCase,
    binary_intervals,
    binary_score,
    mean_intervals,
    pixel_scores,
)
from common.pooled_metrics import PooledMetrics, pool_pixels, pooled_intervals
from inpainter.heatmap_folder import (
    HEATMAP_LIST,
    LEFT_OUT,
    EvaluationError,
    HeatmapEntry,
    left_out,
    list_heatmaps,
    read_heatmap,
)
from inpainter.settings import PicardConfig, input_path

LOG = logging.getLogger(__name__)
UNUSABLE = (UserError, OSError, MemoryError)  # what one bad image raises
MOST_RESAMPLES = 100_000
"""Bootstrap draws take about a millisecond each."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is compared, and how; paths may also be given as text."""

    heatmap_dir: Path
    """Folder that predict_heatmap.py wrote, with heatmaps.csv."""
    annotations: Path
    """CSV file of boxes or folder of masks; see common/annotations.py."""
    ignore_masks: Path | None = None
    """Folder of masks; pixels above 0 do not count."""
    image_dir: Path | None = None
    """Folder of the images, for inside_tissue and the contact sheet; their sizes are compared."""
    inside_tissue: float | None = None
    """Only pixels of a larger grey value, in [0, 1), count; None = all."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """An image that cannot be evaluated is left out, counted and named, or stops the run."""
    on_unknown_image: OnUnknown = "error"
    """The same for an annotation of an image that has no heatmap."""
    white_value: int | None = None
    """Stored value that means white, as the settings' white_value; for images alone."""
    n_resamples: int = 1000
    """Bootstrap draws per interval; 0 = no intervals."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        for name in ("heatmap_dir", "annotations", "ignore_masks", "image_dir"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        grey = self.inside_tissue
        if grey is not None and not 0 <= grey < 1:
            raise EvaluationError(f"inside_tissue must be a grey value in [0, 1), got {grey}")
        if grey is not None and self.image_dir is None:
            raise EvaluationError("inside_tissue needs the images. Pass --image_dir.")
        if not 0 <= self.n_resamples <= MOST_RESAMPLES:
            expected = f"must be 0 to {MOST_RESAMPLES}, of which 1000 are usual"
            raise EvaluationError(f"bootstrap draws {expected}, got {self.n_resamples}")


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of --mode heatmap, all but --mode itself."""
    add_common_arguments(parser, PicardConfig, default_config="configs/default.yaml")
    add = parser.add_argument
    add("--heatmap_dir", type=Path, metavar="DIR",
        help="required: folder that predict_heatmap.py wrote, with heatmaps.csv")  # fmt: skip
    add("--annotations", type=Path, metavar="FILE|DIR",
        help="required: boxes as CSV with columns image,top,left,height,width[,label] in pixels, "
             "or a folder of masks named like the images (above 0 = lesion); an image without "
             "annotation is normal")  # fmt: skip
    add("--ignore_masks", type=Path, metavar="DIR",
        help="folder of masks; pixels above 0 do not count")  # fmt: skip
    add("--image_dir", type=Path, metavar="DIR",
        help="folder of the images: draws a contact sheet; for --inside_tissue (there: "
             "test_data_path if not given)")  # fmt: skip
    add("--inside_tissue", type=float, nargs="?", const=True, metavar="GREY",
        help="count only pixels brighter than this, in [0, 1) (without a number: "
             "test.tissue_threshold)")  # fmt: skip
    add("--output_dir", type=Path, metavar="DIR",
        help="where to write (default: <heatmap_dir>/evaluation)")  # fmt: skip
    add("--on_bad_image", choices=("skip", "error"),
        help="an image that cannot be evaluated is left out, counted and named, or stops the run "
             "(default: test.on_bad_image)")  # fmt: skip
    add("--on_unknown_image", choices=("error", "skip"), default="error",
        help="the same for an annotation of an image without heatmap (default: error)")  # fmt: skip
    add("--bootstrap", type=int, default=1000, metavar="N",
        help="draws for 95 %% intervals over images, 0 = no intervals (default: 1000)")  # fmt: skip
    add("--report", action="store_true",
        help="also write report.html: numbers, curves and images on one page")  # fmt: skip
    add("--report_images", type=int, default=GALLERY_IMAGES, metavar="N",
        help="images in it, those on which the scores are most wrong "
             f"(default: {GALLERY_IMAGES})")  # fmt: skip


def evaluation_settings(config: PicardConfig, arguments: argparse.Namespace) -> EvaluationSettings:
    """What the flags of `add_evaluation_flags` and the config ask for. Raises ConfigError."""
    image_dir, inside_tissue = arguments.image_dir, arguments.inside_tissue
    if inside_tissue is not None:
        if inside_tissue is True:
            inside_tissue = config.test.tissue_threshold
        image_dir = image_dir or input_path(config.test_data_path, "test_data_path")
    return EvaluationSettings(
        heatmap_dir=arguments.heatmap_dir,
        annotations=arguments.annotations,
        ignore_masks=arguments.ignore_masks,
        image_dir=image_dir,
        inside_tissue=inside_tissue,
        white_value=config.white_value,
        on_bad_image=arguments.on_bad_image or config.test.on_bad_image,
        on_unknown_image=arguments.on_unknown_image,
        n_resamples=arguments.bootstrap,
        seed=config.seed,
    )


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
class MetricResult:
    """All numbers on one kind of heatmap; intervals are 95 % bootstrap ones over images."""

    metric: str
    rows: list[ImageRow]
    entries: list[HeatmapEntry]
    """Where the rows' heatmaps are."""
    excluded: dict[str, str]
    """Image that could not be evaluated -> reason."""
    per_image: dict[str, Interval]
    """auroc, ap: mean over the images whose rows have them."""
    pooled: dict[str, Interval]
    """auroc, ap, pro over the pixels of all images together."""
    image_level: dict[str, Interval] | None
    """auroc, ap of max_score, lesion against normal images; None without normal ones."""
    pixels: PooledMetrics
    """Curves and histogram behind pooled."""


@dataclass(frozen=True)
class Sources:
    """Where the images' labels come from."""

    settings: EvaluationSettings
    annotations: Annotations
    ignore_masks: MaskAnnotations | None

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

    def grey_values(self, image: str, size: tuple[int, int]) -> np.ndarray:
        """(H, W) in [0, 1]. Raises EvaluationError unless the image has its heatmap's size."""
        path = self.settings.image_dir / image
        grey = read_image(path, 1, white_value=self.settings.white_value)[0].numpy()
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
    annotations = read_annotations(settings.annotations, known, on_unknown=unknown, remedy=remedy)
    ignore_masks = None
    if settings.ignore_masks is not None:
        ignore_masks = find_masks(settings.ignore_masks, ImageNames(known, unknown, remedy))
    sources = Sources(settings, annotations, ignore_masks)
    unscored = {image: why for image, why in unscored.items() if image in annotations.of_image}
    if unscored:
        report_unscored(unscored, settings)
    results = [evaluate_metric(entries, sources) for entries in by_metric.values()]
    return Evaluation(settings, sources, results, unscored)


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
    usable, rows, excluded = [], [], {}
    for entry in tqdm(entries, desc=metric, leave=False, disable=None):
        try:
            rows.append(evaluate_image(entry, sources))
            usable.append(entry)
        except UNUSABLE as error:
            name, reason = escaped(entry.image), str(error) or type(error).__name__
            if settings.on_bad_image == "error":
                raise EvaluationError(f"{name}, {metric}: {reason}") from error
            LOG.warning("left out: %s, %s: %s", name, metric, reason)
            excluded[entry.image] = reason
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
    draws = {"n_resamples": settings.n_resamples, "seed": settings.seed}
    pixels = pool_pixels(StoredCases(sources, usable))
    labels = np.array([row.has_lesion for row in rows])
    maxima = np.array([row.max_score for row in rows])
    per_image = {name: [getattr(row, name) for row in scored] for name in ("auroc", "ap")}
    return MetricResult(
        metric=metric,
        rows=rows,
        entries=usable,
        excluded=excluded,
        per_image=mean_intervals(per_image, **draws),
        pooled=pooled_intervals(pixels, **draws),
        image_level=None if labels.all() else binary_intervals(labels, maxima, **draws),
        pixels=pixels,
    )


def evaluate_image(entry: HeatmapEntry, sources: Sources) -> ImageRow:
    """The numbers of one image. Raises one of UNUSABLE where it has none."""
    case, settings = sources.read(entry), sources.settings
    if settings.image_dir is not None and settings.inside_tissue is None:
        sources.grey_values(entry.image, case.heatmap.shape)  # compares the sizes
    scores, labels = pixel_scores(case)
    if case.segmentation.any() and not labels.any():
        raise EvaluationError("all its lesion pixels are ignored, so it is no normal image either")
    both = labels.any() and not labels.all()
    auroc, ap = binary_score(labels, scores) if both else (None, None)
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
