"""What the engines and `test.refine` cost on a demo that has run: seconds, and the AUROC they give.

Completes the demo's test images again with its first network, once for every row, through
predict_heatmap.py on one thread. After `make demo`: --demo phantom; after `make demo-ct`:
--demo ct.
"""

import argparse
import csv
import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

import numpy as np

from common.images import read_image
from common.metrics import score_heatmap
from demos import picard_report as report
from inpainter.heatmap_tables import list_heatmaps, read_heatmap

ROWS = {
    "plain": ("test.engine=plain",),
    "fast": ("test.engine=fast",),
    "refine 2": ("test.engine=fast", "test.refine=2"),
    "refine 3": ("test.engine=fast", "test.refine=3"),
    "refine 4": ("test.engine=fast", "test.refine=4"),
}


class Demo(NamedTuple):
    """Where a demo left things, below its output folder."""

    config: str
    dataset_name: str
    checkpoints: Path
    images: Path
    truth: Path
    """Masks, named like the images; above 0 = lesion."""
    body: Path
    """Masks of the pixels that count, or that do not."""
    body_counts: bool


def demo_of(name: str, output: Path | None) -> Demo:
    """The phantoms, or the direction lung 1 -> lung 2 of the CT demo."""
    if name == "phantom":
        folder = output or report.ROOT / "demo" / "phantom"
        parts = (folder / "checkpoints", folder / "test", folder / "masks", folder / "bodies", True)
        return Demo("configs/demo_phantom.yaml", "demo_phantom", *parts)
    folder = output or report.ROOT / "demo" / "ct"
    slices = folder / "data" / "lung2" / "tumour"
    checkpoints = folder / "lung1_to_lung2" / "checkpoints"
    parts = (checkpoints, slices / "images", slices / "tumour", slices / "outside", False)
    return Demo("configs/demo_ct.yaml", "lung1_to_lung2", *parts)


def complete(subject: Demo, overrides: tuple[str, ...], output: Path) -> tuple[float, int]:
    """Writes heatmaps to `output`; returns seconds of scoring and the windows completed."""
    sets = [f"test_data_path={subject.images}", "test.log_compute_times=true"]
    sets += ["test.calibration=off", *overrides]
    checkpoints = subject.checkpoints / subject.dataset_name / "hole_seed0"
    command = ["predict_heatmap.py", "--config", subject.config, "--overwrite"]
    command += ["--checkpoint_dir", str(checkpoints), "--checkpoint_iter", "best"]
    command += ["--output_dir", str(output)]
    for override in sets:
        command += ["--set", override]
    (output / "compute_times.csv").unlink(missing_ok=True)  # rows are added to it
    report.run_command(command, lambda text: print(text, flush=True))
    with (output / "compute_times.csv").open() as file:
        rows = list(csv.DictReader(file))
    return sum(float(r["seconds"]) for r in rows), sum(int(r["completed_windows"]) for r in rows)


def scores(subject: Demo, heatmaps: Path) -> dict[str, tuple[float, float]]:
    """By metric: AUROC and average precision, mean over the images."""
    found = {}
    for metric, entries in list_heatmaps(heatmaps).items():
        values = []
        for entry in entries:
            truth = read_image(subject.truth / entry.image)[0].numpy() > 0
            body = (read_image(subject.body / entry.image)[0].numpy() > 0) == subject.body_counts
            values.append(score_heatmap(read_heatmap(entry.file), truth, ~body))
        found[metric] = tuple(np.mean(values, axis=0))
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", choices=("phantom", "ct"), required=True, help="which demo")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the demo's, if not the default")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS),
        metavar="ROW", help="which of: " + ", ".join(ROWS) + " (default: all)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting that differs from the config's, as in predict_heatmap.py")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
    subject = demo_of(arguments.demo, arguments.output and arguments.output.resolve())
    lines = []
    for name in arguments.rows:
        output = subject.checkpoints.parent / "engines" / name.replace(" ", "_")
        seconds, windows = complete(subject, (*arguments.set, *ROWS[name]), output)
        cells = [
            f"{metric} {auroc:.4f} / {ap:.4f}"
            for metric, (auroc, ap) in scores(subject, output).items()
        ]
        lines.append(f"{name:10}{seconds:8.1f} s {windows:7} windows   " + "   ".join(cells))
    print("\nSeconds and windows over all images; pixel AUROC / average precision, their mean:")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except report.DemoError as error:
        sys.exit(f"engines.py: {error}")
