"""Evaluation of heatmaps by lesion, by patient and by group."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.config import ConfigError
from inpainter.evaluation import EvaluationSettings, evaluate_heatmaps
from inpainter.evaluation_report import write_report
from inpainter.evaluation_tables import candidates_csv, detection_table, lesions_csv
from inpainter.heatmap_tables import EvaluationError
from tests.inpainter.evaluation_case import heatmap_folder

LABELLED = (
    "image,top,left,height,width,label,patient\n"
    "a.png,1,2,2,3,mass,1\nsub/b.png,4,5,3,3,mass,2\nsub/b.png,0,0,1,1,calcification,2\n"
    "c.png,,,,,,1\n"
)
METADATA = "image,scanner\na.png,X\nsub/b.png,Y\nc.png,X\n"


@pytest.fixture
def settings(tmp_path: Path) -> EvaluationSettings:
    settings = heatmap_folder(tmp_path)
    settings.annotations.write_text(LABELLED)
    (tmp_path / "metadata.csv").write_text(METADATA)
    return replace(settings, min_distance=3)


def test_lesions_found_by_hand(settings: EvaluationSettings) -> None:
    # good: a.png's box has 124 in its corner (2, 4) and b.png's box 107 in (6, 7); the last pixel,
    # 79, is a false maximum in a and c, in b it lies too near; (0, 0) is the lowest of all
    found = evaluate_heatmaps(settings).results[0].detection
    assert found.unit == "image"
    assert found.curve.thresholds.tolist()[1:] == [124.0, 107.0, 79.0]
    assert found.curve.sensitivity == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])
    assert found.curve.false_positives.tolist() == [0, 0, 0, 2 / 3]
    assert found.sensitivity["0.125"].value == pytest.approx(2 / 3)
    assert [(group.name, group.lesions) for group in found.by_class] == [
        ("calcification", 1),
        ("mass", 2),
    ]
    assert [group.sensitivity["mean"].value for group in found.by_class] == [0, 1]
    assert [group.name for group in found.by_size] == [
        "up to 4 px",
        "above 4 to 7 px",
        "above 7 px",
    ]


def test_coco_gives_what_boxes_give_class_by_class(settings: EvaluationSettings) -> None:
    by_box = evaluate_heatmaps(settings).results[0]
    corners = {
        1: [2, 1, 5, 1, 5, 3, 2, 3],
        2: [5, 4, 8, 4, 8, 7, 5, 7],
        3: [0, 0, 1, 0, 1, 1, 0, 1],
    }
    found = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "sub/b.png"}],
        "categories": [{"id": 1, "name": "mass"}, {"id": 2, "name": "calcification"}],
        "annotations": [
            {"image_id": min(n, 2), "category_id": 1 + (n > 2), "segmentation": [outline]}
            for n, outline in corners.items()
        ],
    }
    path = settings.annotations.with_name("coco.json")
    path.write_text(json.dumps(found))
    by_outline = evaluate_heatmaps(replace(settings, annotations=path)).results[0]
    assert by_outline.rows == by_box.rows
    classes = [
        [(group.name, group.lesions, group.sensitivity["mean"].value) for group in of.by_class]
        for of in (by_outline.detection, by_box.detection)
    ]
    assert classes[0] == classes[1] == [("calcification", 1, 0), ("mass", 2, 1)]


def test_lesions_and_candidates_are_listed(settings: EvaluationSettings) -> None:
    results = evaluate_heatmaps(settings).results
    lesions = list(csv.DictReader(io.StringIO(lesions_csv(results))))
    assert [row["score"] for row in lesions[:3]] == ["124", "107", ""]
    assert lesions[2]["label"] == "calcification"
    candidates = list(csv.DictReader(io.StringIO(candidates_csv(results))))
    of_good = [row for row in candidates if row["metric"] == "good"]
    assert [(row["image"], row["row"], row["column"], row["lesion"]) for row in of_good] == [
        ("a.png", "2", "4", "0"),
        ("a.png", "7", "9", ""),
        ("sub/b.png", "6", "7", "1"),
        ("c.png", "7", "9", ""),
    ]


def test_own_bounds_of_size(settings: EvaluationSettings) -> None:
    found = evaluate_heatmaps(replace(settings, size_bins=(6.0,))).results[0].detection
    assert [(group.name, group.lesions) for group in found.by_size] == [
        ("up to 6 px", 2),
        ("above 6 px", 1),
    ]


def test_intervals_are_by_patient_where_the_annotations_or_metadata_know_him(
    settings: EvaluationSettings, tmp_path: Path
) -> None:
    evaluation = evaluate_heatmaps(settings)
    assert evaluation.sources.clusters.unit == "patient"
    write_report(evaluation, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["intervals"] == "95 % bootstrap over patients (2), 20 draws"
    best = written["metrics"]["good"]["best_on_the_test_set"]
    assert set(best) == {"note", "f1_over_all_pixels", "dice_mean_over_images_with_lesion"}
    froc = written["metrics"]["good"]["froc"]
    assert (froc["hit_rule"], froc["units"], froc["lesions"]) == ("centre_in_mask", 3, 3)
    assert froc["sensitivity"]["mean"]["value"] == pytest.approx(2 / 3)


def test_results_by_group(settings: EvaluationSettings, tmp_path: Path) -> None:
    grouped = replace(settings, metadata=tmp_path / "metadata.csv", groups=("scanner",))
    evaluation = evaluate_heatmaps(grouped)
    of_x, of_y = evaluation.results[0].groups
    assert (of_x.column, of_x.value, of_x.images, of_x.images_with_lesion) == ("scanner", "X", 2, 1)
    assert of_x.image_level["auroc"].value == 1.0
    assert of_x.pooled["auroc"].value == 1.0
    assert of_x.sensitivity["0.125"].value == 1.0
    assert of_y.image_level is None
    assert of_y.sensitivity["mean"].value == 0.5
    assert "scanner X" in detection_table(evaluation)


@pytest.mark.parametrize("rule", ["iou", "bcs_dbt"])
def test_other_rules_of_a_hit(settings: EvaluationSettings, rule: str) -> None:
    found = evaluate_heatmaps(replace(settings, hit_rule=rule)).results[0].detection
    assert found.hit_rule == rule
    # all centres lie within 100 pixels of each other here
    expected = {"iou": [124.0, 107.0, None], "bcs_dbt": [124.0, 107.0, 107.0]}[rule]
    scores = [lesion.score if lesion.score > 0 else None for lesion in found.found.lesions]
    assert scores == expected


def test_settings_of_detection_that_make_no_sense_are_refused(
    settings: EvaluationSettings, tmp_path: Path
) -> None:
    for wrong, message in (
        ({"min_iou": 0.0}, "--min_iou must be above 0"),
        ({"min_distance": 0}, "--min_distance must be 1"),
        ({"size_bins": (0.0,)}, "--size_bins must be above 0"),
        ({"groups": ("sex",)}, "Pass --metadata"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(settings, **wrong)
    settings.annotations.write_text(LABELLED.replace("c.png,,,,,", "c.png,0,0,2,2,mass"))
    with pytest.raises(EvaluationError, match="Pass --false_positives all"):
        evaluate_heatmaps(replace(settings, false_positives_on="normal"))
    many = "image,id\n" + "".join(f"{name},{n}\n" for n, name in enumerate(["a.png", "c.png"]))
    (tmp_path / "metadata.csv").write_text(many.replace(",0", ",").replace(",1", ","))
    grouped = replace(settings, metadata=tmp_path / "metadata.csv", groups=("id",))
    with pytest.raises(EvaluationError, match="has 0 values"):
        evaluate_heatmaps(grouped)
