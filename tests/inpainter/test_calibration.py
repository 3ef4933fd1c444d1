"""Calibrated scores: their values, what they do not depend on, their file and its refusals."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.checkpoint import (
    CheckpointError,
    checkpoint_path,
    content_hash,
    load_tensors,
    save_atomic,
)
from common.config import ConfigError
from common.images import ImageError, write_image
from inpainter.calibrate import calibrate, calibrate_once
from inpainter.calibration import Calibration, describe, robust_line
from inpainter.prediction import PredictionOptions, predict
from inpainter.predictor import Predictor, load_predictor
from inpainter.settings import PicardConfig
from inpainter.training import train
from tests.tiny_runs import (
    PREDICT,
    heatmaps_in,
    run_script,
    texture,
    tiny_config,
    tiny_file,
    with_test,
    write_checkpoint,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ON = (
    *("test.calibration=knn", "test.calibration_windows=300", "test.patch_stride=8"),
    *("test.heatmap_alignment=centred", "netG.dropout_which=ALL"),
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Normal images in `train`, images to score in `test`, a checkpoint in `model`."""
    write_images(tmp_path / "train", n=4, size=(48, 64))
    write_images(tmp_path / "test", size=(48, 64))
    write_checkpoint(tmp_path / "model", tiny_config(tmp_path))
    return tmp_path


def calibrated(folder: Path, *more: str) -> Predictor:
    config = tiny_config(folder, *ON, *more)
    calibrate(config, folder / "model", "latest")
    return load_predictor(folder / "model", config=config, device="cpu")


def bank(known: torch.Tensor, distances: torch.Tensor) -> Calibration:
    """A calibration whose descriptions are what is compared."""
    D = known.shape[1]
    cells = torch.ones(len(known), 2, 2)
    return Calibration(torch.zeros(D), torch.eye(D), known, cells, {"MCD_image": distances})


def surprise(normal: Calibration, distances: torch.Tensor, described: torch.Tensor) -> torch.Tensor:
    """Of one image's windows, by MCD_image."""
    return normal.surprise({"MCD_image": distances}, normal.neighbours(described))["MCD_image"]


def test_surprise_of_one_window_is_the_normal_tail_of_its_neighbours() -> None:
    # 20 neighbours at 0 with distances e^(0 or 2) - 1 and 20 far away; the median of all is 1
    near = torch.tensor([math.e**2 - 1, 0.0] * 10)
    normal = bank(
        torch.cat([torch.zeros(20, 1), torch.full((20, 1), 9.0)]), torch.cat([near, torch.ones(20)])
    )
    found = surprise(normal, torch.tensor([math.e**3 - 1]), torch.zeros(1, 1))
    # logs: 2 and 0, ten of each: mean 1, deviation sqrt(20 / 19)
    z = (3 - 1) / (math.sqrt(20 / 19) + 0.05)
    expected = -math.log10(0.5 * math.erfc(z / math.sqrt(2)))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_farther_is_more_surprising_and_never_infinite() -> None:
    normal = bank(torch.zeros(30, 2), torch.linspace(0.5, 1.5, 30))
    distances = torch.tensor([0.0, 0.5, 1.0, 3.0, 1e6])
    values = surprise(normal, distances, torch.zeros(5, 2))
    assert (values.diff() > 0).all()
    assert (values >= 0).all()
    assert values[-1] < 16


def test_windows_are_compared_with_those_of_the_same_surroundings() -> None:
    # texture where the description is 1: distances ten times those of flat tissue, at 0
    description = torch.tensor([[0.0], [1.0]]).repeat_interleave(40, dim=0)
    distances = torch.cat([torch.linspace(0.9, 1.1, 40), torch.linspace(9, 11, 40)])
    normal = bank(description, distances)
    values = surprise(normal, torch.tensor([10.0, 10.0]), torch.tensor([[0.0], [1.0]]))
    flat, textured = values.tolist()
    assert flat > 10
    assert textured < 1


def test_what_raises_every_window_of_an_image_alike_is_no_surprise() -> None:
    generator = torch.Generator().manual_seed(0)
    description = torch.rand(400, 1, generator=generator)
    distances = (description[:, 0] + 0.1 * torch.randn(400, generator=generator)).exp()
    normal = bank(description, distances)
    noisier = distances[:100] * 3
    noisier[7] *= 5
    before = surprise(normal, distances[:100], description[:100])
    after = surprise(normal, noisier, description[:100])
    assert after.median() == pytest.approx(before.median().item(), abs=0.1)
    assert after.argmax() == 7
    assert after[7] > 4


def test_a_cell_is_compared_with_the_same_cell_of_the_neighbours() -> None:
    # The first of two cells is hard to complete: its squares are e^4 or e^0, the other's 1.
    first = torch.tensor([math.e**4, 1.0] * 10)
    normal = replace(
        bank(torch.zeros(20, 1), torch.ones(20)),
        cells=torch.stack([first, torch.ones(20)], dim=1)[:, None],
    )
    cells = torch.full((1, 1, 2), math.e**6)
    hard, easy = normal.surprise_in_cells(cells, normal.neighbours(torch.zeros(1, 1))).flatten()
    floor = 0.1  # a tenth of the median of all, 1
    logs = [math.log(value + floor) / 2 for value in (math.e**6, math.e**4, 1.0)]
    deviation = (logs[1] - logs[2]) / 2 * math.sqrt(20 / 19)
    z = (logs[0] - (logs[1] + logs[2]) / 2) / (deviation + 0.05)
    assert hard.item() == pytest.approx(-math.log(0.5 * math.erfc(z / math.sqrt(2))), rel=1e-4)
    assert easy > 5 * hard


def test_normal_cells_are_1_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2000, 4, 4, generator=generator).mul(0.5).exp()
    normal = replace(bank(torch.rand(1000, 1, generator=generator), torch.ones(1000)),
                     cells=draw[:1000])  # fmt: skip
    near = normal.neighbours(torch.rand(1000, 1, generator=generator))
    found = normal.surprise_in_cells(draw[1000:], near)
    assert found.mean() == pytest.approx(1, abs=0.1)
    noisier = normal.surprise_in_cells(draw[1000:] * 9, near)  # an image that is noisy all over
    assert noisier.mean() == pytest.approx(1, abs=0.2)


def test_robust_line_goes_through_the_many_not_the_few() -> None:
    x = torch.arange(50, dtype=torch.float64)
    y = 2 + 0.5 * x
    y[40:44] += 100
    assert torch.allclose(robust_line(x, y)[:40], (2 + 0.5 * x)[:40], atol=0.2)
    assert torch.allclose(robust_line(torch.ones(30), torch.full((30,), 3.0)), torch.tensor(3.0))


def test_description_does_not_see_what_is_in_the_hole() -> None:
    windows = texture(32, 32)[None] * 2 - 1
    other = windows.clone()
    other[..., 8:24, 8:24] = -1
    arguments = (torch.zeros(1, 1, 16, 16), torch.tensor([0.1]))
    assert torch.equal(describe(windows, *arguments), describe(other, *arguments))
    other[..., 0, 0] = 0
    assert not torch.equal(describe(windows, *arguments), describe(other, *arguments))


LOCALISED = ("test.heatmap_type=averaged_hole", "test.heatmap_localise=0.5")


@pytest.mark.parametrize(
    "more", [(), LOCALISED, (*LOCALISED, "test.heatmap_sign=darker")], ids=["", "local", "darker"]
)
def test_engines_batches_and_order_give_the_same_scores(folder, more) -> None:
    predictor = calibrated(folder, *more)
    image = texture(48, 64, seed=9)
    heatmap = predictor(image, name="a")["MCD_image"]
    others = [
        with_test(predictor.config, parallel_batchsize=1),
        with_test(predictor.config, engine="plain"),
    ]
    for config in others:
        same = load_predictor(folder / "model", config=config, device="cpu")
        same(texture(48, 64, seed=1), name="b")  # an image scored before changes nothing
        assert torch.allclose(same(image, name="a")["MCD_image"], heatmap, atol=1e-3)


def test_a_lesion_stands_out_of_what_is_hard_to_complete(folder) -> None:
    predictor = calibrated(folder)
    image = texture(48, 64, seed=9)
    image[:, 20:30, 30:42] = 0
    heatmap = predictor(image, name="a")["MCD_image"]
    inside = torch.zeros(48, 64, dtype=torch.bool)
    inside[20:30, 30:42] = True
    assert heatmap[inside].mean() > 2 * heatmap[~inside].mean()


def test_windows_without_tissue_score_nothing(folder) -> None:
    predictor = calibrated(folder, "test.only_check_nonblack_pixels=true")
    image = texture(48, 96, seed=9)
    image[:, :, 40:] = 0
    *_, last = predictor.score_image(image, "a")
    assert 0 < last.n_scored < last.n_windows
    assert (last.grids["MCD_image"][:, -2:] == 0).all()
    black = predictor(torch.zeros(1, 48, 64), name="b")
    assert all((heatmap == 0).all() for heatmap in black.values())


def test_every_metric_is_calibrated(folder) -> None:
    metrics = "MCD_image, MeanCD_image, MedCD_image, MCD_feature, no_dropout"
    found = calibrated(folder, f"test.heatmap_metrics=[{metrics}]")(texture(48, 64), name="a")
    assert list(found) == metrics.split(", ")
    for heatmap in found.values():
        assert heatmap.shape == (48, 64)
        assert heatmap.isfinite().all()


def test_no_dropout_alone_and_elementwise_dropout_are_calibrated(folder) -> None:
    for more in ("test.heatmap_metrics=[no_dropout]", "netG.dropout_type=1D"):
        found = calibrated(folder, more)(texture(48, 64), name="a")
        assert all(heatmap.isfinite().all() for heatmap in found.values())


def test_refined_prediction_is_calibrated(folder) -> None:
    predictor = calibrated(folder, "test.patch_stride=2", "test.refine=4")
    *_, last = predictor.score_image(texture(48, 64, seed=9), "a")
    assert 0 < last.n_scored < last.n_windows
    assert last.heatmaps["MCD_image"].isfinite().all()


def test_calibration_is_the_same_whatever_the_folder_is_called(folder) -> None:
    first = calibrated(folder).calibrations[1.0]
    (folder / "train").rename(folder / "normal")
    again = calibrated(folder, f"train_data_path={folder / 'normal'}").calibrations[1.0]
    assert torch.equal(first.known, again.known)
    assert len(first.known) == 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("netG.dropout_which=COARSE",), "netG.dropout_which 'ALL' there, 'COARSE' now"),
        (("test.heatmap_M_inpaint=3",), "test.heatmap_M_inpaint 2 there, 3 now"),
        (("flatten=0.1",), "flatten None there, 0.1 now"),
        (("test.scales=[0.5]",), r"has no scale 0.5, only 1.0.*--calibrate"),
        (("test.heatmap_metrics=[MedCD_image]",), r"has no MedCD_image, only .*--calibrate"),
    ],
)
def test_a_calibration_for_other_settings_is_refused(folder, change, message) -> None:
    calibrated(folder)
    with pytest.raises(CheckpointError, match=message):
        load_predictor(folder / "model", config=tiny_config(folder, *ON, *change))


def test_missing_foreign_and_damaged_calibrations_are_refused(folder) -> None:
    config = tiny_config(folder, *ON)
    with pytest.raises(CheckpointError, match=r"no .*calibration_00000001.pt.*--calibrate.*off"):
        load_predictor(folder / "model", config=config)
    path = calibrate(config, folder / "model", "latest")
    whole = load_tensors(path)

    for damage in ({"known": whole["scales"]["1.0"]["known"][:-1]}, {"axes": torch.tensor(1)},
                   {"cells": whole["scales"]["1.0"]["cells"][:, 0]},
                   {"mean": whole["scales"]["1.0"]["mean"] * math.nan}):  # fmt: skip
        save_atomic({**whole, "scales": {"1.0": {**whole["scales"]["1.0"], **damage}}}, path)
        with pytest.raises(CheckpointError, match=r"damaged.*--calibrate"):
            load_predictor(folder / "model", config=config)
    older = {key: part for key, part in whole["scales"]["1.0"].items() if key != "cells"}
    save_atomic({**whole, "scales": {"1.0": older}}, path)
    with pytest.raises(CheckpointError, match=r"has no cells: an older version.*--calibrate"):
        load_predictor(folder / "model", config=config)
    save_atomic({"weights": {}}, path)
    with pytest.raises(CheckpointError, match=path.name):
        load_predictor(folder / "model", config=config)
    save_atomic(whole, path)
    write_checkpoint(folder / "other", config, step=2)
    checkpoint_path(folder / "other", "gen", 2).replace(checkpoint_path(path.parent, "gen", 1))
    with pytest.raises(CheckpointError, match=r"was made for other weights.*--calibrate"):
        load_predictor(folder / "model", config=config)


def test_too_few_windows_and_unreadable_images_are_named(folder, caplog) -> None:
    config = tiny_config(folder, *ON, "test.only_check_nonblack_pixels=true")
    (folder / "train" / "0.png").write_bytes(b"no picture")
    calibrate(config, folder / "model", "latest")
    assert "Passed over: 0.png" in caplog.text
    for number in range(1, 4):
        write_image(folder / "train" / f"{number}.png", torch.zeros(1, 48, 64))
    with pytest.raises(ImageError, match=r"only 0 windows with tissue at scale 1.0"):
        calibrate(config, folder / "model", "latest")
    with pytest.raises(ImageError, match=r"0.png"):
        calibrate(with_test(config, on_bad_image="error"), folder / "model", "latest")


def test_several_scales_need_calibration() -> None:
    with pytest.raises(ConfigError, match=r"test.scales: .*only with test.calibration: knn"):
        tiny_config(Path("x"), "test.scales=[1, 0.5]")
    with pytest.raises(ConfigError, match=r"test.scales: needs one scale or more, each once"):
        tiny_config(Path("x"), *ON, "test.scales=[0.5, 0.5]")


def test_heatmaps_of_several_scales_have_the_image_size_and_are_their_mean(folder) -> None:
    both = calibrated(folder, "test.scales=[1, 0.5]")
    image = texture(64, 80, seed=9)
    single = [
        load_predictor(folder / "model", config=tiny_config(folder, *ON, f"test.scales=[{scale}]"))(
            image, name="a"
        )["MCD_image"]
        for scale in (1, 0.5)
    ]
    *_, last = both.score_image(image, "a")
    assert torch.allclose(last.heatmaps["MCD_image"], (single[0] + single[1]) / 2, atol=1e-5)
    assert last.heatmaps["MCD_image"].shape == (64, 80)
    assert last.n_windows == 8 * 10 + 4 * 5


def test_prediction_files_are_bound_to_the_calibration(folder) -> None:
    config = tiny_config(folder, *ON)
    calibrate(config, folder / "model", "latest")
    first = predict(config, PredictionOptions(folder / "model"))
    assert "calibration: " in (first.folder / "run.txt").read_text()
    again = predict(config, PredictionOptions(folder / "model"))
    assert again.folder == first.folder
    write_images(folder / "train", n=2, size=(64, 64))
    calibrate(config, folder / "model", "latest")
    other = predict(config, PredictionOptions(folder / "model"))
    assert other.folder != first.folder
    old, new = (heatmaps_in(result.folder)["0.png"] for result in (first, other))
    assert not torch.equal(old, new)


def test_training_ends_with_a_calibration_of_images_that_it_did_not_see(folder) -> None:
    config = tiny_config(
        folder, *ON, "train.held_out=0.25", "train.scales=[1, 0.5]", "train.subset_frac=0.7"
    )
    result = train(config)
    saved = load_tensors(checkpoint_path(result.folder, "calibration", 4))
    assert saved["normals"]["from"] == "images held out from training"
    assert saved["normals"]["images"]["images"] == 1
    predictor = load_predictor(result.folder, step="best", device="cpu")
    assert predictor(folder / "test" / "0.png")["MCD_image"].shape == (48, 64)
    other = replace(config, train=replace(config.train, held_out=0.0, subset_frac=None), seed=5)
    again = load_tensors(calibrate(other, result.folder, "latest"))  # training says what it saw
    assert again["normals"]["images"] == saved["normals"]["images"]
    write_images(folder / "train", n=6, size=(48, 64))
    with pytest.raises(CheckpointError, match="nobody knows which images were held out"):
        calibrate(config, result.folder, "latest")


def test_command_line_calibrates_and_then_predicts(folder) -> None:
    flags = ["--config", tiny_file(folder, *ON), "--checkpoint_dir", folder / "model"]
    flags += ["--output_dir", folder / "out"]
    refused = run_script(PREDICT, *flags)
    assert refused.returncode == 1
    assert "--calibrate" in refused.stderr
    done = run_script(PREDICT, *flags, "--calibrate")
    assert done.returncode == 0, done.stderr
    assert "Calibration: " in done.stdout
    assert len(heatmaps_in(folder / "out")) == 3
    again = run_script(PREDICT, *flags, "--calibrate")
    assert again.returncode == 0, again.stderr
    assert "Not measured again" in again.stderr
    assert "0 images scored, 3 were finished before" in again.stdout


def test_what_changes_no_score_measures_nothing_again(folder) -> None:
    config = tiny_config(folder, *ON)
    path = calibrate_once(config, folder / "model", "latest")
    kept = content_hash(path)
    other = replace(config, test_data_path=str(folder / "train"), num_workers=1)
    other = with_test(other, save_heatmap_plots=False, calibration="auto")
    assert content_hash(calibrate_once(other, folder / "model", "latest")) == kept
    calibrate_once(with_test(config, patch_stride=4), folder / "model", "latest")
    assert content_hash(path) != kept


def test_command_that_would_not_use_a_calibration_is_refused_before_it_measures(folder) -> None:
    config = with_test(tiny_config(folder, *ON), calibration="off")
    with pytest.raises(ConfigError, match=r"--calibrate: test.calibration is off"):
        calibrate_once(config, folder / "model", "latest")
    assert not list((folder / "model").glob("calibration_*"))


def test_auto_is_the_distance_until_normal_windows_are_measured_and_says_so(folder, caplog) -> None:
    caplog.set_level("INFO")
    auto = with_test(tiny_config(folder, *ON), calibration="auto")
    image = texture(48, 64, seed=9)

    def found(config: PicardConfig) -> torch.Tensor:
        return load_predictor(folder / "model", config=config)(image, name="a")["MCD_image"]

    assert load_predictor(folder / "model", config=auto).config == uncalibrated(auto)
    assert "Scores are distances, for there is no" in caplog.text
    assert torch.equal(found(auto), found(uncalibrated(auto)))
    path = calibrate(auto, folder / "model", "latest")
    assert load_predictor(folder / "model", config=auto).config == tiny_config(folder, *ON)
    assert f"Scores are calibrated: {path}" in caplog.text
    assert torch.equal(found(auto), found(tiny_config(folder, *ON)))
    with pytest.raises(CheckpointError, match=r"made with other settings: test\.droprate"):
        found(with_test(auto, droprate=0.2))


def test_a_calibration_that_another_version_measured_is_made_anew(folder, monkeypatch) -> None:
    config = tiny_config(folder, *ON)
    old = calibrate_once(config, folder / "model", "latest").read_bytes()
    assert calibrate_once(config, folder / "model", "latest").read_bytes() == old
    monkeypatch.setattr("inpainter.calibrate.MEASURED", 1)
    assert calibrate_once(config, folder / "model", "latest").read_bytes() != old


def test_training_with_auto_measures_nothing(folder) -> None:
    config = tiny_config(folder, *ON, "test.calibration=auto")
    assert list(train(config).folder.glob("calibration_*")) == []


def uncalibrated(config: PicardConfig) -> PicardConfig:
    return with_test(config, calibration="off")


def test_off_is_the_distance_whether_a_calibration_is_there_or_not(folder) -> None:
    config = tiny_config(folder, *ON)
    before = load_predictor(folder / "model", config=uncalibrated(config))
    image = texture(48, 64, seed=9)
    expected = before(image, name="a")["MCD_image"]
    predictor = calibrated(folder)
    after = load_predictor(folder / "model", config=uncalibrated(config))
    assert torch.equal(after(image, name="a")["MCD_image"], expected)
    *_, distances, _ = predictor.score_image(image, "a")
    assert torch.equal(distances.heatmaps["MCD_image"], expected)


def test_of_very_many_images_only_as_many_are_read_as_are_worth_it(folder, monkeypatch) -> None:
    write_images(folder / "train", n=12, size=(48, 64))
    read = []
    plain = Predictor.pixels_of
    monkeypatch.setattr(Predictor, "pixels_of", lambda *a: read.append(a[1].name) or plain(*a))
    config = tiny_config(folder, *ON, "test.calibration_windows=32")
    calibrate(config, folder / "model", "latest")
    assert read == ["0.png", "11.png", "4.png", "7.png"]
