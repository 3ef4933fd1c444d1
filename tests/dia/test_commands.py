"""The published commands, typed as printed, on tiny trees laid out as kvasir and retina.

Behind the published flags stand ours that make the runs small.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import REPOSITORY
from tests.tiny_runs import read_table, run_script

DDPM = str(REPOSITORY / "diffusion_models" / "train_eval_ddpm.py")
TRAIN = str(REPOSITORY / "train_dia.py")
EVALUATE = str(REPOSITORY / "eval.py")
TREES = {
    "kvasir": ("kvasir-anomaly-polyps", ("normal", "polyps")),
    "retina": ("OCT2017", ("NORMAL", "CNV", "DME", "DRUSEN")),
}
PUBLISHED_TRAINING = (
    "--model resnet18_imagenet --mode simclr_DIA --shift_trans_type diffusion_rotation "
    "--diff_resolution 32 --batch_size 32 --one_class_idx 0 --save_step 1"
)
PUBLISHED_EVALUATION = (
    "--mode ood_pre --model resnet18_imagenet --ood_score CSI --shift_trans_type rotation "
    "--print_score --diffusion_upper_offset 0. --diffusion_offset 0. --ood_samples 10 "
    "--resize_factor 0.54 --resize_fix --one_class_idx 0"
)
SMALL_DDPM = (
    "--dim 8 --dim_mults 1 2 --train_num_steps 1 --ddpm_batch_size 2 --num_samples 1 "
    "--sampling_timesteps 1 --gradient_accumulate_every 1 --strip_steps 0 50"
)
SMALL_TRAINING = "--epochs 1 --resize_to 32 --select_ood_samples 1"


def write_tree(root: Path, name: str) -> None:
    """Three images of every class in train and two in test, each class with its own stripes."""
    folder, classes = TREES[name]
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for number, label in enumerate(classes):
            target = root / folder / split / label
            target.mkdir(parents=True)
            for i in range(count):
                pixels = random.uniform(0, 60, (40, 48, 3))
                pixels[:: number + 2] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(target / f"{i}.jpeg")


def run(script: str, *arguments: object, cwd: Path) -> str:
    """Runs a command in a new Python; returns what it printed."""
    done = run_script(script, *arguments, "--device", "cpu", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dataset", TREES)
def test_published_commands_run_on_a_tree_as_downloaded(dataset: str, tmp_path: Path) -> None:
    write_tree(tmp_path / "data", dataset)
    common = ("--dataset", dataset, "--data_root", "data")
    small = (*SMALL_DDPM.split(), "--output_dir", "ddpm")
    run(DDPM, "--mode", "train", *common, *small, cwd=tmp_path)

    flags = (*PUBLISHED_TRAINING.split(), "--diffusion_model_path", "ddpm/model-1.pt")
    small = (*SMALL_TRAINING.split(), "--run_dir", "dia")
    assert "best_CSI.model" in run(TRAIN, *common, *flags, *small, cwd=tmp_path)

    flags = (*PUBLISHED_EVALUATION.split(), "--load_path", "dia/best_CSI.model")
    printed = run(EVALUATE, *common, *flags, "--resize_to", "32", cwd=tmp_path)
    assert "one_class_mean" in printed
    assert "Checkpoint chosen by: test" in printed
    folder = tmp_path / "dia" / "eval_ood_pre_best_CSI"
    results = json.loads((folder / "results.json").read_text())
    assert list(results["scores"]["CSI"]["auroc"]) == ["one_class_1"]
    scores = read_table(folder / "scores_CSI.csv")
    assert sum(row["label"] == "0" for row in scores) == 2
    assert len(scores) == 2 * len(TREES[dataset][1])
