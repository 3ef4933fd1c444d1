"""A demo run from its command line to its end, within the test's process."""

import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest

from common.config import REPOSITORY
from demos import picard_report
from tests.tiny_runs import run_script

RunDemo = Callable[..., str]


@pytest.fixture
def run_demo(
    one_thread: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[RunDemo]:
    """Runs `python SCRIPT arguments...` and returns what it prints; it must end with status 0.

    The programs that it starts are forked from the server that has the libraries loaded.
    """
    one_at_a_time = threading.Lock()  # the server's children are not to be started by two threads

    def run(command: list[str], *, cwd: Path, check: bool) -> CompletedProcess[str]:
        assert command[0] == sys.executable
        assert not check
        with one_at_a_time:
            done = run_script(*command[1:], cwd=cwd)
        sys.stderr.write(done.stderr)
        return done

    def run_demo(script: str, *arguments: str | Path) -> str:
        path = str(REPOSITORY / script)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    monkeypatch.setattr(picard_report, "subprocess", SimpleNamespace(run=run))
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1" if name != "OMP_WAIT_POLICY" else "PASSIVE")  # put back later
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run_demo
    for number, handler in handlers.items():
        signal.signal(number, handler)
