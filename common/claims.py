"""Claims: what one process alone may write, among processes and machines that share a disk.

    claimed = claim(folder / "writer.lock")  # None where a living process holds it
    with claimed: ...                        # released on every way out

A claim is a small file that only one process can create (O_EXCL, which holds on NFS, too). It names
its machine and process. A claim holds as long as that process lives: on the same machine that is
looked up, also whether the number belongs to another process by now; of another machine it is known
by the file's time, which the holder renews every 15 s. One that is older than five minutes, by the
clock of the disk that it lies on, is taken for a dead process's.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from common.errors import UserError
from common.files import read_regular

LOG = logging.getLogger(__name__)
RENEWAL_SECONDS = 15.0
"""How often the time of a claim's file is renewed."""
SILENCE_SECONDS = 300.0
"""Age from which a claim of another machine does not hold any more."""
TAKEOVER = ".takeover"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.02, 5.0
"""Between two looks at a claim that is waited for; the longer the wait, the longer the pauses."""
SECONDS_OF_SILENCE_IN_WAITING = 2.0
TRIES = 100
"""How often a claim that vanishes while it is looked at is tried again."""


class ClaimError(UserError):
    """A claim was not released in time."""


@dataclass(frozen=True)
class Holder:
    """The process that a claim's file names."""

    host: str = "an unknown machine"
    pid: int = 0
    since: str = "an unknown time"
    started: int | None = None
    """When the process started, in the machine's own count; None where that is not known."""
    machine: str | None = None
    """The boot and the space in which `pid` means this process; None where that is not known."""
    token: str = ""
    """Of this one claim."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@dataclass(frozen=True)
class Claim:
    """A claim that this process holds, until `release` or the end of a with block."""

    path: Path
    holder: Holder
    new_folders: tuple[Path, ...] = ()
    """Folders that were made for it, the innermost first."""
    _ended: threading.Event = field(default_factory=threading.Event)

    def is_held(self) -> bool:
        """Whether it still is this process's: a machine that stood still may have lost it."""
        return holder_of(self.path) == self.holder

    def release(self) -> None:
        """Gives it up: its file goes, and the folders made for it where nothing else is in them.

        Does nothing in a child that a fork has made of the holder, nor after it was lost.
        """
        if self._ended.is_set() or self.holder.pid != os.getpid():
            return
        self._ended.set()
        if not self.is_held():
            return
        with contextlib.suppress(OSError):  # the folder is gone, or cannot be written any more
            self.path.unlink()
        with contextlib.suppress(OSError):  # something is in it
            for folder in self.new_folders:
                folder.rmdir()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _renew(self) -> None:
        """Until the end: the file's time is now, by the clock of the disk."""
        while not self._ended.wait(RENEWAL_SECONDS):
            with contextlib.suppress(OSError):
                if self.is_held():
                    os.utime(self.path)


def claim(path: Path) -> Claim | None:
    """Claims a path for this process; None where a living process holds it already.

    path: the claim's own file, which lies beside what it protects; its folder is made if missing.
    A dead process's claim is taken over, which the log says. Raises OSError where the file cannot
    be written.
    """
    path = Path(path)
    for _ in range(TRIES):
        made = _created(path)
        if made is not None:
            return made
        holder = holder_of(path)
        if holder is None:
            continue  # released just now
        if _is_running(holder):
            return None
        # Only one process may remove a dead claim, and it looks again first: else a slower one
        # would remove the claim of the process that was quicker.
        sole = claim(path.with_name(path.name + TAKEOVER))
        if sole is None:
            return None
        with sole:
            if holder_of(path) != holder:
                continue
            if _is_running(holder) is None and not _is_silent(path, sole.path):
                return None
            LOG.info("%s: %s, has ended without releasing it; taken over.", path, holder)
            path.unlink(missing_ok=True)
    return None


def wait_for_claim(path: Path, seconds: float) -> Claim:
    """Claims a path, after its holder has released it or died; says so while it waits.

    seconds: how long to wait for living holders in all. Raises ClaimError after that, OSError where
    the file cannot be written.
    """
    started, said = time.monotonic(), False
    while (made := claim(path)) is None:
        waited = time.monotonic() - started
        if waited > seconds:
            raise ClaimError(
                f"{path} was held for {seconds / 60:.0f} minutes by others, now by "
                f"{holder_of(path)}. Stop that process, and run again."
            )
        if not said and waited > SECONDS_OF_SILENCE_IN_WAITING:
            LOG.info("Waiting for %s to release %s", holder_of(path), path)
            said = True
        time.sleep(min(max(waited / 10, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS))
    return made


def holder_of(path: Path) -> Holder | None:
    """Who a claim's file names; None where there is no such file.

    A file that is no claim, or that a kill left empty, has an unknown holder.
    """
    try:
        text = read_regular(path).decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Holder(**json.loads(text))
    except (TypeError, ValueError, RecursionError):
        return Holder()


def is_own(path: Path) -> bool:
    """Whether this process holds the claim of a path."""
    holder = holder_of(path)
    return holder is not None and (holder.machine, holder.pid, holder.started) == (
        *(_machine(), os.getpid(), _start_of(os.getpid())),
    )


def _created(path: Path) -> Claim | None:
    """The claim, if its file could be made; None where there is one."""
    new_folders = _make_folder(path.parent)
    holder = Holder(
        socket.gethostname(),
        os.getpid(),
        time.strftime("%Y-%m-%d %H:%M:%S"),
        _start_of(os.getpid()),
        _machine(),
        secrets.token_hex(8),
    )
    try:
        number = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except (FileExistsError, FileNotFoundError):  # the latter: its folder was removed just now
        return None
    try:
        with open(number, "wb") as file:  # noqa: PTH123, a file that is open already
            file.write(json.dumps(asdict(holder)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # an error of a write has no file's name
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    made = Claim(path, holder, new_folders)
    threading.Thread(target=made._renew, name=f"renewing {path.name}", daemon=True).start()
    return made


def _make_folder(folder: Path) -> tuple[Path, ...]:
    """Makes a folder and those around it; returns the ones that were missing, innermost first."""
    missing = tuple(each for each in (folder, *folder.parents) if not each.exists())
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _is_running(holder: Holder) -> bool | None:
    """Whether the holder lives; None where only the age of its claim can tell."""
    if holder.machine is None or holder.machine != _machine():
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return _start_of(holder.pid) == holder.started


def _is_silent(path: Path, just_written: Path) -> bool:
    """Whether a claim's file was not renewed for long, compared with one written just now."""
    with contextlib.suppress(FileNotFoundError):
        return just_written.stat().st_mtime - path.stat().st_mtime > SILENCE_SECONDS
    return False


@cache
def _machine() -> str | None:
    """This boot of this machine, and the space of process numbers; None where they are not known.

    Containers may share a host's name and not its process numbers.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname() if os.name == "posix" else None


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None for an ended or unknown one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *numbers = text.rpartition(")")[2].split()  # the name before may hold anything
    return None if state in "ZX" else int(numbers[18])
