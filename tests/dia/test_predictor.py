"""The Python API on a run of the real command: its scores are those of eval.py."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import CheckpointError, content_hash, load_tensors, save_atomic
from common.config import REPOSITORY, ConfigError
from common.datasets import DatasetError
from common.image_batches import BadImages
from common.image_sets import ImageSet, load_set
from common.images import read_image, write_image
from common.processes import Processes
from dia.evaluation import cached_features
from dia.predictor import TrainedEncoder, load_encoder, score
from tests.tiny_runs import run_script, texture

SIDE = 16
FLAGS = f"--dataset folder --one_class_idx 0 --resize_to {SIDE} --device cpu --ood_samples 2"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Images in data/, and the folder of a run of train_dia.py with what eval.py says of it."""
    root = tmp_path_factory.mktemp("api")
    for folder, count in (("train/normal", 4), ("test/normal", 2), ("test/spot", 2)):
        for number in range(count):
            image = texture(SIDE + 4, SIDE + 4, 3, seed=number + len(folder))
            write_image(root / "data" / folder / f"{number}.png", image)
    flags = [*FLAGS.split(), "--data_root", root / "data"]
    small = "--model resnet18 --width 4 --mode simclr_CSI --shift_trans_type cutperm --warmup 1 "
    small += "--batch_size 2 --epochs 1 --select_ood_samples 1"
    train = str(REPOSITORY / "train_dia.py")
    done = run_script(train, *flags, *small.split(), "--run_dir", root / "run", cwd=root)
    assert done.returncode == 0, done.stderr
    for mode, scores in (("ood_pre", "CSI simclr"), ("ood", "similar baseline_marginalized")):
        given = ["--load_path", root / "run/best_CSI.model", "--ood_score", *scores.split()]
        evaluate = str(REPOSITORY / "eval.py")
        done = run_script(evaluate, "--mode", mode, *flags, *given, cwd=root)
        assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def encoder(root: Path) -> TrainedEncoder:
    return load_encoder(root / "run", select="best", device="cpu")


def scores_of_eval(root: Path, ood_score: str) -> dict[str, float]:
    (path,) = (root / "run").glob(f"eval_*/scores_{ood_score}.csv")
    with path.open() as file:
        return {row["file"]: float(row[ood_score]) for row in csv.DictReader(file)}


def tensors_and_names(root: Path, split: str) -> tuple[torch.Tensor, list[str]]:
    files = sorted((root / "data" / split).rglob("*.png"))
    names = [file.relative_to(root / "data").as_posix() for file in files]
    return torch.stack([read_image(file) for file in files]), names


@pytest.mark.parametrize("ood_score", ["CSI", "simclr", "similar", "baseline_marginalized"])
def test_scores_of_tensors_are_those_of_eval(root, encoder, ood_score: str) -> None:
    train, train_names = tensors_and_names(root, "train")
    test, test_names = tensors_and_names(root, "test")
    found = score(
        encoder, train, test, ood_score=ood_score, train_names=train_names, test_names=test_names
    )
    assert (found.shape, found.dtype) == ((4,), torch.float32)
    expected = scores_of_eval(root, ood_score)
    assert dict(zip(test_names, found.tolist(), strict=True)) == pytest.approx(expected, rel=1e-6)


def test_files_and_image_sets_are_scored_too(root, encoder) -> None:
    train, test = (load_set("folder", root / "data", s, size=SIDE) for s in ("train", "test"))
    of_sets = score(encoder, train, test)
    assert dict(zip(test.names, of_sets.tolist(), strict=True)) == pytest.approx(
        scores_of_eval(root, "CSI"), rel=1e-6
    )
    of_files = score(
        encoder, train.items, test.items, train_names=train.names, test_names=test.names
    )
    assert of_files.tolist() == of_sets.tolist()


def test_input_that_cannot_be_scored_is_refused(root, encoder) -> None:
    images = torch.rand(2, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match=r"expected images \(N, 1 or 3, H, W\), got \(3, 16, 16\)"):
        score(encoder, images, images[0])
    with pytest.raises(ValueError, match=r"in \[0, 1\], got values from"):
        score(encoder, images, images * 255)
    with pytest.raises(ValueError, match=r"expected floats in \[0, 1\], got torch.uint8"):
        score(encoder, images, np.zeros((2, 3, SIDE, SIDE), dtype=np.uint8))
    with pytest.raises(ValueError, match="pass train_images"):
        score(encoder, None, images)
    with pytest.raises(ValueError, match="'csi' is unknown; choose from CSI"):
        score(encoder, images, images, "csi")
    with pytest.raises(DatasetError, match="the set is empty"):
        score(encoder, images[:0], images)


def test_checkpoint_that_is_not_there_is_named(root, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"select='best'; \*\.model files there: none"):
        load_encoder(tmp_path)
    lone = tmp_path / "best_CSI.model"
    lone.write_bytes((root / "run/best_CSI.model").read_bytes())
    with pytest.raises(ConfigError, match=r"has no config\.yaml beside it"):
        load_encoder(lone)
    run = load_encoder(root / "run", select="last", device="cpu")
    assert run.path.name == "last.model"
    assert run.config.evaluation.ood_samples == 2
    own = load_encoder(lone, config=run.config, device="cpu")
    images = torch.rand(2, 1, SIDE, SIDE)
    assert score(own, None, images.numpy(), "baseline").shape == (2,)


@pytest.mark.parametrize(
    "change",
    [{"white_value": 255}, {"window": (100.0, 50.0)}, {"precision": "tf32"}, {"refuse_grey": True}],
)
def test_kept_features_are_of_these_pixels_and_products_alone(root, encoder, change) -> None:
    images = load_set("folder", root / "data", "test", size=SIDE)
    before = kept_after(encoder, images)
    assert kept_after(encoder, images) == before
    if "precision" in change:
        encoder = replace(encoder, config=replace(encoder.config, **change))
    else:
        images = replace(images, **change)
    assert len(kept_after(encoder, images) - before) == 1


def kept_after(encoder: TrainedEncoder, images: ImageSet) -> set[Path]:
    """The files of kept features, when those of a set were taken."""
    cached_features(encoder, images, bad=BadImages("skip"), processes=Processes())
    return set((encoder.path.parent / "features").iterdir())


def test_features_of_weights_that_a_training_has_replaced_are_not_kept_for_its_new_ones(
    root, tmp_path: Path
) -> None:
    images = load_set("folder", root / "data", "test", size=SIDE)
    run = shutil.copytree(root / "run", tmp_path / "run", ignore=lambda *_: ["features"])
    old = load_encoder(run, device="cpu")
    weights = {name: tensor * 2 for name, tensor in load_tensors(old.path).items()}
    save_atomic(weights, old.path)  # by a training, while the evaluation runs
    (kept,) = kept_after(old, images)
    new = load_encoder(run, device="cpu")
    assert len(kept_after(new, images) - {kept}) == 1
    assert {old.sha256, new.sha256} == {content_hash(root / "run" / old.path.name),
                                        content_hash(new.path)}  # fmt: skip


def test_features_that_cannot_be_kept_cost_a_warning_and_no_scores(
    root, tmp_path: Path, caplog
) -> None:
    images = load_set("folder", root / "data", "test", size=SIDE)
    run = shutil.copytree(root / "run", tmp_path / "run", ignore=lambda *_: ["features"])
    (run / "features").write_text("a file in the folder's place")
    encoder, bad = load_encoder(run, device="cpu"), BadImages("skip")
    features = cached_features(encoder, images, bad=bad, processes=Processes())
    assert features.names == images.names
    assert str(run / "features") in caplog.text
    assert "--no-cache_features" in caplog.text
