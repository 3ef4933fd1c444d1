"""Stopping cleanly: Ctrl-C and SIGTERM ask a loop to end after the step at hand."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """While active, the first SIGINT or SIGTERM only sets `requested`; the second one interrupts.

    with StopRequest() as stop: loop, and leave it where stop.requested. `signal_number` is the
    signal that came, 0 if none did. Works in the main thread only, as Python's signals do.
    """

    def __init__(self) -> None:
        self.signal_number = 0
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
        if self.requested:
            raise KeyboardInterrupt
        self.signal_number = number
