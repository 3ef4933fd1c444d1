"""Snapshots of a training: what is saved, restored and thrown away, and which one is best.

A snapshot at a step is gen_%08d.pt and dis_%08d.pt in the published layout, and state_%08d.pt with
what else a resumed run needs. The generator's file is written last and deleted first, so that
where it is, the others are, whenever the process is killed.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor

from common.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    checkpoint_path,
    listed_steps,
    load_module,
    load_optimiser,
    load_tensors,
    open_file,
    require_mapping,
    save_atomic,
    state_of,
    steps_in,
    weights_hash,
)
from common.config import config_to_dict, resolve_path
from common.devices import eval_mode
from common.random_numbers import random_state, restore_random_state
from common.run_log import LOG_NAME, read_log
from common.training import (
    check_resumed,
    flat,
    require_finite_training,
    restore_scaler,
    scaler_state,
)
from inpainter.networks import Networks
from inpainter.networks.generator import Generator
from inpainter.networks.loading import critic_weights, generator_weights
from inpainter.settings import PicardConfig
from inpainter.step import LOWER_RATE, Optimisers, TrainState
from inpainter.windows import centre_crop, centre_mask

LOG = logging.getLogger(__name__)
Weights = Mapping[str, Tensor]
OpenFiles = Mapping[str, BinaryIO]
"""The files of a step, by role."""
Result = TypeVar("Result")
TRIES = 20
"""How often `latest` and `best` are looked up again beside a training that deletes old steps."""
ROLES = ("state", "dis", "gen")
"""In the order of writing."""
SET_ASIDE = "superseded"
RESUME_OPTION = "--resume STEP"
SELECTION_KEY = "select_l1"
"""Name in log.jsonl of the error by which the best snapshot is chosen; see completion_error."""

WHERE = (
    *("dataset_name", "expname", "checkpoints_dir", "logs_dir", "heatmaps_dir", "train.resume"),
    *("train_data_path", "test_data_path", "data_with_subfolder", "calibration_data_path"),
)
"""Where things lie; that the images are the same is seen from their contents."""
MACHINE = (
    *("cuda", "gpu_ids", "device", "num_workers", "peer_timeout"),
    *("train.channels_last", "train.cache_mb", "train.accumulate", "train.compile"),
)
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


def run_name(config: PicardConfig) -> Path:
    """<dataset_name>/<mask_type>_<expname>, below the checkpoints and the logs folder."""
    name = f"{config.train.mask_type}_{config.expname}"
    return Path(config.dataset_name or "unnamed", name)


def run_folder(config: PicardConfig) -> Path:
    """Folder of the run's checkpoints."""
    return resolve_path(config.checkpoints_dir, "checkpoints_dir") / run_name(config)


def operating_point_path(folder: Path, step: int) -> Path:
    """Where a step's operating point is: operating_point_<step, 8 digits>.json."""
    return checkpoint_path(folder, "operating_point", step).with_suffix(".json")


def files_of(folder: Path, step: int) -> list[Path]:
    """All files that a step may have, the generator's first.

    What is measured with it comes later, if at all, and is of no use without the rest.
    """
    roles = [*reversed(ROLES), "calibration"]
    files = [checkpoint_path(folder, role, step) for role in roles]
    return [*files, operating_point_path(folder, step)]


class Progress(NamedTuple):
    """How far a run has come, beside its weights."""

    step: int
    losses: dict[str, float]
    """As last computed since the last line of the log."""
    saturated_in_a_row: int
    """See CollapseWatch."""


def save_snapshot(folder: Path, progress: Progress, trained: TrainState) -> None:
    """Writes the three files of a step; each appears whole, the generator's last.

    Raises TrainingError, before anything is written, where a weight or a number of the optimisers
    is not finite.
    """
    step, networks, optimisers = progress.step, trained.networks, trained.optimisers
    tensors = training_tensors(networks, optimisers)
    require_finite_training(f"at step {step}", tensors, LOWER_RATE)
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
        **scaler_state(trained.scaler),
        "config": config_to_dict(trained.config),
        "images": dict(trained.images),
        "weights": _hashes(generator, critics),
    }
    save_atomic(state, checkpoint_path(folder, "state", step))
    save_atomic(critics, checkpoint_path(folder, "dis", step))
    save_atomic(generator, checkpoint_path(folder, "gen", step))


def training_tensors(networks: Networks, optimisers: Optimisers) -> dict[str, dict[str, Tensor]]:
    """Weights and Adam's moments by name, by what they belong to."""
    tensors = {
        f"weights of the {name}": module.state_dict() for name, module in networks._asdict().items()
    }
    for name, optimiser in optimisers._asdict().items():
        tensors[f"gradients of {name}"] = {
            f"{entry} of parameter {number}": value
            for number, moments in optimiser.state_dict()["state"].items()
            for entry, value in moments.items()
            if isinstance(value, Tensor)
        }
    return tensors


def restore_snapshot(
    folder: Path, which: int | str, trained: TrainState, *, same_run: bool
) -> Progress:
    """Loads a step (a number, `latest` or `best`) into the networks and optimisers.

    same_run: the run goes on in its folder, where only MAY_CHANGE may differ and the training
    images must be the same; else a new run starts from it, where only NETWORKS must be the same.
    Raises CheckpointError for a missing or broken file, for files of different steps and for other
    settings. `latest` is the newest whole one; see use_step.
    """
    restore = partial(_restore, folder, trained, same_run)
    return use_step(folder, which, ROLES, restore, option=RESUME_OPTION)


def _restore(
    folder: Path, trained: TrainState, same_run: bool, step: int, files: OpenFiles
) -> Progress:
    """What restore_snapshot does with a step, from its open files."""
    config, networks = trained.config, trained.networks
    paths = {role: checkpoint_path(folder, role, step) for role in ROLES}
    path = paths["state"]
    state = _read_state(path, step, files["state"])
    generator = generator_weights(paths["gen"], files["gen"])
    critics = critic_weights(paths["dis"], files["dis"])
    weights_fit = tuple(k for k in flat(config_to_dict(config)) if not k.startswith(NETWORKS))
    check_resumed(
        state,
        config,
        trained.images,
        source=str(path),
        may_change=MAY_CHANGE if same_run else weights_fit,
        images_may_change=not same_run,
        remedy=FINE_TUNE if same_run else "Networks and shapes must be those of the checkpoint.",
    )
    load_module(networks.generator, generator, str(paths["gen"]))
    for name, critic in (("localD", networks.local_critic), ("globalD", networks.global_critic)):
        load_module(critic, critics[name], f"{paths['dis']}: {name}")
    _check_hashes(folder, step, state.get("weights"), _hashes(generator, critics))
    train = config.train
    has_stepped = {
        "gen": not train.critic or step >= train.n_critic if same_run else None,
        "dis": train.critic if same_run else None,
    }
    for name, optimiser in trained.optimisers._asdict().items():
        source = f"{path}: optimizer_{name}"
        value = state[f"optimizer_{name}"]
        load_optimiser(optimiser, value, source, has_stepped=has_stepped[name])
        for group in optimiser.param_groups:
            group["betas"] = (train.beta1, train.beta2)  # a new run may have others
    restore_scaler(trained.scaler, state, str(path))
    restore_random_state(state["random"], str(path))
    return Progress(step, *_log_state(state, path))


def _read_state(path: Path, step: int, file: BinaryIO) -> dict[str, Any]:
    """What a state_%08d.pt, opened before, holds: of this very step."""
    entries = ("step", "config", "optimizer_gen", "optimizer_dis", "random")
    state = require_mapping(load_tensors(path, file), str(path), entries)
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


def _hashes(generator: Weights, critics: Mapping[str, Weights]) -> dict[str, str]:
    """Hash of each network's weights, by the network's name in the files."""
    return {name: weights_hash(state) for name, state in {"gen": generator, **critics}.items()}


def _check_hashes(folder: Path, step: int, saved: object, hashes: Mapping[str, str]) -> None:
    """Refuses weights that are not those the state was saved with; old states have no hashes."""
    for name, value in hashes.items() if isinstance(saved, Mapping) else ():
        if saved.get(name) != value:
            role = "gen" if name == "gen" else "dis"
            raise CheckpointError(
                f"{checkpoint_path(folder, role, step)} holds other weights than were saved with "
                f"{checkpoint_path(folder, 'state', step).name}: it is of another step or run. "
                "Copy it again, or go on from another step."
            )


def resolve_step(
    folder: Path,
    which: int | str,
    roles: Sequence[str] = ("gen",),
    *,
    option: str | None = None,
    without: Collection[int] = (),
) -> int:
    """The step that is meant: a number, `latest`, or `best`.

    Counts only steps whose files of all roles are there, and none of `without`. best is the lowest
    selection error (`select_l1`) that log.jsonl in the folder records for one of them; the earliest
    on a tie. option: the flag that takes another step, for messages. Raises CheckpointError,
    listing the steps there, where none is meant.
    """
    folder = Path(folder)
    steps = sorted(_steps_with(folder, roles).difference(without))
    if not steps:
        what = " + ".join(f"{role}_<step>.pt" for role in roles)
        raise CheckpointError(
            f"No checkpoint ({what}) in {folder}.{state_of(folder)} Train first, or pass another "
            "folder."
        )
    listing = f"Steps there: {listed_steps(steps)}."
    remedy = f" Pass one with {option}." if option else " Ask for one of these."
    if which == "latest":
        return steps[-1]
    if which == "best":
        best = best_of(folder, steps)
        if best is None:
            raise CheckpointError(
                f"{folder / LOG_NAME} records no selection error ({SELECTION_KEY}) of a checkpoint "
                f"that is still there, so there is no best one. {listing} Pass one, or latest."
            )
        return best
    if re.fullmatch(r"[0-9]{1,18}", str(which)) is None:
        raise CheckpointError(
            f"'{str(which)[:40]}' is no step. Expected a number, latest or best. {listing}{remedy}"
        )
    step = int(which)
    if step not in steps:
        files = [checkpoint_path(folder, role, step) for role in roles]
        missing = ", ".join(file.name for file in files if not file.is_file())
        raise CheckpointError(f"No {missing} in {folder}. {listing}{remedy}")
    return step


def use_step(
    folder: Path,
    which: int | str,
    roles: Sequence[str],
    use: Callable[[int, OpenFiles], Result],
    *,
    option: str | None = None,
) -> Result:
    """use(step, its open files) for the step that is meant, also beside a training.

    The files are opened together before any is read, so what is deleted meanwhile can still be
    read; where one was deleted sooner, `latest` and `best` are looked up again. Of `latest`, a step
    with a damaged file is passed over for the one before it, with a warning. which, roles and
    option: see resolve_step. Raises CheckpointError, and whatever `use` raises.
    """
    damaged: list[int] = []
    tries_left = TRIES
    while True:
        step = resolve_step(folder, which, roles, option=option, without=damaged)
        tries_left -= 1
        try:
            with contextlib.ExitStack() as stack:
                paths = {role: checkpoint_path(folder, role, step) for role in roles}
                files = {r: stack.enter_context(open_file(path)) for r, path in paths.items()}
                return use(step, files)
        except DamagedCheckpointError as error:
            damaged.append(step)
            if which != "latest" or not _steps_with(folder, roles).difference(damaged):
                raise
            LOG.warning("%s Passed over: `latest` is the step before it.", error)
        except (CheckpointError, FileNotFoundError):
            gone = not all(path.is_file() for path in paths.values())
            if not (gone and which in ("latest", "best") and tries_left):
                raise


def _steps_with(folder: Path, roles: Sequence[str]) -> set[int]:
    """The steps whose files of all roles are there."""
    return set.intersection(*(set(steps_in(folder, role)) for role in roles))


def best_of(folder: Path, steps: Sequence[int]) -> int | None:
    """The step of the lowest selection error, the earliest on a tie; None where none has one."""
    errors = {step: e for step, e in selection_errors(folder).items() if step in steps}
    return min(sorted(errors), key=errors.get, default=None)


def selection_errors(folder: Path) -> dict[int, float]:
    """Selection error by step, as log.jsonl has it; the last line of a step counts."""
    errors: dict[int, float] = {}
    for record, _ in read_log(Path(folder) / LOG_NAME):
        value = record.get(SELECTION_KEY)
        if isinstance(value, int | float) and abs(value) < 2**53:  # not NaN
            errors[record["step"]] = float(value)
    return errors


def tidy_snapshots(folder: Path, step: int) -> None:
    """Before a run goes on at `step`: what a kill left half-written goes, later snapshots move.

    Snapshots of later steps belong to an earlier run, whose log lines are dropped too; they go
    to the subfolder `superseded`, so that `latest` and `best` mean this run's.
    """
    for path in folder.glob("*.pt.tmp"):
        path.unlink()
    later = [other for other in steps_in(folder, "gen") if other > step]
    for other in later:
        for path in files_of(folder, other):
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
    for step in set(steps) - set(steps[-keep:]) - {best_of(folder, steps)}:
        for path in files_of(folder, step):  # what is left of a kill in between goes next time
            path.unlink(missing_ok=True)


@torch.inference_mode()
def completion_error(generator: Generator, crops: Tensor, mask_hw: tuple[int, int]) -> float:
    """Mean |completion - truth| in the central hole, without dropout, images in [-1, 1].

    The paper picks the snapshot with the lowest one on its training set. crops: (n, C, H, W), on
    the generator's device. Lower = better.
    """
    mask = centre_mask(tuple(crops.shape[2:]), mask_hw, crops.device)
    total = 0.0
    with eval_mode(generator):
        for batch in crops.split(16):
            hole = mask.expand(len(batch), -1, -1, -1)
            fine = generator(batch * (1 - mask), hole).fine
            error = (centre_crop(fine, mask_hw) - centre_crop(batch, mask_hw)).abs()
            total += error.mean(dim=(1, 2, 3)).double().sum().item()
    return total / len(crops)
