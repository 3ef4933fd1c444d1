"""The one boundary for errors: what a user can mend is one line, a fault of ours a traceback."""

import errno
import signal
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from common.cli import run_script
from common.errors import UserError


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program's name, and the handlers of signals put back."""
    monkeypatch.setattr(sys, "argv", ["folder/program.py"])
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def failing(error: BaseException) -> object:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("x.png: broken. Replace it."), 1, "program.py: x.png: broken. Replace it.\n"),
        (
            FileExistsError(errno.EEXIST, "File exists", "out"),
            1,
            "program.py: out: File exists. A file of that name is where a folder is needed. Name "
            "another, or move it away.\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "out"),
            1,
            "program.py: out: Permission denied. Allow it, or name another path.\n",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"),
            1,
            "program.py: not enough memory (DefaultCPUAllocator: can't allocate memory: 9 bytes). "
            "Lower the batch or image size.\n",
        ),
        (
            MemoryError("Unable to allocate 12 GiB"),
            1,
            "program.py: not enough memory (Unable to allocate 12 GiB). Lower the batch or image "
            "size.\n",
        ),
        (KeyboardInterrupt(), 130, "program.py: Interrupted.\n"),
    ],
)
def test_error_that_a_user_can_mend_is_one_line(error, status: int, said: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(failing(error))
    assert ended.value.code == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "error", [ValueError("shapes (2,) (3,)"), KeyError("model"), RuntimeError("size mismatch")]
)
def test_programming_error_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        run_script(failing(error))
    assert raised.value is error


def test_numpys_shape_mismatch_is_no_message_of_ours() -> None:
    def main() -> int:
        return int((np.zeros(2) + np.zeros(3)).sum())

    with pytest.raises(ValueError, match="broadcast"):
        run_script(main)
