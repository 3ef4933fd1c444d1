"""Checkpoints: one file per role and step (gen_00005000.pt) that no kill can harm.

A file is written beside its place as *.tmp, flushed to disk and renamed. So a file of a given name
is always whole, and a step counts only when the files of all its roles are there.
"""

import hashlib
import json
import math
import os
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from common.errors import UserError

LOG_NAME = "log.jsonl"
SELECTION_KEY = "select_l1"

LOAD_ERRORS = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)
"""What torch.load raises for a file that is truncated, corrupt or no checkpoint."""


class CheckpointError(UserError):
    """A checkpoint is missing or cannot be read."""


def save_atomic(obj: Any, path: Path) -> None:
    """Saves tensors and plain values with torch.save; the file appears whole or not at all."""
    _write_atomic(lambda file: torch.save(obj, file), path)


def save_text_atomic(text: str, path: Path) -> None:
    """Writes UTF-8 text; the file appears whole or not at all."""
    _write_atomic(lambda file: file.write(text.encode()), path)


def _write_atomic(write: Callable[[BinaryIO], object], path: Path) -> None:
    """Writes to path.tmp, flushes it to disk, renames it, flushes the rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_tensors(path: Path) -> Any:
    """Loads a file of tensors and plain values onto the CPU, without running code from it.

    Raises CheckpointError where the file is missing (listing the steps that are there), truncated,
    corrupt, or holds Python objects of other kinds.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(_missing(path))
    try:
        damaged = damaged_record(path)
        if damaged is not None:
            raise CheckpointError(
                f"{path}: the record {damaged} is damaged (its checksum does not fit). "
                f"{_other_steps(path)}"
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        forbidden = re.search(r"Unsupported (?:global|class).*?([\w]+(?:\.\w+)+)", str(error))
        if forbidden:
            raise CheckpointError(
                f"{path} holds a Python object ({forbidden[1]}), and loading that could run code. "
                "Save it again as a state dict of tensors."
            ) from error
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no checkpoint "
            f"({type(error).__name__} on reading). {_other_steps(path)}"
        ) from error


def damaged_record(path: Path) -> str | None:
    """The first record of a zip file whose CRC-32 does not fit; none for a whole one or no zip.

    torch.load does not compare checksums: one flipped bit would pass for a weight.
    """
    if not zipfile.is_zipfile(path):
        return None  # torch.load's older format, or nothing that it knows
    with zipfile.ZipFile(path) as file:
        return file.testzip()


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, read again only where its size or time has changed."""
    stat = Path(path).stat()
    return _content_hash(str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _content_hash(path: str, size: int, time_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_path(folder: Path, role: str, step: int) -> Path:
    """The file of one role at one step: <folder>/<role>_<step, 8 digits>.pt."""
    return Path(folder) / f"{role}_{step:08d}.pt"


def steps_in(folder: Path, role: str = "gen") -> list[int]:
    """The steps whose file of this role is in the folder, ascending; none for a missing folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"{re.escape(role)}_(\d{{8,}})\.pt")
    matches = (pattern.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def resolve_step(
    folder: Path,
    wanted: int | str | Literal["latest", "best"],
    roles: Sequence[str] = ("gen",),
) -> int:
    """The step that is meant: a number, `latest`, or `best`.

    Counts only steps whose files of all roles are there. best is the lowest selection error
    (`select_l1`) that log.jsonl in the folder records for one of them; the earliest on a tie.
    Raises CheckpointError, listing the steps there, where none is meant.
    """
    folder = Path(folder)
    steps = sorted(set.intersection(*(set(steps_in(folder, role)) for role in roles)))
    if not steps:
        what = " + ".join(f"{role}_<step>.pt" for role in roles)
        state = "" if folder.is_dir() else " The folder does not exist."
        raise CheckpointError(
            f"No checkpoint ({what}) in {folder}.{state} Train first, or pass another folder."
        )
    listing = f"Steps there: {_listing(steps)}."
    if wanted == "latest":
        return steps[-1]
    if wanted == "best":
        errors = {step: e for step, e in selection_errors(folder).items() if step in steps}
        if not errors:
            raise CheckpointError(
                f"{folder / LOG_NAME} records no selection error ({SELECTION_KEY}) of a checkpoint "
                f"that is still there, so there is no best one. {listing} Pass one, or latest."
            )
        return min(errors, key=lambda step: (errors[step], step))
    if isinstance(wanted, str) and not wanted.isdigit():
        raise CheckpointError(
            f"'{wanted}' is no step. Expected a number, latest or best. {listing}"
        )
    step = int(wanted)
    if step not in steps:
        missing = [
            checkpoint_path(folder, role, step).name
            for role in roles
            if not checkpoint_path(folder, role, step).is_file()
        ]
        raise CheckpointError(
            f"No {', '.join(missing)} in {folder}. {listing} Pass one with --checkpoint_iter."
        )
    return step


def selection_errors(folder: Path) -> dict[int, float]:
    """Selection error by step, as log.jsonl has it; the last line of a step counts."""
    errors: dict[int, float] = {}
    for record in read_log(Path(folder) / LOG_NAME):
        value = record.get(SELECTION_KEY)
        if isinstance(value, int | float) and math.isfinite(value):
            errors[int(record["step"])] = float(value)
    return errors


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl that have a step; a line cut short by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def strip_module_prefix(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict without the `module.` that (Distributed)DataParallel puts before names."""
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and PyTorch's generators, in types that load_tensors reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what random_state returned; GPUs only where their number is the same."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        (kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss)
    )
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _missing(path: Path) -> str:
    """Message for a file that is not there."""
    state = "" if path.parent.is_dir() else " The folder does not exist."
    return f"No {path.name} in {path.parent}.{state} {_other_steps(path)}"


def _other_steps(path: Path) -> str:
    """What to use instead of a file that is missing or broken."""
    match = re.fullmatch(r"([A-Za-z]+)_(\d+)\.pt", path.name)
    if not match:
        return "Copy it again, or pass another file."
    steps = [step for step in steps_in(path.parent, match[1]) if step != int(match[2])]
    if not steps:
        return "There are no other steps there."
    return f"Other steps there: {_listing(steps)}. Pass one with --checkpoint_iter."


def _listing(steps: Sequence[int]) -> str:
    """Steps in words, the middle left out of a long list."""
    if len(steps) <= 12:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:4]))}, ... {', '.join(map(str, steps[-4:]))}"
