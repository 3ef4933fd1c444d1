"""Fixtures that several test modules use, and where temporary folders lie."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

MEMORY = Path("/dev/shm")
ROOM = 4 * 2**30
"""Bytes; the folders of the tests that run at the same time need less."""

# Every file is flushed to disk before it gets its name; tests need not wait for a disk so often.
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: tiny networks are slower with more, and sums depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
