"""Writing files that appear whole or not at all."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Full disk, used-up quota, largest size of a file."""


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill path.tmp, flushes it to disk and renames it; makes the folder if missing.

    Whatever happens, no path.tmp is left, and what was at `path` before stays until the new file is
    whole. Raises OSError with the file's name where the system refuses, also where `write` is a
    library's function that hides the system's reason behind an error of its own.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                _fill(file, write)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush_folder(path.parent)
    except OSError as error:
        raise _about(error, path) from error


def free_space(path: Path) -> int | None:
    """Bytes that are free where the path lies, or would lie; none where that is not known."""
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


class _Watched:
    """A file that remembers why the system refused a write."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.refusal: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.refusal = error
            raise

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def _fill(file: BinaryIO, write: Callable[[BinaryIO], object]) -> None:
    """Calls write(file); where the system refused a write, raises that error and no other."""
    watched = _Watched(file)
    try:
        write(watched)  # torch.save answers a full disk with "inline_container.cc … unexpected pos"
    except RuntimeError as error:
        if watched.refusal is None:
            raise
        raise watched.refusal from error


def _flush_folder(folder: Path) -> None:
    """Makes a rename in the folder last."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _about(error: OSError, path: Path) -> OSError:
    """The same error with the file's name; an error of a write has none."""
    if error.filename is not None and not str(error.filename).endswith(".tmp"):
        return error
    return OSError(error.errno, error.strerror or str(error), str(path))
