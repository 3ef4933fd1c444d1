"""The benchmark of PICARD on real images."""

import json
import runpy
from pathlib import Path

import nrrd
import numpy as np
import pytest

from benchmarks.real.picard_sets import brain
from common.config import REPOSITORY, ConfigError, config_to_yaml
from tests.tiny_runs import tiny_config, write_checkpoint

PICARD = runpy.run_path(str(REPOSITORY / "benchmarks" / "real" / "picard.py"))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a training that was finished with a smoothing of 0.25."""
    config = tiny_config(tmp_path, "test.heatmap_smooth=0.25")
    write_checkpoint(tmp_path / "run", config)
    (tmp_path / "run" / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    line = json.dumps({"step": 1, "select_l1": 0.1})  # by which the best step is known
    (tmp_path / "run" / "log.jsonl").write_text(f"{line}\n", encoding="utf-8")
    return tmp_path / "run"


def test_finished_training_is_scored_with_the_settings_of_this_call(finished: Path) -> None:
    predictor = PICARD["predictor_of"](finished, ["test.heatmap_smooth=0.125"], "cpu")
    assert predictor.config.test.heatmap_smooth == 0.125


def test_finished_training_keeps_the_settings_that_this_call_does_not_name(finished: Path) -> None:
    predictor = PICARD["predictor_of"](finished, ["test.patch_stride=8"], "cpu")
    assert predictor.config.test.heatmap_smooth == 0.25


@pytest.mark.parametrize("setting", ["train.scales=[0.5]", "netG.ngf=8", "flatten=0.1"])
def test_finished_training_of_other_settings_is_refused(finished: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml has other settings .* another --output"):
        PICARD["predictor_of"](finished, [setting], "cpu")


def test_brain_slices_with_tumour_are_cases_and_others_are_trained_on(tmp_path: Path) -> None:
    volume, tumour = np.zeros((256, 256, 4), np.int16), np.zeros((256, 256, 4), np.int16)
    volume[40:200, 60:220, 1:] = 500  # a head in three of four slices
    volume[100:120, 80:100, 2] = tumour[100:120, 80:100, 2] = 1000
    for number in (1, 2):
        nrrd.write(str(tmp_path / f"brain{number}_image.nrrd"), volume)
        nrrd.write(str(tmp_path / f"brain{number}_label.nrrd"), tumour)
    task = brain(tmp_path, tmp_path / "out")
    assert [path.name for path in sorted(task.training.iterdir())] == ["01.png", "03.png"]
    (case,) = task.cases
    assert case.image.shape == (1, 128, 128)
    assert np.argwhere(case.truth).min(axis=0).tolist() == [40, 50]  # rows, columns
    assert case.truth.sum() == 100
    assert case.body.sum() == 80 * 80 - 4 * 3  # the opening takes the corners off
    assert case.image.amax() == 1
    assert case.group == "brain MR 2 -> 1"
