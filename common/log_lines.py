"""Reading a run's log.jsonl, whatever became of it: a kill cuts lines, and people edit files."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)
LOG_NAME = "log.jsonl"
LAST_STEP = 10**18
"""No training takes more steps; names of files and 64-bit integers hold as many."""


def parse_record(line: str) -> dict[str, Any] | None:
    """The record of a line, which has a step in [0, 10^18]; none where the line is no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # an integer of 5000 digits, a list 10000 deep
        return None
    step = record.get("step") if isinstance(record, dict) else None
    usable = isinstance(step, int) and not isinstance(step, bool) and 0 <= step <= LAST_STEP
    return record if usable else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; other lines are passed over, and counted in a warning.

    A last line without its end, which a kill leaves, is not counted.
    """
    return [record for record, _ in numbered_lines(path)]


def numbered_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the record and the text of each line that has one. See read_log."""
    if not path.is_file():
        return
    odd = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        record = parse_record(line)
        if record is not None:
            yield record, line.rstrip("\r\n")
        elif line.endswith("\n") and line.strip():
            odd += 1
    if odd:
        LOG.warning("%s: %d lines are no records and were passed over.", path, odd)
