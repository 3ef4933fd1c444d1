"""TensorBoard's events, written where they are made: without the library's thread.

SummaryWriter hands events to a thread, where a full disk or a folder that is gone ends in a
traceback and, later, in an error of the next call. Here each event is on disk when `scalar` or
`picture` returns, or the call raises OSError.
"""

import os
import socket
import time
from pathlib import Path

from torch import Tensor


class EventFile:
    """One file of events in a folder, which is made if missing.

    purge_step: points of this and later steps, which an earlier run left there, are dropped.
    Raises ImportError where TensorBoard is not installed, OSError where the file cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        # imported here: most programs write no events
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._event, self._summary = Event, summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def scalar(self, step: int, tag: str, value: float) -> None:
        """A point of a curve."""
        self._add(step, self._summary.scalar(tag, value))

    def picture(self, step: int, tag: str, image: Tensor) -> None:
        """A picture (1 or 3, H, W) in [0, 1]."""
        self._add(step, self._summary.image(tag, image, dataformats="CHW"))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, step: int, summary: object) -> None:
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: object) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()
        if not self.path.exists():
            raise FileNotFoundError(2, "the file was deleted", str(self.path))
