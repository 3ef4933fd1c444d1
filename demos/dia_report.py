"""What demos/clothes.py does with its images: the README's commands, one table.

Images are files of a train/<class>, test/<class> tree. Scores are turned so that larger = more
anomalous.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from common.checkpoint import save_text_atomic
from common.config import REPOSITORY
from common.images import read_image, write_image
from common.metrics import Interval, binary_intervals, format_interval
from demos.baselines import IMAGE_BASELINES
from demos.data.clothes import GROUPS, OTHER_CLASSES
from diffusion_models.dissolve import load_dissolver
from diffusion_models.pictures import dissolving_strip

Say = Callable[[str], None]


class Job(NamedTuple):
    """Commands that follow each other, with a name for their log."""

    name: str
    commands: Sequence[Sequence[str]]
    after: str | None = None
    """Name of an earlier job that has to end first."""


class Row(NamedTuple):
    """One method on one group of anomalies."""

    group: str
    method: str
    auroc: Interval
    seed: int | None = None


def run_jobs(jobs: Sequence[Job], logs: Path, say: Say) -> dict[str, float]:
    """Runs jobs side by side, one for each processor core; output goes to logs/<job>.log.

    Returns the seconds of each. Raises RuntimeError with the command and the log where one fails.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = max(1, min(len(jobs), cores or 1))
    threads = str(max(1, (cores or 1) // at_once))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    logs.mkdir(parents=True, exist_ok=True)

    def run(job: Job, before: Future | None) -> float:
        if before is not None:
            before.result()
        started = time.monotonic()
        with (logs / f"{job.name}.log").open("w", encoding="utf-8") as log:
            for command in job.commands:
                say(f"$ python {shlex.join(command)}")
                _run_command(command, log, environment)
        return time.monotonic() - started

    ends: dict[str, Future] = {}
    with ThreadPoolExecutor(at_once) as pool:
        for job in jobs:
            before = None if job.after is None else ends[job.after]
            ends[job.name] = pool.submit(run, job, before)
        try:
            return {name: end.result() for name, end in ends.items()}
        except RuntimeError:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_command(command: Sequence[str], log: TextIO, environment: Mapping[str, str]) -> None:
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
            f"`python {shlex.join(command)}` ended with status {done.returncode}; its output is "
            f"in {log.name}"
        )


def group_of(file: str, normal: str) -> str:
    """The table's group of a test file such as test/hole/003.png; the normal class has its name."""
    name = file.split("/")[-2]
    return name if name == normal or name in GROUPS else OTHER_CLASSES


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
    scores = {name: score(train, test) for name, score in IMAGE_BASELINES.items()}
    return {
        name: {group: values[groups == group] for group in dict.fromkeys(groups.tolist())}
        for name, values in scores.items()
    }


def compare(
    method: str, scores: Mapping[str, NDArray], normal: str, seed: int | None = None
) -> list[Row]:
    """AUROC of the normal images against every group, with 95 % bootstrap intervals over images."""
    rows = []
    for group in (group for group in GROUPS if group in scores):
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
    return format_interval(intervals[0])


def findings(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Sentences on whether the first of each pair beat the second in each group, either way.

    Trained methods are compared seed by seed; a method without seeds is the same for all.
    """
    auroc = {(row.method, row.group, row.seed): row.auroc.value for row in rows}
    sentences = []
    for group in dict.fromkeys(row.group for row in rows):
        for ours, rival in pairs:
            gains = [
                value - auroc.get((rival, group, seed), auroc.get((rival, group, None), np.nan))
                for (method, of, seed), value in auroc.items()
                if (method, of) == (ours, group)
            ]
            sentences.append(f"{group}: {ours} is {_gain(gains, rival)}")
    return sentences


def _gain(gains: Sequence[float], rival: str) -> str:
    mean = float(np.mean(gains))
    verdict = "above" if mean > 0 else "below" if mean < 0 else "level with"
    text = f"{abs(mean):.3f} {verdict} {rival}"
    if len(gains) == 1:
        return text
    higher = sum(gain > 0 for gain in gains)
    return f"{text} (sd {np.std(gains, ddof=1):.3f}, higher with {higher} of {len(gains)} seeds)"


def save_strip(folder: Path, normal: str, checkpoint: Path, steps: Sequence[int]) -> Path:
    """Draws test images and changed ones, dissolved at each step, enlarged: dissolved.png."""
    chosen = [(normal, n) for n in range(3)] + [(group, 0) for group in GROUPS]
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
