"""Demo on real lung CT: train on one patient's tumour-free slices, find the other's tumour.

Fetches two volumes (34 MB; see demos/data/lung_ct.py), trains both directions at once, one thread
each, and ends in a table and a contact sheet for each. DEMO_SEEDS=3 trains three seeds per
direction. Two patients with one tumour each: a demonstration, not a benchmark.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

from common.cli import run_script
from common.images import read_image
from demos import picard_report as report
from demos.baselines import BASELINES
from demos.data.lung_ct import (
    VOLUMES,
    Slices,
    fetch_volumes,
    prepare,
    read_cases,
    read_volume,
    split,
    write_slices,
)

CONFIG = "configs/demo_ct.yaml"
SHRINK = 4  # 512 x 512 to 128 x 128: pixels of 2.3 and 2.5 mm, a hole of 16 is 36 and 40 mm
SHOWN = ("MCD_image calibrated", "MCD_image", "no_dropout", "knn_16x16")
CALIBRATED = report.Variant(" calibrated", ("test.heatmap_metrics=[MCD_image, MeanCD_image]",))
DISTANCES = report.Variant("", ("test.calibration=off",))
ONE_COMPLETION = report.Variant(
    " M=1",
    (
        "test.calibration=off",
        "test.heatmap_M_inpaint=1",
        "test.heatmap_metrics=[MCD_image, MCD_feature]",
    ),
)
TINY = (
    "train.n_steps=4",
    "train.print_iter=2",
    "train.select_crops=4",
    "netG.ngf=2",
    "netD.ndf=2",
    "test.patch_stride=16",
    "test.heatmap_M_inpaint=2",
    "test.calibration_windows=200",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tiny", action="store_true", help="see in seconds that it runs; its numbers mean nothing")
    add("--seeds", type=int, default=int(os.environ.get("DEMO_SEEDS", "1")), metavar="N",
        help="training seeds (default: the variable DEMO_SEEDS, or 1)")  # fmt: skip
    add("--first_seed", type=int, default=0, metavar="N", help="the first of them (default: 0)")
    add("--archive", type=Path, metavar="FILE", help="pyradiomics-3.0.1.tar.gz, already downloaded")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting that differs from the config's, as in train.py")  # fmt: skip
    add("--output", type=Path, default=report.ROOT / "demo" / "ct", metavar="DIR",
        help="folder for everything; results there are replaced (default: demo/ct)")  # fmt: skip
    return parser.parse_args()


def prepare_data(output: Path, archive: Path | None) -> dict[str, Slices]:
    """Fetches the volumes and writes their slices below output/data; returns them by volume."""
    volumes = fetch_volumes(output / "volumes", archive)
    shutil.rmtree(output / "data", ignore_errors=True)
    prepared = {}
    for name in VOLUMES:
        volume = read_volume(volumes, name)
        slices = prepare(volume, SHRINK * volume.pixel_mm)
        normal, with_tumour = split(slices.tumour)
        write_slices(slices, normal, output / "data" / name / "normal", masks=False)
        write_slices(slices, with_tumour, output / "data" / name / "tumour", masks=True)
        say(f"{name}: {len(normal)} normal slices to train on, {len(with_tumour)} with tumour")
        prepared[name] = slices
    return prepared


@dataclass(frozen=True)
class Direction:
    """Train on one volume, predict the other; `output` is the whole demo's folder."""

    source: str
    target: str
    output: Path

    @property
    def name(self) -> str:
        return f"{self.source}_to_{self.target}"

    @property
    def folder(self) -> Path:
        return self.output / self.name

    @property
    def training(self) -> Path:
        return self.output / "data" / self.source / "normal" / "images"

    def cases(self) -> list[report.Case]:
        folder = self.output / "data" / self.target / "tumour"
        return read_cases(folder, f"{self.source} -> {self.target}")

    def run(
        self, seeds: Sequence[int], overrides: Sequence[str], variants: Sequence[report.Variant]
    ) -> report.Predicted:
        """Trains and predicts through the documented commands."""
        images = self.output / "data" / self.target / "tumour" / "images"
        places = {
            "dataset_name": self.name,
            "train_data_path": self.training,
            "test_data_path": images,
            "checkpoints_dir": self.folder / "checkpoints",
            "logs_dir": self.folder / "logs",
        }
        return report.run_seeds(
            CONFIG,
            seeds,
            [case.name for case in self.cases()],
            self.folder,
            dataset_name=self.name,
            overrides=[*(f"{key}={value}" for key, value in places.items()), *overrides],
            variants=variants,
            say=say,
        )

    def report(
        self, predicted: report.Predicted, baselines: Sequence[str], record: dict[str, object]
    ) -> str:
        """Adds the baselines of these names, writes results and pictures; returns the table."""
        clock = time.monotonic()
        training = [read_image(path) for path in sorted(self.training.iterdir())]
        cases = self.cases()
        heatmaps = {**predicted.heatmaps, **report.baseline_heatmaps(training, cases, baselines)}
        rows = report.compare(cases, heatmaps)
        seconds = {**predicted.seconds, "baselines": time.monotonic() - clock}
        record = {**record, "test_slices": [case.name for case in cases], "seconds": seconds}
        report.save_results(rows, cases, heatmaps, SHOWN, self.folder, record)
        return report.format_table(rows)


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    output = arguments.output.resolve()
    # Two processes of one thread each are faster than one of two on networks this small.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
    torch.set_num_threads(1)
    prepare_data(output, arguments.archive)
    directions = [Direction(*pair, output) for pair in (VOLUMES, VOLUMES[::-1])]
    for direction in directions:
        shutil.rmtree(direction.folder, ignore_errors=True)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    overrides = [*(TINY if arguments.tiny else ()), *arguments.set]
    variants = [CALIBRATED, DISTANCES] + ([] if arguments.tiny else [ONE_COMPLETION])
    with ThreadPoolExecutor(len(directions)) as pool:
        jobs = [pool.submit(each.run, seeds, overrides, variants) for each in directions]
        results = [job.result() for job in jobs]
    say("\nScoring the same images with baselines that need no training loop ...")
    baselines = SHOWN[-1:] if arguments.tiny else tuple(BASELINES)
    record = {"command": sys.argv, "training_seeds": list(seeds)}
    for direction, predicted in zip(directions, results, strict=True):
        say(direction.report(predicted, baselines, record))
    say("\nMean over tumour slices, pixels inside the body; [95 % bootstrap interval over slices].")
    say("Two patients and one tumour each: a demonstration, not a benchmark.")
    for direction, predicted in zip(directions, results, strict=True):
        seconds = ", ".join(f"{name} {value:.0f} s" for name, value in predicted.seconds.items())
        say(f"{direction.name}: {seconds}; pictures: {direction.folder / 'contact_sheet.png'}")
    say(f"{time.monotonic() - started:.0f} s in all, download included")
    return 0


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_script(main)
