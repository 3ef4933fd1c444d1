"""What a run of the encoder leaves to go on from: the published files and its state."""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    keep_copy,
    load_module,
    load_optimiser,
    load_tensors,
    require_finite_weights,
    require_mapping,
    require_state_dict,
    save_atomic,
)
from common.config import config_to_dict
from common.run_log import LAST_STEP
from common.training import (
    OWN_SETTINGS,
    check_resumed,
    require_as_many_processes,
    require_finite_training,
    require_still_sole_writer,
    restore_scaler,
    saved_progress,
    scaler_state,
)
from dia.building import TrainState

LOG = logging.getLogger(__name__)
STATE_NAME, PREVIOUS_NAME = "state.pt", "state.previous.pt"
"""Of the last save, and of the one before it."""
LOWER_RATE = "Start a new run with a lower --lr_init, or with the other --optimizer."
MAY_CHANGE = (
    # Where things lie, and what the first epoch began with; images and diffusion model are known
    # by their contents.
    *("data.data_root", "contrastive.run_dir", "contrastive.resume_path", "contrastive.suffix"),
    *("contrastive.load_path", "contrastive.no_strict", "contrastive.diffusion_model_path"),
    # What computes, and how fast.
    *("device", "data.num_workers", "contrastive.local_rank", "peer_timeout", "compile"),
    # What is written or said, and how images are scored.
    *("contrastive.save_step", "contrastive.eval_step", "contrastive.error_step"),
    *("data.on_bad_image", "evaluation."),
    # The learning rate of the epochs to come follows the new length.
    "contrastive.epochs",
)
"""Settings that may differ when a run goes on; all else decides what is learnt or selected."""


def require_finite_encoder(state: TrainState) -> None:
    """Raises TrainingError where a weight of the encoder is not finite."""
    weights = {"weights of the encoder": state.encoder.state_dict()}
    require_finite_training(f"after epoch {state.epoch}", weights, LOWER_RATE)


def save(state: TrainState, folder: Path) -> None:
    """Writes the published files and the state; TrainingError where a weight is not finite.

    Within an epoch it writes the state alone. The state before becomes state.previous.pt.
    """
    require_still_sole_writer(folder)
    require_finite_encoder(state)
    model, optimiser = state.encoder.state_dict(), state.optimizer.state_dict()
    progress = {"epoch": state.epoch, "best": state.best}
    if state.batch == 0:
        save_atomic(model, folder / "last.model")
        save_atomic(optimiser, folder / "last.optim")
        save_atomic(progress, folder / "last.config")
    saved = {
        **progress,
        "step": state.step,
        "batch": state.batch,
        "processes": state.processes.world_size,
        "steps_per_epoch": state.steps_per_epoch,
        "sums": dict(state.sums),
        "selected": state.selected,
        "model": model,
        "optim": optimiser,
        "probe": state.probe.state_dict(),
        **scaler_state(state.scaler),
        "data": state.data,
        "config": config_to_dict(state.config),
    }
    keep_copy(folder / STATE_NAME, folder / PREVIOUS_NAME)
    save_atomic(saved, folder / STATE_NAME)


def newest_state(folder: Path) -> tuple[Path, Any]:
    """The file of the last save and what it holds; of the one before, with a warning, if damaged.

    Raises CheckpointError where there is none, or none that is whole.
    """
    path, previous = folder / STATE_NAME, folder / PREVIOUS_NAME
    if not (path.is_file() or previous.is_file()):
        raise CheckpointError(
            f"no {STATE_NAME} in {folder} to resume from. Pass the folder of a run of "
            "train_dia.py; to start from weights alone, use --load_path last.model."
        )
    try:
        return path, load_tensors(path)
    except CheckpointError as error:
        if path.is_file() and not isinstance(error, DamagedCheckpointError):
            raise
        if not previous.is_file():
            raise
        saved = load_tensors(previous)
        LOG.warning("%s Going on from %s, the save before it.", error, PREVIOUS_NAME)
        return previous, saved


def restore(state: TrainState, folder: Path) -> None:
    """Goes on from the state that a run has left in its folder.

    Raises CheckpointError where there is none, or a broken one, or one of other settings, images or
    diffusion model.
    """
    config, (path, saved) = state.config, newest_state(folder)
    entries = ("epoch", "model", "optim", "probe", "best", "config")
    saved = require_mapping(saved, str(path), entries)
    data = saved["data"] if isinstance(saved.get("data"), Mapping) else {}
    images = state.data["images"]
    check_resumed(saved | data, config, images, source=str(folder), may_change=MAY_CHANGE)
    batch = "contrastive.batch_size"
    require_as_many_processes(saved, state.processes, batch, source=str(path))
    model_hash = state.data["diffusion_model"]
    if data.get("diffusion_model", model_hash) != model_hash:
        raise CheckpointError(
            f"{folder}: {config.contrastive.diffusion_model_path} is another diffusion model than "
            f"the run was started with (its contents differ). {OWN_SETTINGS}"
        )
    epochs = (config.contrastive.epochs, "contrastive.epochs")
    state.epoch = saved_progress(saved, "epoch", *epochs, source=str(path))
    # States of old do not say what was selected.
    saved.setdefault("selected", state.epoch)
    state.selected = saved_progress(saved, "selected", *epochs, source=str(path))
    restore_place(state, saved, str(path))
    state.best = require_mapping(saved["best"], f"{path}: best")
    if not all(isinstance(value, float) and math.isfinite(value) for value in state.best.values()):
        raise CheckpointError(
            f"{path}: best is {str(state.best)[:60]!r}, expected finite numbers by name. The file "
            "is damaged; copy it again."
        )
    model = require_state_dict(saved["model"], f"{folder}: model")
    require_finite_weights(model, f"{folder}: model")
    load_module(state.encoder, model, f"{folder}: model")
    for name, optimizer in (("optim", state.optimizer), ("probe", state.probe)):
        has_stepped = state.epoch > 0 or state.batch > 0
        load_optimiser(optimizer, saved[name], f"{folder}: {name}", has_stepped=has_stepped)
    restore_scaler(state.scaler, saved, str(folder))


def restore_place(state: TrainState, saved: Mapping[str, Any], source: str) -> None:
    """Takes a state's steps, and how far it is within its epoch; none said is its beginning.

    Raises CheckpointError where it says something else, or where epochs have another length now.
    """
    now, then = state.steps_per_epoch, saved.get("steps_per_epoch")
    # States of old do not say their steps, and those of before have epochs of this length.
    steps = {"step": state.epoch * (then if type(then) is int else now), **saved}
    state.step = saved_progress(steps, "step", LAST_STEP, "any training", source=source)
    if not saved.get("batch"):
        return
    if now != then:
        raise CheckpointError(
            f"{source}: it was saved within an epoch of {then} batches, and those of this run have "
            f"{now}. Start as many processes as before."
        )
    last = (now - 1, "the batches of an epoch")
    state.batch = saved_progress(saved, "batch", *last, source=source)
    sums = require_mapping(saved.get("sums"), f"{source}: sums")
    if not all(isinstance(total, float) and math.isfinite(total) for total in sums.values()):
        raise CheckpointError(f"{source}: sums of losses that are no numbers. Copy it again.")
    state.sums = Counter(sums)
