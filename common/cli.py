"""How every program starts and ends: logging, signals, and one boundary for errors."""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from common import notices
from common.errors import UserError
from common.interrupts import exit_on_sigterm

INTERRUPTED = 128 + signal.SIGINT


def run_script(main: Callable[[], int], *, interrupted: str = "Interrupted.") -> NoReturn:
    """Runs a program's main function and exits with the status that it returns.

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
        _say(describe_os_error(error))
        status = 1
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        _say(f"not enough memory ({first_line(error)}). Lower the batch or image size.")
        status = 1
    sys.exit(status)


def describe_os_error(error: OSError) -> str:
    """The system's reason, the file and, where there is an obvious one, the remedy."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}." if error.filename else f"{reason}."


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether NumPy or PyTorch, on a CPU or a GPU, could not allocate an array."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _say(message: str) -> None:
    """One message on standard error, behind the program's name."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
