"""Both trainings and the evaluation on tiny images: resuming, refusals, results."""

import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import CheckpointError, load_tensors
from common.config import ConfigError
from common.image_sets import load_set
from dia import training
from dia.building import build_negatives
from dia.data import warn_of_all_classes
from dia.evaluation import evaluate
from dia.settings import DiaConfig, EvaluationConfig
from dia.training import train
from diffusion_models import training as ddpm
from diffusion_models.pictures import draw_dissolved, draw_samples
from diffusion_models.settings import DataConfig, DdpmConfig, DiffusionConfig
from tests.tiny_dia import SIDE, changed, tiny_contrastive, tiny_diffusion, train_until


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    """Smooth normals, and anomalies with a bright spot; 6 + 3 training, 4 + 4 test images."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, n in (("train", 6), ("test", 4)):
        for name in ("normal", "spot"):
            folder = root / "kvasir-anomaly-polyps" / split / name
            folder.mkdir(parents=True)
            for i in range(n if name == "normal" or split == "test" else 3):
                pixels = np.linspace(0, 200, SIDE)[:, None, None] + random.uniform(
                    0, 40, (SIDE, SIDE, 3)
                )
                if name == "spot":
                    pixels[4:9, 4:9] = 250
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def ddpm_config(data_root: Path, tmp_path_factory) -> DdpmConfig:
    settings = tiny_diffusion(
        tmp_path_factory.mktemp("ddpm") / "whole",
        ddpm_batch_size=4,
        gradient_accumulate_every=2,
        train_num_steps=4,
        save_every=2,
        ema_update_every=1,
        sampling_timesteps=2,
        num_samples=4,
    )
    data = DataConfig(dataset="kvasir", data_root=str(data_root))
    return DdpmConfig(device="cpu", data=data, diffusion=settings)


@pytest.fixture(scope="module")
def diffusion_model(ddpm_config: DdpmConfig) -> Path:
    return ddpm.train(ddpm_config).folder / "model-2.pt"


@pytest.fixture(scope="module")
def config(data_root: Path, diffusion_model: Path, tmp_path_factory) -> DiaConfig:
    contrastive = tiny_contrastive(
        tmp_path_factory.mktemp("dia") / "whole",
        width=8,
        mode="simclr_DIA",
        shift_trans_type="diffusion_rotation",
        diffusion_model_path=str(diffusion_model),
        diff_resolution=SIDE,
        batch_size=3,
        epochs=2,
        save_step=1,
        select_by="test",
    )
    data = DataConfig(dataset="kvasir", data_root=str(data_root), one_class_idx=0, resize_to=SIDE)
    evaluation = EvaluationConfig(select_ood_samples=1, bootstrap_samples=20)
    return DiaConfig(device="cpu", data=data, contrastive=contrastive, evaluation=evaluation)


@pytest.fixture(scope="module")
def trained(config: DiaConfig) -> Path:
    return train(config).folder


def assert_same_weights(a: Path, b: Path, entry: str | None = None) -> None:
    first, second = (torch.load(path) for path in (a, b))
    if entry is not None:
        first, second = first[entry], second[entry]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resumed_diffusion_training_equals_uninterrupted_training(
    ddpm_config, diffusion_model, tmp_path: Path
) -> None:
    half = changed(ddpm_config, "diffusion", train_num_steps=2, output_dir=str(tmp_path))
    ddpm.train(half)
    full = changed(ddpm_config, "diffusion", output_dir=str(tmp_path))
    assert ddpm.train(full, resume=tmp_path).step == 4
    for entry in ("model", "ema"):
        assert_same_weights(diffusion_model, tmp_path / "model-2.pt", entry)


def test_pictures_of_a_diffusion_model_are_written(
    ddpm_config, diffusion_model, tmp_path: Path
) -> None:
    shown = changed(
        ddpm_config, "diffusion", state_dict_path=str(diffusion_model), output_dir=str(tmp_path)
    )
    paths = [*draw_dissolved(shown), *draw_samples(shown)]
    assert len(paths) == 5
    assert all(np.asarray(Image.open(path)).std() > 0 for path in paths)


def test_resumed_training_equals_uninterrupted_training(config, trained, tmp_path: Path) -> None:
    assert train_until(changed(config, "contrastive", run_dir=str(tmp_path)), 1).epoch == 1
    resumed = changed(config, "contrastive", run_dir=None, resume_path=str(tmp_path))
    assert train(resumed).epoch == 2
    assert_same_weights(trained / "last.model", tmp_path / "last.model")


def interrupts(function, *, call: int):
    """The function, whose call of this number, from 1, asks to stop as Ctrl-C does."""
    calls = itertools.count(1)

    def interrupted(*arguments, **options):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return function(*arguments, **options)

    return interrupted


def test_training_stopped_within_an_epoch_goes_on_from_that_batch(
    config, trained, tmp_path: Path, monkeypatch
) -> None:
    started = changed(config, "contrastive", run_dir=str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(training, "training_step", interrupts(training.training_step, call=1))
        stopped = train(started)
    assert (stopped.epoch, stopped.exit_status) == (0, 130)
    assert not (tmp_path / "last.model").exists()  # that of a whole epoch
    resumed = changed(config, "contrastive", run_dir=None, resume_path=str(tmp_path))
    assert train(resumed).epoch == 2
    assert_same_weights(trained / "last.model", tmp_path / "last.model")
    again, once = ((folder / "log.jsonl").read_text() for folder in (tmp_path, trained))
    assert losses_in(again) == losses_in(once)


def losses_in(log: str) -> list[float]:
    return [line["train/loss"] for line in map(json.loads, log.splitlines()) if "epoch" in line]


def test_selection_is_given_up_for_a_stop_and_made_up_for_later(
    config, trained, tmp_path: Path, monkeypatch
) -> None:
    started = changed(config, "contrastive", run_dir=str(tmp_path), select_by="test", epochs=1)
    with monkeypatch.context() as patched:
        values = interrupts(training.extract_features, call=2)
        patched.setattr(training, "extract_features", values)
        assert train(started).exit_status == 130
    assert not (tmp_path / "best_CSI.model").exists()
    resumed = changed(started, "contrastive", run_dir=None, resume_path=str(tmp_path))
    assert "CSI" in train(resumed).best
    assert (tmp_path / "best_CSI.model").is_file()


def test_new_run_does_not_overwrite_an_old_one(
    config, trained, ddpm_config, diffusion_model
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (trained / "last.model", diffusion_model)}
    with pytest.raises(CheckpointError, match=r"already holds a run.*--resume_path"):
        train(config)
    with pytest.raises(CheckpointError, match=r"already holds a run.*--resume "):
        ddpm.train(ddpm_config)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_new_run_does_not_begin_in_the_folder_of_the_other_program(
    config, trained, ddpm_config, diffusion_model
) -> None:
    folders = trained, diffusion_model.parent
    before = [(folder / "config.yaml").read_bytes() for folder in folders]
    with pytest.raises(CheckpointError, match=r"a run of train_eval_ddpm.py. Choose .*--run_dir"):
        train(changed(config, "contrastive", run_dir=str(diffusion_model.parent)))
    with pytest.raises(
        CheckpointError, match=r"a run of train_dia.py. Choose another --output_dir"
    ):
        ddpm.train(changed(ddpm_config, "diffusion", output_dir=str(trained)))
    assert [(folder / "config.yaml").read_bytes() for folder in folders] == before


def test_run_folder_of_the_diffusion_model_is_recorded_as_its_newest_file(
    config, trained, diffusion_model, tmp_path: Path
) -> None:
    folder = str(diffusion_model.parent)
    named = changed(config, "contrastive", diffusion_model_path=folder, run_dir=str(tmp_path))
    train(named)
    assert_same_weights(trained / "last.model", tmp_path / "last.model")
    assert f"diffusion_model_path: {diffusion_model}\n" in (tmp_path / "config.yaml").read_text()
    recorded = load_tensors(tmp_path / "state.pt")["config"]["contrastive"]
    assert recorded["diffusion_model_path"] == str(diffusion_model)


def test_diffusion_model_of_other_images_is_named_line_by_line(
    config, diffusion_model, tmp_path: Path, caplog
) -> None:
    build_negatives(config, torch.device("cpu"))
    lone = tmp_path / "model-1.pt"
    torch.save({"model": load_tensors(diffusion_model)["model"]}, lone)
    other = changed(config, "data", one_class_idx=1, white_value=4095)
    published = changed(other, "contrastive", diffusion_model_path=str(lone))
    build_negatives(published, torch.device("cpu"))
    assert caplog.messages == []
    build_negatives(other, torch.device("cpu"))
    build_negatives(changed(config, "data", dataset="folder"), torch.device("cpu"))
    said = [message.partition("is of other images: ")[2] for message in caplog.messages]
    assert said == [
        "data.white_value None when it was trained, 4095 now.",
        "data.one_class_idx 0 when it was trained, 1 now.",
        "data.dataset 'kvasir' when it was trained, 'folder' now.",
    ]


def test_images_dissolved_at_their_own_size_are_not_resized(config) -> None:
    named = r"data.resize_to: must be none or 28, at which pneumoniamnist .*got 16"
    with pytest.raises(ConfigError, match=named):
        build_negatives(changed(config, "data", dataset="pneumonia"), torch.device("cpu"))
    for size in (None, 28):
        own = changed(config, "data", dataset="pneumonia", resize_to=size)
        assert build_negatives(own, torch.device("cpu")).fit == "pad"


def test_training_on_anomalies_too_is_said(config, caplog) -> None:
    every = changed(config, "data", one_class_idx=None)
    warn_of_all_classes(every, load_set("kvasir", Path(every.data.data_root), "train"))
    assert "anomalies among them. For normal images alone pass --one_class_idx 0" in caplog.text


def test_published_checkpoint_files_are_written(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"last.model", "last.optim", "last.config", "best_CSI.model", "log.jsonl"} <= names
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)


def evaluation(config: DiaConfig, trained: Path, folder: Path, **values) -> DiaConfig:
    plain = changed(
        config,
        "contrastive",
        shift_trans_type="rotation",
        load_path=str(trained / "last.model"),
        resize_factor=0.54,
    )
    return changed(plain, "evaluation", results_dir=str(folder), ood_samples=2, **values)


def scores_in(folder: Path, score: str = "CSI") -> dict[str, float]:
    lines = (folder / f"scores_{score}.csv").read_text().splitlines()[1:]
    return {line.split(",")[0]: float(line.split(",")[2]) for line in lines}


def test_scores_do_not_depend_on_the_batch_size(config, trained, tmp_path: Path) -> None:
    folders = [tmp_path / str(size) for size in (1, 100)]
    for folder, size in zip(folders, (1, 100), strict=True):
        values = {"test_batch_size": size, "cache_features": False}
        evaluate(evaluation(config, trained, folder, **values), "ood_pre", [])
    one, many = map(scores_in, folders)
    assert one.keys() == many.keys()
    assert max(abs(one[name] - many[name]) for name in one) < 1e-4


def test_features_are_reused_until_an_image_changes(config, trained, data_root, tmp_path) -> None:
    settings = evaluation(config, trained, tmp_path)
    evaluate(settings, "ood_pre", [])
    features = sorted((trained / "features").iterdir())
    assert len(features) == 3  # train, normal, one_class_1
    stamps = [path.stat().st_mtime_ns for path in features]
    evaluate(settings, "ood_pre", [])
    assert [path.stat().st_mtime_ns for path in sorted((trained / "features").iterdir())] == stamps
    image = data_root / "kvasir-anomaly-polyps/test/spot/0.png"
    before, times = image.read_bytes(), (image.stat().st_atime_ns, image.stat().st_mtime_ns)
    image.write_bytes(before[:-1] + b"x")  # same size and time; PNG's last byte is a checksum's
    os.utime(image, ns=times)
    evaluate(settings, "ood_pre", [])
    assert len(list((trained / "features").iterdir())) == 4
    image.write_bytes(before)
    kept = features[0]
    torch.save([1, 2], kept)
    evaluate(settings, "ood_pre", [])
    assert set(torch.load(kept)) == {"names", "simclr", "shift", "left_out"}


def test_results_name_the_split_that_chose_the_checkpoint(config, trained, tmp_path: Path) -> None:
    settings = evaluation(config, trained, tmp_path, ood_score=("CSI", "simclr"))
    best = changed(settings, "contrastive", load_path=str(trained / "best_CSI.model"))
    assert "Checkpoint chosen by: test" in evaluate(best, "ood_pre", []).text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["selected_by"] == "test"
    csi = results["scores"]["CSI"]
    assert csi["one_class_mean"] == pytest.approx(csi["auroc"]["one_class_1"]["value"])


def test_other_modes_run_and_scores_of_the_wrong_mode_are_refused(
    config, trained, tmp_path: Path
) -> None:
    scores = ("clean_norm", "similar", "baseline", "baseline_marginalized")
    settings = evaluation(config, trained, tmp_path, ood_score=scores)
    assert "one_class_mean" in evaluate(settings, "ood", []).text
    assert "[Error@1" in evaluate(settings, "test_marginalized_acc", []).text
    with pytest.raises(ConfigError, match=r"clean_norm.* is no score of --mode ood_pre"):
        evaluate(settings, "ood_pre", [])


def test_checkpoint_of_another_architecture_is_refused(config, trained, tmp_path: Path) -> None:
    settings = evaluation(config, trained, tmp_path)
    wrong = changed(settings, "contrastive", shift_trans_type="none", mode="simclr")
    with pytest.raises(CheckpointError, match="another architecture"):
        evaluate(wrong, "ood_pre", [])


def test_resolution_that_does_not_match_the_diffusion_model_is_refused(config, tmp_path) -> None:
    wrong = changed(config, "contrastive", diff_resolution=32, run_dir=str(tmp_path))
    with pytest.raises(CheckpointError, match="trained with image size 16, but 32 is asked for"):
        train(wrong)


def test_size_that_the_unet_cannot_halve_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"image_size.*multiple of 8 pixels.*got 30"):
        DiffusionConfig(image_size=30)
    assert DiffusionConfig(image_size=30, dim_mults=(1, 2)).side == 30


@pytest.mark.parametrize("select_by", ["val", "last"])
def test_checkpoint_can_be_chosen_without_test_images(config, tmp_path, select_by: str) -> None:
    settings = changed(
        config,
        "contrastive",
        select_by=select_by,
        run_dir=str(tmp_path),
        epochs=1,
        mode="simclr_CSI",
        shift_trans_type="cutperm",
    )
    assert set(train(settings).best) == ({"CSI"} if select_by == "val" else set())


def test_the_save_of_an_epoch_holds_its_selection_where_no_images_are_needed(
    config, tmp_path
) -> None:
    """A kill between the two would otherwise lose it."""
    settings = changed(config, "contrastive", run_dir=str(tmp_path / "run"), select_by="last")
    result = train(settings)
    saved = load_tensors(tmp_path / "run" / "state.pt")
    assert saved["selected"] == saved["epoch"] == result.epoch
