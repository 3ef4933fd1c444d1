"""PICARD on volumes: slices to train on, heatmaps per slice, a table per volume."""

import dataclasses
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from common.config import load_config
from inpainter.calibrate import halves
from inpainter.heatmap_folder import volume_rows
from inpainter.predictor import load_predictor
from inpainter.settings import PicardConfig
from inpainter.training import training_crops
from tests.tiny_runs import (
    PREDICT,
    heatmaps_in,
    predicted,
    read_table,
    run_script,
    texture,
    tiny_config,
    tiny_file,
    write_checkpoint,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def write_volume(path: Path, n: int = 3, seed: int = 0) -> Path:
    """n textured slices of 40 x 44 pixels, 0 to 2000, as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    slices = [texture(40, 44, seed=seed + i)[0].numpy() * 2000 for i in range(n)]
    lps = np.stack(slices).astype(np.int16).transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(lps, np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_volume(tmp_path / "test" / "scan.nii")
    write_images(tmp_path / "test", n=1)
    write_checkpoint(tmp_path / "model", tiny_config(tmp_path))
    return tmp_path


SLICES = [f"scan.nii#{n:03d}" for n in range(3)]


def test_volume_gets_a_heatmap_per_slice_and_a_row_per_metric(folder) -> None:
    done = run_script(
        PREDICT, "--config", tiny_file(folder), "--checkpoint_dir", folder / "model",
        "--output_dir", folder / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(heatmaps_in(folder / "out")) == {"0.png", *SLICES}
    scores = {
        row["image"]: float(row["max"])
        for row in read_table(folder / "out" / "scores.csv")
        if row["metric"] == "MCD_image" and row["image"] in SLICES
    }
    rows = read_table(folder / "out" / "volumes.csv")
    assert [row["metric"] for row in rows] == ["MCD_image", "MCD_feature"]
    assert (rows[0]["volume"], rows[0]["slices"], rows[0]["left_out"]) == ("scan.nii", "3", "0")
    assert float(rows[0]["max"]) == max(scores.values())
    assert SLICES[int(rows[0]["slice_of_max"])] == max(scores, key=scores.__getitem__)
    assert float(rows[0]["mean_of_max"]) == pytest.approx(np.mean(list(scores.values())), rel=1e-6)
    assert (folder / "out" / "data" / f"{SLICES[1]}_MCD_image_2_0.5_16_32_16.pt").is_file()


def test_slices_are_resumed_and_scored_again_when_their_file_changes(folder) -> None:
    config = tiny_config(folder)
    first = predicted(folder, config)
    assert first.finished == ["0.png", *SLICES]
    assert predicted(folder, config).already_there == ["0.png", *SLICES]
    write_volume(folder / "test" / "scan.nii", n=2, seed=7)
    again = predicted(folder, config)
    assert again.finished == SLICES[:2]
    assert [row["slices"] for row in read_table(first.folder / "volumes.csv")] == ["2", "2"]
    middle = predicted(folder, dataclasses.replace(config, slices="middle"))
    assert middle.folder == first.folder
    assert (middle.finished, middle.already_there) == ([], ["0.png", SLICES[1]])


def test_window_is_part_of_what_heatmaps_depend_on(folder) -> None:
    config = dataclasses.replace(tiny_config(folder), window=(1000.0, 2000.0))
    first = predicted(folder, config)
    assert "window: (1000.0, 2000.0)\n" in (first.folder / "run.txt").read_text()
    other = predicted(folder, dataclasses.replace(config, window=(1000.0, 500.0)))
    assert other.folder != first.folder
    maps, others = heatmaps_in(first.folder), heatmaps_in(other.folder)
    assert torch.equal(maps["0.png"], others["0.png"])
    assert not torch.equal(maps[SLICES[0]], others[SLICES[0]])


def test_bad_slice_is_left_out_alone(folder) -> None:
    path = folder / "test" / "scan.nii"
    path.write_bytes(path.read_bytes()[:-100])
    result = predicted(folder, tiny_config(folder))
    assert result.finished == ["0.png", *SLICES[:2]]
    assert list(result.bad) == [SLICES[2]]
    (row, _) = read_table(result.folder / "volumes.csv")
    assert (row["slices"], row["left_out"]) == ("2", "1")


def test_python_api_takes_a_slice(folder) -> None:
    config = tiny_config(folder)
    predictor = load_predictor(folder / "model", config=config)
    heatmaps = predictor(folder / "test" / SLICES[1])
    result = predicted(folder, config)
    assert torch.equal(heatmaps["MCD_image"], heatmaps_in(result.folder)[SLICES[1]])


def test_training_takes_the_slices_that_the_setting_names(tmp_path) -> None:
    write_volume(tmp_path / "train" / "scan.nii", n=5)
    config = tiny_config(tmp_path, "slices=every_2", "window=[1000, 2000]")
    crops = training_crops(config)
    assert [path.name for path in crops.paths] == [f"scan.nii#{n:03d}" for n in (0, 2, 4)]
    assert crops.crops([0, 1, 2]).abs().max() <= 1
    assert crops.window == (1000.0, 2000.0)


def test_volume_rows_are_those_of_the_highest_slice_and_the_mean_of_all() -> None:
    scores = {
        "p/a.dcm#002": [{"metric": "MCD_image", "max": "1"}],
        "p/a.dcm#010": [{"metric": "MCD_image", "max": "4"}],
        "b.png": [{"metric": "MCD_image", "max": "9"}],
    }
    row = {
        "volume": "p/a.dcm",
        "metric": "MCD_image",
        "slices": 2,
        "left_out": 1,
        "max": "4",
        "slice_of_max": 10,
        "mean_of_max": "2.5",
    }
    lost = ["p/a.dcm#003", "c.png"]
    assert volume_rows(scores, lost, {}) == [row]
    at = {"threshold": "4", "verdict": "normal"}
    assert volume_rows(scores, lost, {"MCD_image": 4.0}) == [row | at]
    assert volume_rows(scores, lost, {"MCD_image": 3.9})[0]["verdict"] == "abnormal"


def test_slices_of_a_volume_stay_in_one_half() -> None:
    paths = [
        Path(name) for name in ("a.nii#000", "b.nii#000", "b.nii#001", "b.nii#002", "c.nii#000")
    ]
    assert [len(half) for half in halves(paths)] == [4, 1]
    assert [len(half) for half in halves([Path("a.png"), Path("b.png")])] == [1, 1]
    assert [len(half) for half in halves(paths[1:4])] == [3, 0]


def test_settings_file_without_the_keys_means_all_slices_as_their_files_say() -> None:
    published = load_config(PicardConfig, Path("configs/published.yaml"))
    assert (published.slices, published.window) == ("all", "auto")
