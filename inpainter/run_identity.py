"""What the heatmaps of a prediction run depend on beside their images, and the run's folder.

run.txt in the folder holds it, one `key: value` per line.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.checkpoint import CheckpointError
from common.config import REPOSITORY
from common.files import escaped
from inpainter.settings import PicardConfig

LOG = logging.getLogger(__name__)
NAME = "run.txt"
NO_INFLUENCE = frozenset({
    *("dataset_name", "expname", "train_data_path", "test_data_path", "data_with_subfolder"),
    *("checkpoints_dir", "logs_dir", "heatmaps_dir"),
    *("cuda", "gpu_ids", "device", "num_workers", "train"),
    *("coarse_l1_alpha", "l1_loss_alpha", "ae_loss_alpha", "global_wgan_loss_alpha"),
    *("gan_loss_alpha", "wgan_gp_lambda"),
    *("test.parallel_batchsize", "test.save_heatmap_data", "test.save_heatmap_plots"),
    *("test.save_progressive_heatmap", "test.log_compute_times", "test.on_bad_image"),
    *("test.engine", "test.compile"),
})  # fmt: skip
"""Settings, or whole sections, that change no heatmap; every other one, new ones too, does."""
FOR_THE_READER = "checkpoint"
"""The line that is not compared: the weights' hashes stand for the file that they came from."""
SHOWN = 4

Identity = dict[str, str]


def run_identity(
    config: PicardConfig, checkpoint: str, weights: Mapping[str, str], image_dir: Path
) -> Identity:
    """What heatmaps depend on: the weights, the folder of images, the settings.

    checkpoint: where the weights came from, in words; weights: SHA-256 by role.
    """
    lines = {FOR_THE_READER: checkpoint, **weights, "images": str(image_dir.resolve())}
    lines |= influential_settings(config)
    return {key: escaped(value) for key, value in lines.items()}


def influential_settings(config: PicardConfig) -> Identity:
    """The settings that may change a heatmap, by dotted key."""
    return {key: repr(value) for key, value in _leaves(config) if not _has_no_influence(key)}


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _has_no_influence(key: str) -> bool:
    return key in NO_INFLUENCE or key.partition(".")[0] in NO_INFLUENCE


def as_text(identity: Identity) -> str:
    return "".join(f"{key}: {value}\n" for key, value in identity.items())


def read_identity(folder: Path) -> Identity | None:
    """The identity that a folder's heatmaps were made with; none for a new folder.

    Raises CheckpointError where run.txt cannot be read.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise CheckpointError(
            f"{path} is no UTF-8 text, so it does not say how the heatmaps there were made. Pass "
            "another --output_dir, or --overwrite to replace them."
        ) from None
    return {key: value for key, _, value in (line.partition(": ") for line in lines)}


def differences(old: Identity, new: Identity) -> list[str]:
    """What differs, in words; a setting that the old one lacks had the published value."""
    published = influential_settings(PicardConfig())
    words = []
    for key in dict.fromkeys([*new, *old]):
        before, now = old.get(key, published.get(key)), new.get(key, published.get(key))
        if key != FOR_THE_READER and before != now:
            words.append(f"{key} {_brief(before)} there, {_brief(now)} now")
    return words


def _brief(value: str | None) -> str:
    return (
        "none" if value is None else value if len(value) <= 40 else f"{value[:12]}...{value[-12:]}"
    )


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
        same = [run.parent for run in base.glob(f"*/{NAME}") if _is_of(run.parent, identity)]
        return max(same) if same else new_folder(base / time.strftime("%Y-%m-%d_%H-%M-%S"))
    if given.exists() and not given.is_dir():
        raise CheckpointError(f"--output_dir {given} is a file. Pass a folder, or a new name.")
    old = read_identity(given) if not overwrite and holds_scores(given) else None
    differing = [] if old is None or _is_earlier(old, identity) else differences(old, identity)
    if differing:
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise CheckpointError(
            f"{given} holds heatmaps made with other settings or another checkpoint: "
            f"{'; '.join(differing[:SHOWN])}{more}. Pass another --output_dir, or --overwrite to "
            "replace them."
        )
    given.mkdir(parents=True, exist_ok=True)
    return given


def holds_scores(folder: Path) -> bool:
    """Whether any image was scored into this folder."""
    path = folder / "scores.csv"
    try:
        with path.open("rb") as file:
            return len(file.readlines(2**16)) > 1
    except FileNotFoundError:
        return False


def _is_earlier(old: Identity, identity: Identity) -> bool:
    """Whether run.txt is of the time before contents were recorded, of the same step and images.

    There images.csv is missing too, so that every image is scored anew.
    """
    lines = {f"{key} {identity[key]}" for key in (FOR_THE_READER, "images")}
    return "gen" not in old and lines <= set(old)


def _is_of(folder: Path, identity: Identity) -> bool:
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
