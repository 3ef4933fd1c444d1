"""Fixtures that several test modules use, and where temporary folders lie."""

import os
import runpy
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import TextIO

import pytest
import torch

RunDemo = Callable[..., str]
MEMORY = Path("/dev/shm")
ROOM = 4 * 2**30
"""Bytes; the folders of the tests that run at the same time need less."""

# Every file is flushed to disk before it gets its name; tests need not wait for a disk so often.
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: tiny networks are slower with more, and sums depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_demo(
    one_thread: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[RunDemo]:
    """Runs `python SCRIPT arguments...` and returns what it prints; it must end with status 0.

    The programs that it starts are forked from the server that has the libraries loaded.
    """
    # Imported here, for the process that shares out the tests runs none and need not load so much.
    from common.config import REPOSITORY
    from demos import dia_report, picard_report
    from tests.tiny_runs import run_script

    one_at_a_time = threading.Lock()  # the server's children are not to be started by two threads

    def run(
        command: list[str],
        *,
        cwd: Path,
        check: bool,
        env: Mapping[str, str] | None = None,
        stdout: TextIO | None = None,
        stderr: int | None = None,
    ) -> CompletedProcess[str]:
        assert command[0] == sys.executable
        assert not check
        with one_at_a_time:
            done = run_script(*command[1:], cwd=cwd)
        if stdout is None:
            sys.stderr.write(done.stderr)
        else:
            stdout.write(done.stdout + done.stderr)
        return done

    def run_demo(script: str, *arguments: str | Path) -> str:
        path = str(REPOSITORY / script)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    for module in (picard_report, dia_report):
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run, STDOUT=None))
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1" if name != "OMP_WAIT_POLICY" else "PASSIVE")  # put back later
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run_demo
    for number, handler in handlers.items():
        signal.signal(number, handler)
