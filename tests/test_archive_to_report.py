"""A tomosynthesis archive from its download to the report: prepare, train, predict, evaluate."""

import json
from pathlib import Path

from common.config import REPOSITORY
from tests.common.test_archives import COMMAND, write_bcs_dbt
from tests.tiny_runs import PREDICT, TRAIN, as_flags, read_table, run_script, settings


def ran(script: str, *arguments: object) -> str:
    done = run_script(script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tomosynthesis_goes_from_the_download_to_the_report(tmp_path: Path) -> None:
    write_bcs_dbt(tmp_path / "raw")
    folder, heatmaps = tmp_path / "sorted", tmp_path / "heatmaps"
    printed = ran(COMMAND, "prepare", "bcs-dbt", tmp_path / "raw", folder)
    lines = dict(line.strip().split(": ", 1) for line in printed.splitlines() if "_path: " in line)
    flags = as_flags(
        [
            *settings(tmp_path),
            *(f"{key}={path}" for key, path in lines.items()),
            *("data_with_subfolder=true", "train.n_steps=2", "train.snapshot_save_iter=2"),
            "test.heatmap_metrics=[MCD_image]",
        ]
    )
    ran(TRAIN, *flags)
    ran(PREDICT, *flags, "--checkpoint_iter", 2, "--output_dir", heatmaps)
    images = [row["image"] for row in read_table(heatmaps / "heatmaps.csv")]
    assert len(images) == 9  # three slices of each of three views
    assert "cancer/DBT-P00003_DBT-S00004_lcc.dcm#001" in images
    evaluation = ("--annotations", folder / "annotations.csv", "--metadata",
                  folder / "metadata.csv", "--bootstrap", 5, "--report")  # fmt: skip
    eval_py = str(REPOSITORY / "eval.py")
    ran(eval_py, *flags, "--heatmap_dir", heatmaps, *evaluation, "--output_dir", tmp_path / "e")
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    lesions = read_table(tmp_path / "e" / "lesions.csv")
    assert sorted(row["label"] for row in lesions) == ["benign", "benign", "cancer"]
    assert (tmp_path / "e" / "report.html").is_file()
    assert results["settings"]
