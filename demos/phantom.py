"""`make demo`: draws phantoms, trains on normal ones, finds the lesions of others, compares.

DEMO_SEEDS=3 trains three networks and reports mean ± standard deviation. Everything is written
under demo/phantom.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

from torch import from_numpy

from common.cli import run_script
from demos import picard_report as report
from demos.data.phantoms import DEFAULT_TEST, write_phantoms

CONFIG = "configs/demo_phantom.yaml"
OUTPUT = report.ROOT / "demo" / "phantom"
DATA_SEED = 20  # seeds below were used to choose phantoms and settings
ONE_COMPLETION = report.Variant(
    " M=1", ("test.heatmap_M_inpaint=1", "test.heatmap_metrics=[MCD_image]")
)
TINY = (
    "train.n_steps=20",
    "train.select_crops=4",
    "netG.ngf=4",
    "test.patch_stride=16",
    "test.heatmap_M_inpaint=2",
)
SHOWN = ("MCD_image", "no_dropout", "knn_16x16", "linear_completion")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--tiny", action="store_true", help="see in seconds that it runs; its numbers mean nothing")
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
    for part in ("train", "test", "masks", "bodies", "checkpoints", "heatmaps", "logs"):
        shutil.rmtree(output / part, ignore_errors=True)
    counts = dict.fromkeys(DEFAULT_TEST, 1) if arguments.tiny else DEFAULT_TEST
    n_train = 3 if arguments.tiny else 200
    data = write_phantoms(output, arguments.data_seed, n_train=n_train, n_test=counts)
    say(f"Drew {len(data.train)} normal phantoms and {len(data.test)} with lesions into {output}")
    overrides = [*(TINY if arguments.tiny else ()), *arguments.set]
    if output != OUTPUT:
        places = {"train_data_path": "train", "test_data_path": "test", "logs_dir": "logs",
                  "checkpoints_dir": "checkpoints"}  # fmt: skip
        overrides += [f"{key}={output / part}" for key, part in places.items()]
    predicted = report.run_seeds(
        CONFIG,
        range(arguments.seeds),
        list(data.test),
        output,
        dataset_name="demo_phantom",
        overrides=overrides,
        variants=(report.Variant(), ONE_COMPLETION),
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
    heatmaps = {**predicted.heatmaps, **report.baseline_heatmaps(train_images, cases)}
    seconds = {**predicted.seconds, "baselines": time.monotonic() - clock}
    rows = report.compare(cases, heatmaps)
    say(report.format_table(rows))
    seconds["total"] = time.monotonic() - started
    record = {"command": sys.argv, "data_seed": arguments.data_seed, "seconds": seconds}
    report.save_results(rows, cases, heatmaps, SHOWN, output, record)
    say(f"\nNumbers: {output / 'results.json'}")
    say(f"Pictures: {output / 'contact_sheet.png'}")
    say(f"Losses: tensorboard --logdir {output / 'logs'}")
    say("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    return 0


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_script(main)
