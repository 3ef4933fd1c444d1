"""Trainings and predictions that take a second: images, settings, checkpoints, command lines."""

import csv
import dataclasses
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import checkpoint_path, load_tensors, save_atomic
from common.config import REPOSITORY, config_to_yaml, load_config
from common.images import write_image, write_image16
from dia.settings import DiaConfig
from diffusion_models.settings import DiffusionConfig
from inpainter.networks import build_networks
from inpainter.prediction import PredictionOptions, PredictionResult, predict
from inpainter.settings import PicardConfig
from tests.image_files import write_png16

ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
TRAIN = str(REPOSITORY / "inpainter" / "train.py")
PREDICT = str(REPOSITORY / "predict_heatmap.py")
SMALL = (
    "dataset_name=tiny",
    "device=cpu",
    "num_workers=0",
    "train.image_shape=[32, 32, 1]",
    "train.mask_shape=[16, 16]",
    "train.max_delta_shape=[4, 4]",
    "train.batch_size=2",
    "train.n_steps=4",
    "train.n_critic=2",
    "train.print_iter=1",
    "train.snapshot_save_iter=4",
    "train.select_crops=3",
    "train.lr=1.0e-3",
    "train.init=he",
    "test.patch_shape=[32, 32, 1]",
    "test.mask_shape=[16, 16]",
    "test.patch_stride=16",
    "test.heatmap_M_inpaint=2",
    "test.save_heatmap_plots=false",
    "netG.ngf=4",
    "netG.stages=coarse",
    "netG.dilations=[1, 1, 2, 2]",
    "netG.droprate=0.2",
    "netD.ndf=2",
)
PATIENCE = 600
"""Seconds that a test waits for another process: only one that hangs takes so long."""
PRELOADED = [
    *("inpainter.training", "inpainter.prediction", "inpainter.evaluation_report"),
    *("dia.training", "dia.evaluation", "diffusion_models.training", "diffusion_models.pictures"),
    *("torch.utils.tensorboard", "pydicom", "tifffile", "tests.tiny_runs"),
]
"""Modules that the server of `forked` has imported: else each child would, this one, too."""
NEEDS_GPU = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA GPU")
STREAMS = ("stdout", "stderr")
BOTH_STAGES = ("netG.stages=coarse_fine", "netG.dilations=[2, 4, 8, 16]")
RGB = (
    "train.image_shape=[32, 32, 3]",
    "test.patch_shape=[32, 32, 3]",
    "netG.input_dim=3",
)


@dataclasses.dataclass(frozen=True)
class DiaFile(DiaConfig):
    """A whole settings file such as configs/dia.yaml: also the diffusion program's section."""

    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)


def settings(folder: Path, *more: str) -> list[str]:
    """Overrides of a small run whose data and results lie in `folder`."""
    paths = (
        f"train_data_path={folder / 'train'}",
        f"test_data_path={folder / 'test'}",
        f"checkpoints_dir={folder / 'checkpoints'}",
        f"logs_dir={folder / 'logs'}",
        f"heatmaps_dir={folder / 'heatmaps'}",
    )
    return [*SMALL, *paths, *more]


def tiny_config(folder: Path, *more: str) -> PicardConfig:
    """The same as settings."""
    return load_config(PicardConfig, None, settings(folder, *more))


def tiny_file(folder: Path, *more: str) -> Path:
    """The same as a YAML file."""
    path = folder / "tiny.yaml"
    path.write_text(config_to_yaml(tiny_config(folder, *more)))
    return path


def with_test(config: PicardConfig, **changes: Any) -> PicardConfig:
    """The settings with some of `test:` changed."""
    return dataclasses.replace(config, test=dataclasses.replace(config.test, **changes))


def texture(height: int, width: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """A smooth bright picture with a little noise, (C, H, W) in [0.2, 1]."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.arange(height)[:, None] / 9, torch.arange(width)[None, :] / 7
    waves = (y + seed).sin() * x.cos() * 0.3 + 0.6
    noise = torch.rand(channels, height, width, generator=generator) * 0.1
    return (waves[None] * torch.linspace(1, 0.8, channels)[:, None, None] + noise).clamp(0.2, 1)


def write_images(folder: Path, n: int = 3, size: tuple[int, int] = (40, 44)) -> Path:
    """n grey PNG files, 0.png, 1.png, …; returns the folder."""
    for number in range(n):
        write_image(folder / f"{number}.png", texture(*size, seed=number))
    return folder


def write_every_format(folder: Path, channels: int = 1) -> list[str]:
    """One image of every kind that is read; returns the names."""
    picture = texture(40, 44, channels)
    write_image(folder / "png8.png", picture)
    levels = (picture.permute(1, 2, 0).numpy() * 65535).astype(np.uint16)
    if channels == 1:
        write_image16(folder / "png16.png", picture)
        Image.fromarray(levels[:, :, 0]).save(folder / "tiff16.tif")
    else:
        write_png16(folder / "png16.png", levels)
    eight = Image.open(folder / "png8.png")
    for name in ("photo.jpg", "scan.jpeg", "eight.tiff", "bitmap.bmp"):
        eight.save(folder / name)
    return sorted(path.name for path in folder.iterdir())


def corrupt(path: Path) -> Path:
    """Cuts a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def write_checkpoint(folder: Path, config: PicardConfig, step: int = 1, prefix: str = "") -> Path:
    """Fresh networks as a checkpoint in the published layout; returns the folder."""
    torch.manual_seed(step)
    networks = build_networks(config, torch.device("cpu"))

    def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {prefix + name: tensor for name, tensor in module.state_dict().items()}

    critics = {"localD": state(networks.local_critic), "globalD": state(networks.global_critic)}
    save_atomic(critics, checkpoint_path(folder, "dis", step))
    save_atomic(state(networks.generator), checkpoint_path(folder, "gen", step))
    return folder


def run_script(
    script: str, *arguments: object, cwd: Path = REPOSITORY, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command line of the project to its end: a new process, its own arguments and streams.

    The process is forked from a server that has the libraries loaded, which saves seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        child = forked_script(Path(folder), script, *arguments, cwd=cwd, **environment)
        child.join(PATIENCE)
        if child.is_alive():
            child.kill()
            raise TimeoutError(f"{script} {arguments} took more than {PATIENCE} s")
        output, errors = (
            Path(folder, name).read_text(errors="backslashreplace") for name in STREAMS
        )
    return subprocess.CompletedProcess([script, *arguments], child.exitcode, output, errors)


def forked_script(
    streams: Path, script: str, *arguments: object, cwd: Path = REPOSITORY, **environment: str
) -> BaseProcess:
    """The same, not waited for; what it prints comes into two files of the folder `streams`."""
    command = [str(script), *map(str, arguments)]
    files = [streams / name for name in STREAMS]
    return forked(partial(_as_program, command, cwd, files), **environment)


def _as_program(command: list[str], cwd: Path, streams: list[Path]) -> None:
    """Becomes `python command...`, as far as the program can tell."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def as_flags(overrides: list[str]) -> list[str]:
    """key=value texts as --set flags."""
    return [part for text in overrides for part in ("--set", text)]


def forked(function: Callable[[], object], **environment: str) -> BaseProcess:
    """Runs a picklable function in a child process; much quicker than a new Python.

    The child comes from a server that has imported the package and run nothing: a fork of the test
    process itself fails where autograd has threads. It ends with status 0, or 1 if it raises.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    child = server.Process(target=_in_child, args=(function, environment))
    child.start()
    return child


def forked_pair(function: Callable[[], object]) -> list[BaseProcess]:
    """The same function in two processes that find each other as if torchrun had started them."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [forked(function, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def wait_until(holds: Callable[[], object]) -> None:
    """Waits until something holds; a TimeoutError after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"what a test waits for has not come within {PATIENCE} s")
        time.sleep(0.005)


def wait_for_text(path: Path, length: int) -> None:
    """Waits until a file has more than `length` bytes."""
    wait_until(lambda: path.is_file() and path.stat().st_size > length)


def _in_child(function: Callable[[], object], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    # A fork server's child would start its own children from a server of its own, which is slow.
    multiprocessing.set_start_method(None, force=True)
    function()


def ended(child: BaseProcess) -> int:
    """Waits for a child and returns its status, minus the signal's number if one ended it."""
    child.join(PATIENCE)
    return child.exitcode


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def predicted(folder: Path, config: PicardConfig, **options: object) -> PredictionResult:
    """What a prediction by the checkpoint in `folder / "model"` returns."""
    return predict(config, PredictionOptions(folder / "model", **options))


def heatmaps_in(folder: Path, metric: str = "MCD_image") -> dict[str, torch.Tensor]:
    """Image -> heatmap, as heatmaps.csv lists them."""
    rows = [row for row in read_table(folder / "heatmaps.csv") if row["metric"] == metric]
    return {row["image"]: load_tensors(folder / row["file"]) for row in rows}


def assert_equal_states(a, b, where: str = "") -> None:
    """Same nesting, same plain values, same tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal_states(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_equal_states(*pair, f"{where}/{number}")
    else:
        assert a == b, where
