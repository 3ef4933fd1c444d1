"""make faults: tries every fault many times, and writes the table in docs/reliability.md.

python -m tests.faults             # all of them; an hour or two on two cores
python -m tests.faults kill pipe   # those whose names have one of these words
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from tests.faults.disks import may_mount
from tests.faults.faults import FAULTS, Fault, row, write_table


def tried(fault: Fault, root: Path) -> tuple[int, int]:
    """How many faults were made, and how many trials lost something, which is printed."""
    count = lost = 0
    for number in range(fault.trials):
        try:
            count += fault.trial(root, number)
        except Exception:  # all that can go wrong is counted
            traceback.print_exc()
            count, lost = count + 1, lost + 1
    return count, lost


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="faults with this in their name")
    return parser.parse_args()


def main() -> int:
    """Tries the faults that are asked for; 1 where something was lost."""
    words, any_lost = parse_arguments().words, False
    torch.set_num_threads(1)
    logging.getLogger().addHandler(logging.NullHandler())
    memory = Path("/dev/shm")
    place = str(memory) if os.access(memory, os.W_OK) else None
    for name, fault in FAULTS.items():
        if words and not any(word in name for word in words):
            continue
        if fault.needs_disk and not may_mount():
            print(f"Not tried, for only root may mount a disk: {name}")
            continue
        root = Path(tempfile.mkdtemp(dir=place))
        count, lost = tried(fault, root)
        shutil.rmtree(root, ignore_errors=True)
        print(row(fault, count, lost), flush=True)
        write_table({name: row(fault, count, lost)})
        any_lost |= lost > 0
    return int(any_lost)


if __name__ == "__main__":
    sys.exit(main())
