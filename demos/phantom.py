"""Draws phantoms, trains on normal ones, finds the lesions of others, compares.

`make demo` is a check that takes at most four minutes: it measures how fast this machine trains,
trains for two minutes and scores eight images. `make demo-full` (--full) makes the table of
docs/results.md, in a quarter to half an hour; DEMO_SEEDS=3 trains three networks for it and reports
mean ± standard deviation. Everything is written under demo/phantom.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

from torch import from_numpy

from common.cli import run_script
from demos import picard_report as report
from demos.baselines import BASELINES
from demos.data.phantoms import DEFAULT_TEST, LesionKind, write_phantoms

CONFIG = "configs/demo_phantom.yaml"
OUTPUT = report.ROOT / "demo" / "phantom"
DATA_SEED = 20  # seeds below were used to choose phantoms and settings
CALIBRATED = report.Variant(" calibrated", ("test.heatmap_metrics=[MCD_image, MeanCD_image]",))
DISTANCES = report.Variant("", ("test.calibration=off",))
ONE_COMPLETION = report.Variant(
    " M=1",
    ("test.calibration=off", "test.heatmap_M_inpaint=1", "test.heatmap_metrics=[MCD_image]"),
)
MOST_STEPS = 5500  # configs/demo_phantom.yaml
TRAINING_SECONDS = 120
"""What the quick check trains for; drawing, scoring and comparing take the rest of 4 minutes."""


class Size(NamedTuple):
    """How much a demo draws, trains, scores and compares."""

    n_train: int
    n_held_out: int
    """Other normal phantoms, for the calibration."""
    n_test: Mapping[LesionKind, int]
    overrides: tuple[str, ...]
    """Settings that differ from the config's, `key=value`."""
    variants: tuple[report.Variant, ...]
    baselines: tuple[str, ...]
    """Names in demos/baselines.py."""


FULL = Size(200, 60, DEFAULT_TEST, (), (CALIBRATED, DISTANCES, ONE_COMPLETION), tuple(BASELINES))
QUICK = Size(
    n_train=200,
    n_held_out=0,
    n_test={"mass": 6, "distortion": 1, "calcifications": 1},
    overrides=(
        "test.calibration=off",  # it takes minutes, and helps a fully trained network alone
        "netG.ngf=8",  # twice the steps in the same time: better after two minutes, worse after ten
        "test.heatmap_metrics=[MCD_image, no_dropout]",
        "test.heatmap_M_inpaint=4",
        "test.patch_stride=6",
    ),
    variants=(report.Variant(),),
    baselines=("intensity", "pca", "linear_completion", "knn_16x16"),
)
TINY = QUICK._replace(
    n_train=3,
    n_held_out=2,
    variants=FULL.variants,
    n_test=dict.fromkeys(DEFAULT_TEST, 1),
    overrides=(
        "train.n_steps=20",
        "train.select_crops=4",
        "netG.ngf=4",
        "test.patch_stride=16",
        "test.heatmap_M_inpaint=2",
        "test.calibration_windows=200",
    ),
)
SHOWN = ("MCD_image calibrated", "MCD_image", "no_dropout", "knn_16x16", "linear_completion")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="everything in docs/results.md")
    size.add_argument("--tiny", action="store_true",
        help="see in seconds that it runs; its numbers mean nothing")  # fmt: skip
    add = parser.add_argument
    add("--seeds", type=int, default=int(os.environ.get("DEMO_SEEDS", "1")), metavar="N",
        help="training seeds (default: the variable DEMO_SEEDS, or 1)")  # fmt: skip
    add("--data_seed", type=int, default=DATA_SEED, metavar="N",
        help="seed of the phantoms (default: %(default)s)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting that differs from the config's, as in train.py")  # fmt: skip
    add("--output", type=Path, default=OUTPUT, metavar="DIR",
        help="folder for everything; what an earlier demo left there is removed "
             "(default: demo/phantom)")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    output = arguments.output.resolve()
    for part in ("train", "held_out", "test", "masks", "bodies", "checkpoints", "heatmaps", "logs"):
        shutil.rmtree(output / part, ignore_errors=True)
    size = FULL if arguments.full else TINY if arguments.tiny else QUICK
    counts = {"n_train": size.n_train, "n_held_out": size.n_held_out, "n_test": size.n_test}
    data = write_phantoms(output, arguments.data_seed, **counts)
    say(f"Drew {len(data.train)} normal phantoms and {len(data.test)} with lesions into {output}")
    overrides = [*size.overrides, *arguments.set]
    if output != OUTPUT:
        places = {"train_data_path": "train", "test_data_path": "test", "logs_dir": "logs",
                  "checkpoints_dir": "checkpoints",
                  "calibration_data_path": "held_out"}  # fmt: skip
        overrides += [f"{key}={output / part}" for key, part in places.items()]
    if not arguments.full:
        overrides.insert(0, f"train.n_steps={affordable_steps(overrides, output)}")
    predicted = report.run_seeds(
        CONFIG,
        range(arguments.seeds),
        list(data.test),
        output,
        dataset_name="demo_phantom",
        overrides=overrides,
        variants=size.variants,
        at_once=min(arguments.seeds, os.cpu_count() or 1),  # each runs on one thread
        say=say,
    )
    cases = [
        report.Case(name, from_numpy(p.image)[None], p.lesion_mask, p.body, p.lesions[0].kind)
        for name, p in data.test.items()
    ]
    say("\nScoring the same images with baselines that need no training loop ...")
    clock = time.monotonic()
    train_images = [from_numpy(phantom.image)[None] for phantom in data.train.values()]
    heatmaps = {
        **predicted.heatmaps,
        **report.baseline_heatmaps(train_images, cases, size.baselines),
    }
    seconds = {**predicted.seconds, "baselines": time.monotonic() - clock}
    rows = report.compare(cases, heatmaps)
    say(report.format_table(rows))
    seconds["total"] = time.monotonic() - started
    record = {"command": sys.argv, "data_seed": arguments.data_seed, "seconds": seconds}
    shown = [method for method in SHOWN if method in heatmaps]
    report.save_results(rows, cases, heatmaps, shown, output, record)
    say(f"\nNumbers: {output / 'results.json'}")
    say(f"Pictures: {output / 'contact_sheet.png'}")
    say(f"Losses: tensorboard --logdir {output / 'logs'}")
    say("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    return 0


def affordable_steps(overrides: Sequence[str], output: Path) -> int:
    """Training steps that take TRAINING_SECONDS here, at most MOST_STEPS, by a short training."""
    n_steps = 60
    trial = (f"train.n_steps={n_steps}", "train.print_iter=20", "train.warmup_steps=0",
             "test.calibration=off")  # fmt: skip
    places = (
        "expname=trial",
        f"checkpoints_dir={output / 'trial'}",
        f"logs_dir={output / 'trial'}",
    )
    say("\nHow fast does this machine train?")
    report.train(CONFIG, [*overrides, *trial, *places], say)
    (log,) = (output / "trial").rglob("log.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rate = max(line.get("train/steps_per_second", 0.0) for line in lines)
    shutil.rmtree(output / "trial")
    affordable = max(n_steps, min(int(rate * TRAINING_SECONDS), MOST_STEPS))
    say(f"{rate:.1f} steps a second: {affordable} steps fit in {TRAINING_SECONDS} s")
    return affordable


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_script(main)
