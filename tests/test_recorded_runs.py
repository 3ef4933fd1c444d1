"""The first 20 losses of each training, and a heatmap by each engine, as recorded before.

A change that is meant to change nothing leaves them as they are. Processors round otherwise and
training amplifies that, so the comparison allows 1 % of the largest loss of that name and 1e-4 of
the largest score; another order of random numbers, another term or rate differs by far more.
Where a change is meant to change them: RECORD=1 pytest tests/test_recorded_runs.py, and say why.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_runs import (
    BOTH_STAGES,
    PREDICT,
    REPOSITORY,
    RGB,
    TRAIN,
    as_flags,
    heatmaps_in,
    run_script,
    settings,
    tiny_config,
    tiny_file,
    write_checkpoint,
    write_images,
)

RECORDED = Path(__file__).parent / "recorded" / "runs.json"
N_STEPS = 20
DIFFUSION = (
    *("diffusion.image_size=16", "diffusion.dim=8", "diffusion.dim_mults=[1, 2]"),
    *("diffusion.timesteps=100", "diffusion.steps=50", "diffusion.strip_steps=[0, 50]"),
    *("diffusion.ddpm_batch_size=4", f"diffusion.train_num_steps={N_STEPS}"),
    *(f"diffusion.save_every={N_STEPS}", "diffusion.sampling_timesteps=2"),
    *("diffusion.num_samples=1", "diffusion.log_every=1"),
)
CONTRASTIVE = (
    *("contrastive.model=resnet18", "contrastive.width=8", "contrastive.batch_size=6"),
    *("contrastive.mode=simclr_DIA", "contrastive.shift_trans_type=diffusion_rotation"),
    *("contrastive.diff_resolution=16", f"contrastive.epochs={N_STEPS}", "contrastive.warmup=2"),
    *(f"contrastive.save_step={N_STEPS}", "contrastive.select_by=last"),
    "contrastive.lr_init=0.01",  # the published rate amplifies rounding on six images
)
DATA = ("data.dataset=kvasir", "data.resize_to=16", "data.num_workers=0", "device=cpu")
MEASURES = ("seconds", "memory", "per_second")


def assert_recorded(name: str, values: dict[str, list[float]], tolerance: float) -> None:
    """Compares with the recorded values of that name, or records them under RECORD=1."""
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if os.environ.get("RECORD") == "1":
        RECORDED.parent.mkdir(exist_ok=True)
        RECORDED.write_text(json.dumps({**recorded, name: values}, indent=1) + "\n")
        return
    assert list(values) == list(recorded[name])
    for part, numbers in values.items():
        expected = np.asarray(recorded[name][part])
        allowed = tolerance * np.abs(expected).max()
        np.testing.assert_allclose(numbers, expected, rtol=0, atol=allowed, err_msg=part)


def ran(script: str, *arguments: object) -> None:
    done = run_script(script, *arguments)
    assert done.returncode == 0, done.stderr


def losses(log: Path, prefix: str) -> dict[str, list[float]]:
    """By tag, the losses of every step in a run's log.jsonl."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    tags = sorted({tag for line in lines for tag in line if tag.startswith(prefix)})
    return {
        tag: [line[tag] for line in lines if tag in line]
        for tag in tags
        if not any(word in tag for word in MEASURES)
    }


def write_tree(root: Path) -> Path:
    """Six normal images to train on, as one class of a dataset; returns the data root."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("normal", "spot"):
            folder = root / "kvasir-anomaly-polyps" / split / name
            folder.mkdir(parents=True)
            for number in range(6 if name == "normal" else 2):
                ramp = np.linspace(0, 200, 16)[:, None, None]
                pixels = ramp + random.uniform(0, 40, (16, 16, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def test_losses_of_picard_are_the_recorded_ones(tmp_path: Path) -> None:
    write_images(tmp_path / "train", size=(48, 48))
    more = (*BOTH_STAGES, f"train.n_steps={N_STEPS}", f"train.snapshot_save_iter={N_STEPS}")
    ran(TRAIN, "--seed", 3, *as_flags(settings(tmp_path, *more)))
    (log,) = (tmp_path / "checkpoints").rglob("log.jsonl")
    assert_recorded("picard", losses(log, "train/"), 0.01)


def test_losses_of_the_diffusion_model_and_of_dia_are_the_recorded_ones(tmp_path: Path) -> None:
    root = f"data.data_root={write_tree(tmp_path / 'data')}"
    ddpm = (*DIFFUSION, *DATA, root, f"diffusion.output_dir={tmp_path / 'ddpm'}")
    script = REPOSITORY / "diffusion_models" / "train_eval_ddpm.py"
    ran(script, "--mode", "train", "--seed", 3, *as_flags([*ddpm]))
    assert_recorded("diffusion", losses(tmp_path / "ddpm" / "log.jsonl", "train/"), 0.01)
    model = f"contrastive.diffusion_model_path={tmp_path / 'ddpm' / 'model-1.pt'}"
    place = f"contrastive.run_dir={tmp_path / 'dia'}"
    dia = (*CONTRASTIVE, *DATA, "data.one_class_idx=0", root, model, place)
    ran(REPOSITORY / "train_dia.py", "--seed", 3, *as_flags([*dia]))
    assert_recorded("dia", losses(tmp_path / "dia" / "log.jsonl", "train/"), 0.01)


@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_heatmap_is_the_recorded_one(engine: str, tmp_path: Path) -> None:
    write_images(tmp_path / "test", n=1, size=(56, 72))
    more = (
        *(*RGB, *BOTH_STAGES, "netG.dropout_which=ALL", f"test.engine={engine}"),
        "test.heatmap_metrics=[MCD_image, MCD_feature]",
    )
    checkpoint = write_checkpoint(tmp_path / "model", tiny_config(tmp_path, *more))
    place = ("--checkpoint_dir", checkpoint, "--checkpoint_iter", 1)
    file = tiny_file(tmp_path, *more)
    ran(PREDICT, "--config", file, *place, "--output_dir", tmp_path / "out")
    found = {
        metric: heatmaps_in(tmp_path / "out", metric)["0.png"].flatten()[::7].tolist()
        for metric in ("MCD_image", "MCD_feature")
    }
    assert_recorded("heatmap", found, 1e-4)
