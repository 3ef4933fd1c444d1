"""What the demos share: run the commands of the README, and score without a network.

A demo prepares a folder of normal images and a list of `Case`s, then `run_seeds` trains and
predicts as a user would, `baseline_heatmaps` scores the same images without a network, and
`demo_report` compares. Heatmaps are by method, then training seed, then case; baselines have one
seed. Larger = more anomalous throughout.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.baselines import BASELINES
from common.errors import UserError
from inpainter.demo_report import Case
from inpainter.heatmap_files import list_heatmaps, read_heatmap

ROOT = Path(__file__).resolve().parent.parent
Say = Callable[[str], None]


class DemoError(UserError):
    """A command of a demo failed; the message names it."""


class Predicted(NamedTuple):
    """What `run_seeds` brings back."""

    heatmaps: dict[str, list[list[NDArray[np.float32]]]]
    """Method -> training seed -> image, (H, W) each."""
    seconds: dict[str, float]
    """By command: train, predict."""


@dataclass(frozen=True)
class Variant:
    """One run of predict_heatmap.py and how its rows are called."""

    suffix: str = ""
    """Added to the metrics' names in the table."""
    overrides: tuple[str, ...] = ()
    """`key=value` for --set."""


def run_command(arguments: Sequence[str], say: Say) -> float:
    """Runs a Python script of this repository as a user would and returns the seconds it took.

    arguments: script, then its flags, with paths relative to the repository root, from which it
    is run. Raises DemoError with the command line where it fails.
    """
    say(f"\n$ python {shlex.join(arguments)}")
    started = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise DemoError(
            f"`python {shlex.join(arguments)}` ended with status {done.returncode}; see above"
        )
    return time.monotonic() - started


def run_seeds(
    config: str,
    seeds: Sequence[int],
    images: Sequence[str],
    output: Path,
    *,
    dataset_name: str,
    overrides: Sequence[str] = (),
    variants: Sequence[Variant] = (Variant(),),
    at_once: int = 1,
    say: Say,
) -> Predicted:
    """Trains one network per seed and scores the test folder, through the documented commands.

    config: settings file, relative to the repository root, with that dataset_name; it or
    `overrides` (`key=value`, for both commands) has checkpoints_dir: <output>/checkpoints.
    images: names in the test folder, in the order of the heatmaps returned; those written are in
    <output>/heatmaps/. at_once: seeds that run at the same time. Seconds are summed over seeds.
    Raises DemoError where a command fails or an image has no heatmap.
    """

    def one(seed: int) -> Predicted:
        return _run_seed(config, seed, images, output, dataset_name, overrides, variants, say)

    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(one, seeds))
    methods = found[0].heatmaps
    heatmaps = {method: [maps for each in found for maps in each.heatmaps[method]]
                for method in methods}  # fmt: skip
    seconds = {key: sum(each.seconds[key] for each in found) for key in found[0].seconds}
    return Predicted(heatmaps, seconds)


def _run_seed(
    config: str,
    seed: int,
    images: Sequence[str],
    output: Path,
    dataset_name: str,
    overrides: Sequence[str],
    variants: Sequence[Variant],
    say: Say,
) -> Predicted:
    expname = f"seed{seed}"
    common = ["--config", config, "--seed", str(seed), *_set(f"expname={expname}", *overrides)]
    seconds = {"train": run_command(["inpainter/train.py", *common], say), "predict": 0.0}
    checkpoints = output / "checkpoints" / dataset_name / f"hole_{expname}"
    heatmaps: dict[str, list[list[NDArray[np.float32]]]] = {}
    for variant in variants:
        folder = output / "heatmaps" / (expname + variant.suffix.replace(" ", "_"))
        flags = ["--checkpoint_dir", _from_root(checkpoints), "--checkpoint_iter", "best"]
        flags += ["--output_dir", _from_root(folder), *_set(*variant.overrides)]
        seconds["predict"] += run_command(["predict_heatmap.py", *common, *flags], say)
        for metric, entries in list_heatmaps(folder).items():
            files = {entry.image: entry.file for entry in entries}
            if missing := sorted(set(images) - set(files)):
                raise DemoError(f"{folder} has no {metric} heatmap of {', '.join(missing)}")
            maps = [read_heatmap(files[name]) for name in images]
            heatmaps[metric + variant.suffix] = [maps]
    return Predicted(heatmaps, seconds)


def _set(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def baseline_heatmaps(train_images: Sequence[Tensor], cases: Sequence[Case]) -> dict[str, list]:
    """Heatmaps of every baseline in common/baselines.py: method -> one seed -> case.

    train_images: (1, H, W) each, in [0, 1].
    """
    scorers = {name: fit(train_images) for name, fit in BASELINES.items()}
    return {
        name: [[score(case.image).numpy() for case in cases]] for name, score in scorers.items()
    }


def _from_root(path: Path) -> str:
    """Path as typed at the repository root."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
