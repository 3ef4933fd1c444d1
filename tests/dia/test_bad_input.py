"""What a user gets for input that cannot work, through the real command lines."""

from pathlib import Path

import pytest
import torch

from common.config import REPOSITORY
from common.images import write_image
from dia.encoders import build_encoder
from tests.tiny_runs import run_script


def write_classes(root: Path, counts: dict[str, int]) -> None:
    """A train folder with so many 16² images of each class."""
    for name, count in counts.items():
        for number in range(count):
            write_image(root / "train" / name / f"{number}.png", torch.rand(3, 16, 16))


def missing_class_folder(folder: Path) -> list[str]:
    write_classes(folder / "OCT2017", {"NORMAL": 2, "CNV": 1, "DME": 1})
    return ["train_dia.py", "--dataset", "retina", "--one_class_idx", "0", "--run_dir", "run"]


def one_image(folder: Path) -> list[str]:
    write_classes(folder, {"normal": 1})
    flags = ["--mode", "train", "--dataset", "folder", "--output_dir", "run"]
    return ["diffusion_models/train_eval_ddpm.py", *flags]


def other_architecture(folder: Path) -> list[str]:
    encoder = build_encoder("resnet18", n_classes=2, n_shifts=4, width=8)
    torch.save(encoder.state_dict(), folder / "last.model")
    flags = ["--mode", "ood_pre", "--dataset", "folder", "--model", "resnet18", "--width", "16"]
    flags += ["--shift_trans_type", "rotation", "--load_path", "last.model"]
    return ["eval.py", *flags, "--results_dir", "run"]


@pytest.mark.parametrize(
    ("prepare", "answer"),
    [
        (missing_class_folder, "lacks the class folder DRUSEN. Expected"),
        (one_image, "1 training image(s) of class 0 in folder: at least 2 are needed"),
        (other_architecture, "last.model does not fit the network of the settings"),
    ],
)
def test_answer_is_one_line_and_nothing_is_written(prepare, answer: str, tmp_path: Path) -> None:
    script, *flags = prepare(tmp_path)
    roots = ("--data_root", tmp_path, "--device", "cpu")
    done = run_script(str(REPOSITORY / script), *flags, *roots, cwd=tmp_path)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if answer in line]
    assert len(said) == 1
    assert said[0].startswith(f"{Path(script).name}: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
