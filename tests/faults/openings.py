"""A file is changed at the moment at which an evaluation opens it, the first time or later.

The evaluation stands still just before it opens the file, so nothing comes between the change and
what it meets.
"""

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from tests.faults.changes import REPLACEMENTS, deleted
from tests.faults.disks import assert_named, assert_recovers, disk, remount
from tests.faults.programs import PROGRAMS, Opening, Running, assert_whole, place, started
from tests.tiny_runs import corrupt, wait_until

READ = {
    "eval.py": {
        "heatmaps/data/sub__b_good.pt": 8,
        "heatmaps/heatmaps.csv": 2,
        "heatmaps/command.txt": 2,
        "boxes.csv": 2,
        "metadata.csv": 2,
        "images/sub/b.png": 2,
    },
    "eval.py --mode ood_pre": {
        "data/train/normal/1.png": 8,
        "data/test/normal/1.png": 8,
        "data/test/spot/0.png": 8,
        "run/last.model": 2,
    },
}
"""What each of them reads, and how often at least: Python announces a file read once twice."""
WRITTEN = {"eval.py": "heatmaps/evaluation", "eval.py --mode ood_pre": "results"}
"""The folder that it writes to."""


def file_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("other")


INPUT_CHANGES = (*REPLACEMENTS, corrupt)
FOLDER_CHANGES = (deleted, file_in_its_place)


def stands_still(running: Running) -> bool:
    """Waits until the program stands still, which is true, or has ended."""
    state = Path(f"/proc/{running.child.pid}/stat")

    def stopped() -> bool:
        with contextlib.suppress(OSError):  # it has ended just now
            return state.read_text().rpartition(")")[2].split()[0] == "T"
        return False

    wait_until(lambda: stopped() or not running.child.is_alive())
    return stopped()


def changed_at(name: str, folder: Path, opening: Opening, change: Callable[[], object]) -> bool:
    """Runs the evaluation with a change just before an opening; false where it opens less often."""
    running = started(PROGRAMS[name], folder, streams=folder.parent, stop_at=opening)
    reached = stands_still(running)
    if reached:
        try:
            change()
        finally:
            os.kill(running.child.pid, signal.SIGCONT)
    assert_named(running.done())
    return reached


def input_changed(name: str, root: Path, number: int) -> int:
    """One of the files that it reads, at one of its openings, in one way."""
    chance = random.Random(f"{name} {number}")
    file, openings = chance.choice([*READ[name].items()])
    how = chance.choice(INPUT_CHANGES)
    with place(root, f"{number}/opened") as folder:
        PROGRAMS[name].prepare(folder)
        path = folder / file
        opening = Opening(str(path), chance.randint(1, openings))
        reached = changed_at(name, folder, opening, lambda: how(path))
        assert_results_are_whole(folder / WRITTEN[name])
    return int(reached)


def folder_changed(name: str, root: Path, number: int) -> int:
    """The folder that it writes to, when it opens a file there."""
    change = FOLDER_CHANGES[number % len(FOLDER_CHANGES)]
    with place(root, f"{number}/opened") as folder:
        PROGRAMS[name].prepare(folder)
        results = folder / WRITTEN[name]
        opening = Opening(str(results), 1 + number)
        reached = changed_at(name, folder, opening, lambda: change(results))
        assert_results_are_whole(results)
    return int(reached)


def read_only_at(name: str, root: Path, number: int) -> int:
    """The disk cannot be written to any more when it opens a file of its results."""
    with place(root, f"read-only {number}") as around, disk(around, 2**28) as folder:
        PROGRAMS[name].prepare(folder)
        opening = Opening(str(folder / WRITTEN[name]), 1 + 4 * number)
        reached = changed_at(name, folder, opening, lambda: remount(folder, "ro"))
        remount(folder, "rw")
        assert_recovers(name, folder, root)
    return int(reached)


def assert_results_are_whole(folder: Path) -> None:
    """Nothing half-written is there."""
    assert_whole(folder, at_rest=True)
    if (folder / "results.json").is_file():
        json.loads((folder / "results.json").read_text())
