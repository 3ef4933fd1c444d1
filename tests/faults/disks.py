"""Full disks, and places that cannot be written to: a named error, and nothing saved is lost."""

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.faults.programs import (
    PROGRAMS,
    Done,
    assert_whole,
    place,
    run,
    started,
    undisturbed,
)
from tests.tiny_runs import assert_equal_states


def assert_named(done: Done) -> None:
    """It ended by itself, without a traceback."""
    assert done.status in (0, 1, 3), (done.status, done.said)
    assert "Traceback" not in done.said, done.said


def assert_recovers(name: str, folder: Path, root: Path) -> None:
    """With room again, the work ends as if nothing had been."""
    program, whole = PROGRAMS[name], undisturbed(name, root)
    assert_whole(folder, at_rest=True)
    done = run(program, folder)
    assert done.status == 0, done.said
    assert_whole(folder, at_rest=True)
    assert_equal_states(dict(program.results(folder)), dict(whole))


@cache
def sizes_of(name: str, root: Path) -> list[int]:
    """Bytes of one file of each kind that the program writes, the largest first.

    A byte less, and that file cannot be written, while all smaller ones can.
    """
    program = PROGRAMS[name]
    with place(root, f"sized {name.replace('/', ' ')}") as folder:
        program.prepare(folder)
        before = {path for path in folder.rglob("*")}
        assert run(program, folder).status == 0
        written = (p for p in folder.rglob("*") if p.is_file() and p not in before)
        kinds = {(p.suffix, p.stem.rstrip("0123456789")): p.stat().st_size for p in written}
        return sorted({size for size in kinds.values() if size}, reverse=True)


def limited_file(name: str, root: Path, number: int) -> int:
    """No file may be larger than all but a byte of one of those that the program writes."""
    program, sizes = PROGRAMS[name], sizes_of(name, root)
    with place(root, f"limited {number}") as folder:
        program.prepare(folder)
        assert_named(run(program, folder, limit=sizes[number % len(sizes)] - 1))
        assert_recovers(name, folder, root)
    return 1


@cache
def bytes_of(name: str, root: Path) -> tuple[int, int]:
    """What the program reads and what it writes, in bytes."""
    program = PROGRAMS[name]
    with place(root, f"weighed {name.replace('/', ' ')}") as folder:
        program.prepare(folder)
        before = _size(folder)
        assert run(program, folder).status == 0
        return before, _size(folder) - before


def _size(folder: Path) -> int:
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*") if p.is_file())


def may_mount() -> bool:
    """Whether this user may make a small disk in memory."""
    return os.geteuid() == 0 and Path("/proc/mounts").exists()


@contextmanager
def disk(around: Path, size: int) -> Iterator[Path]:
    """A disk in memory of so many bytes."""
    folder = around / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={-(-size // 4096) * 4096}", "tmpfs"]
    subprocess.run([*mount, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, option: str) -> None:
    """Changes such a disk: `size=256m`, `ro`, `rw`."""
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


def full_disk(name: str, root: Path, number: int) -> int:
    """A disk in memory that is full at a random moment, and made larger afterwards."""
    program = PROGRAMS[name]
    before, written = bytes_of(name, root)
    room = before + int(random.Random(f"{name} {number}").uniform(0.02, 0.95) * written)
    with place(root, f"full {number}") as around, disk(around, room) as folder:
        program.prepare(folder)
        assert_named(started(program, folder, streams=around).done())
        remount(folder, "size=256m")
        assert_recovers(name, folder, root)
    return 1


def read_only(name: str, root: Path, number: int) -> int:
    """A disk in memory that cannot be written to, and later can."""
    program = PROGRAMS[name]
    with place(root, f"read-only {number}") as around, disk(around, 2**28) as folder:
        program.prepare(folder)
        remount(folder, "ro")
        done = started(program, folder, streams=around).done()
        assert_named(done)
        assert done.status == 1, done.said
        assert str(folder) in done.said, done.said
        remount(folder, "rw")
        assert_recovers(name, folder, root)
    return 1
