"""What a run leaves beside its results: settings, command, environment, numbers over time."""

import json
import logging
import math
import os
import platform
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import save_text_atomic
from common.config import REPOSITORY
from common.files import read_regular, require_regular

LOG = logging.getLogger(__name__)
LOG_NAME = "log.jsonl"
LAST_STEP = 10**18
"""No training takes more steps; names of files and 64-bit integers hold as many."""


class EventFile:
    """One file of TensorBoard's events in a folder, which is made if missing.

    SummaryWriter hands events to a thread, where a full disk or a folder that is gone ends in a
    traceback and, later, in an error of the next call. Here each event is on disk when `scalar` or
    `picture` returns, or the call raises OSError.
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
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, step: int, tag: str, value: float) -> None:
        """A point of a curve."""
        self._write(step=step, summary=self._summary.scalar(tag, value))

    def picture(self, step: int, tag: str, image: Tensor) -> None:
        """A picture (1 or 3, H, W) in [0, 1]."""
        self._write(step=step, summary=self._summary.image(tag, image, dataformats="CHW"))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, **content: object) -> None:
        """Writes one event of now with this content."""
        event = self._event(wall_time=time.time(), **content)
        self._records.write(event.SerializeToString())
        self._records.flush()
        if not self.path.exists():
            raise FileNotFoundError(2, "the file was deleted", str(self.path))


class RunLog:
    """Writes a run's numbers and pictures over time: log.jsonl in its folder, and TensorBoard's.

    resume_step: the step a run goes on from. Lines of log.jsonl and TensorBoard points of later
    steps are dropped, since the run will make those steps again; at 0 all are.
    check: asked before each line of log.jsonl; raises where the folder is not this run's any more.
    Build it in the main process alone.
    """

    def __init__(
        self,
        run_folder: Path,
        events_folder: Path,
        resume_step: int,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._path, self._check = run_folder / LOG_NAME, check
        drop_later_lines(self._path, resume_step)
        self._waiting = ""
        self._complained = False
        self._events: EventFile | None = None
        try:
            self._events = EventFile(events_folder, resume_step + 1 if resume_step > 0 else 0)
        except ImportError as error:
            LOG.warning(
                "No curves for TensorBoard, which cannot be imported (%s); log.jsonl has the "
                "numbers. To have them: pip install tensorboard",
                error,
            )
        except OSError as error:
            LOG.warning("No curves for TensorBoard, log.jsonl has the numbers: %s", error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers by tag, as one line of log.jsonl and as TensorBoard curves.

        A line that cannot be written waits for the next one; the first time that is a warning.
        Raises what `check` raises.
        """
        numbers = {tag: float(value) for tag, value in values.items()}
        line = {tag: n if math.isfinite(n) else None for tag, n in numbers.items()}  # JSON: no NaN
        self._waiting += json.dumps({"step": step, **line}, allow_nan=False) + "\n"
        self._write_waiting()
        for tag, number in numbers.items():
            self._to_events(lambda events, t=tag, n=number: events.scalar(step, t, n))

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Shows a picture (1 or 3, H, W) in [0, 1] in TensorBoard."""
        pixels = image.detach().cpu().clamp(0, 1)
        self._to_events(lambda events: events.picture(step, tag, pixels))

    def close(self) -> None:
        """Closes the files; what was recorded before is on disk already."""
        self._write_waiting()
        self._to_events(EventFile.close)

    def _write_waiting(self) -> None:
        """Appends what waits to log.jsonl, or takes back what was written of it."""
        if not self._waiting:
            return
        self._check()
        try:
            require_regular(self._path)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            before = self._path.stat().st_size if self._path.exists() else 0
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(self._waiting)
            except OSError:
                os.truncate(self._path, before)
                raise
        except OSError as error:
            if not self._complained:
                LOG.warning("%s cannot be written (%s); trying again later.", self._path, error)
            self._complained = True
        else:
            self._waiting = ""

    def _to_events(self, write: Callable[[EventFile], object]) -> None:
        """Writes to the events, if any; a failure is a warning and ends them, not the training."""
        if self._events is None:
            return
        try:
            write(self._events)
        except OSError as error:
            LOG.warning("TensorBoard's events end here, log.jsonl goes on: %s", error)
            self._events = None


def drop_later_lines(path: Path, last_step: int) -> None:
    """Keeps of a log.jsonl the whole lines of steps 1 to last_step; none where that is 0.

    A line that a kill cut short is dropped with them. The file is replaced as a whole.
    """
    if not path.is_file():
        return
    lines = [line + "\n" for record, line in read_log(path) if 0 < record["step"] <= last_step]
    save_text_atomic("".join(lines), path)


def write_run_record(
    folder: Path, *, config_yaml: str, command: Sequence[str], resume_step: int = 0
) -> None:
    """Writes config.yaml, command.txt and env.json into a folder, which is made if missing.

    config_yaml: the resolved settings. command: the command line as a list (sys.argv). A start at
    resume_step > 0 adds its command to those in command.txt; the others are of the latest start.
    """
    path = folder / "command.txt"
    earlier = ""
    if resume_step > 0 and path.is_file():
        earlier = read_regular(path).decode("utf-8", "surrogateescape")
    save_text_atomic(config_yaml, folder / "config.yaml")
    save_text_atomic(earlier + shlex.join(map(str, command)) + "\n", path)
    environment = {**describe_environment(), "resume_step": resume_step}
    save_text_atomic(json.dumps(environment, indent=2) + "\n", folder / "env.json")


def describe_environment() -> dict[str, Any]:
    """Versions, machine, threads and git commit, as plain values; null for what is not known.

    git_dirty: whether tracked files differ from the commit. tf32: whether a GPU may round products.
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32,
        "git_commit": commit,
        "git_dirty": None if commit is None or changes is None else bool(changes),
        "working_directory": str(Path.cwd()),
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command about this repository; None without git, or outside a clone."""
    if not (REPOSITORY / ".git").exists():  # else it would answer for a repository around this one
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def read_log(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (record, text) of each line of a log.jsonl that has a step in [0, 10^18].

    Other lines are passed over, and counted in a warning; a last line without its end, which a kill
    leaves, is not counted.
    """
    if not path.is_file():
        return
    odd = 0
    for line in read_regular(path).decode("utf-8", "replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # an integer of 5000 digits, a list 10000 deep
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is int and 0 <= step <= LAST_STEP:
            yield record, line.rstrip("\r\n")
        elif line.endswith("\n") and line.strip():
            odd += 1
    if odd:
        LOG.warning("%s: %d lines are no records and were passed over.", path, odd)
