"""The images of one output folder, shared out among processes on one or many machines.

While a prediction runs, sharing/ in the output folder holds a claim of every process at work, a
claim of every image that is being scored, and what every image that is done adds to the tables: so
that no image is scored twice, and that a dead process's image is taken over. Only who holds
tables.claim writes the tables. The last process to end removes the folder. Nothing is sent between
processes: they need the same disk and nothing else.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.checkpoint import CheckpointError, save_text_atomic
from common.claims import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    Claim,
    Holder,
    claim,
    holder_of,
    wait_for_claim,
)
from common.config import ConfigError
from common.files import escaped, read_regular, unescaped
from common.runtime import Processes, launched
from inpainter.heatmap_folder import HeatmapFolder, remove_partial_files

LOG = logging.getLogger(__name__)
FOLDER, TABLES_CLAIM = "sharing", "tables.claim"
TABLES_SECONDS = 3600.0
"""How long a process waits for others that write the tables, which takes them seconds."""
Rows = dict[str, list[dict[str, str]]]
"""Rows of an image by the name of their table."""


def processes_of(arguments: argparse.Namespace) -> Processes:
    """Which of how many this process is: by --shard, else by torchrun. Raises ConfigError."""
    if arguments.shard is None:
        return launched()
    if launched().world_size > 1:
        raise ConfigError("torchrun shares the images out by itself: leave --shard away.")
    return arguments.shard


def shard(text: str) -> Processes:
    """What --shard says, 2/8 for the third of eight; an argparse type."""
    found = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not number < count:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no part; expected i/n, i counted from 0: 0/8 to 7/8 for eight processes"
        )
    return Processes(number, count)


def in_turn(images: Sequence[str], processes: Processes) -> list[str]:
    """All images in the order in which one of the processes looks for work.

    First its own part, neighbours together, for slices of a volume are read from one file; then the
    others' parts, each from its end, where its own process comes last.
    """
    count = processes.world_size
    bounds = [len(images) * number // count for number in range(count + 1)]
    parts = [images[start:end] for start, end in itertools.pairwise(bounds)]
    own = processes.rank
    others = [parts[(own + k) % count] for k in range(1, count)]
    return [*parts[own], *(image for part in others for image in reversed(part))]


@dataclass(frozen=True)
class Done:
    """What became of an image."""

    image: str
    rows: Rows
    """What it adds to the tables."""
    notes: list[str] = field(default_factory=list)
    """Sentences that are true of it."""
    left_out: str | None = None
    """Why it has no heatmaps; None where it has."""
    by: str = ""
    """The process."""

    def text(self) -> str:
        """As a file holds it."""
        left_out = None if self.left_out is None else escaped(self.left_out)
        return json.dumps(asdict(self) | {"image": escaped(self.image), "left_out": left_out})

    @classmethod
    def of(cls, text: str) -> "Done":
        """What `text` wrote. Raises ValueError or TypeError for anything else."""
        done = cls(**json.loads(text))
        left_out = None if done.left_out is None else unescaped(done.left_out)
        return cls(unescaped(done.image), done.rows, done.notes, left_out, done.by)


class SharedFolder:
    """An output folder in which this process and others work; a context that ends its work there.

    Raises OSError where the folder cannot be written.
    """

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.place, self.processes = folder, folder / FOLDER, processes
        self.name = secrets.token_hex(8)
        """Of this process, here."""
        self.done: dict[str, Done] = {}
        """By image: what the tables have of the images that were done since somebody is at work."""
        self._present: Claim | None = None
        self._read: set[str] = set()

    def __enter__(self) -> "SharedFolder":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends this process's work; the last one tidies up."""
        if self._present is None:
            return
        ours = claim(self.place / TABLES_CLAIM)
        self._present.release()
        if ours is None:
            return  # who holds it will see to the rest
        with ours:
            if not self.others():
                remove_partial_files(self.folder)
                if self._files() <= self._read:
                    self._clear()
        with contextlib.suppress(OSError):  # somebody has come
            self.place.rmdir()

    def tables(self) -> Claim:
        """The right to write the tables, for a with block, when the others have given it up."""
        return wait_for_claim(self.place / TABLES_CLAIM, TABLES_SECONDS)

    def tables_if_free(self) -> Claim | None:
        """The same at once, or None."""
        return claim(self.place / TABLES_CLAIM)

    def others(self) -> list[Holder]:
        """The other processes at work in the folder. Under `tables`."""
        found = []
        for path in self.place.glob("process-*.claim"):
            if self._present is not None and path == self._present.path:
                continue
            dead = claim(path)
            if dead is not None:
                dead.release()
            elif (holder := holder_of(path)) is not None:
                found.append(holder)
        return found

    def begin(self) -> None:
        """Counts this process among those at work. Under `tables`."""
        self._present = claim(self.place / f"process-{self.name}.claim")

    def forget(self) -> None:
        """Drops what earlier processes left, none of which is at work. Under `tables`."""
        self._clear()
        self.done, self._read = {}, set()

    def is_free(self, image: str) -> bool:
        """Whether nobody has done an image or is at it, as it looks now."""
        return not (self._path(image, "claim").exists() or self.is_done(image))

    def is_done(self, image: str) -> bool:
        """Whether an image was done since somebody is at work here."""
        return image in self.done or self._path(image, "json").exists()

    @contextlib.contextmanager
    def turn(self, image: str) -> Iterator[bool]:
        """Whether this process is to score an image, which nobody else does meanwhile."""
        claimed = claim(self._path(image, "claim"))
        if claimed is None:
            yield False
            return
        with claimed:
            yield not self.is_done(image)

    def left(self, images: Iterable[str]) -> Iterator[str]:
        """Yields, again and again, the images that are not done yet, until all are.

        They are with others: each gets its turn as soon as its process has died.
        """
        images, pause = [*images], FIRST_PAUSE_SECONDS
        while images := [image for image in images if not self.is_done(image)]:
            yield from images
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def finish(self, image: str, rows: Rows, notes: list[str], left_out: str | None = None) -> None:
        """Says, for all processes, what became of an image; what it has to write is written."""
        done = Done(image, rows, notes, left_out, self.name)
        save_text_atomic(done.text(), self._path(image, "json"))

    def write_news(self, output: HeatmapFolder) -> None:
        """Writes into the tables what all processes have done since. Under `tables`.

        A file that is damaged is passed over: its image is scored by the next run.
        """
        output.catch_up()
        for name in sorted(self._files() - self._read):
            path = self.place / name
            try:
                done = Done.of(read_regular(path).decode())
            except (ValueError, TypeError, AttributeError) as error:
                LOG.warning("%s is damaged (%s); the next run scores its image.", path, error)
            else:
                output.put(done.image, done.rows)
                self.done[done.image] = done
            self._read.add(name)

    def n_done(self) -> int:
        """How many images were done since somebody is at work here."""
        return len(self._files())

    def _files(self) -> set[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.place) as entries:
            return {entry.name for entry in entries if entry.name.endswith(".json")}
        return set()

    def _clear(self) -> None:
        """Removes all but who is waiting for, or has, the tables, and this process's own claim."""
        kept = None if self._present is None else self._present.path.name
        for path in [*self.place.iterdir()]:
            if path.name != kept and not path.name.startswith(TABLES_CLAIM):
                path.unlink(missing_ok=True)

    def _path(self, image: str, ending: str) -> Path:
        digest = hashlib.sha256(os.fsencode(image)).hexdigest()[:32]
        return self.place / f"{digest}.{ending}"


def require_welcome(
    folder: Path, others: Sequence[Holder], *, differing: str, overwrite: bool
) -> None:
    """Raises CheckpointError where a folder in use cannot be helped with.

    differing: in what this run is not that of the others, in words.
    """
    if not others:
        return
    who = f"{folder} is in use: {others[0]} writes heatmaps into it"
    if overwrite:
        raise CheckpointError(
            f"{who}, which --overwrite would delete. Wait until it ends, or stop it, or pass "
            "another --output_dir; without --overwrite this process helps it."
        )
    if differing:
        raise CheckpointError(
            f"{who} with other settings or another checkpoint: {differing}. Wait until "
            "it ends, or stop it, or pass another --output_dir."
        )
