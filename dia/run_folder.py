"""What a contrastive run keeps: the published checkpoint files, and a state to resume from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.checkpoint import CheckpointError, load_tensors, save_atomic
from common.config import REPOSITORY, resolve_path
from dia.settings import DiaConfig

STATE_NAME = "state.pt"


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
    if (Path(folder) / STATE_NAME).is_file():
        raise CheckpointError(
            f"{folder} already holds a run. Go on with --resume_path {folder}, or choose another "
            "--run_dir or --suffix, or move the folder away."
        )


def save_models(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes last.model, last.optim and last.config, the published files."""
    save_atomic(state["model"], folder / "last.model")
    save_atomic(state["optim"], folder / "last.optim")
    save_atomic({"epoch": state["epoch"], "best": state["best"]}, folder / "last.config")


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the one file that a resume reads."""
    save_atomic(dict(state), folder / STATE_NAME)


def load_state(folder: Path) -> dict[str, Any]:
    """Reads it back; CheckpointError where the folder has none."""
    path = Path(folder) / STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"no {STATE_NAME} in {folder} to resume from. Pass the folder of a run of "
            "train_dia.py; to start from weights alone, use --load_path last.model."
        )
    return load_tensors(path)
