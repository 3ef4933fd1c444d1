"""How every program starts and ends: logging, signals, and one boundary for errors."""

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from common import notices
from common.errors import UserError
from common.files import NO_ROOM, free_space
from common.runtime import exit_on_sigterm

INTERRUPTED = 128 + signal.SIGINT
REMEDIES = {
    errno.EEXIST: "A file of that name is where a folder is needed. Name another, or move it away.",
    errno.ENOTDIR: "A part of the path is a file, not a folder. Name another path.",
    errno.EISDIR: "A folder is where a file is needed. Name another path.",
    errno.EACCES: "Allow it, or name another path.",
    errno.EPERM: "Allow it, or name another path.",
    errno.EROFS: "That place cannot be written to; name another path.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Raise the limit (ulimit -n), or lower the number of reading processes.",
}


def run_script(
    main: Callable[[], int], *, interrupted: str = "Interrupted.", unfinished: str = ""
) -> NoReturn:
    """Runs a program's main function and exits with the status that it returns.

    unfinished: how to go on after the system's refusals are mended, for the message.

    A UserError, an error of the operating system and a lack of memory end the program with one line
    and status 1, Ctrl-C with the line `interrupted` and status 130, SIGTERM with status 143. Any
    other exception is a programming error and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # scripts switch it off for imports
    exit_on_sigterm()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    notices.forget()
    try:
        status = main()
        notices.sum_up()
    except KeyboardInterrupt:
        _say(interrupted)
        status = INTERRUPTED
    except UserError as error:
        _say(str(error))
        status = 1
    except OSError as error:
        _say(f"{describe_os_error(error)} {unfinished}".rstrip())
        status = 1
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        _say(f"not enough memory ({first_line(error)}). Lower the batch or image size.")
        status = 1
    sys.exit(status)


def describe_os_error(error: OSError) -> str:
    """The system's reason, the file and, where there is an obvious one, the remedy."""
    reason = error.strerror or str(error) or type(error).__name__
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    remedy = REMEDIES.get(error.errno, "")
    if error.errno == errno.EFBIG:
        remedy = "Raise the limit on the size of files (ulimit -f); what was saved before is whole."
    elif error.errno in NO_ROOM and where:
        free = free_space(Path(os.fsdecode(error.filename)))
        known = "" if free is None else f" ({free / 2**20:.0f} MiB are free there)"
        remedy = f"Make room{known}; what was saved before is whole."
    return f"{where}{reason}. {remedy}".rstrip()


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether NumPy or PyTorch, on a CPU or a GPU, could not allocate an array."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "unable to allocate")
    return any(sign in text for sign in signs)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _say(message: str) -> None:
    """One message on standard error, behind the program's name."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
