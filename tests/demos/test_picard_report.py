"""The demos' table: values by hand, seeds, groups, and the files written."""

import json

import numpy as np
import pytest
import torch

from demos.picard_report import Case, DemoError, compare, format_table, run_command, save_results

TRUTH = np.array([[True, False], [False, False]])
GOOD = np.array([[9, 1], [2, 3]], np.float32)  # AUROC 1, AP 1
MIDDLE = np.array([[2, 1], [0, 3]], np.float32)  # one of three normal pixels scores higher


def cases(*groups: str) -> list[Case]:
    everywhere = np.ones_like(TRUTH)
    image = torch.full((1, 2, 2), 0.5)
    return [Case(f"{n}.png", image, TRUTH, everywhere, group) for n, group in enumerate(groups)]


def test_rows_are_means_over_images_and_seeds_of_each_group():
    maps = {"ours": [[GOOD, MIDDLE], [MIDDLE, MIDDLE]], "rival": [[MIDDLE, GOOD]]}
    rows = {(row.group, row.method): row for row in compare(cases("mass", "mass"), maps)}
    ours = rows["mass", "ours"]
    assert ours.auroc_by_seed == pytest.approx([5 / 6, 2 / 3])
    assert ours.auroc.value == pytest.approx(3 / 4)
    assert ours.ap_by_seed == pytest.approx([3 / 4, 1 / 2])
    assert rows["mass", "rival"].auroc.value == pytest.approx(5 / 6)
    assert ours.auroc.low <= ours.auroc.value <= ours.auroc.high


def test_groups_are_scored_apart_and_only_inside_the_body():
    inside = np.array([[True, True], [True, False]])
    first, second = cases("mass", "swirl")
    rows = compare([first, second._replace(body=inside)], {"ours": [[MIDDLE, MIDDLE]]})
    assert [(row.group, row.auroc.value) for row in rows] == [
        ("mass", pytest.approx(2 / 3)),
        ("swirl", pytest.approx(1)),
    ]


def test_missing_heatmap_is_refused():
    with pytest.raises(ValueError, match="ours: 1 heatmaps for 2 images"):
        compare(cases("mass", "mass"), {"ours": [[GOOD]]})


def test_table_shows_spread_over_seeds_only_where_there_are_several():
    maps = {"ours": [[GOOD], [MIDDLE]], "rival": [[MIDDLE]]}
    ours, rival = format_table(compare(cases("mass"), maps)).splitlines()[-2:]
    assert "0.833 ± 0.236" in ours
    assert "±" not in rival


def test_results_and_contact_sheet_are_written(tmp_path):
    maps = {"ours": [[GOOD, MIDDLE]]}
    chosen = cases("mass", "swirl")
    save_results(compare(chosen, maps), chosen, maps, ["ours"], tmp_path, {"data_seed": 7})
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert saved["data_seed"] == 7
    assert [row["group"] for row in saved["rows"]] == ["mass", "swirl"]
    assert (tmp_path / "contact_sheet.png").stat().st_size > 1000


def test_failed_command_is_named():
    said = []
    with pytest.raises(DemoError, match=r"no_such_script\.py.*status 2"):
        run_command(["no_such_script.py"], said.append)
    assert "no_such_script.py" in said[0]


def test_intervals_draw_patients_where_all_are_known() -> None:
    truth = np.zeros((4, 4), bool)
    truth[0] = True
    body, pixels = np.ones((4, 4), bool), torch.zeros(1, 4, 4)
    maps = [np.where(truth, value, 0.5).astype(np.float32) for value in (1.0, 1.0, 0.0, 0.0)]
    shown = [Case(f"{n}.png", pixels, truth, body, patient="ab"[n // 2]) for n in range(4)]
    (by_patient,) = compare(shown, {"m": [maps]})
    (by_image,) = compare([case._replace(patient=None) for case in shown], {"m": [maps]})
    assert by_patient.auroc.value == by_image.auroc.value == 0.5
    assert (by_patient.auroc.low, by_patient.auroc.high) == (0, 1)  # both draws are one patient
    (one,) = compare([case._replace(patient="a") for case in shown], {"m": [maps]})
    assert one.auroc.low is None
