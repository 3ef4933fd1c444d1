"""What every training shares: its folder and log, what may change on resume, finite numbers."""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.profiler import ProfilerActivity, profile, schedule

from common.checkpoint import CheckpointError, non_finite, require_mapping
from common.claims import claim, holder_of, is_own
from common.config import config_to_dict, config_to_yaml
from common.devices import resolve_device, supports_half, tf32_products
from common.errors import UserError
from common.image_sets import data_changes
from common.processes import Processes, joined_processes
from common.random_numbers import seed_everything
from common.run_log import RunLog, write_run_record

LOG = logging.getLogger(__name__)
LOCK_NAME = "writer.lock"
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
PROFILE_NAME = "profile.json.gz"
PROFILED_STEPS = 20
OWN_SETTINGS = "Give the settings it was made with, or start a new run in another folder."


class TrainingError(UserError):
    """A training that cannot go on: a loss is not finite, or the network collapsed."""


def autocast_to(precision: str, device: torch.device) -> torch.autocast:
    """A context in which networks compute in 16 bits, where train.precision is bf16 or fp16."""
    half = HALF.get(precision, torch.bfloat16)
    return torch.autocast(device.type, half, enabled=precision in HALF)


def gradient_scaler(precision: str, device: torch.device) -> GradScaler:
    """Keeps small gradients from vanishing in fp16; with every other precision it does nothing.

    Also says where another precision is faster: fp32 on a GPU, 16 bits without such products.
    """
    if precision == "fp32" and device.type == "cuda":
        LOG.info(
            "precision fp32 rounds nothing. tf32, in which torch computes convolutions on a GPU by "
            "itself, takes about half the time."
        )
    if precision in HALF and not supports_half(HALF[precision], device):
        LOG.warning(
            "precision %s: %s has no such products and emulates them, which is slower than fp32.",
            precision,
            "this processor" if device.type == "cpu" else device,
        )
    return GradScaler(device.type, enabled=precision == "fp16")


def scaler_state(scaler: GradScaler) -> dict[str, Any]:
    """The entry of a checkpoint that a resumed run in fp16 needs; none with other precisions."""
    return {"scaler": scaler.state_dict()} if scaler.is_enabled() else {}


def restore_scaler(scaler: GradScaler, saved: Mapping[str, Any], source: str) -> None:
    """Takes what scaler_state gave; CheckpointError where it is something else.

    Where there is none, of a run of another precision, the scale starts anew.
    """
    if not scaler.is_enabled() or "scaler" not in saved:
        return
    entries = require_mapping(saved["scaler"], f"{source}: scaler", tuple(scaler.state_dict()))
    if not all(type(entries[name]) in (int, float) for name in scaler.state_dict()):
        raise CheckpointError(
            f"{source}: the scale of the gradients is not one. Go on from another step."
        )
    scaler.load_state_dict(dict(entries))


def scale_of(scaler: GradScaler) -> dict[str, float]:
    """For the log: what gradients are multiplied by in fp16; halved where a step was left out."""
    return {"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}


@contextlib.contextmanager
def profiling(folder: Path | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """A function to call after every step, which writes profile.json.gz of 20 steps to a folder.

    The first two are left out. One line says where it is and what took longest. None: does nothing.
    """
    if folder is None:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=1, warmup=1, active=PROFILED_STEPS, repeat=1)
    written: list[Path] = []

    def write(profiler: profile) -> None:
        path, unfinished = folder / PROFILE_NAME, folder / f"unfinished_{PROFILE_NAME}"
        profiler.export_chrome_trace(str(unfinished))
        written.append(unfinished.replace(path))
        times = Counter()
        for event in profiler.key_averages():
            times[event.key] += event.self_cpu_time_total + event.self_device_time_total
        total = max(times.total(), 1)
        longest = ", ".join(f"{name} {time / total:.0%}" for name, time in times.most_common(5))
        LOG.info("Profile (open it at https://ui.perfetto.dev): %s. Longest: %s", path, longest)

    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
    if not written:
        LOG.warning("No profile: it begins with the third step, and the run had fewer.")


@contextlib.contextmanager
def joined_training(config: Any) -> Iterator[tuple[torch.device, Processes]]:
    """Where a training runs: its device, and this process among those that train together.

    config: settings with `device`, `seed` and `precision`, of which tf32 holds meanwhile, and
    `peer_timeout`.
    """
    device = resolve_device(config.device)
    joined = joined_processes(device, config.peer_timeout)
    with tf32_products(config.precision == "tf32"), joined as processes:
        seed_everything(config.seed)
        yield device, processes


@contextlib.contextmanager
def sole_writer(folder: Path, processes: Processes, remedy: str) -> Iterator[None]:
    """A run folder that no other training writes into meanwhile; the main process claims it.

    remedy: where else to write. Raises CheckpointError where a living process trains into it.
    """
    if not processes.is_main:
        yield
        return
    lock = folder / LOCK_NAME
    claimed = claim(lock)
    if claimed is None:
        raise CheckpointError(
            f"{folder} is in use: another training writes into it ({holder_of(lock)}). Wait until "
            f"it ends, or stop it, or {remedy}. If there is no such process, delete {lock}."
        )
    with claimed:
        yield


def require_still_sole_writer(folder: Path) -> None:
    """To be asked in the main process before each save, and each line of the log.

    Raises TrainingError where the folder is not this process's any more: its machine stood still,
    and another training took it over.
    """
    lock = folder / LOCK_NAME
    if is_own(lock):
        return
    holder = holder_of(lock)
    taken = f"names another process ({holder})" if holder else "is gone"
    raise TrainingError(
        f"Nothing more is saved: {lock} {taken}. This training stood still for minutes, so that "
        "another one took its folder, or someone deleted the file. Look whether another one runs "
        "there; if none does, go on from the last checkpoint."
    )


def refuse_to_overwrite(
    folder: Path, checkpoints: Collection[object], remedy: str, *, reached: str = ""
) -> None:
    """Raises CheckpointError where the folder of a new run has checkpoints of another one.

    checkpoints: those found there. remedy: how to go on from them, or where else to write.
    reached: " up to step 4", for the message.
    """
    if checkpoints:
        raise CheckpointError(
            f"{folder} already holds a run{reached}. {remedy}, or move the folder away."
        )


@contextlib.contextmanager
def open_run(
    folder: Path,
    events: Path,
    config: Any,
    *,
    processes: Processes,
    command: Sequence[str],
    resume_step: int,
) -> Iterator[RunLog | None]:
    """The log of a run in the main process, closed at the end; None in the others.

    config: a settings dataclass. See RunLog and write_run_record, which this calls, for the rest.
    """
    if not processes.is_main:
        yield None
        return
    yaml = config_to_yaml(config)
    write_run_record(folder, config_yaml=yaml, command=command, resume_step=resume_step)
    check = partial(require_still_sole_writer, folder)
    with contextlib.closing(RunLog(folder, events, resume_step, check)) as log:
        yield log


def check_resumed(
    state: Mapping[str, Any],
    config: Any,
    images: Mapping[str, Any],
    *,
    source: str,
    may_change: Collection[str],
    images_may_change: bool = False,
    remedy: str = OWN_SETTINGS,
) -> None:
    """Refuses to go on from a state with other settings or images; logs the changes it allows.

    state: has the `config` it was saved with, and its `images` unless it is of an old run. config:
    a settings dataclass; a key that the saved one lacks had its default. images: identity of the
    training images (common.image_sets). source: the checkpoint, for messages. may_change: dotted
    keys, or sections with a dot at the end ("evaluation."). Raises CheckpointError that names every
    refused key, both values and the remedy.
    """
    saved = require_mapping(state["config"], f"{source}: config")
    given = flat(config_to_dict(config))
    before = flat(config_to_dict(type(config)())) | flat(saved)
    lines = {
        key: f"{key}: {before.get(key)!r} when it was saved, {value!r} now"
        for key, value in given.items()
        if before.get(key) != value
    }
    sections = tuple(name for name in may_change if name.endswith("."))
    refused = [
        line for key, line in lines.items() if not (key in may_change or key.startswith(sections))
    ]
    if refused:
        raise CheckpointError(
            f"{source} was made with other settings, and cannot go on with these: "
            f"{'; '.join(refused)}. {remedy}"
        )
    other_images = data_changes(state.get("images"), images)
    if other_images and not images_may_change:
        raise CheckpointError(
            f"{source}: {other_images}; a run goes on with the same ones. {remedy}"
        )
    if other_images:
        LOG.warning("%s: %s.", source, other_images)
    if lines:
        LOG.warning("Going on from %s with changed settings: %s", source, "; ".join(lines.values()))


def require_as_many_processes(
    state: Mapping[str, Any], processes: Processes, key: str, *, source: str
) -> None:
    """Refuses to go on with another number of processes than the one that a state was saved by.

    key: the batch of each process, which they make a batch of all; source: the checkpoint, for the
    CheckpointError. States of old do not say how many there were, and go on with any number.
    """
    then, now = state.get("processes"), processes.world_size
    if then not in (None, now):
        raise CheckpointError(
            f"{source}: processes: {str(then)[:40]!r} when it was saved, '{now}' now. {key} is of "
            "each, so the batches would have another size. Start as many processes as before "
            "(torchrun --nproc_per_node), or start a new run in another folder."
        )


def saved_progress(
    state: Mapping[str, Any], unit: str, total: int, key: str, *, source: str
) -> int:
    """How many steps or epochs a state has behind it.

    unit: the entry that says so ("step"). total: of the whole run, which the setting `key` says.
    source: the checkpoint, for messages. Raises CheckpointError where the entry is no whole number
    of 0 or more, or more than total.
    """
    done = state[unit]
    if type(done) is not int or done < 0:
        raise CheckpointError(
            f"{source}: {unit} is {str(done)[:40]!r}, expected a whole number of 0 or more. The "
            "file is damaged; copy it again, or go on from another one."
        )
    if done > total:
        raise CheckpointError(
            f"{source} is of {unit} {done}, beyond {key}: {total}. Raise "
            f"--{key.rpartition('.')[2]}, or start a new run in another folder."
        )
    return done


def require_finite(
    step: int,
    losses: Mapping[str, float],
    remedy: str = "Go on from the last checkpoint with a lower learning rate.",
) -> None:
    """Raises TrainingError, with the step, all losses and the remedy, unless all are numbers."""
    if not all(math.isfinite(value) for value in losses.values()):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise TrainingError(f"The loss is not finite at step {step}: {shown}. {remedy}")


def require_finite_training(
    reached: str, states: Mapping[str, Mapping[str, Tensor]], remedy: str
) -> None:
    """Raises TrainingError, before anything is saved, where a number of a network is not finite.

    reached: "at step 7", for the message. states: tensors by name, by what they belong to ("weights
    of the generator").
    """
    for what, state in states.items():
        names = non_finite(state)
        if names:
            raise TrainingError(
                f"The {what} are not finite {reached}: {names}. Nothing of it is saved. {remedy}"
            )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found
