"""Every fault that is tried, how often, and the table of it in docs/reliability.md.

A trial gets a folder for itself and its number; it returns how many faults it made, and raises
where something was lost or not said.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.claims import wait_for_claim
from common.config import REPOSITORY
from tests.faults import changes, damage, disks, fuzz, kills, openings
from tests.faults.bad_inputs import BAD_INPUTS, answer, prepared
from tests.faults.programs import PROGRAMS

TABLE = REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- made by make faults -->", "<!-- end of what is made -->"
HEAD = "| fault | what must hold after it | tried | lost |\n|---|---|---|---|"
ENDED = "status 0, 1 or 3 without a traceback, every visible file whole"
RECOVERED = f"{ENDED}; with room again, the results of an undisturbed run"
DAMAGED = "{} cut at every 10 %, one bit flipped at 50 places"
SAME = "every visible checkpoint whole; started again, the results of an undisturbed run"


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    holds: str
    trial: Callable[[Path, int], int]
    trials: int
    """In the long form."""

    needs_disk: bool = False
    """Whether it makes a disk in memory, as root may."""


def faults() -> Iterator[Fault]:
    """The rows, in the order of the table."""
    changed = "deleted, replaced, made a pipe, a folder or a device under"
    answered = "a result or a named error, in less than 2 GiB"
    opened = "just before `{}` opens a file there"
    for what, holds, trial, trials, subjects in (
        ("kill -9 of `{}`", SAME, kills.kill_at_random, 2, PROGRAMS),
        ("no larger file for `{}`, each kind in turn", RECOVERED, disks.limited_file, 5, PROGRAMS),
        ("full disk for `{}`", RECOVERED, disks.full_disk, 3, PROGRAMS),
        ("read-only disk for `{}`", RECOVERED, disks.read_only, 1, PROGRAMS),
        (f"an input {changed} `{{}}`", ENDED, changes.input_changed, 5, changes.BEGUN),
        (f"an output {changed} `{{}}`", ENDED, changes.output_changed, 8, changes.BEGUN),
        ("clock set back by a day under `{}`", SAME, changes.clock_set_back, 1, changes.BEGUN),
        (
            "an input deleted, replaced, cut, made a pipe, a folder or a device at the moment when "
            "`{}` opens it",
            *(ENDED, openings.input_changed, 12, openings.READ),
        ),
        (
            f"results deleted, or a file in their folder's place, {opened}",
            *(ENDED, openings.folder_changed, 4, openings.WRITTEN),
        ),
        (f"disk read-only {opened}", RECOVERED, openings.read_only_at, 2, openings.WRITTEN),
        (DAMAGED, "refused by name", damage.damaged, 1, damage.KINDS),
        ("damaged {}", answered, fuzz.mutated, 1, fuzz.KINDS),
    ):
        for subject in subjects:
            on_disk = trial in (disks.full_disk, disks.read_only, openings.read_only_at)
            yield Fault(what.format(subject), holds, partial(trial, subject), trials, on_disk)
    yield Fault("reading process of a training killed", ENDED, damage.reader_killed, 2)
    yield Fault("one of two training processes killed", ENDED, damage.rank_killed, 2)
    yield Fault("bad input (below)", "its status, its message, no traceback", bad_inputs, 1)


def bad_inputs(root: Path, _: int, every: int = 1) -> int:
    """Every so many-th bad input."""
    data, tried = prepared(root / "data"), BAD_INPUTS[::every]
    for bad in tried:
        done = answer(bad, data[bad.program], root / "copy")
        assert done.status == bad.status, (bad, done)
        assert "Traceback" not in done.said, (bad, done)
        assert bad.says in done.said, (bad, done)
    return len(tried)


FAULTS = {fault.name: fault for fault in faults()}


def row(fault: Fault, tried: int, lost: int) -> str:
    """A line of the table."""
    outcome = str(lost or "nothing") if tried else "not tried yet"
    return f"| {fault.name} | {fault.holds} | {tried} | {outcome} |"


def rows_in_table() -> dict[str, str]:
    """Line by fault, as the file has them."""
    made = TABLE.read_text().partition(BEGIN)[2].partition(END)[0]
    lines = made.partition("### Bad inputs")[0].splitlines()
    found = {line.split(" | ")[0].removeprefix("| "): line for line in lines if " | " in line}
    return {name: line for name, line in found.items() if name in FAULTS}


def bad_input_lines() -> list[str]:
    """The table of bad inputs."""
    return [
        f"### Bad inputs\n\n{len(BAD_INPUTS)}, each with the status and a part of the message.\n",
        "| program | input | status | says |\n|---|---|---|---|",
        *(
            f"| `{bad.program}` | {_cell(bad.what)} | {bad.status} | {_cell(bad.says)} |"
            for bad in BAD_INPUTS
        ),
    ]


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def write_table(new: dict[str, str]) -> None:
    """Puts new rows among those of the file."""
    with wait_for_claim(TABLE.with_suffix(".claim"), 600):  # another process has other rows
        _write_table(rows_in_table() | new)


def _write_table(rows: dict[str, str]) -> None:
    lines = [
        HEAD,
        *(rows.get(name, row(fault, 0, 0)) for name, fault in FAULTS.items()),
        "",
        *bad_input_lines(),
    ]
    before, _, rest = TABLE.read_text().partition(BEGIN)
    made = "\n".join(lines)
    TABLE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}")
