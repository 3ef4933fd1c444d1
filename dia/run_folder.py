"""What a contrastive run keeps: the published checkpoint files, and a state to resume from."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import training
from common.checkpoint import CheckpointError, load_tensors, require_mapping, save_atomic
from common.config import REPOSITORY, resolve_path
from common.training import OWN_SETTINGS
from dia.settings import DiaConfig

STATE_NAME = "state.pt"
WHERE = (
    *("data.data_root", "contrastive.run_dir", "contrastive.resume_path", "contrastive.suffix"),
    *("contrastive.load_path", "contrastive.no_strict", "contrastive.diffusion_model_path"),
)
"""Where things lie, and what the first epoch began with; images and diffusion model are known by
their contents."""
MACHINE = ("device", "data.num_workers", "contrastive.local_rank")
"""What computes, and how fast."""
WRITTEN = (
    *("contrastive.save_step", "contrastive.eval_step", "contrastive.error_step"),
    *("data.on_bad_image", "evaluation."),
)
"""What is written or said, and how images are scored."""
MAY_CHANGE = (*WHERE, *MACHINE, *WRITTEN, "contrastive.epochs")
"""What may differ when a run goes on; each change is named in the log.

epochs: the learning rate of the epochs to come follows the new length. All else decides what is
learnt or chosen and is refused.
"""


def run_folder(config: DiaConfig) -> Path:
    """The run's folder: resume_path, run_dir, or a name of its settings below logs/."""
    settings = config.contrastive
    for key in ("resume_path", "run_dir"):
        if getattr(settings, key) is not None:
            return resolve_path(getattr(settings, key), f"contrastive.{key}")
    parts = [config.data.dataset, settings.model, "unsup", settings.mode]
    parts += ["shift", settings.shift_trans_type, f"res{settings.diff_resolution}"]
    if config.data.one_class_idx is not None:
        parts.append(f"one_class_{config.data.one_class_idx}")
    if settings.suffix:
        parts.append(settings.suffix)
    return REPOSITORY / "logs" / "_".join(parts)


def refuse_to_overwrite(folder: Path) -> None:
    """CheckpointError where a folder holds a run, which a new one would overwrite."""
    remedy = f"Go on with --resume_path {folder}, or choose another --run_dir or --suffix"
    training.refuse_to_overwrite(folder, list(Path(folder).glob(STATE_NAME)), remedy)


def save_models(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes last.model, last.optim and last.config, the published files."""
    save_atomic(state["model"], folder / "last.model")
    save_atomic(state["optim"], folder / "last.optim")
    save_atomic({"epoch": state["epoch"], "best": state["best"]}, folder / "last.config")


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the one file that a resume reads."""
    save_atomic(dict(state), folder / STATE_NAME)


def load_state(folder: Path) -> dict[str, Any]:
    """Reads it back; CheckpointError where the folder has none, or one that holds other things."""
    path = Path(folder) / STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"no {STATE_NAME} in {folder} to resume from. Pass the folder of a run of "
            "train_dia.py; to start from weights alone, use --load_path last.model."
        )
    entries = ("epoch", "model", "optim", "probe", "best", "config")
    state = require_mapping(load_tensors(path), str(path), entries)
    require_mapping(state["config"], f"{path}: config")
    for name in ("epoch", "selected"):
        value = state.get(name, 0)
        if type(value) is not int or value < 0:
            raise CheckpointError(
                f"{path}: {name} is {str(value)[:40]!r}, expected a whole number of 0 or more. The "
                "file is damaged; copy it again."
            )
    best = require_mapping(state["best"], f"{path}: best")
    for name, value in best.items():
        if not (isinstance(name, str) and isinstance(value, float) and math.isfinite(value)):
            raise CheckpointError(
                f"{path}: best has {str(name)[:40]!r}: {str(value)[:40]}, expected finite numbers "
                "by name. The file is damaged; copy it again."
            )
    return state


def check_resumed(
    state: Mapping[str, Any], config: DiaConfig, data: Mapping[str, Any], source: str
) -> None:
    """Refuses to go on with other settings or data than a state's; names changes that are allowed.

    data: what the run learns from now, as Trainer.data_facts returns it; states of old runs lack
    it. Raises CheckpointError.
    """
    saved = state.get("data")
    saved = saved if isinstance(saved, Mapping) else {}
    before = {"config": state["config"], "images": saved.get("images")}
    training.check_resumed(before, config, data["images"], source=source, may_change=MAY_CHANGE)
    if "diffusion_model" in saved and saved["diffusion_model"] != data["diffusion_model"]:
        raise CheckpointError(
            f"{source}: {config.contrastive.diffusion_model_path} is another diffusion model than "
            f"the run was started with (its contents differ). {OWN_SETTINGS}"
        )
    if state["epoch"] > config.contrastive.epochs:
        raise CheckpointError(
            f"{source} is of epoch {state['epoch']}, beyond contrastive.epochs: "
            f"{config.contrastive.epochs}. Raise --epochs, or start a new run in another folder."
        )
