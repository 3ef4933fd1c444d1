"""Where a diffusion run keeps its checkpoints and records."""

import re
import time
from pathlib import Path

from common.checkpoint import CheckpointError
from common.config import REPOSITORY, resolve_path
from diffusion_models.settings import DdpmConfig


def new_folder(config: DdpmConfig) -> Path:
    """The run folder: output_dir, or a dated one below ddpm_models/."""
    settings = config.diffusion
    if settings.output_dir is not None:
        return resolve_path(settings.output_dir, "diffusion.output_dir")
    ratio = "" if settings.ratio == 1 else f"_r{settings.ratio}"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return REPOSITORY / "ddpm_models" / f"{config.data.dataset}-{settings.side}-{stamp}{ratio}"


def checkpoints(folder: Path) -> dict[int, Path]:
    """The files model-N.pt of a folder by N."""
    return {
        int(match[1]): path
        for path in Path(folder).glob("model-*.pt")
        if (match := re.fullmatch(r"model-(\d+)\.pt", path.name))
    }


def newest_checkpoint(folder: Path) -> Path:
    """The model-N.pt of the highest N; CheckpointError where there is none."""
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"no model-N.pt in {folder} to resume from")
    return found[max(found)]


def refuse_to_overwrite(folder: Path) -> None:
    """CheckpointError where a folder holds a run, which a new one would overwrite."""
    if checkpoints(folder):
        raise CheckpointError(
            f"{folder} already holds a run. Go on with --resume {folder}, or choose another "
            "--output_dir, or move the folder away."
        )


def events_folder(config: DdpmConfig, folder: Path) -> Path:
    """Where TensorBoard's events go: logs/<run>, or into a folder that was chosen."""
    if config.diffusion.output_dir is not None:
        return folder / "events"
    return REPOSITORY / "logs" / folder.name
