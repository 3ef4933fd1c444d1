"""PICARD on real images with known lesions: trains, calibrates, scores, compares with baselines.

    python benchmarks/real/picard.py mias --data FOLDER --seeds 3
    python benchmarks/real/picard.py idrid --data FOLDER --seeds 3
    python benchmarks/real/picard.py lung --data demo/ct/data --seeds 3
    python benchmarks/real/picard.py lung_back --data demo/ct/data --seeds 3
    python benchmarks/real/picard.py brain --data FOLDER --seeds 3

FOLDER holds the set as docs/results.md says; that of lung (1 -> 2) and lung_back (2 -> 1) is what
`make demo-ct` writes; that of brain and brain_back is `data` in pyradiomics 3.0.1's source
distribution. Scales, strides and the baselines' blurs were chosen on the images listed in
chosen_<set>.txt; the table is of the others. Intervals draw patients where they are known (mias). A
training that is finished in --output is not repeated, but scored with the settings of this call.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run by path, uninstalled

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from benchmarks.real.picard_sets import TASKS, Task
from common.cli import run_script
from common.config import ConfigError, load_config
from common.images import read_image, to_grey
from demos import picard_report as report
from demos.baselines import (
    fit_difference_of_gaussians,
    fit_intensity,
    fit_knn,
    fit_patchcore,
)
from inpainter.networks.pretrained import load_pretrained
from inpainter.predictor import Predictor, load_predictor
from inpainter.settings import PicardConfig
from inpainter.windows import resized, scaled_hw

HERE = Path(__file__).resolve().parent
CONFIG = "configs/demo_ct.yaml"
N_STEPS = 5000
Scorer = Callable[[Tensor], Tensor]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", choices=TASKS)
    add("--data", type=Path, required=True, metavar="DIR", help="the set's folder")
    add("--seeds", type=int, default=1, metavar="N", help="trainings (default: 1)")
    add("--output", type=Path, metavar="DIR", help="(default: demo/real/<set>)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="more", help="a setting")
    add("--variant", action="append", default=[], metavar="KEY=VALUE,...",
        help="score with these settings, too, as distances; again for more")  # fmt: skip
    add("--patchcore", type=Path, metavar="FILE",
        help="weights of a pretrained network (test.feature_space's) for a row of "
             "PatchCore")  # fmt: skip
    add("--device", default="cpu", help="scores there; --set device=… trains (default: cpu)")
    add("--limit", type=int, metavar="N", help="score the first N images of each half only")
    add("--half", choices=("reported", "chosen"), default="reported", help="images to report on")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    output = (arguments.output or report.ROOT / "demo" / "real" / arguments.task).resolve()
    task = TASKS[arguments.task](arguments.data, output)
    listed = HERE / f"chosen_{arguments.task}.txt"
    names = set(listed.read_text().split()) if listed.is_file() else set()
    chosen = [case for case in task.cases if case.name in names][: arguments.limit]
    reported = [case for case in task.cases if case.name not in names][: arguments.limit]
    cases = reported if arguments.half == "reported" else chosen
    started = time.monotonic()
    heatmaps: dict[str, list] = {}
    for seed in range(arguments.seeds):
        folder = trained(task, output, seed, arguments.more)
        predictor = predictor_of(folder, [*task.settings, *arguments.more], arguments.device)
        found = scored(predictor, cases)
        for variant in arguments.variant:
            found |= varied(folder, variant, cases, arguments.device)
        for method, maps in found.items():
            heatmaps.setdefault(method, []).append(maps)
    heatmaps |= baselines(task, chosen, cases)
    if arguments.patchcore is not None:
        heatmaps["PatchCore"] = [patchcore(task, arguments.patchcore, cases)]
    cases, heatmaps = with_kinds(task, cases, heatmaps)
    rows = report.compare(cases, heatmaps)
    record = {"set": arguments.task, "half": arguments.half, "settings": task.settings,
              "more": arguments.more, "seconds": time.monotonic() - started}  # fmt: skip
    metric = next(iter(found))
    shown = (f"{metric} calibrated", metric, "smoothed intensity", "k-NN of patches")
    report.save_results(rows, cases, heatmaps, shown, output, record)
    print(report.format_table(rows))
    return 0


def trained(task: Task, output: Path, seed: int, more: Sequence[str]) -> Path:
    """The folder of a training that ends in a calibration; trains where there is none."""
    folder = output / "checkpoints" / "real" / f"hole_seed{seed}"
    settings = [
        *("dataset_name=real", f"expname=seed{seed}", f"train_data_path={task.training}"),
        *(f"calibration_data_path={task.held_out}", f"checkpoints_dir={output / 'checkpoints'}"),
        *(f"logs_dir={output / 'logs'}", f"train.n_steps={N_STEPS}", "train.cache_mb=2048"),
        *("train.snapshot_save_iter=1000", "train.keep_snapshots=1", "test.calibration=knn"),
        "test.heatmap_M_inpaint=5",
        *("test.heatmap_metrics=[MCD_image, MeanCD_image]", *task.settings, *more),
    ]
    if not list(folder.glob("calibration_*.pt")):
        report.train(CONFIG, settings, partial(print, flush=True), seed=seed)
    return folder


def predictor_of(folder: Path, settings: Sequence[str], device: str) -> Predictor:
    """What scores. A training of before may have ended with other settings for the test than these.

    Raises ConfigError where it was trained with others, and what load_predictor does, also where
    windows were measured with others.
    """
    path = folder / "config.yaml"
    trained_with = load_config(PicardConfig, path)
    config = load_config(PicardConfig, path, settings)
    if replace(config, test=trained_with.test) != trained_with:
        raise ConfigError(
            f"{path} has other settings than this command: its training is not this one. Choose "
            "another --output."
        )
    return load_predictor(folder, "best", config, device)


def scored(predictor: Predictor, cases: Sequence[report.Case]) -> dict[str, list]:
    """Heatmaps by method, then image: every metric as published, and calibrated."""
    found: dict[str, list] = {}
    for case in tqdm(cases, unit="image", disable=not sys.stderr.isatty()):
        *_, raw, calibrated = predictor.score_image(pixels_of(case, predictor), case.name)
        for suffix, result in (("", raw), (" calibrated", calibrated)):
            for metric, heatmap in result.heatmaps.items():
                found.setdefault(metric + suffix, []).append(heatmap.numpy())
    return found


def pixels_of(case: report.Case, predictor: Predictor) -> Tensor:
    """The case's image as the networks take it."""
    grey = len(case.image) > predictor.config.netG.input_dim
    return predictor.pixels_of(to_grey(case.image) if grey else case.image)


def varied(
    folder: Path, variant: str, cases: Sequence[report.Case], device: str
) -> dict[str, list]:
    """The same of MCD_image alone, or the metric that the variant names, as a distance."""
    changed = ["test.calibration=off", "test.heatmap_metrics=[MCD_image]", *variant.split(",")]
    config = load_config(PicardConfig, folder / "config.yaml", changed)
    other = load_predictor(folder, "best", config, device=device)
    (metric,) = config.test.heatmap_metrics
    maps = []
    for case in cases:
        *_, last = other.score_image(pixels_of(case, other), case.name)
        maps.append(last.heatmaps[metric].numpy())
    return {variant: maps}


def baselines(
    task: Task, chosen: Sequence[report.Case], cases: Sequence[report.Case]
) -> dict[str, list]:
    """Heatmaps of methods that need no training loop, by name: one seed, then image."""
    filters: Mapping[str, Callable[[float], Scorer]] = {
        "smoothed intensity": lambda sigma: fit_intensity((), sigma),
        "difference of Gaussians": lambda sigma: fit_difference_of_gaussians((), sigma, 10 * sigma),
    }
    maps = {}
    for name, made in filters.items():
        best = task.blurs[0]
        if len(task.blurs) > 1:
            best = max(task.blurs, key=lambda sigma: _auroc(task, made(sigma), chosen))
        print(f"{name}: {best} pixels, chosen on {len(chosen)} images", flush=True)
        maps[name] = [[_plane(made(best), case.image, task.channel) for case in cases]]
    training = [_small(read_image(path), task) for path in sorted(task.training.iterdir())]
    knn = fit_knn(training)
    maps["k-NN of patches"] = [[
        resized(knn(_small(case.image, task))[None], case.truth.shape)[0].numpy() for case in cases
    ]]  # fmt: skip
    return maps


def patchcore(task: Task, weights: Path, cases: Sequence[report.Case]) -> list:
    """PatchCore's heatmaps, of images at their full size and in all their colours."""
    training = (read_image(path) for path in sorted(task.training.iterdir()))
    score = fit_patchcore(training, load_pretrained(weights))
    return [score(case.image).numpy() for case in cases]


def with_kinds(
    task: Task, cases: Sequence[report.Case], heatmaps: Mapping[str, list]
) -> tuple[list[report.Case], dict[str, list]]:
    """The cases and, behind them, those of each kind of lesion, with the same heatmaps."""
    more = [(number, kind) for number, case in enumerate(cases) for kind in task.kinds(case)]
    numbers = [*range(len(cases)), *(number for number, _ in more)]
    repeated = {
        method: [[maps[number] for number in numbers] for maps in seeds]
        for method, seeds in heatmaps.items()
    }
    return [*cases, *(kind for _, kind in more)], repeated


def _small(image: Tensor, task: Task) -> Tensor:
    """(C, H, W) -> (1, h, w): the channel that counts, at the size that the network sees."""
    channel = min(task.channel, len(image) - 1)
    plane = image[channel : channel + 1]
    return resized(plane, scaled_hw((image.shape[1], image.shape[2]), task.scale))


def _plane(scorer: Scorer, image: Tensor, channel: int) -> NDArray[np.float32]:
    return scorer(image[channel : channel + 1]).numpy()


def _auroc(task: Task, scorer: Scorer, cases: Sequence[report.Case]) -> float:
    """Mean pixel AUROC over images."""
    maps = {"": [[_plane(scorer, case.image, task.channel) for case in cases]]}
    return report.compare(cases, maps, n_resamples=2)[0].auroc.value


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(main)
