"""What a run leaves beside its results: settings, command, environment, numbers over time."""

import json
import math
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import save_text_atomic
from common.config import REPOSITORY
from common.log_lines import LOG_NAME, numbered_lines


class RunLog:
    """Writes a run folder's records: config.yaml, command.txt, env.json, log.jsonl, TensorBoard.

    run_folder: made if missing. events_folder: for TensorBoard's events; None writes none.
    config_yaml: the resolved settings. command: the command line as a list (sys.argv).
    resume_step: the step a run goes on from. Lines of log.jsonl and TensorBoard points of later
    steps are dropped, since the run will make those steps again; at 0 all are. command.txt gets a
    further line; config.yaml and env.json are those of the latest start.
    Build it in the main process alone.
    """

    def __init__(
        self,
        run_folder: Path,
        events_folder: Path | None,
        *,
        config_yaml: str,
        command: Sequence[str],
        resume_step: int = 0,
    ) -> None:
        self.run_folder = Path(run_folder)
        write_run_record(
            self.run_folder, config_yaml=config_yaml, command=command, resume_step=resume_step
        )
        path = self.run_folder / LOG_NAME
        drop_later_lines(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = None
        if events_folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = resume_step + 1 if resume_step > 0 else 0
            self._events = SummaryWriter(str(events_folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers by tag, as one line of log.jsonl and as TensorBoard curves."""
        numbers = {tag: float(value) for tag, value in values.items()}
        self.record(step, numbers)
        if self._events is not None:
            for tag, number in numbers.items():
                self._events.add_scalar(tag, number, step)

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Shows a picture (1 or 3, H, W) in [0, 1] in TensorBoard."""
        if self._events is not None:
            self._events.add_image(tag, image.detach().cpu().clamp(0, 1), step)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds one line to log.jsonl: the step and these plain values, NaN as null."""
        line = {"step": step, **{key: _strict(value) for key, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the files; what was recorded before is on disk already."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _strict(value: Any) -> Any:
    """NaN and infinities, which JSON does not know, as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_later_lines(path: Path, last_step: int) -> None:
    """Keeps of a log.jsonl the whole lines of steps 1 to last_step; none where that is 0.

    A line that a kill cut short is dropped with them. The file is replaced as a whole.
    """
    if not path.is_file():
        return
    kept = [line + "\n" for record, line in numbered_lines(path) if 0 < record["step"] <= last_step]
    save_text_atomic("".join(kept), path)


def write_run_record(
    folder: Path, *, config_yaml: str, command: Sequence[str], resume_step: int = 0
) -> None:
    """Writes config.yaml, command.txt and env.json into a folder, which is made if missing.

    A start at resume_step > 0 adds its command to those in command.txt.
    """
    folder = Path(folder)
    path = folder / "command.txt"
    earlier = path.read_text(encoding="utf-8") if resume_step > 0 and path.is_file() else ""
    save_text_atomic(config_yaml, folder / "config.yaml")
    save_text_atomic(earlier + shlex.join(map(str, command)) + "\n", path)
    environment = {**describe_environment(), "resume_step": resume_step}
    save_text_atomic(json.dumps(environment, indent=2) + "\n", folder / "env.json")


def describe_environment() -> dict[str, Any]:
    """Versions, machine, threads and git commit, as plain values; null for what is not known.

    git_dirty: whether tracked files differ from the commit.
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
