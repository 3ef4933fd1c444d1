"""The benchmark of DIA on real images, from an archive to the table."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.config import REPOSITORY, load_config
from tests.tiny_runs import run_script

TINY = (
    *("contrastive.epochs=2", "contrastive.width=2", "contrastive.batch_size=2"),
    *("diffusion.train_num_steps=1", "diffusion.save_every=1", "diffusion.ddpm_batch_size=2"),
    *("diffusion.dim_mults=[1]", "diffusion.sampling_timesteps=1", "evaluation.ood_samples=1"),
)
COARSE, FINE = 7, 1
"""Sides of the squares of which a picture is made."""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A folder with a pneumoniamnist.npz whose anomalies have less fine detail."""
    draw = np.random.default_rng(0)

    def pictures(count: int, side: int) -> np.ndarray:
        squares = draw.integers(0, 256, (count, 28 // side, 28 // side), dtype=np.uint8)
        return squares.repeat(side, axis=1).repeat(side, axis=2)

    np.savez(
        tmp_path / "pneumoniamnist.npz",
        train_images=pictures(4, FINE),
        train_labels=np.zeros((4, 1), np.uint8),
        test_images=np.concatenate([pictures(3, FINE), pictures(2, COARSE)]),
        test_labels=np.repeat([0, 1], [3, 2])[:, None].astype(np.uint8),
    )
    return tmp_path


def test_one_command_trains_evaluates_and_compares_and_repeats_nothing(
    archive: Path, run_demo: Callable[..., str]
) -> None:
    output = archive / "out"
    command = ("benchmarks/real/dia.py", "pneumoniamnist", "--data", archive, "--small")
    command += ("--methods", "DIA", "--output", output)
    command += tuple(part for text in TINY for part in ("--set", text))
    printed = run_demo(*command)
    assert "3 normal test images against 2 (pneumonia); --small, NOT the published" in printed
    assert "resnet18 of width 2 at 28 x 28, 2 epochs" in printed
    results = json.loads((output / "results.json").read_text())
    auroc = {row["method"]: row["auroc"]["value"] for row in results["rows"]}
    assert list(auroc) == ["DIA", "1-NN on pixels", "PCA-30 reconstruction", "less fine detail"]
    assert auroc["less fine detail"] == 1
    scored = json.loads((output / "seed0" / "DIA" / "evaluation" / "results.json").read_text())
    assert scored["selected_by"] == "last"
    assert auroc["DIA"] == pytest.approx(scored["scores"]["CSI"]["one_class_mean"])

    assert "$ python" in printed
    assert "$ python" not in run_demo(*command)
    assert json.loads((output / "results.json").read_text())["table"] == results["table"]

    other = run_script(*command, "--set", "contrastive.epochs=3")
    assert other.returncode == 2
    assert "settings.yaml has other settings than this command" in other.stderr


def test_one_diffusion_model_is_trained_before_all_seeds_that_dissolve_with_it(tmp_path) -> None:
    program = runpy.run_path(str(REPOSITORY / "benchmarks" / "real" / "dia.py"))
    settings = load_config(program["Settings"], program["CONFIG"])
    jobs = [
        job
        for seed in range(2)
        for job in program["jobs_of"](settings, tmp_path, seed, ["CSI", "DIA"], model_seed=0)
    ]
    names = ["seed0_ddpm", "seed0_CSI", "seed0_DIA", "seed1_CSI", "seed1_DIA"]
    assert [job.name for job in jobs] == names
    assert [job.after for job in jobs] == [None, None, "seed0_ddpm", None, "seed0_ddpm"]
    models = [str(tmp_path / "seed0" / "ddpm" / "model-11.pt")] * 2
    trainings = [job.commands[0] for job in jobs if job.name.endswith("_DIA")]
    assert [command[-1] for command in trainings] == models
