"""Sensitivity and specificity at the operating point, by hand."""

import json
from pathlib import Path

import pytest

from common.config import REPOSITORY
from common.metrics import share_interval
from inpainter.evaluation import evaluate_heatmaps
from inpainter.heatmap_tables import EvaluationError
from inpainter.operating_statistics import operating_statistics, read_verdicts
from tests.inpainter.evaluation_case import heatmap_folder
from tests.tiny_runs import run_script

VERDICTS = """image,metric,score,threshold,verdict
a.png,good,123,90,abnormal
sub/b.png,good,88,90,normal
c.png,good,79,90,normal
"""


def with_verdicts(folder: Path, text: str = VERDICTS) -> Path:
    (folder / "verdicts.csv").write_text(text)
    return folder


def test_wilson_interval_by_hand() -> None:
    # (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964, p = 8/10
    assert share_interval(8, 10) == pytest.approx((0.8, 0.4901625, 0.9433178))
    assert share_interval(0, 0) is None
    value, low, high = share_interval(5, 5)
    assert (value, high) == (1, 1)
    assert 0.5 < low < 0.6


def test_verdicts_are_counted_against_the_annotations(tmp_path) -> None:
    settings = heatmap_folder(tmp_path)
    folder = with_verdicts(settings.heatmap_dir)
    found = operating_statistics(evaluate_heatmaps(settings).results, folder)
    assert list(found) == ["good"]  # there are none of the other metric
    good = found["good"]
    assert (good.true_positives, good.false_negatives) == (1, 1)
    assert (good.true_negatives, good.false_positives) == (1, 0)
    assert good.sensitivity.value == 0.5
    assert good.specificity.value == 1
    assert good.thresholds == (90.0,)
    assert good.without_verdict == ()


def test_images_without_verdict_do_not_count_and_are_named(tmp_path) -> None:
    settings = heatmap_folder(tmp_path)
    folder = with_verdicts(settings.heatmap_dir, "\n".join(VERDICTS.splitlines()[:3]) + "\n")
    good = operating_statistics(evaluate_heatmaps(settings).results, folder)["good"]
    assert good.without_verdict == ("c.png",)
    assert good.specificity is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("abnormal", "perhaps", r"line 2: expected a verdict.*got 'perhaps'"),
        ("79,90", "79,much", r"line 4: .*'much'"),
        ("c.png", "a.png", r"line 4: a.png, good is there twice"),
        ("verdict\n", "result\n", r"columns \['verdict'\] are missing"),
    ],
)
def test_malformed_verdicts_are_refused_by_line(tmp_path, old, new, message) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_verdicts(with_verdicts(tmp_path, VERDICTS.replace(old, new)))


def test_command_line_reports_sensitivity_and_specificity(tmp_path) -> None:
    settings = heatmap_folder(tmp_path)
    flags = ("--heatmap_dir", with_verdicts(settings.heatmap_dir), "--annotations",
             settings.annotations, "--bootstrap", "0", "--report")  # fmt: skip
    done = run_script(str(REPOSITORY / "eval.py"), "--mode", "heatmap", *flags)
    assert done.returncode == 0, done.stderr
    assert "Images at the operating point (95 % Wilson intervals)" in done.stdout
    folder = settings.heatmap_dir / "evaluation"
    found = json.loads((folder / "results.json").read_text())["at_operating_point"]["good"]
    assert found["sensitivity"]["value"] == 0.5
    assert (found["true_positives"], found["false_positives"]) == (1, 0)
    assert "Images at the operating point" in (folder / "report.html").read_text()
