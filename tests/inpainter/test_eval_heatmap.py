"""The command line eval.py --mode heatmap: what it prints, what it writes, how it refuses."""

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import REPOSITORY, config_to_yaml, load_config
from inpainter.evaluation import EvaluationSettings
from inpainter.settings import PicardConfig
from tests.inpainter.evaluation_case import expected_auroc, heatmap_folder
from tests.tiny_runs import run_script


@pytest.fixture
def settings(tmp_path: Path) -> EvaluationSettings:
    return heatmap_folder(tmp_path)


def run_eval(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_script(REPOSITORY / "eval.py", *arguments)


def test_command_prints_a_table_and_writes_numbers_and_plots(
    settings: EvaluationSettings, tmp_path: Path
) -> None:
    result = run_eval(
        *("--mode", "heatmap", "--config", REPOSITORY / "configs" / "default.yaml"),
        *("--heatmap_dir", settings.heatmap_dir, "--annotations", settings.annotations),
        *("--image_dir", tmp_path / "images", "--inside_tissue", "--seed", 5, "--bootstrap", 20),
        *("--report", "--report_images", 2),
    )
    assert result.returncode == 0, result.stderr
    assert "good    mean over images with a lesion  2" in result.stdout
    folder = settings.heatmap_dir / "evaluation"
    written = json.loads((folder / "results.json").read_text())
    assert written["settings"]["seed"] == written["config"]["seed"] == 5
    assert written["settings"]["inside_tissue"] == written["config"]["test"]["tissue_threshold"]
    assert "--checkpoint_iter 7" in written["heatmaps_made_by"]["command.txt"]
    good = written["metrics"]["good"]
    b = expected_auroc("sub/b.png", "good", [(4, 5, 3, 3), (0, 0, 1, 1)])
    assert good["per_image"]["auroc"]["value"] == pytest.approx((1 + b) / 2)
    assert good["image_level"]["auroc"]["value"] == 1.0
    counts = [good[f"images{kind}"] for kind in ("", "_with_lesion", "_normal")]
    assert counts == [3, 2, 1]
    assert (good["pixels"], good["lesion_pixels"], good["lesion_regions"]) == (240, 16, 3)
    plots = {path.name for path in (folder / "plots").iterdir()}
    kinds = ("roc", "pr", "froc", "scores", "image_scores")
    assert plots == {f"{kind}_{metric}.png" for kind in kinds for metric in ("good", "flat")} | {
        *("roc.png", "pr.png", "contact_sheet.png")
    }
    page = (folder / "report.html").read_text()
    assert "The 2 images of 3" in page
    assert page.count('<article class="card"') == 2
    assert "--checkpoint_iter 7" in page
    with (folder / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a.png", "sub/b.png", "c.png"] * 2
    assert float(rows[1]["auroc"]) == pytest.approx(b)
    assert (rows[2]["auroc"], rows[2]["has_lesion"]) == ("", "False")


def test_images_are_read_as_they_were_for_the_heatmaps(settings: EvaluationSettings) -> None:
    made_with = load_config(PicardConfig, None, ["white_value=4095", "test.tissue_threshold=0.25"])
    (settings.heatmap_dir / "config.yaml").write_text(config_to_yaml(made_with))

    def found(*flags: str) -> dict[str, Any]:
        result = run_eval(
            *("--config", REPOSITORY / "configs" / "default.yaml", "--inside_tissue"),
            *("--heatmap_dir", settings.heatmap_dir, "--annotations", settings.annotations),
            *("--image_dir", settings.heatmap_dir.parent / "images", "--bootstrap", 0, *flags),
        )
        assert result.returncode == 0, result.stderr
        written = settings.heatmap_dir / "evaluation" / "results.json"
        return json.loads(written.read_text())["settings"] | {"log": result.stderr}

    by_default = found()
    assert (by_default["white_value"], by_default["inside_tissue"]) == (4095, 0.25)
    said = "As the heatmaps were made: test.tissue_threshold: 0.25, white_value: 4095"
    assert said in by_default["log"]
    asked = found("--set", "white_value=1023", "--set", "test.tissue_threshold=0.1")
    assert (asked["white_value"], asked["inside_tissue"]) == (1023, 0.1)


def test_command_names_what_is_wrong_and_how_to_mend_it(settings: EvaluationSettings) -> None:
    result = run_eval("--heatmap_dir", settings.heatmap_dir.parent, "--annotations", "none.csv")
    assert result.returncode == 1
    assert "has no heatmaps.csv. Pass --heatmap_dir the folder" in result.stderr
    assert str(settings.heatmap_dir) in result.stderr
    assert "Traceback" not in result.stderr


def test_output_path_that_is_a_file_is_refused_before_anything_is_computed(
    settings: EvaluationSettings, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("text")
    result = run_script(
        str(REPOSITORY / "eval.py"),
        *("--heatmap_dir", settings.heatmap_dir, "--annotations", settings.annotations),
        *("--output_dir", tmp_path / "out"),
    )
    assert result.returncode == 1
    assert f"--output_dir {tmp_path / 'out'} is a file. Pass a folder" in result.stderr
    assert not (settings.heatmap_dir / "evaluation").exists()


def test_report_without_images_is_refused(settings: EvaluationSettings) -> None:
    given = ("--heatmap_dir", settings.heatmap_dir, "--annotations", settings.annotations)
    result = run_eval(*given, "--report", "--report_images", 0)
    assert result.returncode == 2
    assert "--report_images must be 1 or more, got 0" in result.stderr


def test_dry_run_prints_the_settings_and_needs_no_heatmaps() -> None:
    result = run_eval("--mode", "heatmap", "--dry_run", "--seed", 9)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["seed"] == 9


def test_mode_that_does_not_exist_is_refused() -> None:
    result = run_eval("--mode", "segment", "--dataset", "cifar10")
    assert result.returncode == 2
    assert "invalid choice: 'segment' (choose from" in result.stderr
