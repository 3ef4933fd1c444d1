"""Requests to stop, Ctrl-C and SIGTERM: work ends at a place from which it can go on."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType

import torch
import torch.distributed

from common.processes import Processes

SECOND_SIGNAL_DELAY_SECONDS = 1.0
"""Signals that follow one sooner are taken for the same request."""


class _GivenUp(BaseException):
    """Work was given up because a stop was asked for."""


class StopRequest:
    """While active, SIGINT or SIGTERM only sets `requested`; a later Ctrl-C interrupts.

    with StopRequest() as stop: loop, and leave it where stop.requested. `signal_number` is the
    signal that came first, 0 if none did. Signals within a second of it are taken for the same
    request: torchrun sends its processes one more than the terminal does. Works in the main thread
    only, as Python's signals do.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._asked_at = 0.0
        self._interrupts = False
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells report it; 0 if none came."""
        return 128 + self.signal_number if self.requested else 0

    def unless_asked(self, work: Callable[[], object]) -> None:
        """Calls `work`, which is given up at once when a stop is asked for, or not begun.

        For what takes long and is done again by a run that goes on.
        """
        try:
            self._interrupts = True
            if not self.requested:
                work()
            self._interrupts = False
        except _GivenUp:
            pass
        finally:
            self._interrupts = False

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.signal_number, self._asked_at = number, now
            if self._interrupts:
                raise _GivenUp
        elif number == signal.SIGINT and now - self._asked_at > SECOND_SIGNAL_DELAY_SECONDS:
            raise KeyboardInterrupt


def any_asked_to_stop(stop: StopRequest, processes: Processes, device: torch.device) -> bool:
    """Whether any of the processes was asked to; all get the same answer, so they stop together.

    Every process has to call it equally often.
    """
    if processes.world_size == 1:
        return stop.requested
    asked = torch.tensor(int(stop.requested), device=device)
    torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
    return bool(asked.item())


def leave_signals_to_main(_: int = 0) -> None:
    """In a DataLoader's worker: the main process alone answers Ctrl-C and SIGTERM.

    Both reach the whole process group. A worker ends with the main process, by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started meanwhile never hear Ctrl-C or SIGTERM, from their first moment on.

    For reading processes, whose start takes seconds under spawn: leave_signals_to_main comes too
    late for those. A signal to this process is answered at the end. Does nothing on Windows, which
    cannot hold signals back.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
