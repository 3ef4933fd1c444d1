"""The benchmark of training: what it compares with, and its command."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from benchmarks.published_training import published_optimisers, published_step
from inpainter.networks import build_networks
from inpainter.step import ALONE, TrainState, build_optimisers, draw_inputs, training_step
from tests.tiny_runs import BOTH_STAGES, run_script, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def test_published_steps_have_the_losses_of_ours(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, *BOTH_STAGES, "netG.droprate=none")
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    networks = build_networks(config, cpu)
    others = deepcopy(networks)
    theirs = published_optimisers(others, config)
    ours = build_optimisers(networks, config.train)
    state = TrainState(config, cpu, ALONE, networks, ours, n_steps=4, images={})
    crops = torch.rand(2, 1, 32, 32) * 2 - 1
    for step in range(4):
        terms = training_step(state, step, crops).terms
        inputs = draw_inputs(config, others.generator, step, crops)
        updates = (step + 1) % config.train.n_critic == 0
        published = published_step(others, theirs, inputs, config, with_generator=updates)
        assert {name: terms[name] for name in published} == pytest.approx(
            published, rel=1e-3, abs=2e-4
        )


def test_command_measures_steps_and_reading(tmp_path: Path) -> None:
    small = ("--side", 64, "--pairs", 1, "--settings", "published", "--images", 1)
    done = run_script("benchmarks/training_speed.py", *small, "--json", tmp_path / "speed.json")
    assert done.returncode == 0, done.stderr
    assert "times; critics' step" in done.stdout
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["published"]["ratio"] > 0
    assert record["published"]["difference"] < 1e-2
    assert set(record["data"]) == {"PNG", "JPEG", "DICOM"}
