"""A run folder has one writer: a second training is refused, a killed one is in nobody's way."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from common.checkpoint import CheckpointError
from common.claims import Holder, claim
from common.training import LOCK_NAME, TrainingError
from dia import training as contrastive
from dia.settings import DiaConfig
from diffusion_models import training as ddpm
from diffusion_models.settings import DdpmConfig
from inpainter import training as picard_training
from inpainter.snapshots import run_folder
from inpainter.training import train
from tests.tiny_dia import tiny_contrastive, tiny_diffusion, write_normals
from tests.tiny_runs import ended, forked, tiny_config, wait_until, write_images

pytestmark = pytest.mark.usefixtures("one_thread")

Training = Callable[[], object]


def picard(folder: Path) -> tuple[Training, Path, str]:
    config = tiny_config(folder)
    return partial(train, config), run_folder(config), "change expname"


def encoder(folder: Path) -> tuple[Training, Path, str]:
    settings = tiny_contrastive(folder / "run")
    config = DiaConfig(device="cpu", data=write_normals(folder / "data"), contrastive=settings)
    return partial(contrastive.train, config), folder / "run", "another --run_dir or --suffix"


def diffusion(folder: Path) -> tuple[Training, Path, str]:
    settings = tiny_diffusion(folder / "run")
    config = DdpmConfig(device="cpu", data=write_normals(folder / "data"), diffusion=settings)
    return partial(ddpm.train, config), folder / "run", "another --output_dir"


@pytest.mark.parametrize("training", [picard, encoder, diffusion])
def test_training_into_a_folder_in_use_is_refused_by_name(tmp_path: Path, training) -> None:
    start, folder, remedy = training(tmp_path)
    with claim(folder / LOCK_NAME):
        message = (
            rf"{folder} is in use: .*process {os.getpid()} on .*{remedy}.* delete .*{LOCK_NAME}"
        )
        with pytest.raises(CheckpointError, match=message):
            start()
        assert [path.name for path in folder.iterdir()] == [LOCK_NAME]
    assert not folder.exists()


def test_killed_training_is_gone_on_with_and_the_lock_goes_at_the_end(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    write_images(tmp_path / "train")
    often = ("train.snapshot_save_iter=1", "train.select_crops=0")
    endless = tiny_config(tmp_path, *often, "train.n_steps=1000000")
    folder = run_folder(endless)
    child = forked(partial(train, endless))
    wait_until(lambda: list(folder.glob("gen_*.pt")))
    with pytest.raises(CheckpointError, match=rf"process {child.pid} on "):
        train(endless, resume="latest")
    os.kill(child.pid, signal.SIGKILL)
    ended(child)
    reached = max(int(path.stem[4:]) for path in folder.glob("gen_*.pt"))
    last = tiny_config(tmp_path, *often, f"train.n_steps={reached + 1}")
    assert train(last, resume="latest").step == reached + 1
    assert f"process {child.pid} on " in caplog.text
    assert not (folder / LOCK_NAME).exists()


@pytest.mark.parametrize("training", [picard, encoder, diffusion])
@pytest.mark.parametrize("fate", ["deleted", "taken over"])
def test_training_whose_folder_was_taken_saves_nothing(tmp_path, monkeypatch, training, fate):
    """Its machine slept for minutes: another one may have trained there since."""
    write_images(tmp_path / "train")
    start, folder, _ = training(tmp_path)
    other = asdict(Holder("elsewhere", 7, "yesterday"))

    def lose(*_: object) -> bool:
        (folder / LOCK_NAME).unlink()
        if fate == "taken over":
            (folder / LOCK_NAME).write_text(json.dumps(other))
        return True

    module = {picard: picard_training, encoder: contrastive, diffusion: ddpm}[training]
    monkeypatch.setattr(module, "any_asked_to_stop", lose)
    said = "process 7 on elsewhere, since yesterday" if fate == "taken over" else "is gone"
    with pytest.raises(TrainingError, match=rf"^Nothing more is saved: .*{LOCK_NAME} .*{said}"):
        start()
    assert not [*folder.glob("*.pt"), *folder.glob("*.model"), *folder.glob("log.jsonl")]
    assert (folder / LOCK_NAME).exists() == (fate == "taken over")
