"""Checkpoints: one file per role and step (gen_00005000.pt) that no kill can harm.

A file is written beside its place as *.tmp, flushed to disk and renamed. So a file of a given name
is always whole, and a step counts only when the files of all its roles are there. It ends in the
SHA-256 of all that is before it, as the comment of the zip that torch.save writes: whoever reads
it without this module sees no difference, and load_tensors notices every bit that was flipped.
"""

import contextlib
import hashlib
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import open_regular, read_regular, write_atomic

LOAD_ERRORS = (
    *(AssertionError, AttributeError, EOFError, LookupError, OSError, OverflowError, RuntimeError),
    *(TypeError, ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error),
)
"""What torch.load raises for a file that is truncated, corrupt or no checkpoint."""


OPTIONAL = {
    *("foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"),
    *("amsgrad", "nesterov"),
}
"""Options of torch's optimisers that came or went between versions."""
OF_ADAM = {"step", "exp_avg", "exp_avg_sq"}
OF_MOMENTUM = {"momentum_buffer"}
"""What optimisers keep of each parameter: Adam's, and those of SGD and LARS."""
REAL = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


SIGNATURE = b"sha256:"
"""Begins the comment of a zip file of ours; the SHA-256 in hexadecimal digits ends it."""
COMMENT_LENGTH = (len(SIGNATURE) + 64).to_bytes(2, "little")
"""As the last two bytes of the zip's end record say it, before the comment."""
ANNOUNCEMENT = rb"PK\x05\x06.{16}" + re.escape(COMMENT_LENGTH)
"""The end record of a zip file of ours."""
END_LENGTH = 22 + len(SIGNATURE) + 64
"""Of the end record and the comment."""


STEP_FILE = re.compile(r"([A-Za-z]+)_([0-9]{1,18})\.pt")
MADE_BY = {
    r"(gen|dis|state)_[0-9]+\.pt": "inpainter/train.py",
    r"model-[0-9]+\.pt": "diffusion_models/train_eval_ddpm.py",
    r".+\.model": "train_dia.py",
    r"[^.]+": "the folder of a run is made by train_dia.py or train_eval_ddpm.py",
}
"""Which program makes a file, by the pattern of its name."""
FORBIDDEN = r"Unsupported (?:global|class).*?([\w]+(?:\.\w+)+)"
"""What torch.load says of objects that it does not make, since that would run code."""


class CheckpointError(UserError):
    """A checkpoint is missing or cannot be read."""


class DamagedCheckpointError(CheckpointError):
    """A file that is truncated, or whose contents are not those that were written."""


def save_atomic(obj: Any, path: Path) -> None:
    """Saves tensors and plain values with torch.save; the file appears whole or not at all."""
    write_atomic(path, lambda file: _save_signed(obj, file))


def _save_signed(obj: Any, file: BinaryIO) -> None:
    """torch.save, and behind it the SHA-256 of the file as the comment of the zip."""
    torch.save(obj, file)
    file.seek(-len(COMMENT_LENGTH), os.SEEK_END)
    file.write(COMMENT_LENGTH + SIGNATURE)
    digest = stream_hash(file)
    file.seek(0, os.SEEK_END)
    file.write(digest.encode())


def keep_copy(path: Path, copy: Path) -> None:
    """Gives a checkpoint, if it is there and whole, a second name, which stays when it is replaced.

    Raises OSError where that cannot be written.
    """
    try:
        with open_file(path) as file:
            if _damage(file) is not None:
                return
    except (CheckpointError, *LOAD_ERRORS):
        return
    temporary = copy.with_name(copy.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.hardlink_to(path)
        temporary.replace(copy)
    except OSError:  # a file system without second names
        write_atomic(copy, lambda file: file.write(read_regular(path)))
    finally:
        temporary.unlink(missing_ok=True)


def save_text_atomic(text: str, path: Path) -> None:
    """Writes UTF-8 text; the file appears whole or not at all.

    Names of files that are no UTF-8, which Python holds as surrogates, become the bytes they were.
    """
    data = text.encode(errors="surrogateescape")
    write_atomic(path, lambda file: file.write(data))


def open_file(path: Path) -> BinaryIO:
    """A checkpoint's file, opened for reading: it can be read even if it is deleted meanwhile.

    Raises CheckpointError where it is missing, listing the steps that are there, or not readable.
    """
    path = Path(path)
    try:
        return open_regular(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        pass
    except OSError as error:
        remedy = "Allow reading it" if isinstance(error, PermissionError) else "Put the file back"
        raise CheckpointError(f"{path}: {error.strerror}. {remedy}.") from error
    raise CheckpointError(
        f"No {path.name} in {path.parent}.{state_of(path.parent)} {_remedy_of_missing(path)}"
    )


def load_tensors(path: Path, file: BinaryIO | None = None) -> Any:
    """Loads a file of tensors and plain values onto the CPU, without running code from it.

    file: the same, opened before. Raises CheckpointError where the file is missing (listing the
    steps that are there) or holds Python objects of other kinds, DamagedCheckpointError where it is
    truncated or corrupt. A file in torch's older format, which is no zip, has no checksums: what a
    flipped bit made of a weight looks like a weight.
    """
    path = Path(path)
    with contextlib.nullcontext(file) if file else open_file(path) as opened:
        return _load_opened(path, opened)


def _load_opened(path: Path, file: BinaryIO) -> Any:
    """What load_tensors does with an open file."""
    try:
        damage = _damage(file)
        if damage is not None:
            raise DamagedCheckpointError(f"{path}: {damage}. {_other_steps(path)}")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        forbidden = re.search(FORBIDDEN, str(error), re.IGNORECASE)
        if forbidden:
            raise CheckpointError(
                f"{path} holds a Python object ({forbidden[1]}), and loading that could run code. "
                "Save it again as a state dict of tensors."
            ) from error
        raise DamagedCheckpointError(
            f"{path} ({file.seek(0, os.SEEK_END)} bytes) is truncated or no checkpoint "
            f"({type(error).__name__} on reading). {_other_steps(path)}"
        ) from error


def _damage(file: BinaryIO) -> str | None:
    """What a checksum says to be wrong with a file; None for a whole one, or one without.

    A file of ours has the SHA-256 of all bytes, one that torch.save wrote a CRC-32 per record.
    torch.load compares neither: one flipped bit would pass for a weight.
    Raises zipfile.BadZipFile for a zip that has lost its end.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - END_LENGTH))
    end = file.read()
    announced = re.search(ANNOUNCEMENT, end, re.DOTALL)
    if announced and len(end) - announced.end() < len(SIGNATURE) + 64:
        raise zipfile.BadZipFile("the SHA-256 is cut off")
    comment = end[-len(SIGNATURE) - 64 :]
    # Either shows that there was a signature: one flipped bit does not reach both.
    if announced or comment.startswith(SIGNATURE):
        fits = comment == SIGNATURE + stream_hash(file, max(0, size - 64)).encode()
        return None if fits else "damaged (its SHA-256 does not fit its contents)"
    file.seek(0)
    begin = file.read(2)
    if not zipfile.is_zipfile(file):
        if begin == b"PK":
            raise zipfile.BadZipFile("the list of contents is missing")
        return None  # torch.load's older format, or nothing that it knows
    with zipfile.ZipFile(file) as records:
        damaged = records.testzip()
    return damaged and f"the record {damaged} is damaged (its checksum does not fit)"


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, read again only where its size or time has changed."""
    stat = Path(path).stat()
    return _content_hash(str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _content_hash(path: str, size: int, time_ns: int) -> str:
    with open_regular(Path(path)) as file:
        return stream_hash(file)


def stream_hash(file: BinaryIO, length: int | None = None) -> str:
    """SHA-256 of an open file's bytes, or of the first `length` of them."""
    digest, left = hashlib.sha256(), math.inf if length is None else length
    file.seek(0)
    while part := file.read(int(min(2**20, left))):
        digest.update(part)
        left -= len(part)
    return digest.hexdigest()


def checkpoint_path(folder: Path, role: str, step: int) -> Path:
    """The file of one role at one step: <folder>/<role>_<step, 8 digits>.pt."""
    return Path(folder) / f"{role}_{step:08d}.pt"


def steps_in(folder: Path, role: str) -> list[int]:
    """The steps whose file of this role is in the folder, ascending; none for a missing folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"{re.escape(role)}_([0-9]{{8}}|[1-9][0-9]{{8,17}})\.pt")
    matches = (pattern.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def require_mapping(value: Any, source: str, entries: Collection[str] = ()) -> dict[str, Any]:
    """The value, a dict that has these entries. Raises CheckpointError, naming the source."""
    if not isinstance(value, Mapping):
        expected = f"a dict with {', '.join(entries)}" if entries else "a dict"
        raise CheckpointError(f"{source}: expected {expected}, found {_found(value)}.")
    missing = [name for name in entries if name not in value]
    if missing:
        raise CheckpointError(
            f"{source}: no entry {', '.join(missing)}, found {_found(value)}. It is a file of "
            "another kind or version; pass another one."
        )
    return dict(value)


def require_state_dict(value: Any, source: str) -> dict[str, Tensor]:
    """A network's weights by name, without the `module.` of DataParallel.

    source: the file, and where in it, for messages. Raises CheckpointError for anything but names
    with dense tensors of real numbers. What a network wants of them, load_module looks at.
    """
    expected = "expected the weights of a network (names and tensors)"
    if not isinstance(value, Mapping) or not value:
        raise CheckpointError(f"{source}: {expected}, found {_found(value)}. Pass another file.")
    for name, tensor in value.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{source}: {expected}, found the name {str(name)[:40]!r}.")
        if not (isinstance(tensor, Tensor) and _is_plain(tensor)):
            raise CheckpointError(f"{source}: {expected}, found {name} = {_found(tensor)}.")
    return {name.removeprefix("module."): tensor.detach() for name, tensor in value.items()}


def require_finite_weights(state: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError where a weight is NaN or infinite, naming the first few."""
    names = non_finite(state)
    if names:
        raise CheckpointError(
            f"{source}: weights that are not finite (NaN or infinite): {names}. The training that "
            "made them had failed, or the file was changed; use another step."
        )


def non_finite(state: Mapping[str, Tensor]) -> str:
    """Names of the tensors that are NaN or infinite somewhere, the first three; "" for none."""
    return _few([name for name, tensor in state.items() if not _is_finite(tensor)])


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def load_module(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copies a state dict into a module whose weights have the same names, shapes and kinds.

    Raises CheckpointError, in one line with the first few differences.
    """
    expected = module.state_dict()
    kinds = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "of another shape": [
            f"{name}: {tuple(state[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
        "of another type": [
            f"{name}: {state[name].dtype} for {tensor.dtype}"
            for name, tensor in expected.items()
            if name in state and state[name].is_floating_point() != tensor.is_floating_point()
        ],
    }
    differences = [f"{len(names)} {kind} ({_few(names)})" for kind, names in kinds.items() if names]
    if differences:
        raise CheckpointError(
            f"{source} does not fit the network of the settings; weights {'; '.join(differences)}. "
            "Give the settings it was trained with, or another file."
        )
    module.load_state_dict(state)


def load_optimiser(
    optimiser: torch.optim.Optimizer,
    value: Any,
    source: str,
    *,
    has_stepped: bool | None = None,
) -> None:
    """Puts back what optimiser.state_dict() was.

    has_stepped: whether it must have made a step, and so keep anything; None where that is not
    known. Raises CheckpointError, naming the source, where the value is something else or of
    another kind of optimiser.
    """
    value = require_mapping(value, source, ("state", "param_groups"))
    problem = f"{source}: not the state of this optimiser ({type(optimiser).__name__})"
    remedy = "Give the settings the run was started with, or go on from another step."
    groups, expected = value["param_groups"], optimiser.state_dict()["param_groups"]
    same = isinstance(groups, list) and len(groups) == len(expected)
    for group, ours in zip(groups, expected, strict=True) if same else ():
        same &= isinstance(group, Mapping) and group.get("params") == ours["params"]
        same = same and set(group) - OPTIONAL == set(ours) - OPTIONAL
    if not same:
        raise CheckpointError(f"{problem}: its groups of parameters differ. {remedy}")
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    states = require_mapping(value["state"], source)
    entries = OF_ADAM if isinstance(optimiser, torch.optim.Adam) else OF_MOMENTUM
    if has_stepped and not states:
        raise CheckpointError(f"{problem}: it keeps nothing, as before the first step. {remedy}")
    for number, record in states.items():
        known = isinstance(number, int) and 0 <= number < len(parameters)
        if not (known and isinstance(record, Mapping) and set(record) == entries):
            raise CheckpointError(f"{problem}: it keeps other numbers of a parameter. {remedy}")
        shape = parameters[number].shape
        for name, entry in record.items():
            fits = entry is None or (isinstance(entry, int | float) and math.isfinite(entry))
            if isinstance(entry, Tensor):
                fits = _is_plain(entry) and entry.shape in (shape, ()) and _is_finite(entry)
            if not fits:
                raise CheckpointError(
                    f"{problem}: {name} of parameter {number} is {_found(entry)}, expected finite "
                    f"numbers of shape {tuple(shape)}. {remedy}"
                )
    optimiser.load_state_dict(value)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor holds real numbers, one after the other."""
    return tensor.dtype in REAL and tensor.layout == torch.strided and not tensor.is_meta


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; asks for no second copy of a large tensor."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _found(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} ({value.dtype}, {value.layout}, {value.device})"
    if isinstance(value, Mapping):
        return f"a dict of {_few([str(key)[:40] for key in value])}" if value else "an empty dict"
    text = repr(value) if isinstance(value, int | float | str | None) else ""
    return f"{type(value).__name__} {text[:40]}".strip() if value is not None else "nothing (None)"


def _few(names: Sequence[str]) -> str:
    """The first three of a list."""
    more = f", … ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def state_of(folder: Path) -> str:
    """A sentence, with a space before it, where the folder is none."""
    if folder.is_dir():
        return ""
    return " That is a file, not a folder." if folder.exists() else " The folder does not exist."


def _remedy_of_missing(path: Path) -> str:
    """What to do about a file that is not there."""
    if STEP_FILE.fullmatch(path.name) and path.parent.is_dir():
        return _other_steps(path)
    made_by = next((by for name, by in MADE_BY.items() if re.fullmatch(name, path.name)), None)
    train = f", or train first ({made_by})" if made_by else ""
    return f"Correct the path{train}." if train else "Correct the path, or put the file there."


def _other_steps(path: Path) -> str:
    """What to use instead of a file that is missing or broken."""
    match = STEP_FILE.fullmatch(path.name)
    if not match:
        return "Copy it again, or pass another file."
    steps = [step for step in steps_in(path.parent, match[1]) if step != int(match[2])]
    if not steps:
        return "There are no other steps there."
    return f"Other steps there: {listed_steps(steps)}. Ask for one of these."


def listed_steps(steps: Sequence[int]) -> str:
    """Steps in words, the middle left out of a long list."""
    if len(steps) <= 12:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:4]))}, ... {', '.join(map(str, steps[-4:]))}"
