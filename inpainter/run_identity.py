"""What the heatmaps of a run depend on beside their images, and the folder that has such a run.

run.txt in the folder holds it, one `key: value` a line: the identity of the run.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.checkpoint import CheckpointError, save_text_atomic
from common.claims import wait_for_claim
from common.config import REPOSITORY
from common.files import escaped, read_regular
from inpainter.predictor import Predictor
from inpainter.settings import PicardConfig

LOG = logging.getLogger(__name__)
MOST_DIFFERENCES = 4
"""Settings that a message names at most."""
RUN_NAME = "run.txt"
CHOICE_SECONDS = 600.0
"""How long a process waits for others that choose a folder, which takes them moments."""
NO_INFLUENCE = frozenset({
    *("dataset_name", "expname", "train_data_path", "test_data_path", "data_with_subfolder"),
    # What was measured is in the hash of the calibration's file; a pretrained network has its own.
    *("slices", "calibration_data_path", "test.calibration_windows", "test.feature_space",
      "test.specificity"),
    *("checkpoints_dir", "logs_dir", "heatmaps_dir"),
    *("cuda", "gpu_ids", "device", "num_workers", "peer_timeout", "train"),
    *("coarse_l1_alpha", "l1_loss_alpha", "ae_loss_alpha", "global_wgan_loss_alpha"),
    *("gan_loss_alpha", "wgan_gp_lambda"),
    *("test.parallel_batchsize", "test.save_heatmap_data", "test.save_heatmap_plots"),
    *("test.save_progressive_heatmap", "test.log_compute_times", "test.on_bad_image"),
    *("test.engine", "test.compile"),
})  # fmt: skip
"""Settings, or whole sections, that change no heatmap; every other one, new ones too, does."""
FOR_THE_READER = "checkpoint"
"""The line that is not compared: the weights' hashes stand for the file that they came from."""

Identity = dict[str, str]


def run_identity(
    predictor: Predictor, image_dir: Path, names: Sequence[str] | None = None
) -> Identity:
    """What heatmaps depend on: the weights, the folder of images, the settings.

    names: of images that were named one by one, whose run is not that of the whole folder.
    """
    lines = {FOR_THE_READER: predictor.source, **predictor.weights}
    lines |= {"images": str(image_dir.resolve()), **influential_settings(predictor.config)}
    if names is not None:
        lines["named"] = hashlib.sha256("\n".join(map(escaped, names)).encode()).hexdigest()
    return {key: escaped(value) for key, value in lines.items()}


def influential_settings(section: Any, prefix: str = "") -> Identity:
    """The settings that may change a heatmap, by dotted key."""
    settings: Identity = {}
    for setting in dataclasses.fields(section):
        key, value = prefix + setting.name, getattr(section, setting.name)
        if key in NO_INFLUENCE:
            continue
        if dataclasses.is_dataclass(value):
            settings |= influential_settings(value, f"{key}.")
        else:
            settings[key] = repr(value)
    return settings


def read_identity(folder: Path) -> Identity | None:
    """The identity that a folder's heatmaps were made with; None for a new folder.

    Raises CheckpointError where run.txt cannot be read.
    """
    path = folder / RUN_NAME
    if not path.is_file():
        return None
    try:
        lines = read_regular(path).decode().splitlines()
    except UnicodeDecodeError:
        raise CheckpointError(
            f"{path} is no UTF-8 text, so it does not say how the heatmaps there were made. Pass "
            "another --output_dir, or --overwrite to replace them."
        ) from None
    return {key: value for key, _, value in (line.partition(": ") for line in lines)}


def scored_images(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Where the images of a folder's heatmaps lay when they were scored; {} if it does not say."""
    try:
        images = (read_identity(folder) or {}).get("images")
    except CheckpointError:
        images = None
    return {} if images is None else {name: Path(images) / name for name in names}


def differences(old: Identity, new: Identity) -> list[str]:
    """What differs, in words; a setting that the old one lacks had the published value."""
    published = influential_settings(PicardConfig())
    words = []
    for key in dict.fromkeys([*new, *old]):
        before, now = (str(which.get(key, published.get(key, "none"))) for which in (old, new))
        if key != FOR_THE_READER and before != now:
            words.append(f"{key} {_brief(before)} there, {_brief(now)} now")
    return words


def differences_in_words(old: Identity, new: Identity) -> str:
    """The first few of `differences`; "" where the two are the same."""
    differing = differences(old, new)
    unnamed = len(differing) - MOST_DIFFERENCES
    more = f" and {unnamed} more" if unnamed > 0 else ""
    return "; ".join(differing[:MOST_DIFFERENCES]) + more


def write_identity(folder: Path, identity: Identity) -> None:
    """Writes run.txt."""
    text = "".join(f"{key}: {value}\n" for key, value in identity.items())
    save_text_atomic(text, folder / RUN_NAME)


def _brief(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:12]}...{value[-12:]}"


def output_folder(
    config: PicardConfig, given: Path | None, identity: Identity, *, overwrite: bool
) -> Path:
    """The run's folder, made where it is missing: the given one, or else one below heatmaps_dir.

    There a run of the same identity goes on in the folder it had. Raises CheckpointError where the
    given folder is a file or holds heatmaps of another identity that are not to be overwritten.
    """
    if given is None:
        name = config.dataset_name or "unnamed"
        base = REPOSITORY / config.heatmaps_dir / name / "dropout"
        with wait_for_claim(base / "choosing.claim", CHOICE_SECONDS):  # processes started together
            runs = [path.parent for path in base.glob(f"*/{RUN_NAME}")]
            if same := [run for run in runs if is_of(run, identity)]:
                return max(same)
            folder = new_folder(base / time.strftime("%Y-%m-%d_%H-%M-%S"))
            write_identity(folder, identity)
            return folder
    if given.exists() and not given.is_dir():
        raise CheckpointError(f"--output_dir {given} is a file. Pass a folder, or a new name.")
    old = read_identity(given) if not overwrite and holds_scores(given) else None
    is_new = old is None or _is_earlier(old, identity)
    differing = "" if is_new else differences_in_words(old, identity)
    if differing:
        raise CheckpointError(
            f"{given} holds heatmaps made with other settings or another checkpoint: {differing}. "
            "Pass another --output_dir, or --overwrite to replace them."
        )
    given.mkdir(parents=True, exist_ok=True)
    return given


def holds_scores(folder: Path) -> bool:
    """Whether any image was scored into this folder."""
    path = folder / "scores.csv"
    return path.is_file() and len(read_regular(path).splitlines()) > 1


def _is_earlier(old: Identity, identity: Identity) -> bool:
    """Whether run.txt is of the time before contents were recorded, of the same step and images.

    There images.csv is missing too, so that every image is scored anew.
    """
    lines = {f"{key} {identity[key]}" for key in (FOR_THE_READER, "images")}
    return "gen" not in old and lines <= set(old)


def is_of(folder: Path, identity: Identity) -> bool:
    """Whether a folder has a run of this identity."""
    try:
        return not differences(read_identity(folder) or {}, identity)
    except CheckpointError as error:
        LOG.warning("%s", error)
        return False


def new_folder(path: Path) -> Path:
    """Makes the folder, with a number behind its name where another run has just taken it."""
    folder, number = path, 1
    while folder.exists():
        number += 1
        folder = path.with_name(f"{path.name}_{number}")
    folder.mkdir(parents=True)
    return folder
