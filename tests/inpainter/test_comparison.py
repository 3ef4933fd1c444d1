"""Two folders of heatmaps on the same images."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inpainter.comparison import compare
from inpainter.evaluation import EvaluationSettings, evaluate_heatmaps
from inpainter.heatmap_tables import EvaluationError
from tests.inpainter.evaluation_case import BOXES, SIZE, heatmap_folder, heatmap_of
from tests.tiny_runs import REPOSITORY, run_script


@pytest.fixture
def settings(tmp_path: Path) -> EvaluationSettings:
    return replace(heatmap_folder(tmp_path / "one"), min_distance=3)


@pytest.fixture
def other(tmp_path: Path, settings: EvaluationSettings) -> Path:
    """The same images; `good` is what is called `flat` in the first folder."""
    folder = heatmap_folder(tmp_path / "two").heatmap_dir
    for image in ("a", "sub__b", "c"):
        torch.save(
            torch.from_numpy(heatmap_of(f"{image}.png", "flat")),
            folder / "data" / f"{image}_good.pt",
        )
    return folder


def test_differences_are_those_of_the_two_evaluations(
    settings: EvaluationSettings, other: Path
) -> None:
    evaluation = evaluate_heatmaps(settings)
    there = evaluate_heatmaps(replace(settings, heatmap_dir=other)).results[0]
    good, flat = compare(evaluation, other)
    here = evaluation.results[0]
    expected = {
        "per_image_auroc": (here.per_image["auroc"], there.per_image["auroc"]),
        "per_image_ap": (here.per_image["ap"], there.per_image["ap"]),
        "pixel_auroc": (here.pooled["auroc"], there.pooled["auroc"]),
        "pixel_ap": (here.pooled["ap"], there.pooled["ap"]),
        "aupro": (here.pooled["pro"], there.pooled["pro"]),
        "froc_mean": (here.detection.sensitivity["mean"], there.detection.sensitivity["mean"]),
    }
    for name, (one, two) in expected.items():
        assert good.values[name] == pytest.approx(one.value)
        assert good.other_values[name] == pytest.approx(two.value)
        assert good.differences[name].value == pytest.approx(one.value - two.value)
        assert good.differences[name].low <= good.differences[name].high
    assert set(flat.differences.values()) == {(0.0, 0.0, 0.0)}
    assert good.image_auroc is None  # one normal image


def test_images_of_one_folder_alone_are_left_out_and_named(
    settings: EvaluationSettings, other: Path
) -> None:
    table = other / "heatmaps.csv"
    lines = [line for line in table.read_text().splitlines() if not line.startswith("sub/b")]
    table.write_text("\n".join([*lines, "d.png,good,data/a_good.pt", ""]))
    good = compare(evaluate_heatmaps(settings), other)[0]
    assert (good.images, good.only_one_has) == (2, ["d.png", "sub/b.png"])
    assert good.values["froc_mean"] == 1.0  # of a.png's lesion


def test_folders_that_cannot_be_compared_are_refused(
    settings: EvaluationSettings, other: Path
) -> None:
    evaluation = evaluate_heatmaps(settings)
    with pytest.raises(EvaluationError, match="is --heatmap_dir itself"):
        compare(evaluation, settings.heatmap_dir)
    torch.save(torch.rand(SIZE[0], SIZE[1] + 1), other / "data" / "c_good.pt")
    with pytest.raises(EvaluationError, match=r"c\.png: its two heatmaps have 80 and 88 pixels"):
        compare(evaluation, other)
    table = other / "heatmaps.csv"
    table.write_text(table.read_text().replace("good,", "better,").replace("flat,", "worse,"))
    with pytest.raises(EvaluationError, match=r"has good, flat, .* has better, worse"):
        compare(evaluation, other)
    table.write_text("image,metric,file\nz.png,good,data/a_good.pt\n")
    with pytest.raises(EvaluationError, match="has none of the 3 images"):
        compare(evaluation, other)


def test_command_compares_and_splits_and_writes_all_of_it(
    settings: EvaluationSettings, other: Path, tmp_path: Path
) -> None:
    settings.annotations.write_text(BOXES)
    (tmp_path / "patients.csv").write_text(
        "image,patient,sex\na.png,1,f\nsub/b.png,2,m\nc.png,2,m\n"
    )
    result = run_script(
        str(REPOSITORY / "eval.py"),
        *("--heatmap_dir", settings.heatmap_dir, "--annotations", settings.annotations),
        *("--compare", other, "--metadata", tmp_path / "patients.csv", "--group", "sex"),
        *("--hit_rule", "bcs_dbt", "--false_positives", "normal", "--size_bins", 5, 8),
        *("--bootstrap", 20),
    )
    assert result.returncode == 0, result.stderr
    assert "good: share of lesions found (FROC, bcs_dbt) at false positives per image without" in (
        result.stdout
    )
    assert "Intervals: 95 % bootstrap over patients (2), 20 draws" in result.stdout
    assert f"good against good in {other}, 3 images" in result.stdout
    folder = settings.heatmap_dir / "evaluation"
    written = json.loads((folder / "results.json").read_text())
    assert written["comparison"]["metrics"]["good"]["images"] == 3
    assert written["comparison"]["metrics"]["flat"]["differences"]["aupro"]["value"] == 0
    assert [group["value"] for group in written["metrics"]["good"]["groups"]] == ["f", "m"]
    assert written["metrics"]["good"]["froc"]["units_counted_on"] == 1
    assert (folder / "lesions.csv").is_file()
    assert (folder / "candidates.csv").is_file()
