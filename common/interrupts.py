"""Stopping cleanly: Ctrl-C and SIGTERM ask a loop to end after the step at hand."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType, TracebackType

IMPATIENCE_SECONDS = 1.0


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
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells report it; 0 if none came."""
        return 128 + self.signal_number if self.requested else 0

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.signal_number, self._asked_at = number, now
        elif number == signal.SIGINT and now - self._asked_at > IMPATIENCE_SECONDS:
            raise KeyboardInterrupt


def exit_on_sigterm() -> None:
    """Lets SIGTERM end the program as sys.exit does: open files are dealt with, status 143."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


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
