"""Scores normal images with a trained checkpoint and sets the operating point.

See operating_point.py for what is made of the scores.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.checkpoint import checkpoint_path, load_tensors, require_mapping
from common.cli import add_common_arguments
from common.config_types import ConfigError
from common.errors import UserError
from common.files import escaped
from common.image_folders import list_images
from common.image_sets import data_identity
from common.images import ImageError
from common.volumes import split_slice
from inpainter.calibrate import halves, images_trained_on, normal_images, require_still_there
from inpainter.heatmap import Heatmaps, ScaledHeatmaps
from inpainter.operating_point import (
    ImageScores,
    OperatingPoint,
    OperatingPointError,
    image_rank,
    quantiles,
    scores_depend_on,
    thresholds,
)
from inpainter.predictor import Predictor, open_checkpoint, settings_in
from inpainter.settings import Metric, PicardConfig
from inpainter.snapshots import operating_point_path

LOG = logging.getLogger(__name__)
DEFAULT_PIXEL_SPECIFICITY = 0.99


def add_calibration_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of eval.py --mode calibrate, all but --mode itself."""
    add_common_arguments(parser, PicardConfig, default_config=None)
    add = parser.add_argument
    add("--checkpoint_dir", type=Path, metavar="DIR",
        help="required: folder with gen_%%08d.pt; without --config its config.yaml says how images "
             "are scored")  # fmt: skip
    add("--checkpoint_iter", default="latest", metavar="N",
        help="a step, latest, or best (default: latest)")  # fmt: skip
    add("--image_dir", type=Path, metavar="DIR",
        help="required: normal images that were neither trained on nor measured for "
             "test.calibration")  # fmt: skip
    add("--specificity", type=float, default=0.95, metavar="SHARE",
        help="share of normal images to be called normal, in (0, 1) (default: 0.95)")  # fmt: skip
    add("--pixel_specificity", type=float, default=DEFAULT_PIXEL_SPECIFICITY, metavar="SHARE",
        help="share of a normal image's pixels below the threshold that bounds findings, in (0, 1) "
             f"(default: {DEFAULT_PIXEL_SPECIFICITY})")  # fmt: skip


def normals_for_operating_point(config: PicardConfig, state: Path) -> tuple[list[Path], Path]:
    """The images that test.specificity is measured on, and the folder that they lie below.

    state: the step's state_%08d.pt; none before training. Raises ConfigError where all normal
    images are trained on, OperatingPointError where too few are not, and as `normal_images` does.
    """
    key, specificity = "test.specificity", config.test.specificity
    if config.calibration_data_path is None and config.train.held_out == 0:
        raise ConfigError(
            f"{key}: {specificity:g} needs normal images that are not trained on: set "
            "train.held_out, or calibration_data_path",
            key=key,
        )
    paths, root, origin = normal_images(config, state)
    if config.test.calibration == "knn":
        paths = halves(paths)[1]
    try:
        image_rank(len(paths), specificity)
    except OperatingPointError as error:
        half = " (half of them, for test.calibration takes the rest)"
        used = origin + (half if config.test.calibration == "knn" else "")
        raise OperatingPointError(f"{key}, on {used}: {error}") from None
    return paths, root


def set_operating_point(
    config: PicardConfig,
    folder: Path,
    wanted: int | str,
    paths: Sequence[Path],
    root: Path,
    *,
    specificity: float,
    pixel_specificity: float = DEFAULT_PIXEL_SPECIFICITY,
) -> tuple[Path, OperatingPoint]:
    """Scores normal images and writes operating_point_%08d.json beside the checkpoint.

    wanted: a step, `latest` or `best`; paths: the images, below root, by whose names there the
    dropout is drawn. Raises OperatingPointError, CheckpointError, ImageError and WindowError.
    """
    asked = {"image": specificity, "pixel": pixel_specificity}
    for which, share in asked.items():
        if not 0 < share < 1:
            raise ConfigError(f"The {which} specificity must be in (0, 1), got {share:g}.")
    image_rank(len(paths), specificity)  # before hours of scoring
    predictor = open_checkpoint(config, folder, wanted, option="--checkpoint_iter")
    step = predictor.step
    predictor.require_finite_weights()
    normals = data_identity(paths, root)
    warn_of_seen_images(folder, step, normals)
    warn_of_trained_images(folder, paths)
    scores, left_out = scores_of_normals(predictor, paths, root)
    metrics = {metric: thresholds(metric, each, asked) for metric, each in scores.items()}
    described = {
        "scored": len(paths) - len(left_out),
        **normals,
        "folder": escaped(str(root)),
        "left_out": left_out,
    }
    point = OperatingPoint(asked, scores_depend_on(predictor), described, metrics)
    path = operating_point_path(folder, step)
    require_still_there(folder, step)
    point.save(path)
    return path, point


def warn_of_seen_images(folder: Path, step: int, normals: Mapping[str, object]) -> None:
    """Says where the normal images are those trained on, or those of the calibration.

    Their scores are lower than those of images never seen, and so would the thresholds be.
    """
    for role, entry in {"state": "images", "calibration": "normals"}.items():
        path = checkpoint_path(folder, role, step)
        if not path.is_file():
            continue
        saved = require_mapping(load_tensors(path), str(path)).get(entry)
        saved = saved.get("images") if role == "calibration" and saved else saved
        if isinstance(saved, Mapping) and saved.get("sha256") == normals["sha256"]:
            LOG.warning(
                "These normal images are those of %s, whose scores are lower than those of images "
                "never seen: the specificity will be less than asked for. Give other ones.",
                path,
            )


def warn_of_trained_images(folder: Path, paths: Sequence[Path]) -> None:
    """Says how many of the normal images lie where training found those that it saw."""
    then = settings_in(folder)
    if then is None or then.train_data_path is None:
        return
    try:
        seen = {path.resolve() for path in images_trained_on(then)}
    except UserError:
        return  # which are not there any more
    count = sum(path.resolve() in seen for path in paths)
    if count:
        LOG.warning(
            "%d of the %d normal images were trained on, and score lower than images never seen: "
            "the specificity will be less than asked for. Give other ones.",
            count,
            len(paths),
        )


def scores_of_normals(
    predictor: Predictor, paths: Sequence[Path], root: Path
) -> tuple[dict[Metric, list[ImageScores]], dict[str, str]]:
    """Scores by metric, one for every image, and the images left out, with the reason.

    Left out are images without tissue, and those that cannot be scored (on_bad_image: error raises
    ImageError or WindowError).
    """
    scores: dict[Metric, list[ImageScores]] = {m: [] for m in predictor.scorer.metrics}
    left_out: dict[str, str] = {}
    silent = not sys.stderr.isatty()
    for path in tqdm(paths, unit="image", desc="normal images", disable=silent, leave=False):
        name = path.relative_to(root).as_posix()
        try:
            *_, last = predictor.score_image(predictor.pixels_of(path), name)
            if last.n_scored == 0:
                raise ImageError(f"{path} has no tissue: none of its windows was scored.")
        except UserError as error:
            if predictor.config.test.on_bad_image == "error":
                raise
            LOG.warning("Left out: %s: %s", escaped(name), error)
            left_out[escaped(name)] = str(error)
            continue
        for metric, kept in scores.items():
            kept.append(image_scores(last, metric, name))
    return scores, left_out


def image_scores(
    heatmaps: Heatmaps | ScaledHeatmaps, metric: Metric, name: str = ""
) -> ImageScores:
    """One image's scores by a metric; at least one of its windows was scored.

    name: the image's, which says of which volume it is a slice.
    """
    heatmap = heatmaps.heatmaps[metric].numpy()
    scored = heatmap[heatmaps.covered().numpy() & (heatmap != 0)]
    windows = {}
    for scale, part in heatmaps.by_scale().items():
        values = part.grids[metric].numpy()
        if values.any():
            windows[repr(scale)] = quantiles(values[values != 0])
    volume, number = split_slice(name)
    return ImageScores(
        float(heatmap.max()),
        quantiles(scored if scored.size else np.zeros(1)),
        windows,
        None if number is None else volume,
    )


def calibrate_from_arguments(config: PicardConfig, arguments: argparse.Namespace) -> str:
    """eval.py --mode calibrate: writes the operating point, and returns the text to print.

    arguments: the flags of `add_calibration_flags`. Raises as `set_operating_point` does.
    """
    paths = list_images(
        arguments.image_dir,
        recursive=config.data_with_subfolder,
        on_bad=config.test.on_bad_image,
        remedy="set data_with_subfolder: true",
        slices=config.slices,
    )
    path, point = set_operating_point(
        config,
        arguments.checkpoint_dir,
        arguments.checkpoint_iter,
        paths,
        arguments.image_dir,
        specificity=arguments.specificity,
        pixel_specificity=arguments.pixel_specificity,
    )
    return f"{point.summary()}\nOperating point: {path}"
