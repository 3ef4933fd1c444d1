"""The one boundary for errors: what a user can mend is one line, a fault of ours a traceback."""

import ast
import errno
import re
import signal
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from common.cli import COMMON_FLAGS, run_script
from common.config import REPOSITORY
from common.config_types import leaf_types
from common.errors import UserError
from inpainter.settings import PicardConfig
from tests.tiny_runs import DiaFile


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


def test_messages_of_common_name_no_key_or_flag_of_a_system() -> None:
    """The caller passes the remedy in; common's own flags are its to name."""
    keys = {*leaf_types(PicardConfig), *leaf_types(DiaFile)}
    flags = {f"--{key.rpartition('.')[2]}" for key in keys} - {f"--{name}" for name in COMMON_FLAGS}
    words = flags | {key for key in keys if "." in key}
    named = []
    for path in (REPOSITORY / "common").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        documents = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and id(node) not in documents:
                said = {word.strip(".") for word in re.findall(r"[\w.-]+", str(node.value))}
                named += [f"{path.name}: {word}" for word in words & said]
    assert named == []
