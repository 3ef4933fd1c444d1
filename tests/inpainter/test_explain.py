"""Why a place scores as it does: the explained window is the heatmap's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import config_to_yaml
from common.images import read_image, write_image
from inpainter.calibrate import calibrate
from inpainter.explain import (
    ExplainError,
    Normal,
    explain,
    explained,
    nearest_window,
    normal_windows,
    sentence,
)
from inpainter.normal_scores import set_operating_point
from inpainter.prediction import PredictionOptions, predict
from inpainter.predictor import Predictor, load_predictor
from inpainter.windows import window_grid
from tests.tiny_runs import (
    PREDICT,
    heatmaps_in,
    run_script,
    texture,
    tiny_config,
    tiny_file,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = "netG.dropout_which=ALL"
CENTRED = ("test.heatmap_alignment=centred", "test.patch_stride=8")
METRICS = ("MCD_image", "MCD_feature", "MeanCD_image", "MedCD_image", "no_dropout")


def predictor_of(folder: Path, *more: str) -> Predictor:
    config = tiny_config(folder, ALL, *more)
    return load_predictor(folder / "model", config=config, device="cpu")


def explanation(predictor: Predictor, image: Path, place: tuple[int, int], scale: float = 1.0):
    """What is found of a place, and what it is compared with."""
    pixels = read_image(image, 1)
    *_, last = predictor.score_image(pixels, image.name)
    scored, metric = last.by_scale()[scale], predictor.config.test.heatmap_metrics[0]
    found = explained(predictor, pixels, image.name, place, scale, metric, scored)
    return found, normal_windows(predictor, scale, metric, scored)


def test_nearest_window_is_the_one_centred_there() -> None:
    fitting = window_grid((48, 64), (32, 32), 16, "stretched")  # centres at 16, 32; 16, 32, 48
    assert [nearest_window(fitting, at) for at in ((0, 0), (63, 47), (31.5, 15.5))] == [0, 5, 1]
    centred = window_grid((40, 40), (32, 32), 8, "centred")  # one centre per 8 x 8 pixels
    for number in range(25):
        row, col = divmod(number, 5)
        assert nearest_window(centred, (col * 8 + 3.5, row * 8 + 3.5)) == number
        assert nearest_window(centred, (col * 8 + 7, row * 8)) == number


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_distance_is_the_score_of_the_heatmaps_window(folder, metric, engine) -> None:
    more = (f"test.heatmap_metrics=[{metric}]", f"test.engine={engine}", *CENTRED)
    found, normal = explanation(predictor_of(folder, *more), folder / "test" / "1.png", (30, 20))
    assert found.distance == pytest.approx(found.score, rel=1e-4)
    assert found.number == 2 * 8 + 3  # windows of 8 pixels: row 20 // 8, column 30 // 8
    assert found.centre == (28, 20)
    M = 1 if metric == "no_dropout" else 2
    assert found.completions.shape == (M, 1, 16, 16)
    assert found.distances.shape == (M,)
    assert normal.of == "this image's own windows"
    assert len(normal.scores) == 6 * 8


def test_window_and_hole_are_where_they_are_said_to_be(folder) -> None:
    spot = texture(48, 64)
    spot[:, 20, 28] = 0  # first pixel behind the window's centre
    write_image(folder / "spot.png", spot)
    found, _ = explanation(predictor_of(folder, *CENTRED), folder / "spot.png", (28, 20))
    assert found.window[0, 16, 16] == 0
    assert found.truth[0, 8, 8] == 0
    truth = found.truth * 2 - 1
    assert found.distances[found.closest] == pytest.approx(
        (found.completions[found.closest] - truth).norm().item(), rel=1e-4
    )


def test_at_half_scale_the_centre_is_said_in_the_originals_pixels(folder) -> None:
    write_images(folder / "train", n=3, size=(64, 80))
    on = ("test.calibration=knn", "test.calibration_windows=100", "test.scales=[1, 0.5]", *CENTRED)
    config = tiny_config(folder, ALL, *on)
    calibrate(config, folder / "model", "latest")
    write_image(folder / "large.png", texture(64, 80, seed=9))
    predictor = load_predictor(folder / "model", config=config, device="cpu")
    found, normal = explanation(predictor, folder / "large.png", (60, 40), scale=0.5)
    assert found.centre == (56, 40)  # window at columns 24 … 31, rows 16 … 23 of 40 x 32
    assert normal.of == "windows of normal images (calibration)"
    assert normal.is_distance
    bank = predictor.calibrations[0.5].distances["MCD_image"]
    assert sorted(normal.scores.tolist()) == normal.scores.tolist() == sorted(bank.tolist())
    text = explain(config, (folder / "model", 1), folder / "large.png", (60, 40), folder)
    assert "MCD_image, scale 1: window" in text
    assert "MCD_image, scale 0.5: window" in text


def test_normal_windows_of_the_operating_point_come_first(folder) -> None:
    root = write_images(folder / "normal", n=4, size=(48, 64))
    config = tiny_config(folder, ALL)
    paths = sorted(root.iterdir())
    set_operating_point(config, folder / "model", "latest", paths, root, specificity=0.5)
    _, normal = explanation(predictor_of(folder), folder / "test" / "1.png", (30, 20))
    assert normal.of == "windows of normal images (operating point)"


def test_share_below_counts_normal_windows_that_score_less() -> None:
    normal = Normal(np.array([1.0, 2.0, 2.0, 4.0]), "windows", is_distance=False)
    assert [normal.share_below(value) for value in (0, 2, 3, 9)] == [0, 0.25, 0.75, 1]


def test_window_without_tissue_is_said_to_score_nothing(folder) -> None:
    image = texture(48, 128)
    image[:, :, 40:] = 0
    write_image(folder / "half.png", image)
    predictor = predictor_of(folder, "test.only_check_nonblack_pixels=true")
    found, normal = explanation(predictor, folder / "half.png", (100, 20))
    assert not found.has_tissue
    assert "not scored, for want of tissue: the heatmap has 0 there" in sentence(found, normal)


@pytest.mark.parametrize(("x", "y"), [(64, 0), (0, 48), (-1, 0)])
def test_place_beside_the_image_is_refused(folder, x, y) -> None:
    image = folder / "test" / "0.png"
    with pytest.raises(ExplainError, match=r"columns 0 to 63 and rows 0 to 47; first the column"):
        explain(tiny_config(folder), (folder / "model", 1), image, (x, y), folder)


def test_colour_and_many_completions_are_drawn(folder, tmp_path) -> None:
    more = ("test.heatmap_M_inpaint=11", "test.heatmap_metrics=[MCD_image]")
    explain(
        tiny_config(folder, *more), (folder / "model", 1), folder / "test/0.png", (9, 9), tmp_path
    )
    picture = Image.open(tmp_path / "explain_0_9_9_MCD_image.png")
    assert picture.width > 5 * picture.height


def test_command_line_explains_by_the_checkpoints_settings(folder) -> None:
    tiny_file(folder, ALL).rename(folder / "model" / "config.yaml")
    command = [PREDICT, "--checkpoint_dir", folder / "model", "--output_dir", folder / "out"]
    done = run_script(*command, "--explain", folder / "test" / "0.png", "30", "20")
    assert done.returncode == 0, done.stderr
    assert "0.png: the heatmap of MCD_image is" in done.stdout
    assert "of this image's own windows" in done.stdout
    (picture,) = (folder / "out").iterdir()
    assert picture.name == "explain_0_30_20_MCD_image.png"
    refused = run_script(*command, "--explain", folder / "test" / "0.png", "30", "top")
    assert refused.returncode == 2
    assert "two whole numbers, the column and the row" in refused.stderr


def test_explained_is_the_heatmap_of_an_image_in_a_subfolder_too(folder, tmp_path) -> None:
    config = tiny_config(folder, ALL, "data_with_subfolder=true")
    write_images(folder / "nest" / "a", n=1, size=(48, 64))
    result = predict(config, PredictionOptions(folder / "model", image_dir=folder / "nest"))
    there = heatmaps_in(result.folder)["a/0.png"][20, 30]
    (folder / "model" / "config.yaml").write_text(config_to_yaml(config))
    command = [PREDICT, "--checkpoint_dir", folder / "model", "--output_dir", tmp_path / "out"]
    place = ("--explain", folder / "nest" / "a" / "0.png", 30, 20)
    done = run_script(*command, "--image_dir", folder / "nest", *place)
    assert f"a/0.png: the heatmap of MCD_image is {there:.4g} there" in done.stdout
    assert f"{there:.4g} there" not in run_script(*command, *place).stdout  # as 0.png


def test_predictions_and_explanations_drop_the_same(folder) -> None:
    predictor = predictor_of(folder, *CENTRED)
    found, _ = explanation(predictor, folder / "test" / "0.png", (30, 20))
    again, _ = explanation(predictor, folder / "test" / "0.png", (30, 20))
    assert torch.equal(found.completions, again.completions)
    assert found.distances[0] != found.distances[1]
