"""Processes that read ahead for a training: started, watched and ended, whatever happens.

A training that fails must end, and not wait at its exit for processes that read on; a reading
process that the system kills must end the training with a message.
"""

import atexit
import contextlib
import multiprocessing
import re
from collections.abc import Generator, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from common.errors import UserError
from common.interrupts import deaf_children

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


def read_ahead(loader: DataLoader) -> Generator[Any, None, None]:
    """Yields what a DataLoader with worker processes does, and ends them when it is closed.

    Give the loader worker_init_fn=leave_signals_to_main. Use the stream in `with reading(…)`.
    """
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
        stream._shutdown_workers()  # torch has no public name for it; before the killing, or torch
        _end(workers)  # takes that for a failure


@contextlib.contextmanager
def reading(stream: Generator[Item, None, None]) -> Iterator[Iterator[Item]]:
    """Lends a stream of read_ahead to a loop and closes it after, also when the loop fails.

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


def _end(workers: set[BaseProcess]) -> None:
    """Waits for processes a little, then kills them."""
    for worker in workers:
        worker.join(GRACE_SECONDS)
        if worker.is_alive():
            worker.kill()
            worker.join()
    RUNNING.difference_update(workers)


@atexit.register  # after multiprocessing's own, so before it: that one would wait for ever
def _end_all() -> None:
    for worker in RUNNING:
        if worker.is_alive():
            worker.kill()
