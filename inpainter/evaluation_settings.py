"""What --mode heatmap of eval.py compares, and how: its settings and its flags."""

import argparse
import logging
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Literal, get_args

from common.candidates import HitRule
from common.cli import add_common_arguments, as_yaml
from common.config import ConfigError, given_by_set
from common.froc import CountedOn
from common.grey_range import Window
from common.html_report import GALLERY_IMAGES
from common.image_names import OnUnknown
from inpainter.predictor import PIXEL_KEYS, settings_in
from inpainter.settings import PicardConfig, input_path

LOG = logging.getLogger(__name__)
MOST_RESAMPLES = 100_000
"""Bootstrap draws take about a millisecond each."""

PATHS = ("heatmap_dir", "annotations", "ignore_masks", "image_dir", "metadata", "compare")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is compared, and how; paths may also be given as text."""

    heatmap_dir: Path
    """Folder that predict_heatmap.py wrote, with heatmaps.csv."""
    annotations: Path
    """Boxes as CSV, masks, or what labelling tools write; see common/annotations.py."""
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
    resize_masks: bool = False
    """Masks of another size are stretched to their image's, or refused."""
    white_value: int | None = None
    """Stored value that means white, as the settings' white_value; for images alone."""
    window: Window = "auto"
    """What images show black and white, as the settings' window."""
    n_resamples: int = 1000
    """Bootstrap draws per interval; 0 = no intervals."""
    seed: int = 0
    """Seed of the bootstrap."""
    hit_rule: HitRule = "centre_in_mask"
    """When a candidate hits a lesion; see common.candidates.find_in_image."""
    min_iou: float = 0.1
    """For the rule iou: overlap of the boxes by their union."""
    false_positives_on: CountedOn = "all"
    """Images, or volumes, on which FROC counts false positives."""
    min_distance: int | None = None
    """Pixels between candidates; None = 2 % of the image's longer side."""
    size_bins: tuple[float, ...] = ()
    """Bounds of the lesion sizes that are told apart, in pixels; none = terciles."""
    metadata: Path | None = None
    """CSV file about the images; see common.cohort.read_metadata."""
    groups: tuple[str, ...] = ()
    """Columns of it by which all results are split."""
    compare: Path | None = None
    """Another folder of heatmaps of the same images; see inpainter/comparison.py."""

    def __post_init__(self) -> None:
        for name in (
            "heatmap_dir",
            "annotations",
            "ignore_masks",
            "image_dir",
            "metadata",
            "compare",
        ):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        grey = self.inside_tissue
        if grey is not None and not 0 <= grey < 1:
            raise ConfigError(f"inside_tissue must be a grey value in [0, 1), got {grey}")
        if grey is not None and self.image_dir is None:
            raise ConfigError("inside_tissue needs the images. Pass --image_dir.")
        if not 0 <= self.n_resamples <= MOST_RESAMPLES:
            expected = f"must be 0 to {MOST_RESAMPLES}, of which 1000 are usual"
            raise ConfigError(f"bootstrap draws {expected}, got {self.n_resamples}")
        if not 0 < self.min_iou <= 1:
            raise ConfigError(f"--min_iou must be above 0 and at most 1, got {self.min_iou}")
        if self.min_distance is not None and self.min_distance < 1:
            raise ConfigError(f"--min_distance must be 1 pixel or more: {self.min_distance}")
        if any(bound <= 0 for bound in self.size_bins):
            raise ConfigError(f"--size_bins must be above 0 pixels, got {self.size_bins}")
        if self.groups and self.metadata is None:
            raise ConfigError("--group needs the file that has the column. Pass --metadata.")


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of --mode heatmap, all but --mode itself."""
    add_common_arguments(parser, PicardConfig, default_config="configs/default.yaml")
    add = parser.add_argument
    add("--heatmap_dir", type=Path, metavar="DIR",
        help="required: folder that predict_heatmap.py wrote, with heatmaps.csv")  # fmt: skip
    add("--annotations", type=Path, metavar="FILE|DIR",
        help="required: boxes as CSV with columns image,top,left,height,width[,label] in pixels, "
             "a folder of masks named like the images (above 0 = lesion), or what COCO, LabelMe or "
             "YOLO write; an image without annotation is normal")  # fmt: skip
    add("--resize_masks", action="store_true",
        help="stretch masks of another size to their image's (default: refuse them)")  # fmt: skip
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
    add("--metadata", type=Path, metavar="FILE",
        help="CSV about the images: column image and any others; a column patient says which "
             "images intervals draw together")  # fmt: skip
    add("--group", action="append", default=[], metavar="COLUMN",
        help="results also for each value of this column of --metadata, such as scanner; may be "
             "given several times")  # fmt: skip
    add("--compare", type=Path, metavar="DIR",
        help="another folder of heatmaps of the same images: differences, with paired 95 %% "
             "intervals")  # fmt: skip
    add("--hit_rule", choices=get_args(HitRule), default="centre_in_mask",
        help="FROC: when a local maximum hits a lesion: it is a pixel of it; the boxes overlap "
             "(--min_iou); or by the rule of BCS-DBT (default: centre_in_mask)")  # fmt: skip
    add("--min_iou", type=float, default=0.1, metavar="SHARE",
        help="for --hit_rule iou: overlap of the boxes by their union (default: 0.1)")  # fmt: skip
    add("--false_positives", choices=get_args(CountedOn), default="all",
        help="FROC: images (volumes) on which false positives are counted: all, or those without "
             "lesion (default: all)")  # fmt: skip
    add("--min_distance", type=int, metavar="PX",
        help="FROC: pixels between local maxima (default: 2 %% of the longer side)")  # fmt: skip
    add("--size_bins", type=float, nargs="+", default=[], metavar="PX",
        help="bounds of the lesion sizes that are told apart, in pixels of area (default: "
             "terciles)")  # fmt: skip


def as_scored(config: PicardConfig, arguments: argparse.Namespace) -> PicardConfig:
    """The settings, but images are read as they were when the heatmaps were made, and the same is
    tissue.

    arguments: heatmap_dir has the config.yaml that says so, if it has any; what --set gives comes
    before it.
    """
    made_with = settings_in(arguments.heatmap_dir)
    if made_with is None:
        return config
    given = {key for text in arguments.overrides for key in given_by_set(PicardConfig, text)}
    keys = {"test.tissue_threshold"} - given
    if given.isdisjoint(PIXEL_KEYS):  # those of another file belong together
        keys |= PIXEL_KEYS
    values = {key: attrgetter(key)(made_with) for key in sorted(keys)}
    if said := [f"{k}: {as_yaml(v)}" for k, v in values.items() if v != attrgetter(k)(config)]:
        LOG.info("As the heatmaps were made: %s", ", ".join(said))
    threshold = values.pop("test.tissue_threshold", config.test.tissue_threshold)
    test = replace(config.test, tissue_threshold=threshold)
    return replace(config, test=test, **values)


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
        window=config.window,
        on_bad_image=arguments.on_bad_image or config.test.on_bad_image,
        on_unknown_image=arguments.on_unknown_image,
        resize_masks=arguments.resize_masks,
        n_resamples=arguments.bootstrap,
        seed=config.seed,
        hit_rule=arguments.hit_rule,
        min_iou=arguments.min_iou,
        false_positives_on=arguments.false_positives,
        min_distance=arguments.min_distance,
        size_bins=tuple(arguments.size_bins),
        metadata=arguments.metadata,
        groups=tuple(arguments.group),
        compare=arguments.compare,
    )
