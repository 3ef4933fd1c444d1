"""Where a diffusion run keeps its checkpoints and records."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import training
from common.checkpoint import CheckpointError
from common.config import REPOSITORY, resolve_path
from common.run_log import LAST_STEP
from diffusion_models.settings import DdpmConfig

WHERE = ("data.data_root", "diffusion.output_dir", "diffusion.state_dict_path")
"""Where things lie, and what the first step began with; the images are known by their contents."""
MACHINE = ("device", "data.num_workers")
"""What computes, and how fast."""
WRITTEN = (
    *("diffusion.save_every", "diffusion.log_every", "diffusion.sampling_timesteps"),
    *("diffusion.num_samples", "diffusion.steps", "diffusion.strip_steps", "diffusion.strip_range"),
    *("diffusion.ddpm_weights", "data.on_bad_image", "data.resize_to"),
)
"""What is written, drawn or said; data.resize_to is train_dia.py's and eval.py's alone."""
MAY_CHANGE = (*WHERE, *MACHINE, *WRITTEN, "diffusion.train_num_steps")
"""What may differ when a run goes on; each change is named in the log. All else decides what is
learnt and is refused."""


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
    remedy = f"Go on with --resume {folder}, or choose another --output_dir"
    training.refuse_to_overwrite(folder, checkpoints(folder), remedy)


def check_resumed(
    state: Mapping[str, Any], config: DdpmConfig, images: Mapping[str, Any], path: Path
) -> None:
    """Refuses to go on with other settings or images than a checkpoint's; names allowed changes.

    images: set_identity of the training images; checkpoints of old runs lack it. Raises
    CheckpointError.
    """
    step = state["step"]
    if type(step) is not int or not 0 <= step <= LAST_STEP:
        raise CheckpointError(
            f"{path}: step is {str(step)[:40]!r}, expected a whole number of 0 or more. The file "
            "is damaged; go on from another one."
        )
    training.check_resumed(state, config, images, source=str(path), may_change=MAY_CHANGE)
    total = config.diffusion.train_num_steps
    if step > total:
        raise CheckpointError(
            f"{path} is of step {step}, beyond diffusion.train_num_steps: {total}. Raise "
            "--train_num_steps, or start a new run in another folder."
        )


def events_folder(config: DdpmConfig, folder: Path, *, resumed: bool = False) -> Path:
    """Where TensorBoard's events go: logs/<run>, or into a folder that was chosen.

    A run that goes on writes where it has written before, whether or not --output_dir is given.
    """
    if config.diffusion.output_dir is not None or (resumed and (folder / "events").is_dir()):
        return folder / "events"
    return REPOSITORY / "logs" / folder.name
