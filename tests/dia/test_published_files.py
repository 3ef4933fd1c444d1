"""Checkpoints in the published layout, loaded by the command lines, give the recorded numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import REPOSITORY
from tests.golden.golden_dia_tools import read_entry
from tests.golden.golden_tools import group
from tests.golden.golden_weights import parse_shapes, weights_by_rule
from tests.image_files import write_png16
from tests.tiny_runs import read_table, run_script

GOLDEN = REPOSITORY / "tests" / "golden"


def write_images(paths: list[Path], images: np.ndarray) -> None:
    """Images (N, 3, H, W) in [0, 1] as 16-bit colour PNG files."""
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png16(path, np.round(image.transpose(1, 2, 0) * 65535).astype(np.uint16))


def test_diffusion_checkpoint_dissolves_as_recorded(tmp_path: Path) -> None:
    _, arrays = read_entry(GOLDEN, "dia_ddpm_dim8_124_32.npz")
    torch.save({"step": 1, "model": group(arrays, "sd")}, tmp_path / "model-1.pt")
    images = arrays["x01"][:1]
    write_images([tmp_path / "train" / "normal" / "0.png"], images)
    done = run_script(
        str(REPOSITORY / "diffusion_models" / "train_eval_ddpm.py"),
        *("--mode", "eval", "--dataset", "folder", "--data_root", tmp_path, "--steps", 99),
        *("--state_dict_path", tmp_path / "model-1.pt", "--output_dir", tmp_path),
        *("--device", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(next(tmp_path.glob("*step_99-x_start.png"))))
    picture = picture.transpose(2, 0, 1)[:, -32:, -32:] / 255  # one image makes no rim
    expected = arrays["dissolved|t99"][0].clip(0, 1)
    assert np.abs(picture - expected).max() < 1.5 / 255


def test_contrastive_checkpoint_scores_as_recorded(tmp_path: Path) -> None:
    entry, arrays = read_entry(GOLDEN, "dia_model_resnet18_imagenet.npz")
    shapes = parse_shapes(arrays["sd_names"], arrays["sd_shapes"])
    weights = weights_by_rule(entry["settings"]["weights"], shapes)
    torch.save(weights, tmp_path / "last.model")
    names = ("normal", "other")
    write_images([tmp_path / "test" / name / "0.png" for name in names], arrays["x01"])
    done = run_script(
        str(REPOSITORY / "eval.py"),
        *("--mode", "ood", "--dataset", "folder", "--data_root", tmp_path, "--one_class_idx", 0),
        *("--resize_to", 64, "--model", "resnet18_imagenet", "--shift_trans_type", "rotation"),
        *("--load_path", tmp_path / "last.model", "--ood_score", "clean_norm", "baseline"),
        *("--results_dir", tmp_path / "out"),
        *("--device", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    norms = np.linalg.norm(arrays["simclr"], axis=1)
    confidence = torch.from_numpy(arrays["linear"]).softmax(1).amax(1).numpy()
    for score, expected in (("clean_norm", norms), ("baseline", confidence)):
        rows = read_table(tmp_path / "out" / f"scores_{score}.csv")
        got = [float(row[score]) for row in rows]
        assert got == pytest.approx(expected.tolist(), rel=2e-3)
