"""CSI, DIA and its blur controls on real images of one normal class: trains, evaluates, one table.

    python benchmarks/real/dia.py pneumoniamnist --data FOLDER --seeds 3
    python benchmarks/real/dia.py chest_xray --data FOLDER --seeds 3
    python benchmarks/real/dia.py idrid --data FOLDER --seeds 3

FOLDER holds the set as docs/results.md says. Settings are the published ones (configs/dia.yaml);
--small has those of a narrow encoder and few epochs, for a processor core and minutes instead of
days. Nothing is chosen on test images: the last checkpoint of a training is the one that is
evaluated. What is finished in --output is not repeated, and what was begun goes on.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run by path, uninstalled

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional as F

from common.checkpoint import save_text_atomic
from common.cli import run_script
from common.config import REPOSITORY, ConfigError, config_to_yaml, load_config
from common.image_sets import ImageSet
from common.metrics import (
    Interval,
    binary_intervals,
    binary_score,
    bootstrap_intervals,
    format_interval,
)
from demos import dia_report as report
from demos.baselines import nearest_neighbour, pca_reconstruction
from demos.dia_report import Job, Row
from dia.settings import DiaConfig
from diffusion_models.dissolve import checkpoints
from diffusion_models.settings import DiffusionConfig

CONFIG = REPOSITORY / "configs" / "dia.yaml"
METHODS = {
    "CSI": ("simclr_CSI", "rotation"),
    "DIA": ("simclr_DIA", "diffusion_rotation"),
    "gaussian": ("simclr_DIA", "blurgaussian_rotation"),
    "median": ("simclr_DIA", "blurmedian_rotation"),
}
"""Name in the table -> mode and shift transform in training; gaussian and median blur the copies
that DIA dissolves."""
SMALL = (
    "device=cpu",
    "data.num_workers=0",
    "diffusion.dim=8",
    "diffusion.dim_mults=[1, 2]",
    "diffusion.ddpm_batch_size=32",
    "diffusion.gradient_accumulate_every=1",
    "diffusion.train_num_steps=150",
    "diffusion.train_lr=1.0e-3",
    "diffusion.ema_decay=0.98",
    "diffusion.save_every=50",
    "diffusion.sampling_timesteps=2",
    "diffusion.num_samples=1",
    "contrastive.model=resnet18",
    "contrastive.width=8",
    "contrastive.batch_size=16",
    "contrastive.epochs=3",
    "contrastive.warmup=1",
    "contrastive.optimizer=sgd",
    "contrastive.lr_init=1.0e-2",
    "evaluation.ood_samples=4",
)
"""What --small changes, as configs/demo_dia.yaml does: one CPU core, minutes a training."""
SMALL_IMAGES = ("data.resize_to=32",)
"""What --small changes beside, where images are of 224 x 224."""
GREY_SIDE = 32
"""Side in pixels at which the untrained rivals see images that are larger."""
N_RESAMPLES = 1000


@dataclass(frozen=True)
class Settings(DiaConfig):
    """A whole settings file such as configs/dia.yaml."""

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)


@dataclass(frozen=True)
class Task:
    """A set of images: what it is called, and what the settings say of it."""

    title: str
    anomalies: str
    settings: tuple[str, ...]
    """What differs from configs/dia.yaml."""
    small: tuple[str, ...] = ()
    """What --small changes here beside SMALL."""


def pneumoniamnist(data: Path, output: Path) -> Task:
    """The archive pneumoniamnist.npz, 28 x 28 pixels, padded to 32 x 32 where it is dissolved."""
    settings = (
        *("data.dataset=pneumoniamnist", f"data.data_root={data.resolve()}"),
        "contrastive.model=resnet18",
    )
    return Task("PneumoniaMNIST", "pneumonia", settings)


def chest_xray(data: Path, output: Path) -> Task:
    """Chest radiographs: {train,test}/NORMAL and test/PNEUMONIA."""
    settings = linked_tree(
        output / "images",
        {
            "train/normal": sorted((data / "train" / "NORMAL").iterdir()),
            "test/normal": sorted((data / "test" / "NORMAL").iterdir()),
            "test/pneumonia": sorted((data / "test" / "PNEUMONIA").iterdir()),
        },
    )
    return Task("chest X-ray", "pneumonia", settings, small=SMALL_IMAGES)


def idrid(data: Path, output: Path) -> Task:
    """IDRiD: photographs of grade 0 against the 81 with marked lesions, squeezed to squares.

    Photograph 118 is left out: it is in the official test part as well, with grade 3.
    """
    training = [p for p in sorted((data / "normal_train").iterdir()) if "118" not in p.stem]
    settings = linked_tree(
        output / "images",
        {
            "train/normal": training,
            "test/normal": sorted((data / "normal_test").iterdir()),
            "test/retinopathy": sorted((data / "lesion_images").iterdir()),
        },
    )
    return Task("IDRiD", "photographs with marked lesions", settings, small=SMALL_IMAGES)


def linked_tree(root: Path, folders: Mapping[str, Sequence[Path]]) -> tuple[str, ...]:
    """Links the files into root/<folder>, once; returns the settings that read the tree."""
    for name, files in folders.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for path in files:
            link = root / name / path.name
            if not link.is_symlink():
                link.symlink_to(path.resolve())
    return ("data.dataset=folder", f"data.data_root={root}", "data.resize_to=224")


TASKS: dict[str, Callable[[Path, Path], Task]] = {
    "pneumoniamnist": pneumoniamnist,
    "chest_xray": chest_xray,
    "idrid": idrid,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("set", choices=TASKS)
    add("--data", type=Path, required=True, metavar="DIR", help="the set's folder")
    add("--seeds", type=int, default=1, metavar="N", help="trainings (default: 1)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"what to train, of {', '.join(METHODS)} (default: all)")  # fmt: skip
    add("--one_diffusion_model", action="store_true",
        help="all seeds dissolve with the model of seed 0, as published")  # fmt: skip
    add("--small", action="store_true",
        help="a narrow encoder and few epochs, for one CPU core; not the published "
             "settings")  # fmt: skip
    add("--output", type=Path, metavar="DIR",
        help="(default: demo/real/dia_<set>, with --small dia_<set>_small)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="more", help="a setting")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    name = f"dia_{arguments.set}" + ("_small" if arguments.small else "")
    output = (arguments.output or REPOSITORY / "demo" / "real" / name).resolve()
    task = TASKS[arguments.set](arguments.data, output)
    small = (*SMALL, *task.small) if arguments.small else ()
    fixed = ("data.one_class_idx=0", "contrastive.select_by=last")
    overrides = [*task.settings, *fixed, *small, *arguments.more]
    settings = load_config(Settings, CONFIG, overrides)
    write_settings(settings, output)
    jobs = [
        job
        for seed in range(arguments.seeds)
        for job in jobs_of(
            *(settings, output, seed, arguments.methods),
            model_seed=0 if arguments.one_diffusion_model else seed,
        )
    ]
    seconds = report.run_jobs(jobs, output / "logs", partial(print, flush=True)) if jobs else {}
    scores = {
        method: [read_scores(results_of(output, seed, method)) for seed in range(arguments.seeds)]
        for method in arguments.methods
    }
    untrained = untrained_scores(settings)
    counts = np.bincount(next(iter(untrained.values()))[0][0].astype(int))
    heading = describe(task, settings, arguments, counts.tolist())
    rows = rows_of(task.anomalies, scores | untrained)
    found = report.findings(rows, pairs(arguments.methods))
    table = format_table(scores | untrained)
    print("\n".join(["", heading, "", table, "", *found]))
    record = {"command": sys.argv, "heading": heading, "table": table.splitlines()}
    record |= {"found": found, "seconds": {**seconds, "total": time.monotonic() - started}}
    report.save_results(output / "results.json", rows, record)
    print(f"\nNumbers: {output / 'results.json'}")
    return 0


def write_settings(settings: Settings, output: Path) -> None:
    """Writes settings.yaml, which all commands read; ConfigError where another one is there."""
    path, text = output / "settings.yaml", config_to_yaml(settings)
    if not path.is_file():
        save_text_atomic(text, path)
    elif path.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{path} has other settings than this command: its trainings are not these. Choose "
            "another --output."
        )


def diffusion_model(settings: Settings, output: Path, seed: int) -> Path:
    """The last checkpoint of a seed's diffusion model."""
    number = -(-settings.diffusion.train_num_steps // settings.diffusion.save_every)
    return output / f"seed{seed}" / "ddpm" / f"model-{number}.pt"


def results_of(output: Path, seed: int, method: str) -> Path:
    """The scores of a method's images, which are written last of all."""
    return output / f"seed{seed}" / method / "evaluation" / "scores_CSI.csv"


def jobs_of(
    settings: Settings, output: Path, seed: int, methods: Sequence[str], *, model_seed: int
) -> list[Job]:
    """What is left to do of one seed, which dissolves with the diffusion model of model_seed."""
    common = ["--config", str(output / "settings.yaml"), "--seed", str(seed)]
    left = [name for name in methods if not finished(output, seed, name)]
    model = diffusion_model(settings, output, model_seed)
    jobs, ddpm = [], None
    if "DIA" in left and not model.is_file():
        ddpm = f"seed{model_seed}_ddpm"
    if ddpm is not None and model_seed == seed:
        place = "--resume" if checkpoints(model.parent) else "--output_dir"
        script = ["diffusion_models/train_eval_ddpm.py", "--mode", "train"]
        jobs.append(Job(ddpm, [[*script, *common, place, str(model.parent)]]))
    for name in left:
        mode, shift = METHODS[name]
        folder = output / f"seed{seed}" / name
        place = "--resume_path" if (folder / "state.pt").is_file() else "--run_dir"
        train = ["train_dia.py", "--mode", mode, "--shift_trans_type", shift]
        train += [place, str(folder), *common]
        if name == "DIA":
            train += ["--diffusion_model_path", str(model)]
        evaluate = ["eval.py", "--mode", "ood_pre", "--shift_trans_type", "rotation"]
        evaluate += ["--load_path", str(folder / "last.model")]
        evaluate += ["--results_dir", str(results_of(output, seed, name).parent), *common]
        after = ddpm if name == "DIA" else None
        jobs.append(Job(f"seed{seed}_{name}", [train, evaluate], after))
    return jobs


def finished(output: Path, seed: int, method: str) -> bool:
    """Whether a method was trained and evaluated; the evaluation writes results.json last."""
    return results_of(output, seed, method).with_name("results.json").is_file()


Scored = tuple[NDArray[np.bool_], NDArray[np.float64]]
"""Labels (N,), True = anomalous, and scores (N,), larger = more anomalous, of the test images."""


def read_scores(path: Path) -> Scored:
    """From a scores_CSI.csv, whose scores are larger for normal images."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = np.array([row["label"] == "1" for row in rows])
    return labels, np.array([-float(row["CSI"]) for row in rows])


def untrained_scores(settings: Settings) -> dict[str, list[Scored]]:
    """Scores of methods that need no training, on grey pixels."""
    train = grey_images(settings.data.images("train").of_classes([0]))
    tests = settings.data.images("test")
    test = grey_images(tests)
    flat = train.reshape(len(train), -1), test.reshape(len(test), -1)
    laplacians = np.stack([ndimage.laplace(image) for image in test])
    detail = np.abs(laplacians[:, 1:-1, 1:-1]).mean(axis=(1, 2))  # at the rim there is none
    scores = {
        "1-NN on pixels": nearest_neighbour(*flat),
        "PCA-30 reconstruction": pca_reconstruction(*flat, components=30),
        "less fine detail": -detail,
    }
    return {name: [(tests.labels != 0, values)] for name, values in scores.items()}


def grey_images(images: ImageSet) -> NDArray[np.float64]:
    """(N, H, W): images at their own size, or means over an area, 32 x 32, where they are larger.

    Reads the files, whatever side the networks see.
    """
    files = replace(images, size=None)
    planes = [
        files[number].image.double().mean(dim=0, keepdim=True) for number in range(len(files))
    ]
    small = [
        plane if max(plane.shape) <= GREY_SIDE else F.adaptive_avg_pool2d(plane, GREY_SIDE)
        for plane in planes
    ]
    return torch.cat(small).numpy()


def rows_of(group: str, scores: Mapping[str, Sequence[Scored]]) -> list[Row]:
    """A row per method and seed, with bootstrap intervals over images."""
    rows = []
    for method, seeds in scores.items():
        for seed, (labels, values) in enumerate(seeds):
            interval = binary_intervals(labels, values, n_resamples=N_RESAMPLES, seed=0)["auroc"]
            rows.append(Row(group, method, interval, seed if method in METHODS else None))
    return rows


def pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    """What is compared seed by seed: dissolving with the others, all with the best untrained."""
    rivals = [(name, "less fine detail") for name in methods]
    return [("DIA", name) for name in methods if "DIA" in methods and name != "DIA"] + rivals


def format_table(scores: Mapping[str, Sequence[Scored]]) -> str:
    """A line per method: mean AUROC ± sd over seeds [interval over images], each seed's."""
    lines = ["AUROC".ljust(24) + "mean ± sd [95 % over images]".ljust(34) + "seeds"]
    for method, seeds in scores.items():
        values = [binary_score(*scored).auroc for scored in seeds]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        cell = format_interval(mean_interval(seeds), deviation=deviation)
        each = ", ".join(f"{value:.3f}" for value in values) if method in METHODS else "none"
        lines.append(method.ljust(24) + cell.ljust(34) + each)
    return "\n".join(lines)


def mean_interval(seeds: Sequence[Scored]) -> Interval:
    """The seeds' mean AUROC with its bootstrap interval over images, the same for all seeds."""
    labels = seeds[0][0]
    wins = np.mean([_wins(*scored) for scored in seeds], axis=0)

    def auroc(times: NDArray[np.int64]) -> float:
        normal, anomalous = times[~labels], times[labels]
        pairs_drawn = normal.sum() * anomalous.sum()
        return float(normal @ wins @ anomalous / pairs_drawn) if pairs_drawn else np.nan

    def on_draw(draw: NDArray[np.int64]) -> dict[str, float]:
        return {"auroc": auroc(np.bincount(draw, minlength=labels.size))}

    whole = {"auroc": auroc(np.ones(labels.size, dtype=np.int64))}
    n = labels.size
    return bootstrap_intervals(whole, on_draw, n, n_resamples=N_RESAMPLES, seed=0)["auroc"]


def _wins(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(normal images, anomalous images): 1 where the anomalous one scores higher, 0.5 for ties."""
    normal, anomalous = scores[~labels][:, None], scores[labels][None]
    return (anomalous > normal) + 0.5 * (anomalous == normal)


def describe(
    task: Task, settings: Settings, arguments: argparse.Namespace, counts: Sequence[int]
) -> str:
    """The table's heading: images, and the settings that the numbers depend on most."""
    trained, ddpm = settings.contrastive, settings.diffusion
    which = "--small, NOT the published settings" if arguments.small else "published settings"
    changed = f", with {', '.join(arguments.more)}" if arguments.more else ""
    width = f" of width {trained.width}" if trained.model in ("resnet18", "resnet34") else ""
    steps = [
        round(100 * part) for part in (trained.diffusion_offset, trained.diffusion_upper_offset)
    ]
    images = ddpm.ddpm_batch_size * ddpm.gradient_accumulate_every
    return "\n".join([
        f"{task.title}: {counts[0]} normal test images against {counts[1]} ({task.anomalies}); "
        f"{which}{changed}",
        f"{trained.model}{width} at {settings.data.side} x {settings.data.side}, {trained.epochs} "
        f"epochs, batches of {trained.batch_size}, {trained.optimizer}; last checkpoint; "
        f"{settings.evaluation.ood_samples} samples a shift",
        f"Dissolving at {trained.diff_resolution} x {trained.diff_resolution}, t = {steps[0]} to "
        f"{steps[1]}, by a U-Net of width {ddpm.dim} trained {ddpm.train_num_steps} steps of "
        f"{images} images",
    ])  # fmt: skip


if __name__ == "__main__":
    run_script(main, interrupted="Interrupted; the same command goes on.")
