"""Training steps per second on one device, of each training: PICARD, CSI, DIA, the diffusion model.

    python benchmarks/step_rate.py --device cuda
    python benchmarks/step_rate.py picard --device cuda --side 256 --batch 55 --precision tf32 bf16
    python benchmarks/step_rate.py dia csi --device cuda --side 28 --model resnet18 --precision tf32

The steps are those of the trainings themselves with the published settings, on random images that
are in memory before. PICARD's rate is the mean over whole cycles (n_critic steps, of which the last
updates the generator, too). Before, as many steps are taken that no clock sees, ten at most. The
device has finished before a clock is read.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

import numpy as np
import torch
from PIL import Image

import dia.building
import dia.training
import diffusion_models.training
from common.checkpoint import save_text_atomic
from common.config import REPOSITORY, load_config
from common.devices import resolve_device, tf32_products
from common.image_batches import Batch
from common.random_numbers import seed_everything
from common.training import gradient_scaler
from dia.settings import DiaConfig
from diffusion_models.settings import DdpmConfig
from inpainter.fast.holes import HoleCompleter
from inpainter.networks import build_networks
from inpainter.settings import PicardConfig
from inpainter.step import ALONE, TrainState, build_optimisers, training_step

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
N_IMAGES = 64
"""Of the folder that the DIA trainings see."""
Step = Callable[[int], object]
"""Takes a step by its number, from 0."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("trainings", nargs="*", metavar="NAME",
        help=f"of {', '.join(TRAININGS)} (default: all)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--precision", nargs="+", choices=PRECISIONS, default=["fp32"], metavar="NAME",
        help=f"of {', '.join(PRECISIONS)} (default: fp32)")  # fmt: skip
    add("--compile", action="store_true", help="the settings' torch.compile")
    add(
        "--side", type=int, metavar="PX", help="of the images (default: 256; DIA 224, diffusion 32)"
    )
    add("--batch", type=int, metavar="N", help="(default: the published 55; DIA 32, diffusion 256)")
    add("--model", default="resnet18_imagenet", help="DIA's encoder (default: %(default)s)")
    add("--steps", type=int, default=20, metavar="N", help="that are timed (default: 20)")
    add("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    arguments = parser.parse_args()
    unknown = set(arguments.trainings) - set(TRAININGS)
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(TRAININGS)}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    device = resolve_device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    record: list[dict[str, object]] = []
    print(f"{name}, torch {torch.__version__}")
    print(f"{'training':10}{'precision':11}{'steps/s':>9}{'images/s':>10}{'GiB':>7}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for training in arguments.trainings or TRAININGS:
            for precision in arguments.precision:
                found = measure(training, precision, arguments, device, Path(scratch))
                record.append({"training": training, "precision": precision, **found})
                print(
                    f"{training:10}{precision:11}{found['steps_per_s']:9.2f}"
                    f"{found['images_per_s']:10.1f}{found['peak_gib']:7.2f}",
                    flush=True,
                )
    if arguments.json is not None:
        about = {"device": name, "torch": torch.__version__, "command": sys.argv}
        save_text_atomic(json.dumps({**about, "rows": record}, indent=2) + "\n", arguments.json)
    return 0


def measure(
    training: str,
    precision: str,
    arguments: argparse.Namespace,
    device: torch.device,
    scratch: Path,
) -> dict[str, float]:
    """Steps and images per second, and the peak of the device's memory in GiB (0 on a CPU)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seed_everything(0)
    step, images, cycle = TRAININGS[training](precision, arguments, device, scratch)
    count = -(-arguments.steps // cycle) * cycle
    with tf32_products(precision == "tf32"):
        for number in range(min(count, 2 * cycle if cycle > 1 else 5)):
            step(number)
        synchronise(device)
        started = time.perf_counter()
        for number in range(count):
            step(number)
        synchronise(device)
        seconds = (time.perf_counter() - started) / count
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return {"steps_per_s": 1 / seconds, "images_per_s": images / seconds, "peak_gib": peak}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Made = tuple[Step, int, int]
"""A training's step, the images of one, and the steps of a cycle."""


def picard(
    precision: str, arguments: argparse.Namespace, device: torch.device, scratch: Path
) -> Made:
    side, batch = arguments.side or 256, arguments.batch or 55
    settings = [
        f"train.image_shape=[{side}, {side}, 1]",
        f"train.mask_shape=[{side // 2}, {side // 2}]",
        f"train.max_delta_shape=[{side // 8}, {side // 8}]",
        f"train.batch_size={batch}",
        f"train.precision={precision}",
    ]
    config = load_config(PicardConfig, REPOSITORY / "configs" / "published.yaml", settings)
    networks = build_networks(config, device)
    if arguments.compile:
        networks.generator.compile(dynamic=False)
    state = TrainState(
        *(config, device, ALONE, networks, build_optimisers(networks, config.train)),
        n_steps=10**6,
        images={},
        scaler=gradient_scaler(precision, device),
        completer=None if precision in ("bf16", "fp16") else HoleCompleter(networks.generator),
    )
    crops = torch.rand(batch, 1, side, side, device=device) * 2 - 1
    return lambda number: training_step(state, number, crops), batch, config.train.n_critic


def encoder_step(mode: str, shift: str) -> Callable[..., Made]:
    """The contrastive encoder's step in a mode, with its views, augmentation and optimisers."""

    def made(
        precision: str, arguments: argparse.Namespace, device: torch.device, scratch: Path
    ) -> Made:
        side, batch = arguments.side or 224, arguments.batch or 32
        settings = [
            *folder_settings(scratch, side),
            f"data.resize_to={side}",
            f"contrastive.model={arguments.model}",
            f"contrastive.batch_size={batch}",
            f"contrastive.mode={mode}",
            f"contrastive.shift_trans_type={shift}",
            "contrastive.select_by=last",
            f"precision={precision}",
            f"compile={str(arguments.compile).lower()}",
        ]
        if mode == "simclr_DIA":
            path = diffusion_model(arguments, device, scratch)
            settings.append(f"contrastive.diffusion_model_path={path}")
        state = dia.building.initial_state(load_config(DiaConfig, None, settings), device, ALONE)
        state.encoder.train()
        images = torch.rand(batch, 3, side, side, device=device)
        part = Batch(images, torch.zeros(batch, dtype=torch.long), [""] * batch)
        return lambda number: dia.training.training_step(state, 1, number, part), batch, 1

    return made


def diffusion(
    precision: str, arguments: argparse.Namespace, device: torch.device, scratch: Path
) -> Made:
    state = diffusion_state(precision, arguments, device, scratch)
    settings = state.config.diffusion
    images = torch.rand(settings.ddpm_batch_size, 3, settings.side, settings.side, device=device)
    batches, parts = itertools.repeat(images), settings.gradient_accumulate_every
    step = diffusion_models.training.training_step
    return lambda number: step(state, batches), parts * len(images), 1


def diffusion_state(
    precision: str, arguments: argparse.Namespace, device: torch.device, scratch: Path
) -> diffusion_models.training.TrainState:
    """A new diffusion model with the published settings, at 32 x 32."""
    settings = [
        *folder_settings(scratch, 32),
        f"diffusion.ddpm_batch_size={arguments.batch or 256}",
        f"precision={precision}",
        f"compile={str(arguments.compile).lower()}",
    ]
    config = load_config(DdpmConfig, None, settings)
    return diffusion_models.training.initial_state(config, device, ALONE)


def diffusion_model(arguments: argparse.Namespace, device: torch.device, scratch: Path) -> Path:
    """A checkpoint to dissolve with; its weights do not matter."""
    path = scratch / "model-1.pt"
    if not path.is_file():
        diffusion_models.training.save(diffusion_state("fp32", arguments, device, scratch), path)
    return path


def folder_settings(scratch: Path, side: int) -> list[str]:
    """Settings that name a folder of random pictures, which is made here once for each side."""
    folder, draws = scratch / str(side) / "train" / "normal", np.random.default_rng(0)
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for number in range(N_IMAGES):
            picture = draws.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"{number}.png")
    return [
        *("data.dataset=folder", f"data.data_root={folder.parent.parent}"),
        *("data.one_class_idx=0", "data.num_workers=0"),
    ]


TRAININGS: dict[str, Callable[..., Made]] = {
    "picard": picard,
    "csi": encoder_step("simclr_CSI", "rotation"),
    "dia": encoder_step("simclr_DIA", "diffusion_rotation"),
    "diffusion": diffusion,
}


if __name__ == "__main__":
    raise SystemExit(main())
