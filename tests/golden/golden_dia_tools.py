"""What the golden checks of DIA share: tolerances by name, and reading another entry."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden.golden_tools import NUMBER, Arrays, assert_close

Entry = Mapping[str, Any]
Tolerance = float | str


def read_entry(folder: Path, file: str) -> tuple[dict[str, Any], Arrays]:
    """The manifest entry and the arrays of one golden file."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entry = next(entry for entry in manifest["files"] if entry["file"] == file)
    with np.load(folder / file, allow_pickle=False) as arrays:
        return entry, dict(arrays)


def tolerance_for(entry: Entry, *names: str) -> Tolerance:
    """The entry's tolerance under the first of these names, else under 'all' or 'default'."""
    known = entry["tolerance"]
    name = next((name for name in (*names, "all", "default") if name in known), None)
    assert name is not None, f"no tolerance for {names} in {sorted(known)}"
    wording = known[name]
    if isinstance(wording, str) and wording.startswith(("exact", "equal")):
        return 0.0
    if isinstance(wording, str) and (match := re.match(rf"abs {NUMBER}", wording)):
        return float(match[1])
    return wording


def loosened(tolerance: Tolerance, atol: float) -> str:
    """The tolerance with at least this absolute one, as words."""
    if isinstance(tolerance, int | float):
        return f"rtol 0.0, atol {max(float(tolerance), atol):.3e}"
    rtol, own = re.search(rf"rtol {NUMBER}", tolerance), re.search(rf"atol {NUMBER}", tolerance)
    relative = float(rtol[1]) if rtol else 0.0
    return f"rtol {relative:.3e}, atol {max(atol, float(own[1]) if own else 0.0):.3e}"


def check(actual: Any, expected: Any, tolerance: Tolerance, what: str) -> None:
    """assert_close for tensors with gradients, too."""
    actual, expected = (
        values.detach() if isinstance(values, torch.Tensor) else values
        for values in (actual, expected)
    )
    assert_close(actual, expected, tolerance, what)
