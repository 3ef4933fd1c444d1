"""Ctrl-C and SIGTERM in imports, in evaluations, while samples are drawn: one line, no litter."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from common.config import REPOSITORY
from common.images import write_image
from dia.encoders import build_encoder
from diffusion_models.diffusion import GaussianDiffusion
from diffusion_models.unet import Unet
from tests.inpainter.evaluation_case import heatmap_folder
from tests.tiny_runs import PATIENCE, ended, forked, texture

EVALUATE = "eval.py"
DDPM = "diffusion_models/train_eval_ddpm.py"
PROGRAMS = ("inpainter/train.py", "predict_heatmap.py", EVALUATE, "train_dia.py", DDPM)
TOO_EARLY = ("Fatal Python error: init", "    import signal\n")
"""Of Python's own start, and of a program's first line, where a busy machine is after a while."""


def of_images(folder: Path) -> list[str]:
    """eval.py --mode ood_pre, with a reading process."""
    for name in ("train/normal", "test/normal", "test/spot"):
        for number in range(2):
            write_image(folder / "data" / name / f"{number}.png", texture(16, 16, 3, seed=number))
    encoder = build_encoder("resnet18", n_classes=2, n_shifts=4, width=8)
    torch.save(encoder.state_dict(), folder / "last.model")
    flags = "--mode ood_pre --dataset folder --one_class_idx 0 --model resnet18 --width 8 "
    flags += "--shift_trans_type rotation --resize_to 16 --device cpu --num_workers 1"
    return [*flags.split(), "--data_root", str(folder / "data"),
            "--load_path", str(folder / "last.model")]  # fmt: skip


def of_heatmaps(folder: Path) -> list[str]:
    """eval.py --mode heatmap."""
    settings = heatmap_folder(folder)
    return ["--mode", "heatmap", "--heatmap_dir", str(settings.heatmap_dir),
            "--annotations", str(settings.annotations)]  # fmt: skip


def of_samples(folder: Path) -> list[str]:
    """train_eval_ddpm.py --mode sample."""
    model = GaussianDiffusion(Unet(8, (1, 2)), steps=1000)
    torch.save({"model": model.state_dict()}, folder / "model-1.pt")
    return ["--mode", "sample", "--device", "cpu", "--image_size", "16", "--output_dir",
            str(folder), "--state_dict_path", str(folder / "model-1.pt")]  # fmt: skip


def run_until(script: str, flags: list[str], where: str, number: int, method: str) -> None:
    """Runs a program as a terminal does, and sends its process group a signal when it gets there.

    where: the first convolution or the first picture. method: how reading processes start.
    """
    os.setsid()
    multiprocessing.set_start_method(method, force=True)
    errors = os.open(Path(flags[-1]).parent / "errors.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, sys.stderr.fileno())
    first = {
        "convolution": (torch.nn.Conv2d, "forward"),
        "picture": (FigureCanvasAgg, "print_png"),
    }
    owner, name = first[where]
    original = getattr(owner, name)

    def interrupted(*arguments: object, **options: object) -> object:
        done = original(*arguments, **options)
        os.killpg(0, number)
        time.sleep(PATIENCE)
        return done

    setattr(owner, name, interrupted)
    sys.argv = [script, *flags]
    sys.path.insert(0, str((REPOSITORY / script).parent))
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")


@pytest.mark.parametrize(
    ("script", "prepare", "where", "number", "method"),
    [
        (EVALUATE, of_images, "convolution", signal.SIGINT, "spawn"),
        (EVALUATE, of_images, "convolution", signal.SIGTERM, "fork"),
        (EVALUATE, of_heatmaps, "picture", signal.SIGINT, "fork"),
        (EVALUATE, of_heatmaps, "picture", signal.SIGTERM, "fork"),
        (DDPM, of_samples, "convolution", signal.SIGTERM, "fork"),
    ],
)
def test_signal_ends_a_program_in_one_line(
    tmp_path: Path,
    script: str,
    prepare: Callable[[Path], list[str]],
    where: str,
    number: int,
    method: str,
) -> None:
    flags = prepare(tmp_path)
    assert ended(forked(partial(run_until, script, flags, where, number, method))) == 128 + number
    said = (tmp_path / "errors.txt").read_text()
    assert "Traceback" not in said
    assert f"{Path(script).name}: Interrupted" in said
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_during_the_imports_ends_a_program_without_traceback(program: str) -> None:
    for pause in (0.5, 2, 8, 32, 128):  # long before it has imported torch, or soon after if fast
        with subprocess.Popen(
            [sys.executable, REPOSITORY / program, "--dry_run"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            time.sleep(pause)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE)
        if not any(text in errors for text in TOO_EARLY):
            break
    assert "Traceback" not in errors
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 0, 2)
