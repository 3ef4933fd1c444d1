"""What benchmarks/demo_dia.py does: images with small changes, the README's commands, one table.

Images are files of a train/<class>, test/<class> tree; N test images, M training images. Scores are
turned so that larger = more anomalous.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from common.checkpoint import save_text_atomic
from common.config import REPOSITORY
from common.images import read_image, write_image
from common.local_changes import CHANGES
from common.metrics import Interval, binary_intervals
from common.pixel_baselines import BASELINES
from diffusion_models.dissolve import load_dissolver
from diffusion_models.pictures import dissolving_strip

CLASSES = ("t_shirt", "trouser", "pullover", "dress", "coat",
           "sandal", "shirt", "sneaker", "bag", "ankle_boot")  # fmt: skip
RIM = 2
"""Black pixels added around the 28² images, so that they halve well."""
OTHER_CLASSES = "other_classes"

Say = Callable[[str], None]


class Job(NamedTuple):
    """Commands that follow each other, with a name for their log."""

    name: str
    commands: Sequence[Sequence[str]]


class Row(NamedTuple):
    """One method on one group of anomalies."""

    group: str
    method: str
    auroc: Interval
    seed: int | None = None


class Counts(NamedTuple):
    """How many images are written."""

    train: int = 400
    test: int = 120
    """Normal test images; the local changes are made of the same ones."""
    per_other_class: int = 40


def write_images(archive: Path, folder: Path, normal: int, counts: Counts) -> dict[str, int]:
    """Writes the demo's tree: train/<normal>, test/<normal>, other classes and local changes.

    archive: fashion_mnist.npz   normal: class number. Images that offer no place for a change are
    left out of its folder, so a change may have none. Masks of the changes are in masks/<change>.
    Returns the number of test images by folder.
    """
    with np.load(archive, allow_pickle=False) as arrays:
        data = {name: np.asarray(values) for name, values in arrays.items()}
    random = np.random.default_rng(0)
    written: dict[str, int] = {}

    def write(split: str, name: str, number: int, image: NDArray) -> None:
        write_image(folder / split / name / f"{number:03d}.png", torch.from_numpy(image))
        if split == "test":
            written[name] = written.get(name, 0) + 1

    def of_class(split: str, label: int, count: int) -> NDArray[np.float32]:
        chosen = data[f"{split}_images"][data[f"{split}_labels"] == label][:count]
        return np.pad(chosen, ((0, 0), (RIM, RIM), (RIM, RIM))).astype(np.float32) / 255

    for number, image in enumerate(of_class("train", normal, counts.train)):
        write("train", CLASSES[normal], number, image)
    for label, name in enumerate(CLASSES):
        count = counts.test if label == normal else counts.per_other_class
        for number, image in enumerate(of_class("test", label, count)):
            write("test", name, number, image)
    for number, image in enumerate(of_class("test", normal, counts.test)):
        for change, function in CHANGES.items():
            changed = function(image, random)
            if changed is not None:
                write("test", change, number, changed[0])
                write("masks", change, number, changed[1].astype(np.float32))
    return written


def run_jobs(jobs: Sequence[Job], logs: Path, say: Say) -> None:
    """Runs jobs side by side, one for each processor core; output goes to logs/<job>.log.

    Raises RuntimeError with the command and the log where one fails.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = max(1, min(len(jobs), cores or 1))
    threads = str(max(1, (cores or 1) // at_once))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    logs.mkdir(parents=True, exist_ok=True)

    def run(job: Job) -> None:
        with (logs / f"{job.name}.log").open("w", encoding="utf-8") as log:
            for command in job.commands:
                say(f"$ python {shlex.join(command)}")
                done = subprocess.run(
                    [sys.executable, *command],
                    cwd=REPOSITORY,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    check=False,
                )
                if done.returncode:
                    raise RuntimeError(
                        f"`python {shlex.join(command)}` ended with status {done.returncode}; its "
                        f"output is in {log.name}"
                    )

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, jobs))


def group_of(file: str, normal: str) -> str:
    """The table's group of a test file such as test/hole/003.png; the normal class has its name."""
    name = file.split("/")[-2]
    return name if name == normal or name in CHANGES else OTHER_CLASSES


def read_scores(path: Path, normal: str) -> dict[str, NDArray[np.float64]]:
    """Anomaly scores by group from a scores_CSI.csv, whose scores are larger for normal images."""
    groups: dict[str, list[float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            groups.setdefault(group_of(row["file"], normal), []).append(-float(row["CSI"]))
    return {group: np.array(values) for group, values in groups.items()}


def baseline_scores(folder: Path, normal: str) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Anomaly scores of every baseline by group, for the tree that write_images wrote."""

    def flat(files: Sequence[Path]) -> NDArray[np.float64]:
        return np.stack([read_image(file, channels=1).double().flatten().numpy() for file in files])

    train = flat(sorted((folder / "train" / normal).iterdir()))
    files = sorted((folder / "test").rglob("*.png"))
    groups = np.array([group_of(file.as_posix(), normal) for file in files])
    test = flat(files)
    scores = {name: score(train, test) for name, score in BASELINES.items()}
    return {
        name: {group: values[groups == group] for group in dict.fromkeys(groups.tolist())}
        for name, values in scores.items()
    }


def compare(
    method: str, scores: Mapping[str, NDArray], normal: str, seed: int | None = None
) -> list[Row]:
    """AUROC of the normal images against every group, with 95 % bootstrap intervals over images."""
    rows = []
    for group in (OTHER_CLASSES, *CHANGES):
        if group not in scores:
            continue
        values = np.concatenate([scores[normal], scores[group]])
        labels = np.repeat([0, 1], [len(scores[normal]), len(scores[group])])
        interval = binary_intervals(labels, values, n_resamples=500, seed=0)["auroc"]
        rows.append(Row(group, method, interval, seed))
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """One line per method, one column per group: AUROC [95 % interval], or mean ± sd of seeds."""
    groups = list(dict.fromkeys(row.group for row in rows))
    lines = ["AUROC".ljust(24) + "".join(group.rjust(24) for group in groups)]
    for method in dict.fromkeys(row.method for row in rows):
        cells = []
        for group in groups:
            chosen = [row.auroc for row in rows if (row.method, row.group) == (method, group)]
            cells.append(_cell(chosen))
        lines.append(method.ljust(24) + "".join(cell.rjust(24) for cell in cells))
    return "\n".join(lines)


def _cell(intervals: Sequence[Interval]) -> str:
    if not intervals:
        return "-"
    if len(intervals) > 1:
        values = [interval.value for interval in intervals]
        return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    value, low, high = intervals[0]
    return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def findings(rows: Sequence[Row], ours: str, rivals: Sequence[str]) -> list[str]:
    """Sentences on whether `ours` beat each rival in each group, whichever way it went."""
    means: dict[tuple[str, str], float] = {}
    for row in rows:
        same = [r.auroc.value for r in rows if (r.method, r.group) == (row.method, row.group)]
        means[row.method, row.group] = float(np.mean(same))
    sentences = []
    for group in dict.fromkeys(row.group for row in rows):
        for rival in rivals:
            gain = means[ours, group] - means[rival, group]
            verdict = "above" if gain > 0 else "below" if gain < 0 else "level with"
            sentences.append(f"{group}: {ours} is {abs(gain):.3f} {verdict} {rival}")
    return sentences


def save_strip(folder: Path, normal: str, checkpoint: Path, steps: Sequence[int]) -> Path:
    """Draws test images and changed ones, dissolved at each step, enlarged: dissolved.png."""
    chosen = [(normal, n) for n in range(3)] + [(change, 0) for change in CHANGES]
    files = [sorted((folder / "images" / "test" / name).glob("*.png")) for name, _ in chosen]
    pictures = [
        read_image(found[n], 3) for found, (_, n) in zip(files, chosen, strict=True) if found
    ]
    dissolver = load_dissolver(checkpoint)
    images = torch.stack(pictures)
    side = dissolver.image_size or images.shape[-1]
    images = torch.nn.functional.interpolate(images, (side, side), mode="bilinear")
    strip = dissolving_strip(dissolver, images, steps)
    path = folder / "dissolved.png"
    scale = max(1, 96 // side)
    write_image(path, strip.repeat_interleave(scale, 1).repeat_interleave(scale, 2))
    return path


def save_results(path: Path, rows: Sequence[Row], record: Mapping[str, object]) -> None:
    """Writes results.json: the rows and whatever the caller records."""
    plain = [{**row._asdict(), "auroc": row.auroc._asdict()} for row in rows]
    save_text_atomic(json.dumps({**record, "rows": plain}, indent=2) + "\n", path)
