"""Output files: written so that they appear whole or not at all, and named after images."""

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from common.volumes import split_slice

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Full disk, used-up quota, largest size of a file."""
ESCAPE = re.compile(r"\\x([0-9a-f]{2})")
HASH_DIGITS = 16
USUAL_LIMIT = 255
"""Bytes in a file's name on the usual file systems."""
NO_FILES = {
    **{stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"},
    **{stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"},
}
"""What may be in a file's place: nothing, or no end, may come from it."""


def absolute(path: Path) -> Path:
    """The absolute path without `..`; links are followed only where it has some."""
    return path.resolve() if ".." in path.parts else path.absolute()


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading; at once, whatever is there.

    Raises OSError with its name, also where a folder, a pipe, a device or a socket is there.
    """

    def opened(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # for a pipe's other end

    try:
        file = io.FileIO(str(path), opener=opened)
    except OSError:
        require_regular(path)  # a socket cannot be opened
        raise
    try:
        _require_regular(os.fstat(file.fileno()), path)
    except OSError:
        file.close()
        raise
    return io.BufferedReader(file)


def read_regular(path: Path) -> bytes:
    """All bytes of a file. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def require_regular(path: Path) -> None:
    """Raises OSError where a pipe, a device or a socket is in the place of a file to write."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _require_regular(path.stat(), path)


def _require_regular(facts: os.stat_result, path: Path) -> None:
    kind = NO_FILES.get(stat.S_IFMT(facts.st_mode))
    if kind is not None:
        raise OSError(errno.EINVAL, f"it is no regular file but {kind}", str(path))


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill path.tmp, flushes it to disk and renames it; makes the folder if missing.

    `write` may go back in the file and read it. Whatever happens, no path.tmp is left, and what was
    at `path` before stays until the new file is whole. Raises OSError with the file's name where
    the system refuses, also where `write` is a library's function that hides the system's reason
    behind an error of its own.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        require_regular(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)  # of a process that was killed
            with temporary.open("x+b") as file:
                _fill(file, write)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush_folder(path.parent)
    except OSError as error:
        if error.filename is not None and not str(error.filename).endswith(".tmp"):
            raise
        # an error of a write has no file's name
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def free_space(path: Path) -> int | None:
    """Bytes that are free where the path lies, or would lie; None where that is not known."""
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


def escaped(name: str) -> str:
    r"""A name as UTF-8 text in one line, from which `unescaped` makes the same name again.

    A byte that is no UTF-8, a control character, and a backslash that would be read as the start of
    such an escape, become \xNN. All other names stay as they are.
    """
    text = ESCAPE.sub(r"\\x5cx\1", name)
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def unescaped(text: str) -> str:
    """The name that `escaped` wrote."""
    data = text.encode("utf-8", "surrogateescape")
    data = re.sub(ESCAPE.pattern.encode(), lambda found: bytes.fromhex(found[1].decode()), data)
    return data.decode("utf-8", "surrogateescape")


def name_limit(folder: Path) -> int:
    """How many bytes a file's name may have in this folder."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return USUAL_LIMIT


def file_stems(images: Iterable[str], longest: int = USUAL_LIMIT) -> dict[str, str]:
    """Image name -> start of its files' names: the name without its suffix and with __ for /.

    Where two images would share it (scan.png and scan.tif), theirs keep the suffix; so do slices,
    as scan.dcm#017. No two are the same, even where a file system tells neither case nor composed
    characters apart. A stem that is still shared, would be longer than `longest` bytes, hidden, or
    not printable, is made safe and ends in a hash of the image's name.
    """
    whole = {image: image.replace("/", "__") for image in images}
    short = {
        image: name
        if split_slice(image)[1] is not None
        else PurePosixPath(name).with_suffix("").name
        for image, name in whole.items()
    }
    count = Counter(map(_folded, short.values()))
    stems = {i: short[i] if count[_folded(short[i])] == 1 else whole[i] for i in whole}
    hashed = {
        image
        for image, stem in stems.items()
        if not (stem.isprintable() and stem[:1] != "." and 0 < len(os.fsencode(stem)) <= longest)
    }
    while True:
        final = {i: _hashed(i, stems[i], longest) if i in hashed else stems[i] for i in stems}
        count = Counter(map(_folded, final.values()))
        shared = {image for image, stem in final.items() if count[_folded(stem)] > 1} - hashed
        if not shared:
            return final
        hashed |= shared


def _folded(name: str) -> str:
    """The same for names that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _hashed(image: str, stem: str, longest: int) -> str:
    """The stem, shortened and made safe, with a hash of the image's name behind it."""
    digest = hashlib.sha256(image.encode("utf-8", "surrogateescape")).hexdigest()[:HASH_DIGITS]
    safe = "".join(c if c.isprintable() else "_" for c in stem)
    safe = f"_{safe[1:]}" if safe.startswith(".") else safe
    room = max(longest - HASH_DIGITS - 1, 0)
    return f"{safe.encode()[:room].decode(errors='ignore')}_{digest}"
