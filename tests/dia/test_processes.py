"""DIA's trainings in several processes, as torchrun starts them."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from common.checkpoint import CheckpointError, load_tensors, save_atomic
from common.image_batches import BadImages
from common.processes import joined_processes
from dia import training as contrastive
from dia.data import normal_train_set
from dia.evaluation import evaluate, shared_features
from dia.predictor import load_encoder
from dia.settings import DiaConfig, EvaluationConfig
from diffusion_models import training as ddpm
from diffusion_models.settings import DdpmConfig
from tests.tiny_dia import SIDE, tiny_contrastive, tiny_diffusion, write_normals
from tests.tiny_runs import (
    corrupt,
    ended,
    forked_pair,
    read_table,
    wait_for_text,
    write_images,
)

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


@pytest.mark.parametrize("seeding", ["per_image", "published"])
def test_two_processes_score_images_as_one_does(seeding: str, tmp_path: Path) -> None:
    data = write_normals(tmp_path / "data", count=5)
    write_images(tmp_path / "data" / "test" / "normal", size=(SIDE, SIDE))
    write_images(tmp_path / "data" / "test" / "ill", n=4, size=(SIDE, SIDE))
    corrupt(tmp_path / "data" / "test" / "ill" / "1.png")  # of the second process
    trained = DiaConfig(device="cpu", data=data, contrastive=tiny_contrastive(tmp_path / "run"))
    contrastive.train(trained)
    found = {}
    for name in ("alone", "together", "from the cache"):
        checked = dataclasses.replace(
            trained,
            contrastive=dataclasses.replace(
                trained.contrastive, load_path=str(tmp_path / "run" / "last.model"), run_dir=None
            ),
            evaluation=EvaluationConfig(
                results_dir=str(tmp_path / name),
                seeding=seeding,
                ood_samples=2,
                cache_features=name != "alone",
                bootstrap_samples=10,
            ),
        )
        run = partial(evaluate, checked, "ood_pre", ["eval.py"])
        if name == "alone":
            assert run().n_failed == 1
        else:
            assert [ended(child) for child in forked_pair(run)] == [0, 0]
        rows = read_table(tmp_path / name / "scores_CSI.csv")
        found[name] = {row["file"]: float(row["CSI"]) for row in rows}
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["images_left_out"] == ["test/ill/1.png"]
    assert len(found["alone"]) == 6
    assert list(found["together"]) == list(found["alone"])
    assert found["together"] == pytest.approx(found["alone"], rel=1e-4)
    assert found["from the cache"] == found["together"]


def test_processes_that_loaded_different_weights_score_nothing_together(tmp_path: Path) -> None:
    run = tmp_path / "0"
    trained = DiaConfig(
        device="cpu", data=write_normals(tmp_path / "data"), contrastive=tiny_contrastive(run)
    )
    contrastive.train(trained)
    other = shutil.copytree(run, tmp_path / "1") / "last.model"
    save_atomic({name: tensor * 2 for name, tensor in load_tensors(other).items()}, other)
    pair = forked_pair(partial(take_features_of_own_run, tmp_path))
    assert [ended(child) for child in pair] == [0, 0]


def take_features_of_own_run(folder: Path) -> None:
    """Each process with an encoder of its own: the main one has to notice."""
    encoder = load_encoder(folder / os.environ["RANK"], select="last", device="cpu")
    images = normal_train_set(encoder.config)
    with joined_processes(encoder.device, 60) as processes:
        if processes.is_main:
            with pytest.raises(CheckpointError, match="they have different weights"):
                shared_features(encoder, images, BadImages(), processes)
        else:
            assert shared_features(encoder, images, BadImages(), processes) is None
