"""The operating point: its thresholds, its file, and what a prediction makes of it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import CheckpointError, checkpoint_path, load_tensors
from common.config import REPOSITORY, ConfigError, config_to_yaml, load_config
from common.images import ImageError, write_image
from inpainter.calibrate import calibrate
from inpainter.data import split_held_out
from inpainter.findings import Finding, find
from inpainter.normal_scores import image_scores, set_operating_point, warn_of_trained_images
from inpainter.operating_point import (
    LEVELS,
    ImageScores,
    MetricPoint,
    OperatingPoint,
    OperatingPointError,
    image_rank,
    load_operating_point,
    quantiles,
    thresholds,
)
from inpainter.prediction import PredictionOptions, predict
from inpainter.predictor import load_predictor
from inpainter.settings import PicardConfig
from inpainter.snapshots import operating_point_path, prune_snapshots
from inpainter.training import train
from tests.tiny_runs import (
    PREDICT,
    predicted,
    read_table,
    run_script,
    texture,
    tiny_config,
    tiny_file,
    with_test,
    write_checkpoint,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")
EVAL = str(REPOSITORY / "eval.py")
ONE = "test.heatmap_metrics=[MCD_image]"
HALF = {"image": 0.5, "pixel": 0.9}


def scores_with(maximum: float, volume: str | None = None) -> ImageScores:
    """An image whose pixels' scores rise evenly from 0 to the maximum."""
    pixels = np.linspace(0, maximum, LEVELS)
    return ImageScores(maximum, pixels, {"1.0": pixels}, volume)


def test_volumes_have_a_threshold_of_their_own_by_their_highest_slices(tmp_path) -> None:
    slices = {"a": (1.0, 5.0), "b": (2.0, 3.0), "c": (4.0, 0.5)}
    scores = [scores_with(value, volume) for volume, values in slices.items() for value in values]
    point = thresholds("m", scores, HALF)
    assert point.normal.volumes.tolist() == [3, 4, 5]
    assert (point.image_threshold, point.volume_threshold) == (3, 4)  # 4th of 6, 2nd of 3
    assert point.volume_specificity.value == 0.5
    whole = OperatingPoint(HALF, {}, {"scored": 6, "left_out": {}}, {"m": point})
    whole.save(tmp_path / "point.json")
    read = load_operating_point(tmp_path / "point.json").metrics["m"]
    assert (read.volume_threshold, read.volume_specificity) == (4, point.volume_specificity)
    assert "m: a volume is abnormal above 4 (specificity, from 3 normal volumes" in whole.summary()


def test_too_few_volumes_have_no_threshold_and_it_is_said() -> None:
    scores = [scores_with(float(value), "ab"[value % 2]) for value in range(30)]
    asked = {"image": 0.95, "pixel": 0.5}
    point = thresholds("m", scores, asked)
    assert point.volume_threshold is None
    whole = OperatingPoint(asked, {}, {"scored": 30, "left_out": {}}, {"m": point})
    assert "a specificity of 0.95 needs 19 normal volumes, and 2 are here" in whole.summary()


def point_at(image_threshold: float, pixel_threshold: float) -> MetricPoint:
    """An operating point whose normal maxima are 1, 2, 3."""
    point = thresholds("m", [scores_with(v) for v in (1.0, 2.0, 3.0)], HALF)
    return replace(point, image_threshold=image_threshold, pixel_threshold=pixel_threshold)


def point_of(folder: Path, *more: str, n: int = 4, specificity: float = 0.75):
    """The operating point of the checkpoint in `folder / "model"`, from n normal images."""
    root = write_images(folder / "normal", n=n, size=(48, 64))
    paths = sorted(root.iterdir())
    config = tiny_config(folder, *more)
    return set_operating_point(
        config, folder / "model", "latest", paths, root, specificity=specificity
    )


@pytest.mark.parametrize(
    ("n", "specificity", "k"),
    [(19, 0.95, 19), (20, 0.95, 20), (39, 0.95, 38), (99, 0.99, 99), (4, 0.5, 3), (1, 0.5, 1)],
)
def test_threshold_is_the_order_statistic_of_split_conformal_prediction(n, specificity, k) -> None:
    assert image_rank(n, specificity) == k


@pytest.mark.parametrize(
    ("n", "specificity", "message"),
    [
        (20, 0.99, r"0\.99 needs 99 normal images.*20 of them allow 0\.9524 at most"),
        (18, 0.95, r"0\.95 needs 19 normal images.*18 of them allow 0\.9474 at most"),
        (0, 0.5, "needs 1 normal images.*there is none"),
    ],
)
def test_a_specificity_that_so_few_normals_cannot_promise_is_refused(
    n, specificity, message
) -> None:
    with pytest.raises(OperatingPointError, match=message):
        image_rank(n, specificity)


def test_thresholds_and_their_specificity_by_hand() -> None:
    point = thresholds("m", [scores_with(v) for v in (4.0, 1.0, 3.0, 2.0)], HALF)
    assert point.image_threshold == 3.0  # the third of four: (4 + 1) 0.5 = 2.5, rounded up
    # Beta(3, 2): mean 3 / 5; its distribution function is 4 x³ − 3 x⁴
    value, low, high = point.image_specificity
    assert value == pytest.approx(3 / 5)
    assert 4 * low**3 - 3 * low**4 == pytest.approx(0.025, abs=1e-6)
    assert 4 * high**3 - 3 * high**4 == pytest.approx(0.975, abs=1e-6)
    # of 4,000 pixels, evenly from 0 to 1, 2, 3 and 4, nine tenths are at or below t:
    # 1 + 1 + t/3 + t/4 = 3.6, if t is between 2 and 3
    assert point.pixel_threshold == pytest.approx(1.6 * 12 / 7, abs=0.01)
    assert point.pixel_specificity.value == pytest.approx(0.9, abs=0.001)
    assert point.normal.deviations(2.5) == 0
    assert point.normal.deviations(2.5 + np.std([1, 2, 3, 4], ddof=1)) == pytest.approx(1)
    assert [point.normal.chance(v) for v in (5, 4, 3.5, 0)] == [1 / 5, 2 / 5, 2 / 5, 1]


def test_pixel_threshold_is_never_above_that_of_images() -> None:
    point = thresholds(
        "m", [scores_with(v) for v in (1.0, 2.0, 9.0)], {"image": 0.4, "pixel": 0.999}
    )
    assert point.pixel_threshold == point.image_threshold == 2.0


def test_normals_of_the_same_largest_score_are_refused() -> None:
    with pytest.raises(OperatingPointError, match=r"m: all 3 .*same largest score, 2"):
        thresholds("m", [scores_with(2.0)] * 3, HALF)


def test_further_normals_are_called_normal_as_often_as_promised() -> None:
    generator = np.random.default_rng(0)
    called = []
    for _ in range(400):
        maxima = generator.lognormal(size=25)
        threshold = np.sort(maxima[:24])[image_rank(24, 0.9) - 1]
        called.append(maxima[24] <= threshold)
    assert np.mean(called) == pytest.approx(0.92, abs=0.04)  # k / (n + 1) = 23 / 25


def test_findings_are_regions_whose_peak_no_normal_image_reaches() -> None:
    heatmap = np.zeros((8, 10), dtype=np.float32)
    heatmap[1:3, 2:5] = 2
    heatmap[2, 4] = 7
    heatmap[3, 5] = 2  # touches at a corner: the same region
    heatmap[6, 0:3] = 4  # above the pixels' threshold, but its peak is not above the image's
    heatmap[7, 9] = 5
    found, mask = find(heatmap, point_at(4, 1))
    assert found == [
        Finding(1, 2, 3, 4, 7, 7.0, 4, 2, 5.0, 0.25),
        Finding(7, 9, 1, 1, 1, 5.0, 9, 7, 3.0, 0.25),
    ]
    assert mask.sum() == 8
    assert not mask[6].any()


def test_an_image_is_abnormal_if_and_only_if_it_has_a_finding() -> None:
    generator = np.random.default_rng(0)
    point = point_at(0.97, 0.9)
    for _ in range(50):
        heatmap = generator.random((6, 6)) * generator.uniform(0.9, 1.1)
        found, mask = find(heatmap, point)
        assert (heatmap.max() > point.image_threshold) == bool(found) == bool(mask.any())


def test_pixels_and_windows_without_a_score_do_not_count(folder) -> None:
    more = ("test.only_check_nonblack_pixels=true", "test.heatmap_type=averaged_hole")
    config = tiny_config(folder, ONE, "test.heatmap_alignment=centred", *more)
    predictor = load_predictor(folder / "model", config=config, device="cpu")
    image = texture(48, 128)
    image[:, :, 40:] = 0
    *_, last = predictor.score_image(image, "a")
    scores = image_scores(last, "MCD_image")
    heat = last.heatmaps["MCD_image"]
    assert (heat == 0).any()
    assert scores.pixels.min() == heat[heat > 0].min()
    assert scores.windows["1.0"].min() > 0
    assert scores.largest == heat.max()


def test_smoothing_adds_no_pixels_to_the_normal_ones(folder) -> None:
    more = ("test.only_check_nonblack_pixels=true", "test.heatmap_type=averaged_hole")
    config = tiny_config(folder, ONE, "test.heatmap_alignment=centred", *more)
    image = texture(48, 128)
    image[:, :, 40:] = 0
    kept, smoothed = (
        load_predictor(folder / "model", config=each, device="cpu")
        for each in (config, with_test(config, heatmap_smooth=0.5))
    )
    (*_, sharp), (*_, soft) = (each.score_image(image, "a") for each in (kept, smoothed))
    covered = sharp.heatmaps["MCD_image"] != 0
    assert torch.equal(soft.covered(), covered)
    heat = soft.heatmaps["MCD_image"]
    assert (heat[~covered] > 0).any()
    counted = quantiles(heat[covered].numpy())
    np.testing.assert_array_equal(image_scores(soft, "MCD_image").pixels, counted)


def test_an_image_that_scores_0_all_over_is_a_normal_one(folder) -> None:
    config = tiny_config(folder, ONE)
    *_, last = load_predictor(folder / "model", config=config).score_image(texture(48, 64), "a")
    nothing = replace(last, grids={"MCD_image": torch.zeros_like(last.grids["MCD_image"])})
    assert image_scores(nothing, "MCD_image").pixels.max() == 0


def test_images_that_were_trained_on_are_counted_and_warned_about(folder, caplog) -> None:
    config = tiny_config(folder, ONE, "train.held_out=0.25")
    (folder / "model" / "config.yaml").write_text(config_to_yaml(config))
    write_images(folder / "train", n=4, size=(48, 64))
    paths = sorted((folder / "train").glob("*.png"))
    n_seen = len(split_held_out(paths, 0.25, config.seed)[0])
    assert 0 < n_seen < len(paths)
    warn_of_trained_images(folder / "model", paths)
    assert f"{n_seen} of the {len(paths)} normal images were trained on" in caplog.text


def test_specificity_needs_scores_that_stay() -> None:
    with pytest.raises(ConfigError, match=r"test\.specificity.*auto would change the scores"):
        load_config(PicardConfig, None, ["test.specificity=0.95", "test.calibration=auto"])


def test_file_reads_back_the_same_and_is_deleted_with_its_step(folder) -> None:
    path, point = point_of(folder, ONE)
    assert path == operating_point_path(folder / "model", 1)
    again = load_operating_point(path)
    assert again.text() == point.text()
    assert again.metrics["MCD_image"].image_threshold == point.metrics["MCD_image"].image_threshold
    assert (again.normals["scored"], again.normals["images"]) == (4, 4)
    assert re.fullmatch("[0-9a-f]{64}", again.normals["sha256"])
    write_checkpoint(folder / "model", tiny_config(folder), step=2)
    for step in (1, 2):
        (folder / "model" / f"state_{step:08d}.pt").write_bytes(b"")
    prune_snapshots(folder / "model", keep=1)
    assert not path.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.pop("metrics"),
        lambda saved: saved["metrics"]["MCD_image"].update(image_threshold="NaN"),
        lambda saved: saved["metrics"]["MCD_image"]["normal"].update(maxima=[3, 1, 2]),
        lambda saved: saved.update(made_for=3),
    ],
)
def test_damaged_file_is_refused_with_the_remedy(folder, damage) -> None:
    path, _ = point_of(folder, ONE)
    saved = json.loads(path.read_text())
    damage(saved)
    path.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=f"{path} is damaged.*--mode calibrate"):
        predicted(folder, tiny_config(folder, ONE))


def test_prediction_writes_verdicts_findings_and_masks_that_agree(folder) -> None:
    spot = texture(48, 64, seed=9)
    spot[:, 20:28, 30:40] = 0
    write_image(folder / "test" / "spot.png", spot)
    _, point = point_of(folder)
    result = predicted(folder, tiny_config(folder))
    verdicts = read_table(result.folder / "verdicts.csv")
    findings = read_table(result.folder / "findings.csv")
    assert len(verdicts) == 4 * 2
    for row in verdicts:
        of_image = [f for f in findings if f["image"] == row["image"]]
        of_image = [f for f in of_image if f["metric"] == row["metric"]]
        (listed,) = [
            r
            for r in read_table(result.folder / "heatmaps.csv")
            if (r["image"], r["metric"]) == (row["image"], row["metric"])
        ]
        heat = load_tensors(result.folder / listed["file"])
        threshold = point.metrics[row["metric"]].image_threshold
        assert np.float32(row["threshold"]) == np.float32(threshold)
        assert np.float32(row["score"]) == heat.max().numpy()
        assert row["verdict"] == ("abnormal" if heat.max() > threshold else "normal")
        assert bool(of_image) == (row["verdict"] == "abnormal")
        name = Path(listed["file"]).with_suffix(".png").name
        mask = np.array(Image.open(result.folder / "masks" / name))
        assert mask.shape == (48, 64)
        assert set(np.unique(mask)) <= {0, 255}
        assert (mask > 0).sum() == sum(int(f["area"]) for f in of_image)
        for found in of_image:
            place = (int(found["peak_y"]), int(found["peak_x"]))
            assert np.float32(found["peak"]) == heat[place].numpy()
            assert mask[place] == 255
    counted = [r["verdict"] for r in verdicts if r["metric"] == "MCD_image"].count("abnormal")
    assert any(note.startswith(f"MCD_image: {counted} of 4 images are") for note in result.notes)


def test_verdicts_follow_the_operating_point_without_scoring_again(folder) -> None:
    config = tiny_config(folder, ONE)
    first = predicted(folder, config)
    assert not (first.folder / "verdicts.csv").exists()
    path, point = point_of(folder, ONE)
    again = predicted(folder, config)
    assert (again.folder, again.finished) == (first.folder, [])
    before = read_table(first.folder / "verdicts.csv")
    assert len(before) == 3
    metric = replace(point.metrics["MCD_image"], image_threshold=-1.0, pixel_threshold=-1.0)
    replace(point, metrics={"MCD_image": metric}).save(path)
    predicted(folder, config)
    assert {row["verdict"] for row in read_table(first.folder / "verdicts.csv")} == {"abnormal"}
    path.unlink()
    predicted(folder, config)
    left = {p.name for p in first.folder.iterdir()}
    assert not left & {"verdicts.csv", "findings.csv", "operating_point.json"}
    assert not list((first.folder / "masks").iterdir())


def test_a_run_that_was_killed_between_findings_and_verdict_writes_them_once(folder) -> None:
    config = tiny_config(folder, ONE)
    _, point = point_of(folder, ONE)
    path = operating_point_path(folder / "model", 1)
    metric = replace(point.metrics["MCD_image"], image_threshold=0.0, pixel_threshold=0.0)
    replace(point, metrics={"MCD_image": metric}).save(path)
    result = predicted(folder, config)
    findings = read_table(result.folder / "findings.csv")
    table = result.folder / "verdicts.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    predicted(folder, config)
    assert len(read_table(table)) == 3
    assert sorted(map(str, read_table(result.folder / "findings.csv"))) == sorted(
        map(str, findings)
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("test.patch_stride=8", "test.patch_stride 16 there, 8 now"),
        ("seed=3", "seed 1337 there, 3 now"),
        ("test.heatmap_metrics=[MedCD_image]", "no MedCD_image there"),
    ],
)
def test_other_settings_get_no_verdict_and_a_word_why(folder, change, reason) -> None:
    point_of(folder, ONE)
    result = predicted(folder, tiny_config(folder, ONE, change))
    assert not (result.folder / "verdicts.csv").exists()
    assert any(reason in note and "--mode calibrate" in note for note in result.notes)


def test_fewer_metrics_engines_and_batches_keep_their_verdicts(folder) -> None:
    point_of(folder)
    config = with_test(tiny_config(folder, ONE), parallel_batchsize=1, engine="plain")
    result = predicted(folder, config)
    assert len(read_table(result.folder / "verdicts.csv")) == 3


def test_heatmaps_that_were_not_kept_get_no_verdict_later(folder) -> None:
    config = tiny_config(folder, ONE, "test.save_heatmap_data=false")
    first = predicted(folder, config)
    point_of(folder, ONE)
    again = predicted(folder, config)
    assert any("3 finished before without a verdict" in note for note in again.notes)
    redone = predicted(folder, config, overwrite=True)
    assert redone.folder == first.folder
    assert len(read_table(first.folder / "verdicts.csv")) == 3


def test_normals_that_cannot_be_scored_are_named_and_too_few_refused(folder, caplog) -> None:
    root = write_images(folder / "normal", n=5, size=(48, 64))
    (root / "3.png").write_bytes(b"no picture")
    write_image(root / "4.png", torch.zeros(1, 48, 64))
    config = tiny_config(folder, ONE, "test.only_check_nonblack_pixels=true")
    arguments = (folder / "model", "latest", sorted(root.iterdir()), root)
    _, point = set_operating_point(config, *arguments, specificity=0.75)
    assert list(point.normals["left_out"]) == ["3.png", "4.png"]
    assert "4.png: " in caplog.text
    assert "no tissue" in caplog.text
    with pytest.raises(OperatingPointError, match=r"0\.8 needs 4 .*3 of them allow 0\.75"):
        set_operating_point(config, *arguments, specificity=0.8)
    with pytest.raises(ConfigError, match=r"image specificity must be in \(0, 1\), got 1"):
        set_operating_point(config, *arguments, specificity=1)
    with pytest.raises(ImageError, match=r"3\.png"):
        set_operating_point(with_test(config, on_bad_image="error"), *arguments, specificity=0.75)


def test_images_that_the_calibration_measured_are_warned_about(folder, caplog) -> None:
    root = write_images(folder / "train", n=4, size=(48, 64))
    config = tiny_config(folder, ONE, "test.calibration=knn", "test.calibration_windows=100",
                         "test.heatmap_alignment=centred", "test.patch_stride=8",
                         "netG.dropout_which=ALL")  # fmt: skip
    calibrate(config, folder / "model", "latest")
    paths = sorted(root.iterdir())
    set_operating_point(config, folder / "model", "latest", paths, root, specificity=0.75)
    assert "the specificity will be less than asked for" in caplog.text


def test_command_line_calibrates_by_the_checkpoints_settings_and_predicts(folder) -> None:
    write_images(folder / "normal", n=4, size=(48, 64))
    flags = ["--checkpoint_dir", folder / "model"]
    measure = [EVAL, "--mode", "calibrate", *flags, "--image_dir", folder / "normal"]
    without = run_script(*measure)
    assert without.returncode == 2
    assert "No settings file" in without.stderr
    tiny_file(folder, ONE).rename(folder / "model" / "config.yaml")
    refused = run_script(*measure)
    assert refused.returncode == 1
    assert "needs 19 normal images" in refused.stderr
    done = run_script(*measure, "--specificity", "0.8")
    assert done.returncode == 0, done.stderr
    assert re.search(r"MCD_image: an image is abnormal above \d.*from 4 normal images: 0\.800 \[",
                     done.stdout)  # fmt: skip
    predict = run_script(PREDICT, "--config", folder / "model" / "config.yaml", *flags)
    assert predict.returncode == 0, predict.stderr
    assert "of 3 images are abnormal (verdicts.csv, findings.csv, masks/)" in predict.stdout
    usage = run_script(EVAL, "--mode", "calibrate", *flags)
    assert usage.returncode == 2
    assert "--checkpoint_dir and --image_dir are required" in usage.stderr


KNN = ("test.calibration=knn", "test.calibration_windows=60", "test.patch_stride=8",
       "test.heatmap_alignment=centred", "netG.dropout_which=ALL")  # fmt: skip


@pytest.mark.parametrize("more", [(), KNN], ids=["distances", "calibrated"])
def test_training_ends_with_an_operating_point_of_images_that_it_did_not_see(folder, more) -> None:
    write_images(folder / "train", n=8, size=(48, 64))
    held_out = ("train.held_out=0.5", "test.specificity=0.5", ONE)
    config = tiny_config(folder, *held_out, *more, "train.select_crops=0")
    result = train(config)
    point = load_operating_point(operating_point_path(result.folder, 4))
    assert point.normals["scored"] == (2 if more else 4)
    assert point.asked["image"] == 0.5
    if more:
        saved = load_tensors(checkpoint_path(result.folder, "calibration", 4))
        assert saved["normals"]["images"]["images"] == 2
        assert saved["normals"]["images"]["sha256"] != point.normals["sha256"]
    predicted_there = predict(config, PredictionOptions(result.folder))
    assert (predicted_there.folder / "verdicts.csv").is_file()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ((), ConfigError, r"test\.specificity: 0\.95 needs .*train\.held_out, or calibration_data"),
        (("train.held_out=0.5",), OperatingPointError, r"held out from training: .*needs 19"),
        (("train.held_out=0.5", *KNN), OperatingPointError, r"half of them, for test\.calibration"),
    ],
)
def test_training_that_could_not_measure_its_operating_point_does_not_start(
    folder, more, error, message
) -> None:
    write_images(folder / "train", n=4)
    with pytest.raises(error, match=message):
        train(tiny_config(folder, "test.specificity=0.95", *more))
    assert not list((folder / "checkpoints").rglob("*.pt"))


def test_quantiles_stand_for_all_values() -> None:
    assert np.array_equal(quantiles(np.arange(LEVELS)), np.arange(LEVELS))
    assert quantiles(np.array([3.0])).tolist() == [3.0] * LEVELS
    of_two = quantiles(np.array([5.0, 1.0]))
    assert of_two.tolist() == [1.0] * (LEVELS // 2) + [5.0] * (LEVELS // 2)
