"""Measures windows of normal images with a trained checkpoint, for test.calibration.

See calibration.py for what is made of them; normal_scores.py measures whole images.
"""

import dataclasses
import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import (
    CheckpointError,
    checkpoint_path,
    content_hash,
    load_tensors,
    require_mapping,
)
from common.claims import wait_for_claim
from common.config_types import ConfigError
from common.devices import tf32_products
from common.errors import UserError
from common.image_folders import list_images
from common.image_sets import data_changes, data_identity
from common.images import ImageError, to_signed
from common.random_numbers import generator_for
from common.volumes import split_slice
from inpainter.calibration import (
    DESCRIPTION,
    N_NEIGHBOURS,
    Calibration,
    Calibrations,
    save_calibrations,
)
from inpainter.completion import DETAIL
from inpainter.data import split_held_out, subset_of
from inpainter.heatmap import (
    batch_size,
    batched,
    require_finite,
    windows_to_score,
)
from inpainter.predictor import (
    Predictor,
    feature_space,
    open_checkpoint,
    settings_in,
)
from inpainter.run_identity import influential_settings
from inpainter.settings import PicardConfig, input_path
from inpainter.snapshots import OpenFiles, use_step
from inpainter.windows import cut_windows, pad_image, resized, scaled_hw, window_grid

LOG = logging.getLogger(__name__)
FEWEST_OF_AN_IMAGE = 8
"""Windows for which an image is worth being read: of very many images, not all are."""
MEASURED = 3
"""Of what is measured, and where: a file of another number is not used as it is, but made anew."""
PLACES = 8
"""Windows are drawn from a grid of this many places along a hole's side, or a finer one."""
WAIT_SECONDS = 6 * 3600.0
"""How long a process waits for the one that calibrates for all, as long as that one lives."""


def calibrate(config: PicardConfig, folder: Path, wanted: int | str) -> Path:
    """Measures windows of normal images and writes calibration_%08d.pt beside the checkpoint.

    wanted: a step, `latest` or `best`. Raises ConfigError, CheckpointError and ImageError, all with
    their remedy.
    """
    off = dataclasses.replace(config.test, calibration="off", scales=(1.0,))
    uncalibrated = dataclasses.replace(config, test=off)
    predictor = open_checkpoint(uncalibrated, folder, wanted, option="--checkpoint_iter")
    step = predictor.step
    predictor.require_finite_weights()
    paths, root, origin = normal_images(config, checkpoint_path(folder, "state", step))
    if config.test.specificity is not None:
        paths = halves(paths)[0]
    found = measured(predictor, paths, config.test.scales, root)
    require_still_there(folder, step)
    path = checkpoint_path(folder, "calibration", step)
    counts = [len(each.known) for each in found.values()]
    normals = {
        "from": origin,
        "windows": counts,
        "images": data_identity(paths, root),
        "request": request_of(config, folder, step),
    }
    save_calibrations(path, found, config, predictor.weights, normals)
    LOG.info("Calibrated on %s windows of %s: %s", "+".join(map(str, counts)), origin, path)
    return path


def require_still_there(folder: Path, step: int) -> None:
    """Raises CheckpointError where a training has deleted the step that was measured."""
    if not checkpoint_path(folder, "gen", step).is_file():
        raise CheckpointError(
            f"Step {step} of {folder} was deleted while it was measured, as a training does that "
            "keeps few (train.keep_snapshots). Wait until it has ended, and run again."
        )


def calibrate_once(config: PicardConfig, folder: Path, wanted: int | str) -> Path:
    """As `calibrate`, but a file of the same checkpoint, settings and images is used as it is.

    Where several processes want the same, one measures, and the others wait for it. Raises
    ConfigError where the settings would not use it, ClaimError where others take longer than
    WAIT_SECONDS, and as `calibrate` does.
    """
    if config.test.calibration == "off":
        raise ConfigError(
            "--calibrate: test.calibration is off, so that scores are distances. Set "
            "test.calibration=knn, or leave --calibrate out.",
            key="test.calibration",
        )
    step = whole_step(config, folder, wanted)
    path = checkpoint_path(folder, "calibration", step)
    with wait_for_claim(path.with_name(f"{path.name}.claim"), WAIT_SECONDS):
        try:
            saved = require_mapping(load_tensors(path), str(path)) if path.is_file() else {}
        except CheckpointError as error:
            LOG.warning("%s Measured anew.", error)
            saved = {}
        if saved.get("normals", {}).get("request") == request_of(config, folder, step):
            LOG.info("Not measured again: %s has the same weights, settings, images.", path)
            return path
        return calibrate(config, folder, step)


def whole_step(config: PicardConfig, folder: Path, wanted: int | str) -> int:
    """The step that is meant; `latest` passes over a damaged one. Raises CheckpointError."""
    roles = ("gen", "dis") if feature_space(config.test) == "critic" else ("gen",)

    def read(step: int, files: OpenFiles) -> int:
        for role, file in files.items():
            load_tensors(checkpoint_path(folder, role, step), file)
        return step

    return use_step(folder, wanted, roles, read, option="--checkpoint_iter")


def request_of(config: PicardConfig, folder: Path, step: int) -> str:
    """A hash of all that a calibration depends on: version, settings, weights, normal images."""
    test, space = config.test, feature_space(config.test)
    files = [checkpoint_path(folder, role, step) for role in ("gen", "dis")]
    files += [space] if isinstance(space, Path) else []
    paths, root, _ = normal_images(config, checkpoint_path(folder, "state", step))
    settings = influential_settings(config)
    del settings["test.calibration"]  # auto and knn measure the same
    kept = (test.calibration_windows, test.specificity is None)
    parts = [repr(part) for part in (MEASURED, settings, data_identity(paths, root), kept)]
    parts += [content_hash(file) for file in files if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def normal_images(config: PicardConfig, state: Path) -> tuple[list[Path], Path, str]:
    """Images to measure, the folder that they lie below, and where they are from, in words.

    Those of calibration_data_path; else those that train.held_out kept from training; else the
    training images, whose completions are somewhat better than those of images never seen.
    state: the step's state_%08d.pt, which says what was trained on; the config.yaml beside it says
    what was held out, whatever the config does. Raises CheckpointError where the training folder
    has changed since, so that what is held out may have been trained on.
    """
    elsewhere = config.calibration_data_path is not None
    key = "calibration_data_path" if elsewhere else "train_data_path"
    root = input_path(getattr(config, key), key)
    paths = list_images(
        root,
        recursive=config.data_with_subfolder,
        on_bad=config.test.on_bad_image,
        remedy="set data_with_subfolder: true",
        slices=config.slices,
    )
    if elsewhere:
        return paths, root, "the images of calibration_data_path"
    then = settings_in(state.parent) if state.is_file() else None
    then = then or config
    trained, held_out = split_held_out(paths, then.train.held_out, then.seed)
    if not held_out:
        return paths, root, "the training images (train.held_out keeps some for this)"
    if state.is_file():
        saved = require_mapping(load_tensors(state), str(state)).get("images")
        trained = subset_of(trained, then.train.subset_frac, then.seed)
        if changes := data_changes(saved, data_identity(trained, root)):
            raise CheckpointError(
                f"{state}: {changes}, so nobody knows which images were held out. Restore the "
                "folder, or give other normal images as calibration_data_path."
            )
    return held_out, root, "images held out from training"


def images_trained_on(config: PicardConfig) -> list[Path]:
    """The images that a training with these settings sees, of those that are there now."""
    paths = list_images(
        input_path(config.train_data_path, "train_data_path"),
        recursive=config.data_with_subfolder,
        slices=config.slices,
    )
    trained, _ = split_held_out(paths, config.train.held_out, config.seed)
    return subset_of(trained, config.train.subset_frac, config.seed)


def measured(
    predictor: Predictor, paths: Sequence[Path], scales: Sequence[float], root: Path
) -> Calibrations:
    """Calibrations by scale, from test.calibration_windows windows: equal shares of the images.

    Of more images than that is worth reading for, every k-th. One that cannot be scored is passed
    over with a warning, or raises ImageError or WindowError (on_bad_image: error); too few windows
    in all raise ImageError.
    """
    test = predictor.config.test
    most = max(1, test.calibration_windows // FEWEST_OF_AN_IMAGE)
    paths = paths[:: -(-len(paths) // most)]
    share = -(-test.calibration_windows // len(paths))
    batches: dict[float, list[dict[str, Tensor]]] = {scale: [] for scale in scales}
    silent = not sys.stderr.isatty()
    for path in tqdm(paths, unit="image", desc="calibrating", disable=silent, leave=False):
        name = path.relative_to(root).as_posix()
        try:
            image = predictor.pixels_of(path)
            hw = (image.shape[1], image.shape[2])
            for scale in scales:
                small = resized(image, scaled_hw(hw, scale))
                batches[scale] += describe_windows(predictor, small, name, share)
        except UserError as error:
            if test.on_bad_image == "error":
                raise
            LOG.warning("Passed over: %s: %s", name, error)
    return {scale: fitted(batches[scale], scale) for scale in scales}


def describe_windows(
    predictor: Predictor, image: Tensor, name: str, count: int
) -> list[dict[str, Tensor]]:
    """Scores and descriptions of `count` windows of an image, or of all it has, in batches.

    image: (C, H, W) in [0, 1]; name: its name below its folder, which decides which.
    """
    test, config = predictor.config.test, predictor.config
    stride = max(1, min(test.patch_stride, min(test.mask_shape) // PLACES))
    hw = (image.shape[1], image.shape[2])
    grid = window_grid(hw, test.patch_shape[:2], stride, test.heatmap_alignment)
    padded = pad_image(image, grid)
    numbers = windows_to_score(padded, grid, config.seen_test())
    order = torch.randperm(len(numbers), generator=generator_for(config.seed, "calibrate", name))
    chosen = sorted(numbers[i] for i in order[:count].tolist())
    dropout = predictor.dropout(name)
    found = []
    for batch in batched(chosen, batch_size(test, predictor.device)):
        windows = to_signed(cut_windows(padded, grid, batch).to(predictor.device))
        masks = None if dropout is None else dropout.masks(batch)
        with tf32_products(test.precision == "tf32"):
            scores = predictor.scorer(windows, masks, more=(DESCRIPTION, DETAIL))
        found.append({key: values.float().cpu() for key, values in scores.items()})
    return found


def fitted(batches: Sequence[dict[str, Tensor]], scale: float) -> Calibration:
    """The calibration from batches of scores. Raises ImageError for too few windows, or NaN."""
    n_windows = sum(len(batch[DESCRIPTION]) for batch in batches)
    if n_windows < N_NEIGHBOURS:
        raise ImageError(
            f"The normal images have only {n_windows} windows with tissue at scale {scale}, and a "
            f"calibration needs {N_NEIGHBOURS} or more. Give more images (calibration_data_path), "
            "or lower test.min_tissue_fraction."
        )
    scores = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    require_finite(scores)
    description, detail = scores.pop(DESCRIPTION), scores.pop(DETAIL)
    return Calibration.fit(description, detail.sum(dim=1), scores)


def halves(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Normal images that test.calibration measures, and those that test.specificity does.

    Different ones, where both are asked for: the former surprise less than images never seen. In
    the order of their names, in which those of a patient are often neighbours; the slices of a
    volume are in one half.
    """
    middle = max(1, len(paths) // 2)
    volumes = [split_slice(str(path))[0] for path in paths]
    while volumes[middle - 1 : middle + 1] == [volumes[middle - 1]] * 2:
        middle += 1
    return list(paths[:middle]), list(paths[middle:])
