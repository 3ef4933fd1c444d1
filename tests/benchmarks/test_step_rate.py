"""The benchmark of training steps: its command, at the smallest size."""

import json
from pathlib import Path

from tests.tiny_runs import run_script

SCRIPT = "benchmarks/step_rate.py"


def test_command_measures_the_steps_of_the_trainings_named(tmp_path: Path) -> None:
    small = ("--side", 32, "--batch", 1, "--model", "resnet18", "--steps", 1)
    named = ("picard", "dia")  # the latter builds what the other two have
    done = run_script(SCRIPT, *named, "--device", "cpu", *small, "--json", tmp_path / "rates.json")
    assert done.returncode == 0, done.stderr
    title, heading, *lines = done.stdout.splitlines()
    assert title.startswith("cpu, torch ")
    assert heading.split() == ["training", "precision", "steps/s", "images/s", "GiB"]
    rows = json.loads((tmp_path / "rates.json").read_text())["rows"]
    for name, row, line in zip(named, rows, lines, strict=True):
        assert (row["training"], row["precision"], row["peak_gib"]) == (name, "fp32", 0)
        assert row["images_per_s"] == row["steps_per_s"] > 0
        rate = row["steps_per_s"]
        assert line.split() == [name, "fp32", f"{rate:.2f}", f"{rate:.1f}", "0.00"]


def test_unknown_training_is_refused() -> None:
    done = run_script(SCRIPT, "picards")
    assert done.returncode == 2
    assert "unknown: picards; there are picard, csi, dia, diffusion" in done.stderr
