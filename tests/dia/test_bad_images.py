"""One image that cannot be read costs one image: trainings, selection, evaluation."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from common.config import REPOSITORY
from common.datasets import DatasetError
from common.image_batches import BadImages, ReaderError, epoch_batches, ordered_batches, reading
from common.image_sets import load_set
from common.images import ImageError, write_image
from common.processes import Processes
from diffusion_models.settings import DataConfig
from tests.tiny_runs import corrupt, read_table, run_script, texture

SIDE = 16
TRAIN = str(REPOSITORY / "train_dia.py")
EVALUATE = str(REPOSITORY / "eval.py")
DDPM = str(REPOSITORY / "diffusion_models" / "train_eval_ddpm.py")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for folder, count in (("train/normal", 5), ("test/normal", 3), ("test/spot", 3)):
        for number in range(count):
            image = texture(SIDE, SIDE, 3, seed=number + len(folder))
            write_image(root / folder / f"{number}.png", image)
    return root


def train_flags(data: Path, run: Path) -> list[object]:
    flags = "--dataset folder --one_class_idx 0 --model resnet18 --width 4 --mode simclr_CSI "
    flags += "--shift_trans_type rotation --batch_size 2 --epochs 1 --select_ood_samples 1 "
    flags += f"--resize_to {SIDE} --device cpu"
    return [*flags.split(), "--data_root", data, "--run_dir", run]


@pytest.mark.parametrize("workers", [0, 2])
def test_place_of_a_bad_image_is_taken_by_one_that_follows(data, workers: int) -> None:
    corrupt(data / "train/normal/2.png")
    images = DataConfig(data_root=str(data)).images("train", size=SIDE)
    bad = BadImages("skip")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    options = {"epoch": 1, "seed": 0, "processes": Processes(), "num_workers": workers}
    batches = list(epoch_batches(images, batch_size=2, bad=bad, **options))
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    assert list(bad.found) == ["train/normal/2.png"]
    assert not any("2.png" in name for batch in batches for name in batch.names)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ImageError, match=r"2\.png.*data.on_bad_image: skip"):
        list(ordered_batches(images, 2, workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_set_without_a_readable_image_is_refused(data, workers: int) -> None:
    for path in (data / "train/normal").iterdir():
        corrupt(path)
    images = load_set("folder", data, "train", size=SIDE)
    with pytest.raises(DatasetError, match="none of 5 images can be read"):
        list(ordered_batches(images, 2, workers, BadImages("skip")))


def read_on_after_a_kill(data: Path) -> None:
    images = load_set("folder", data, "train", size=SIDE)
    with reading(ordered_batches(images, 1, 1)) as batches:
        next(batches)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        list(batches)


def test_killed_reader_is_a_message(data) -> None:
    for number in range(60):  # more than a reader reads ahead
        write_image(data / "train/normal" / f"more{number}.png", texture(SIDE, SIDE, 3))
    with pytest.raises(ReaderError, match="ended unexpectedly"):
        read_on_after_a_kill(data)


def test_training_and_evaluation_leave_a_bad_image_out(data, tmp_path: Path) -> None:
    corrupt(data / "train/normal/2.png")
    corrupt(data / "test/spot/1.png")
    run = tmp_path / "run"
    done = run_script(TRAIN, *train_flags(data, run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Left out" in done.stderr
    assert "2.png" in done.stderr
    flags = ["--dataset", "folder", "--data_root", data, "--load_path", run / "best_CSI.model"]
    for _ in range(2):  # the second time from the kept features
        done = run_script(EVALUATE, "--mode", "ood_pre", *flags, "--device", "cpu", cwd=tmp_path)
        assert done.returncode == 3, done.stderr
        folder = run / "eval_ood_pre_best_CSI"
        results = json.loads((folder / "results.json").read_text())
        assert results["images_left_out"] == ["test/spot/1.png", "train/normal/2.png"]
        files = [row["file"] for row in read_table(folder / "scores_CSI.csv")]
        assert len(files) == 5
        assert "test/spot/1.png" not in files
    done = run_script(
        EVALUATE, "--mode", "ood", *flags, "--ood_score", "baseline", "--on_bad_image", "error",
        "--device", "cpu", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "1.png" in done.stderr
    assert "Traceback" not in done.stderr


def test_epoch_is_saved_before_a_selection_that_fails(data, tmp_path: Path) -> None:
    corrupt(data / "test/spot/1.png")
    flags = [*train_flags(data, tmp_path / "run"), "--on_bad_image", "error"]
    done = run_script(TRAIN, *flags, cwd=tmp_path)
    assert done.returncode == 1
    assert (tmp_path / "run" / "last.model").is_file()
    assert not (tmp_path / "run" / "best_CSI.model").exists()
    write_image(data / "test/spot/1.png", texture(SIDE, SIDE, 3))
    resume = [*flags, "--resume_path", tmp_path / "run"]
    done = run_script(TRAIN, *resume, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "best_CSI.model").is_file()


def test_diffusion_model_is_trained_and_shown_without_a_bad_image(data, tmp_path: Path) -> None:
    corrupt(data / "train/normal/2.png")
    small = "--dim 8 --dim_mults 1 2 --train_num_steps 3 --ddpm_batch_size 2 --num_samples 1 "
    small += f"--sampling_timesteps 1 --gradient_accumulate_every 1 --image_size {SIDE}"
    flags = ["--dataset", "folder", "--data_root", data, "--device", "cpu"]
    done = run_script(
        DDPM, "--mode", "train", *flags, *small.split(), "--output_dir", tmp_path / "ddpm",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Left out") == 1
    shown = [
        "--state_dict_path",
        tmp_path / "ddpm" / "model-1.pt",
        "--output_dir",
        tmp_path / "pictures",
    ]
    done = run_script(DDPM, "--mode", "eval", *flags, *shown, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2.png" in done.stderr
