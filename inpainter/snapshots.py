"""Snapshots of a training: what is saved, restored and thrown away, and which one is best.

A snapshot at a step is gen_%08d.pt and dis_%08d.pt in the published layout, and state_%08d.pt with
what else a resumed run needs. The generator's file is written last and deleted first, so that
where it is, the others are, whenever the process is killed.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.checkpoint import (
    CheckpointError,
    checkpoint_path,
    load_module,
    load_optimiser,
    load_tensors,
    non_finite,
    require_mapping,
    resolve_step,
    save_atomic,
    selection_errors,
    steps_in,
    weights_hash,
)
from common.config import config_to_dict
from common.image_sets import data_changes
from common.loops import TrainingError
from common.random_state import random_state, restore_random_state
from common.resume import changed_settings, check_resumed_settings
from common.runtime import evaluating
from inpainter.networks import Networks
from inpainter.networks.generator import Generator
from inpainter.networks.loading import critic_weights, generator_weights
from inpainter.settings import PicardConfig
from inpainter.updates import Optimisers
from inpainter.windows import centre_crop, centre_mask

LOG = logging.getLogger(__name__)
ROLES = ("state", "dis", "gen")
"""In the order of writing."""
SET_ASIDE = "superseded"
KEPT_BY_ADAM = ("step", "exp_avg", "exp_avg_sq")
LOWER_RATE = (
    "Go on from the last checkpoint with a lower train.lr (train.resume: FOLDER in a new run), or "
    "set train.warmup_steps and train.grad_clip_norm."
)

WHERE = (
    *("dataset_name", "expname", "checkpoints_dir", "logs_dir", "heatmaps_dir", "train.resume"),
    *("train_data_path", "test_data_path", "data_with_subfolder"),
)
"""Where things lie; that the images are the same is found by their contents."""
MACHINE = ("cuda", "gpu_ids", "device", "num_workers", "train.channels_last", "train.cache_mb")
"""What computes, and how fast."""
HOW_LONG = ("train.n_steps", "train.n_epochs")
"""Where the run ends. With train.lr_schedule: cosine the rate of the steps to come changes, too."""
WRITTEN = (
    *("train.snapshot_save_iter", "train.keep_snapshots", "train.print_iter"),
    *("train.viz_iter", "train.viz_max_out", "train.on_bad_image", "test."),
)
"""What is written or said, and how images are scored afterwards."""
MAY_CHANGE = (*WHERE, *MACHINE, *HOW_LONG, *WRITTEN)
"""What may differ when a run goes on in its folder (--resume); each change is named in the log.

All else decides what is learnt and is refused: data, crops, holes, losses, rates, networks, seed,
precision. A new run that starts from an old one's weights and optimisers (train.resume: FOLDER) may
change all of it but NETWORKS.
"""
NETWORKS = ("netG.", "netD.", "train.image_shape", "train.mask_shape")
"""What a checkpoint's weights are made for: never changed."""
FINE_TUNE = (
    "Give the settings it was made with; to train on with others, start a new run "
    "(another expname) with train.resume: FOLDER."
)


class Progress(NamedTuple):
    """How far a run has come, beside its weights."""

    step: int
    losses: dict[str, float]
    """As last computed since the last line of the log."""
    saturated_in_a_row: int
    """See CollapseWatch."""


def save_snapshot(
    folder: Path,
    progress: Progress,
    networks: Networks,
    optimisers: Optimisers,
    config: PicardConfig,
    images: Mapping[str, Any],
) -> None:
    """Writes the three files of a step; each appears whole, the generator's last.

    images: data_identity of the training images. Raises TrainingError, before anything is written,
    where a weight or a number of the optimisers is not finite.
    """
    require_finite_training(progress.step, networks, optimisers)
    step = progress.step
    generator = networks.generator.state_dict()
    critics = {
        "localD": networks.local_critic.state_dict(),
        "globalD": networks.global_critic.state_dict(),
    }
    state = {
        **progress._asdict(),
        "optimizer_gen": optimisers.gen.state_dict(),
        "optimizer_dis": optimisers.dis.state_dict(),
        "random": random_state(),
        "config": config_to_dict(config),
        "images": dict(images),
        "weights": {"gen": weights_hash(generator), **_hashes(critics)},
    }
    save_atomic(state, checkpoint_path(folder, "state", step))
    save_atomic(critics, checkpoint_path(folder, "dis", step))
    save_atomic(generator, checkpoint_path(folder, "gen", step))


def require_finite_training(step: int, networks: Networks, optimisers: Optimisers) -> None:
    """Raises TrainingError where a weight or a moment of Adam's is NaN or infinite."""
    for name, module in networks._asdict().items():
        found = non_finite(module.state_dict())
        if found:
            raise TrainingError(
                f"The weights of the {name} are not finite at step {step}: {found}. Nothing of "
                f"this step is saved. {LOWER_RATE}"
            )
    for name, optimiser in optimisers._asdict().items():
        moments = {
            f"{entry} of parameter {number}": value
            for number, kept in optimiser.state_dict()["state"].items()
            for entry, value in kept.items()
            if isinstance(value, Tensor)
        }
        found = non_finite(moments)
        if found:
            raise TrainingError(
                f"The gradients of {name} were not finite before step {step} ({found}). Nothing "
                f"of this step is saved. {LOWER_RATE}"
            )


def restore_snapshot(
    folder: Path,
    wanted: int | str,
    networks: Networks,
    optimisers: Optimisers,
    config: PicardConfig,
    images: Mapping[str, Any],
    *,
    same_run: bool,
) -> Progress:
    """Loads a step (a number, `latest` or `best`) into networks and optimisers.

    same_run: the run goes on in its folder, where only MAY_CHANGE may differ and the training
    images must be the same; else a new run starts from it, where only NETWORKS must be the same.
    Raises CheckpointError for a missing or broken file, for files of different steps and for other
    settings.
    """
    step = resolve_step(folder, wanted, ROLES, option="--resume STEP")
    path = checkpoint_path(folder, "state", step)
    state = _read_state(path, step)
    _check_settings(state["config"], config, path, same_run)
    changes = data_changes(state.get("images"), images)
    if changes and same_run:
        raise CheckpointError(f"{path}: {changes}; a run goes on with the same ones. {FINE_TUNE}")
    if changes:
        LOG.warning("%s: %s.", path.name, changes)
    generator = generator_weights(checkpoint_path(folder, "gen", step))
    critics = critic_weights(checkpoint_path(folder, "dis", step))
    load_module(networks.generator, generator, str(checkpoint_path(folder, "gen", step)))
    for name, critic in (("localD", networks.local_critic), ("globalD", networks.global_critic)):
        load_module(critic, critics[name], f"{checkpoint_path(folder, 'dis', step)}: {name}")
    found = {"gen": weights_hash(generator), **_hashes(critics)}
    _check_hashes(folder, step, state.get("weights"), found)
    train = config.train
    has_stepped = {
        "gen": not train.critic or step >= train.n_critic if same_run else None,
        "dis": train.critic if same_run else None,
    }
    for name, optimiser in optimisers._asdict().items():
        source = f"{path}: optimizer_{name}"
        value = state[f"optimizer_{name}"]
        load_optimiser(
            optimiser, value, source, entries=KEPT_BY_ADAM, has_stepped=has_stepped[name]
        )
        for group in optimiser.param_groups:
            group["betas"] = (train.beta1, train.beta2)  # a new run may have others
    restore_random_state(state["random"], str(path))
    return Progress(step, *_log_state(state, path))


def _read_state(path: Path, step: int) -> dict[str, Any]:
    """What a state_%08d.pt holds, of this very step."""
    entries = ("step", "config", "optimizer_gen", "optimizer_dis", "random")
    state = require_mapping(load_tensors(path), str(path), entries)
    if type(state["step"]) is not int or state["step"] != step:
        raise CheckpointError(
            f"{path}: it says that it is of step {str(state['step'])[:40]}, its name says {step}. "
            "Do not rename checkpoints; go on from another step."
        )
    return state


def _log_state(state: Mapping[str, Any], path: Path) -> tuple[dict[str, float], int]:
    """Losses since the last line of the log and the watch's count; snapshots of old have none."""
    losses, in_a_row = state.get("losses", {}), state.get("saturated_in_a_row", 0)
    usable = isinstance(losses, Mapping) and all(
        isinstance(name, str) and isinstance(value, float) for name, value in losses.items()
    )
    if not usable or type(in_a_row) is not int or in_a_row < 0:
        raise CheckpointError(f"{path}: losses or saturated_in_a_row are no numbers. {FINE_TUNE}")
    return dict(losses), in_a_row


def _hashes(critics: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    return {name: weights_hash(state) for name, state in critics.items()}


def _check_hashes(folder: Path, step: int, saved: object, found: Mapping[str, str]) -> None:
    """Refuses weights that are not those the state was saved with; old states have no hashes."""
    for name, value in found.items() if isinstance(saved, Mapping) else ():
        if saved.get(name) != value:
            role = "gen" if name == "gen" else "dis"
            raise CheckpointError(
                f"{checkpoint_path(folder, role, step)} holds other weights than were saved with "
                f"{checkpoint_path(folder, 'state', step).name}: it is of another step or run. "
                "Copy it again, or go on from another step."
            )


def _check_settings(saved: Any, config: PicardConfig, path: Path, same_run: bool) -> None:
    """Refuses what must not change and names what has. A key that is absent had its default."""
    saved = require_mapping(saved, f"{path}: config")
    changed = changed_settings(saved, config_to_dict(config), absent=config_to_dict(PicardConfig()))
    everything = tuple(key for key in changed if not key.startswith(NETWORKS))
    lines = check_resumed_settings(
        changed,
        may_change=MAY_CHANGE if same_run else everything,
        source=str(path),
        remedy=FINE_TUNE if same_run else "Networks and shapes must be those of the checkpoint.",
    )
    if lines:
        LOG.warning("Going on from %s with changed settings: %s", path.name, "; ".join(lines))


def tidy_snapshots(folder: Path, step: int) -> None:
    """Before a run goes on at `step`: what a kill left half-written goes, later snapshots move.

    Snapshots of later steps belong to an earlier run, whose log lines are dropped too; they go
    to the subfolder `superseded`, so that `latest` and `best` mean this run's.
    """
    for path in folder.glob("*.pt.tmp"):
        path.unlink()
    later = [other for other in steps_in(folder) if other > step]
    for other in later:
        for role in reversed(ROLES):
            path = checkpoint_path(folder, role, other)
            if path.exists():
                (folder / SET_ASIDE).mkdir(exist_ok=True)
                path.replace(folder / SET_ASIDE / path.name)
    if later:
        LOG.warning("Snapshots after step %d went to %s: %s", step, folder / SET_ASIDE, later)


def prune_snapshots(folder: Path, keep: int | None) -> None:
    """Deletes all but the newest `keep` snapshots and the best one; none keeps them all."""
    if keep is None:
        return
    steps = steps_in(folder, "state")
    errors = {step: error for step, error in selection_errors(folder).items() if step in steps}
    kept = set(steps[-keep:]) | ({min(errors, key=errors.get)} if errors else set())
    for step in set(steps) - kept:
        for role in reversed(ROLES):  # what is left of a kill in between goes next time
            checkpoint_path(folder, role, step).unlink(missing_ok=True)


@torch.inference_mode()
def completion_error(generator: Generator, crops: Tensor, mask_hw: tuple[int, int]) -> float:
    """Mean |completion - truth| in the central hole, without dropout, images in [-1, 1].

    The paper picks the snapshot with the lowest one on its training set. crops: (n, C, H, W), on
    the generator's device. Lower = better.
    """
    mask = centre_mask(tuple(crops.shape[2:]), mask_hw, crops.device)
    total = 0.0
    with evaluating(generator):
        for batch in crops.split(16):
            hole = mask.expand(len(batch), -1, -1, -1)
            fine = generator(batch * (1 - mask), hole).fine
            error = (centre_crop(fine, mask_hw) - centre_crop(batch, mask_hw)).abs()
            total += error.mean(dim=(1, 2, 3)).double().sum().item()
    return total / len(crops)
