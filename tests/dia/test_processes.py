"""DIA's trainings in several processes, as torchrun starts them."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from common.checkpoint import load_tensors
from dia import training as contrastive
from dia.settings import DiaConfig
from diffusion_models import training as ddpm
from diffusion_models.settings import DdpmConfig
from tests.tiny_dia import tiny_contrastive, tiny_diffusion, write_normals
from tests.tiny_runs import ended, forked_pair, wait_for_text

pytestmark = pytest.mark.usefixtures("one_thread")

ENDLESS = 1_000_000


def encoder_training(folder: Path) -> Callable[[], object]:
    settings = tiny_contrastive(folder / "run", batch_size=3, epochs=ENDLESS, save_step=ENDLESS)
    config = DiaConfig(
        device="cpu", data=write_normals(folder / "data", count=6), contrastive=settings
    )
    return partial(contrastive.train, config)


def diffusion_training(folder: Path) -> Callable[[], object]:
    settings = tiny_diffusion(
        folder / "run",
        ddpm_batch_size=3,
        train_num_steps=ENDLESS,
        save_every=ENDLESS,
        log_every=1,
    )
    config = DdpmConfig(
        device="cpu", data=write_normals(folder / "data", count=6), diffusion=settings
    )
    return partial(ddpm.train, config)


@pytest.mark.parametrize(
    ("training", "saved", "counter"),
    [
        (encoder_training, "state.pt", "epoch"),
        (diffusion_training, "model-1.pt", "step"),
    ],
)
def test_signal_to_one_process_stops_all_together(
    training, saved: str, counter: str, tmp_path: Path
) -> None:
    children = forked_pair(training(tmp_path))
    log = tmp_path / "run" / "log.jsonl"
    wait_for_text(log, 200)
    os.kill(children[1].pid, signal.SIGTERM)
    assert [ended(child) for child in children] == [0, 0]
    last = json.loads(log.read_text().splitlines()[-1])[counter]
    assert load_tensors(tmp_path / "run" / saved)[counter] == last < ENDLESS
