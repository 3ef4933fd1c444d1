"""Every recorded answer of the published code, against ours.

GOLDEN_DIR names the folder (default tests/golden); it holds a manifest.json and the files it lists.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.golden import golden_dia, golden_picard

CHECKS = golden_picard.CHECKS | golden_dia.CHECKS
FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent))


def entries() -> list[dict]:
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    return manifest["files"]


def check_for(name: str):
    """The check of the longest known prefix; an entry that nobody knows fails."""
    matching = [prefix for prefix in CHECKS if name.startswith(prefix)]
    if not matching:
        pytest.fail(f"{name}: no check for this kind of entry; known: {sorted(CHECKS)}")
    return CHECKS[max(matching, key=len)]


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry["file"])
def test_recorded_answer_of_the_published_code(entry: dict) -> None:
    with np.load(FOLDER / entry["file"], allow_pickle=False) as arrays:
        check_for(entry["file"])(FOLDER, entry, dict(arrays))
