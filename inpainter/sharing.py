"""The images of one output folder, shared out among processes on one or many machines.

While a prediction runs, sharing/ in the output folder holds a claim of every process at work, a
claim of every image that is being scored, and what every image that is done adds to the tables: so
that no image is scored twice, and that a dead process's image is taken over. Of the last images the
windows are shared out, too: in blocks, each with its claim and then its result. Only who holds
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

from common.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    load_tensors,
    save_atomic,
    save_text_atomic,
)
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
from common.processes import Processes, launched
from inpainter.heatmap import Compute, Scored, batched
from inpainter.heatmap_folder import HeatmapFolder, remove_partial_files

LOG = logging.getLogger(__name__)
FOLDER, TABLES_CLAIM = "sharing", "tables.claim"
TABLES_SECONDS = 3600.0
"""How long a process waits for others that write the tables, which takes them seconds."""
BATCHES_PER_BLOCK = 8
"""What a process computes of a shared image at a time: seconds of work, beside which files cost
nothing."""
PARTS_FORMAT = 2
"""Of the files of windows: a version that writes others passes these over, and computes its own."""
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
        return not (self.path(image, "claim").exists() or self.is_done(image))

    def is_done(self, image: str) -> bool:
        """Whether an image was done since somebody is at work here."""
        return image in self.done or self.path(image, "json").exists()

    @contextlib.contextmanager
    def turn(self, image: str) -> Iterator[bool]:
        """Whether this process is to score an image, which nobody else does meanwhile."""
        claimed = claim(self.path(image, "claim"))
        if claimed is None:
            yield False
            return
        with claimed:
            yield not self.is_done(image)

    def offer(self, image: str) -> None:
        """Lets others compute windows of an image, by `SharedWindows`."""
        self.path(image, "windows").touch()

    def is_offered(self, image: str) -> bool:
        """Whether one may."""
        return self.path(image, "windows").exists()

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
        save_text_atomic(done.text(), self.path(image, "json"))
        if self.is_offered(image):
            for path in [*self.place.glob(self.path(image, "*").name)]:
                if path.suffix in (".pt", ".windows"):
                    path.unlink(missing_ok=True)

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

    def is_running_out(self, images: Iterable[str]) -> bool:
        """Whether fewer images are free than processes are at work, so that some would idle."""
        present = sum(1 for _ in self.place.glob("process-*.claim"))
        n_processes = max(self.processes.world_size, present)
        free = itertools.islice(filter(self.is_free, images), n_processes)
        return n_processes > 1 and sum(1 for _ in free) < n_processes

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

    def path(self, image: str, ending: str) -> Path:
        """A file about an image."""
        digest = hashlib.sha256(os.fsencode(image)).hexdigest()[:32]
        return self.place / f"{digest}.{ending}"


class NotNeededError(Exception):
    """An image that this process helps with is done."""


class SharedWindows:
    """The windows of one image, of which every process that is free computes some.

    `run` is one of `inpainter.heatmap.Workers`. A block of batches is computed under a claim, each
    batch as one process alone would form it, and the result is a file that the others read: so all
    end with the same numbers. The process whose turn the image is writes the heatmaps.
    """

    def __init__(self, shared: SharedFolder, image: str, sha256: str) -> None:
        """sha256: of the image's file."""
        self.shared, self.image, self.sha256 = shared, image, sha256
        self.n_passes = 0
        self.n_computed = 0
        """Windows that this process computed."""

    def run(self, batches: list[list[int]], compute: Compute) -> Iterator[tuple[list[int], Scored]]:
        """Yields numbers and results of the blocks, in their order, whoever computes them.

        Raises NotNeededError where the image has been done meanwhile.
        """
        self.n_passes += 1
        numbers = [number for batch in batches for number in batch]
        size = len(batches[0]) if batches else 1
        blocks = batched(numbers, size * BATCHES_PER_BLOCK)
        key = f"{PARTS_FORMAT}-{self.sha256[:16]}-{self.n_passes}-{size}"
        known: dict[int, Scored] = {}
        for number, block in enumerate(blocks):
            pause = FIRST_PAUSE_SECONDS
            while number not in known:
                for ahead in range(number, len(blocks)):
                    if ahead in known:
                        continue
                    found = self._block(f"{key}-{ahead}", batched(blocks[ahead], size), compute)
                    if found is not None:
                        known[ahead] = found
                        break
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            yield block, known.pop(number)

    def _block(self, name: str, batches: list[list[int]], compute: Compute) -> Scored | None:
        """The result of a block; None while another process computes it."""
        part = self.shared.path(self.image, f"{name}.pt")
        if (found := _read_part(part)) is not None:
            return found
        claimed = claim(part.with_suffix(".claim"))
        if claimed is None:
            return None
        with claimed:
            if self.shared.is_done(self.image):
                raise NotNeededError
            found = _read_part(part)  # written just before it was claimed here
            if found is None:
                found = Scored.joined([compute(numbers) for numbers in batches])
                save_atomic([*found], part)
                self.n_computed += sum(map(len, batches))
        return found


def _read_part(path: Path) -> Scored | None:
    """What a process has computed; None where there is nothing, or a damaged file."""
    if not path.exists():
        return None
    try:
        return Scored(*load_tensors(path))
    except DamagedCheckpointError as error:
        LOG.warning("Computed again: %s", error)
    except CheckpointError:  # removed just now, for its image is done
        pass
    return None


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
