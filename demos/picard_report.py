"""What PICARD's demos share: the README's commands, baselines, one table, results.json, pictures.

A demo prepares a folder of normal images and a list of `Case`s, then `run_seeds` trains and
predicts as a user would, `baseline_heatmaps` scores the same images without a network, and
`compare` and `save_results` report. Heatmaps are by method, then training seed, then case;
baselines have one seed. Larger = more anomalous throughout.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.checkpoint import save_text_atomic
from common.errors import UserError
from common.figures import SheetRow, contact_sheet
from common.metrics import Interval, format_interval, mean_intervals, score_heatmap
from demos.baselines import BASELINES
from inpainter.heatmap_tables import list_heatmaps, read_heatmap

ROOT = Path(__file__).resolve().parent.parent
Say = Callable[[str], None]
Heatmaps = Mapping[str, Sequence[Sequence[NDArray[np.float32]]]]


class Case(NamedTuple):
    """A test image and what is known about it; arrays are (H, W)."""

    name: str
    """File name within the test folder."""
    image: Tensor
    """(1, H, W) float in [0, 1]."""
    truth: NDArray[np.bool_]
    """True on lesions; both values must occur among the pixels that count."""
    body: NDArray[np.bool_]
    """True on the pixels that count."""
    group: str = "all"
    """Rows of the table are per group, for instance a kind of lesion."""
    patient: str | None = None
    """Whose image it is: where this is known of all in a group, intervals draw patients."""


class Row(NamedTuple):
    """One method on one group of images."""

    group: str
    method: str
    auroc: Interval
    """Pixel AUROC, mean over images and training seeds; 95 % bootstrap interval over patients, or
    over images where they are not known."""
    ap: Interval
    """The same for the average precision."""
    auroc_by_seed: tuple[float, ...]
    """Mean over images for each training seed."""
    ap_by_seed: tuple[float, ...]


def compare(
    cases: Sequence[Case], heatmaps: Heatmaps, *, n_resamples: int = 1000, bootstrap_seed: int = 0
) -> list[Row]:
    """Table rows: every method on every group of cases, all on the same pixels.

    heatmaps: method -> training seed -> case, (H, W) each. Groups come in the order of the cases,
    methods as given. Raises ValueError where the number of heatmaps is not that of the cases.
    """
    rows = []
    scores = {method: _scores(cases, by_seed, method) for method, by_seed in heatmaps.items()}
    for group in dict.fromkeys(case.group for case in cases):
        chosen = [number for number, case in enumerate(cases) if case.group == group]
        patients = [cases[number].patient for number in chosen]
        clusters = None if None in patients else np.unique(patients, return_inverse=True)[1]
        for method, values in scores.items():
            part = values[:, chosen]  # (seeds, images, 2)
            mean = part.mean(0)
            columns = {"auroc": mean[:, 0], "ap": mean[:, 1]}
            intervals = mean_intervals(
                columns, n_resamples=n_resamples, seed=bootstrap_seed, clusters=clusters
            )
            auroc, ap = part.mean(1).T.tolist()
            rows.append(
                Row(group, method, intervals["auroc"], intervals["ap"], tuple(auroc), tuple(ap))
            )
    return rows


def _scores(
    cases: Sequence[Case], by_seed: Sequence[Sequence[NDArray]], method: str
) -> NDArray[np.float64]:
    """AUROC and AP (seeds, images, 2)."""
    for maps in by_seed:
        if len(maps) != len(cases):
            raise ValueError(f"{method}: {len(maps)} heatmaps for {len(cases)} images")
    return np.array(
        [
            [
                score_heatmap(heat, case.truth, ~case.body)
                for heat, case in zip(maps, cases, strict=True)
            ]
            for maps in by_seed
        ]
    )


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; ± is the standard deviation over several training seeds."""
    n_seeds = max(len(row.auroc_by_seed) for row in rows)
    note = f" (± over {n_seeds} training seeds)" if n_seeds > 1 else ""
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        lines += ["", f"{group:<26}{'pixel AUROC':<32}average precision{note}"]
        for row in rows:
            if row.group == group:
                auroc, ap = _cell(row.auroc, row.auroc_by_seed), _cell(row.ap, row.ap_by_seed)
                lines.append(f"  {row.method:<24}{auroc:<32}{ap}")
    return "\n".join(lines)


def _cell(interval: Interval, by_seed: Sequence[float]) -> str:
    deviation = np.std(by_seed, ddof=1) if len(by_seed) > 1 else None
    return format_interval(interval, deviation=deviation)


def save_results(
    rows: Sequence[Row],
    cases: Sequence[Case],
    heatmaps: Heatmaps,
    shown: Sequence[str],
    output: Path,
    record: Mapping[str, object],
) -> None:
    """Writes results.json (rows and `record`) and contact_sheet.png to output.

    The sheet shows image, truth and the heatmaps of the methods `shown`, of the first training
    seed, for the first cases of every group, about six in all.
    """
    table = [
        {**row._asdict(), "auroc": row.auroc._asdict(), "ap": row.ap._asdict()} for row in rows
    ]
    text = json.dumps({"rows": table, **record}, indent=2)
    save_text_atomic(text + "\n", output / "results.json")
    groups = list(dict.fromkeys(case.group for case in cases))
    per_group = max(1, 6 // len(groups))
    numbers = []
    for group in groups:
        numbers += [n for n, case in enumerate(cases) if case.group == group][:per_group]
    pictures = [
        SheetRow(
            cases[n].name,
            cases[n].image.numpy(),
            cases[n].truth,
            [heatmaps[m][0][n] for m in shown],
        )
        for n in numbers
    ]
    contact_sheet(pictures, output / "contact_sheet.png", columns=list(shown))


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


def train(config: str, overrides: Sequence[str], say: Say, *, seed: int = 0) -> float:
    """Runs train.py with a settings file and `key=value` overrides; returns the seconds it took."""
    flags = ["--config", config, "--seed", str(seed), *_set(*overrides)]
    return run_command(["inpainter/train.py", *flags], say)


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
    overrides = [f"expname={expname}", *overrides]
    common = ["--config", config, "--seed", str(seed), *_set(*overrides)]
    seconds = {"train": train(config, overrides, say, seed=seed), "predict": 0.0}
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


def baseline_heatmaps(
    train_images: Sequence[Tensor], cases: Sequence[Case], names: Sequence[str] = tuple(BASELINES)
) -> dict[str, list]:
    """Heatmaps of the baselines of these names: method -> one seed -> case.

    train_images: (1, H, W) each, in [0, 1]; names: of demos/baselines.py.
    """
    scorers = {name: BASELINES[name](train_images) for name in names}
    return {
        name: [[score(case.image).numpy() for case in cases]] for name, score in scorers.items()
    }


def _from_root(path: Path) -> str:
    """Path as typed at the repository root."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
