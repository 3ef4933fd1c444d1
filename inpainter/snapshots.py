"""Snapshots of a training: what is saved, restored and thrown away, and which one is best.

A snapshot at a step is gen_%08d.pt and dis_%08d.pt in the published layout, and state_%08d.pt with
what else a resumed run needs. The generator's file is written last and deleted first, so that
where it is, the others are, whenever the process is killed.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import (
    CheckpointError,
    checkpoint_path,
    load_tensors,
    resolve_step,
    save_atomic,
    selection_errors,
    steps_in,
    strip_module_prefix,
)
from common.config import config_to_dict
from common.random_state import random_state, restore_random_state
from common.runtime import evaluating
from inpainter.generator import Generator
from inpainter.masks import centre_crop, centre_mask
from inpainter.settings import PicardConfig
from inpainter.step import Networks
from inpainter.updates import Optimisers

LOG = logging.getLogger(__name__)
ROLES = ("state", "dis", "gen")
"""In the order of writing."""
SET_ASIDE = "superseded"


def save_snapshot(
    folder: Path, step: int, networks: Networks, optimisers: Optimisers, config: PicardConfig
) -> None:
    """Writes the three files of a step; each appears whole, the generator's last."""
    state = {
        "step": step,
        "optimizer_gen": optimisers.gen.state_dict(),
        "optimizer_dis": optimisers.dis.state_dict(),
        "random": random_state(),
        "config": config_to_dict(config),
    }
    save_atomic(state, checkpoint_path(folder, "state", step))
    critics = {
        "localD": networks.local_critic.state_dict(),
        "globalD": networks.global_critic.state_dict(),
    }
    save_atomic(critics, checkpoint_path(folder, "dis", step))
    save_atomic(networks.generator.state_dict(), checkpoint_path(folder, "gen", step))


def restore_snapshot(
    folder: Path,
    wanted: int | str,
    networks: Networks,
    optimisers: Optimisers,
    config: PicardConfig,
) -> int:
    """Loads a step (a number, `latest` or `best`) into networks and optimisers; returns the step.

    Raises CheckpointError for a missing or broken file or for other network settings.
    """
    step = resolve_step(folder, wanted, ROLES)
    path = checkpoint_path(folder, "state", step)
    state = load_tensors(path)
    _check_settings(state["config"], config, path)
    generator = strip_module_prefix(load_tensors(checkpoint_path(folder, "gen", step)))
    networks.generator.load_state_dict(generator)
    critics = load_tensors(checkpoint_path(folder, "dis", step))
    networks.local_critic.load_state_dict(strip_module_prefix(critics["localD"]))
    networks.global_critic.load_state_dict(strip_module_prefix(critics["globalD"]))
    optimisers.gen.load_state_dict(state["optimizer_gen"])
    optimisers.dis.load_state_dict(state["optimizer_dis"])
    restore_random_state(state["random"], str(path))
    return step


def _check_settings(saved: dict, config: PicardConfig, path: Path) -> None:
    """Networks and crops must be the same; other changes of settings are allowed, and named.

    A key that the snapshot does not know had the published meaning.
    """
    saved = _flat(config_to_dict(PicardConfig())) | _flat(saved)
    given = _flat(config_to_dict(config))
    changed = {k: (saved[k], v) for k, v in given.items() if saved[k] != v}
    fixed = ("netG.", "netD.", "train.image_shape", "train.mask_shape")
    lines = {k: f"{k}: snapshot {old!r}, settings {new!r}" for k, (old, new) in changed.items()}
    refused = [line for key, line in lines.items() if key.startswith(fixed)]
    if refused:
        raise CheckpointError(
            f"{path} cannot be resumed with other networks or shapes:\n  " + "\n  ".join(refused)
        )
    if lines:
        LOG.warning("Resuming %s with changed settings: %s", path.name, "; ".join(lines.values()))


def _flat(values: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


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
