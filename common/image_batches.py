"""Batches of an image set, the same after a resume, and the processes that read batches ahead.

A training that fails must end, and not wait at its exit for processes that read on; a reading
process that the system kills must end the training with a message.
B images per batch and process, C H W image.
"""

import atexit
import contextlib
import itertools
import logging
import multiprocessing
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.datasets import DatasetError, Remedies
from common.devices import RuntimeSetupError
from common.errors import UserError
from common.image_sets import ImageSet, Sample
from common.images import ImageError
from common.processes import Processes
from common.random_numbers import generator_for
from common.stopping import deaf_children, leave_signals_to_main

LOG = logging.getLogger(__name__)
Item = TypeVar("Item")
GRACE_SECONDS = 2.0
"""What a reading process is given to end by itself."""
RUNNING: set[BaseProcess] = set()
UNEXPECTED = (
    "A process that reads images ended unexpectedly ({}). If the system ended it for lack of "
    "memory, set a lower num_workers; 0 reads in the training process. Then go on from the last "
    "checkpoint."
)


class ReaderError(UserError):
    """A process that reads data has died."""


class Batch(NamedTuple):
    """Images with their labels and names."""

    images: Tensor
    """(B, C, H, W) in [0, 1]."""
    labels: Tensor
    """(B,) int64."""
    names: list[str]


class BadImages:
    """Images that cannot be read: each named once and counted, or an error."""

    def __init__(self, on_bad_image: Literal["skip", "error"] = "error") -> None:
        self.on_bad_image = on_bad_image
        self.found: dict[str, str] = {}
        """Message by the image's name in its set."""

    def note(self, messages: Mapping[str, str], remedies: Remedies) -> None:
        """Records what could not be read. Raises ImageError unless such images are skipped."""
        for name, message in messages.items():
            if self.on_bad_image == "error":
                raise ImageError(f"{message} To go on without it, {remedies.skip_bad}.")
            if name not in self.found:
                self.found[name] = message
                LOG.warning("Left out (%d so far): %s", len(self.found), message)


def batches_per_epoch(n_images: int, batch_size: int, processes: Processes) -> int:
    """Batches of one process in one pass; the last may be smaller.

    RuntimeSetupError where there are fewer images than processes.
    """
    if n_images < processes.world_size:
        raise RuntimeSetupError(
            f"{n_images} training images cannot be shared out among {processes.world_size} "
            "processes; start fewer with torchrun --nproc_per_node"
        )
    return -(-(n_images // processes.world_size) // batch_size)


def epoch_batches(
    images: ImageSet,
    *,
    batch_size: int,
    epoch: int,
    seed: int,
    processes: Processes,
    num_workers: int = 0,
    bad: BadImages | None = None,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """One process's batches of one pass, in an order that depends on seed and epoch alone.

    Images that cannot be shared out evenly among the processes are left out of that pass. The
    place of an image that cannot be read is taken by one that follows in the pass, so batches keep
    their sizes. Raises what `BadImages` does, and DatasetError where no image can be read.
    """
    order = torch.randperm(len(images), generator=generator_for(seed, "order", epoch))
    share = order[processes.rank :: processes.world_size][: len(images) // processes.world_size]
    batches = _Batches(images, share.tolist(), batch_size, refill=True)
    return _read(batches, num_workers, bad or BadImages(), pin_memory)


def ordered_batches(
    images: ImageSet,
    batch_size: int,
    num_workers: int = 0,
    bad: BadImages | None = None,
    *,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """All images once, in their order, but for those that cannot be read.

    Raises what `BadImages` does, and DatasetError where no image can be read.
    """
    batches = _Batches(images, range(len(images)), batch_size, refill=False)
    return _read(batches, num_workers, bad or BadImages(), pin_memory)


def _read(
    batches: "_Batches", num_workers: int, bad: BadImages, pin_memory: bool
) -> Generator[Batch, None, None]:
    """The batches in their order; pin_memory: in memory from which a GPU copies by itself."""
    empty, remedies = True, batches.images.remedies
    numbers = range(len(batches))
    stream = read_batches(batches, numbers, num_workers, pin_memory=pin_memory)
    with contextlib.closing(stream) as read:
        for batch, messages, error in read:
            bad.note(messages, remedies)
            if error is not None:
                raise DatasetError(error)
            if batch is not None:
                empty = False
                yield batch
    if empty:
        raise DatasetError(
            f"none of {len(batches.order)} images can be read. {remedies.check_folder}; the first "
            f"message: {next(iter(bad.found.values()), 'the set is empty')}"
        )


class _Batches(Dataset):
    """The batches of a list of image numbers, by number of the batch."""

    def __init__(
        self, images: ImageSet, order: Sequence[int], batch_size: int, refill: bool
    ) -> None:
        """refill: the images that follow take the places of those that cannot be read."""
        self.images, self.order, self.batch_size = images, order, batch_size
        self.refill = refill
        self.bad: dict[str, str] = {}
        """Message by name of the images that could not be read."""

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[Batch | None, dict[str, str], str | None]:
        """The batch, messages by name of bad images, and the message of an error.

        Nothing is raised, since a DataLoader would add its worker's traceback.
        """
        start, end = number * self.batch_size, (number + 1) * self.batch_size
        size = len(self.order[start:end])
        order = [*self.order[start:], *self.order[:start]] if self.refill else self.order[start:end]
        try:
            samples = list(itertools.islice(filter(None, map(self._sample, order)), size))
            if self.refill and samples:  # too few images are left: some twice
                samples = list(itertools.islice(itertools.cycle(samples), size))
            return _collate(samples) if samples else None, self.bad, None
        except UserError as error:
            return None, self.bad, str(error)

    def _sample(self, index: int) -> Sample | None:
        name = self.images.names[index]
        if name in self.bad:
            return None
        try:
            return self.images[index]
        except ImageError as error:
            self.bad[name] = str(error)
            return None


def _collate(samples: list[Sample]) -> Batch:
    """Stacks samples; DatasetError where their sizes differ."""
    shapes = {tuple(sample.image.shape) for sample in samples}
    if len(shapes) > 1:
        raise DatasetError(
            f"images of different sizes in one batch: {sorted(shapes)}; give their set a size"
        )
    images, labels, names = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), list(names))


def read_batches(
    batches: Dataset, numbers: range, num_workers: int, *, pin_memory: bool = False
) -> Generator[Any, None, None]:
    """Yields batches[number] for these numbers, read here or by num_workers processes ahead.

    The processes end when the stream is closed; use it in `with reading(…)`. PyTorch's global
    random generator is left as it is.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_main,
        generator=generator_for("workers"),  # else it draws from the global one
    )
    if num_workers == 0:
        yield from loader
        return
    before = set(multiprocessing.active_children())
    with deaf_children():
        stream = iter(loader)
        workers = set(multiprocessing.active_children()) - before
        RUNNING.update(workers)
    try:
        yield from stream
    except (EOFError, ConnectionError) as error:  # a batch whose maker died in handing it over
        raise ReaderError(UNEXPECTED.format("killed while it sent a batch")) from error
    finally:
        # torch has no public name for it; before the killing, which torch would take for a failure
        stream._shutdown_workers()
        for worker in workers:
            worker.join(GRACE_SECONDS)
            worker.kill()
            worker.join()
        RUNNING.difference_update(workers)


@contextlib.contextmanager
def reading(stream: Generator[Item, None, None]) -> Iterator[Iterator[Item]]:
    """Gives a stream of read_batches to a loop and closes it after, also when the loop fails.

    Raises ReaderError where a reading process dies, whatever the loop does at that moment: torch
    tells of it by a RuntimeError out of a signal handler.
    """
    try:
        with contextlib.closing(stream):
            yield stream
    except RuntimeError as error:
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? [^)]*\) (.*)", str(error))
        if found is None:
            raise
        reason = found[1].split(". ")[0].rstrip(". ")
        raise ReaderError(UNEXPECTED.format(reason)) from error


@atexit.register  # after multiprocessing's own, so before it: that one would wait for ever
def _end_all() -> None:
    for worker in RUNNING:
        worker.kill()
