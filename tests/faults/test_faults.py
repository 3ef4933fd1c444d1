"""The short form of `make faults`: some of every kind of fault; and the table that it writes."""

import signal
from pathlib import Path

import pytest

from tests.faults import fuzz
from tests.faults.bad_inputs import BAD_INPUTS
from tests.faults.disks import may_mount
from tests.faults.faults import FAULTS, TABLE, bad_input_lines, bad_inputs, row, rows_in_table
from tests.faults.programs import Done, Running
from tests.tiny_runs import TRAIN

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = (
    "kill -9 of `train_dia.py`",
    "full disk for `train_dia.py`",
    "encoder's state cut at every 10 %, one bit flipped at 50 places",
    "results deleted, or a file in their folder's place, just before `eval.py --mode ood_pre` "
    "opens a file there",
    "an input deleted, replaced, cut, made a pipe, a folder or a device at the moment when "
    "`eval.py --mode ood_pre` opens it",
)
"""Of the fastest programs."""


@pytest.mark.parametrize("name", SHORT)
def test_nothing_is_lost_and_what_happened_is_said(tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    if fault.needs_disk and not may_mount():
        pytest.skip("only root may mount a disk in memory")
    assert fault.trial(tmp_path, 0) > 0


def test_bad_inputs_are_answered_as_listed(tmp_path: Path) -> None:
    assert len(BAD_INPUTS) >= 100
    assert len({(bad.program, bad.what) for bad in BAD_INPUTS}) == len(BAD_INPUTS)
    bad_inputs(tmp_path, 0, every=17)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_file_gives_a_result_or_a_named_error(tmp_path: Path, kind: str) -> None:
    assert fuzz.check(kind, tmp_path, examples=15) == 15


def test_table_has_a_row_of_every_fault_and_of_every_bad_input() -> None:
    rows = rows_in_table()
    assert list(rows) == list(FAULTS)
    for name, line in rows.items():
        tried, outcome = line.removesuffix(" |").split(" | ")[2:]
        assert int(tried) == 0 or int(tried) >= FAULTS[name].trials
        lost = int(outcome) if outcome.isdigit() else 0
        assert line == row(FAULTS[name], int(tried), lost)
    assert "\n".join(bad_input_lines()) in TABLE.read_text()


def test_program_that_is_killed_before_it_speaks_leaves_nobody_waiting(tmp_path: Path) -> None:
    running = Running([TRAIN, "--help"], tmp_path)
    running.kill()
    assert running.done() == Done(-signal.SIGKILL, "")
