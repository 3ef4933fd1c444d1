"""How programs end: the exit status, and the base of every error that a user can mend."""

import enum
from typing import ClassVar, NamedTuple


class ExitStatus(enum.IntEnum):
    """What the exit status of every program says; docs/operations.md has the same table."""

    DONE = 0
    NOTHING_DONE = 1
    """Nothing could be done, or the work could not go on; what was saved before is whole."""
    BAD_SETTINGS = 2
    """A setting or the command line is wrong; argparse's own status, too."""
    SOME_FAILED = 3
    """Done, but for images that were to be scored or evaluated and could not be."""
    INTERRUPTED = 130
    """Stopped by SIGINT (Ctrl-C); as shells have it, 128 + the signal's number."""
    TERMINATED = 143
    """Stopped by SIGTERM."""


class Outcome(NamedTuple):
    """What a program that scores or evaluates images says at its end."""

    text: str
    n_failed: int = 0
    """Images that were to be scored or evaluated and have no result."""

    @property
    def status(self) -> ExitStatus:
        """DONE, or SOME_FAILED where an image has no result."""
        return ExitStatus.SOME_FAILED if self.n_failed else ExitStatus.DONE


class UserError(Exception):
    """Something that the user can mend: a setting, a file, a folder, a machine.

    The message stands alone: what is wrong, the value, where, and the remedy. Programs print it in
    one line and end with its status; see `common.cli.run_script`. Programming errors are no
    UserError and keep their traceback.
    """

    status: ClassVar[ExitStatus] = ExitStatus.NOTHING_DONE
    """With which a program ends."""
