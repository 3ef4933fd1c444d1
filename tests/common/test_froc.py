"""FROC against hand-computed values and MONAI's answers: candidates, hits, volumes, the curve."""

from pathlib import Path

import numpy as np
import pytest

from common.candidates import (
    Candidates,
    HitRule,
    ImageFindings,
    find_candidates,
    find_in_image,
    regions_of_boxes,
    regions_of_mask,
)
from common.froc import (
    RATES,
    Detections,
    FrocEvents,
    join_units,
)
from common.metrics import MetricError, PixelCase
from common.pooled_metrics import pool_pixels

REFERENCES = Path(__file__).parent / "data" / "detection_references.npz"


def case_of(peaks: dict[tuple[int, int], float], size: tuple[int, int] = (20, 30)) -> PixelCase:
    """A heatmap of zeros with single pixels of these scores, and no lesion."""
    heatmap = np.zeros(size, np.float32)
    for place, score in peaks.items():
        heatmap[place] = score
    return PixelCase(heatmap, np.zeros(size, bool))


def places(candidates: Candidates) -> list[tuple[int, int]]:
    return list(zip(candidates.rows.tolist(), candidates.columns.tolist(), strict=True))


def findings(
    image: str,
    peaks: dict[tuple[int, int], float],
    boxes: list[tuple] = (),
    rule: HitRule = "centre_in_mask",
    size: tuple[int, int] = (20, 30),
    volume_slices: int | None = None,
) -> ImageFindings:
    case = case_of(peaks, size)
    candidates = find_candidates(case, 2, with_boxes=rule == "iou")
    regions = regions_of_boxes(boxes, case)
    return find_in_image(image, candidates, regions, rule, volume_slices=volume_slices)


def joined(*images: ImageFindings, rule: HitRule = "centre_in_mask") -> Detections:
    return join_units(images, rule, 2)


def test_candidates_are_the_local_maxima_from_the_highest_on() -> None:
    found = find_candidates(case_of({(3, 4): 1.0, (10, 20): 3.0, (15, 5): 2.0}), 2)
    assert places(found) == [(10, 20), (15, 5), (3, 4)]
    assert found.scores.tolist() == [3.0, 2.0, 1.0]


def test_of_maxima_within_the_distance_the_higher_one_stays() -> None:
    case = case_of({(10, 10): 3.0, (10, 12): 2.0, (10, 13): 1.0, (16, 10): 1.5})
    assert places(find_candidates(case, 2)) == [(10, 10), (16, 10)]


def test_plateau_counts_once_at_its_centre() -> None:
    case = case_of({(5 + i, 7 + j): 2.0 for i in range(3) for j in range(5)})
    assert places(find_candidates(case, 1)) == [(6, 9)]


def test_step_on_the_way_up_is_no_candidate() -> None:
    case = case_of({(8, column): 1.0 for column in range(2, 20)} | {(8, 20): 2.0})
    assert places(find_candidates(case, 2)) == [(8, 20)]


def test_constant_heatmap_has_no_candidate() -> None:
    assert find_candidates(PixelCase(np.ones((8, 9)), np.zeros((8, 9))), 2).scores.size == 0


def test_ignored_pixel_is_no_candidate_and_hides_none() -> None:
    case = case_of({(5, 5): 9.0, (5, 6): 1.0})
    ignored = np.zeros((20, 30), bool)
    ignored[5, 5] = True
    assert places(find_candidates(case._replace(ignore_mask=ignored), 2)) == [(5, 6)]


def test_distance_is_two_per_cent_of_the_longer_side_where_none_is_given() -> None:
    case = case_of({(10, 100): 3.0, (10, 108): 2.0, (10, 117): 1.0}, (50, 400))
    assert places(find_candidates(case)) == [(10, 100), (10, 117)]  # 8 pixels


def test_as_many_candidates_stay_as_are_asked_for() -> None:
    case = case_of({(5, 4 * i): 1.0 + i for i in range(7)})
    assert find_candidates(case, 1, most=2).scores.tolist() == [7.0, 6.0]


def test_component_is_what_is_above_half_the_height_of_its_maximum() -> None:
    column = np.array([0, 1, 4, 6, 10, 6, 4, 1, 0] + [0] * 200, np.float32)
    heatmap = np.minimum(column[:, None], column[None])
    found = find_candidates(PixelCase(heatmap, heatmap > 99), 3, with_boxes=True)
    assert found.boxes.tolist() == [[3, 3, 3, 3]]  # 5 or more
    wide = np.zeros((10, 200), np.float32)
    wide[4, 20:170] = 1
    found = find_candidates(PixelCase(wide, wide > 99), 3, with_boxes=True)
    assert found.boxes.tolist() == [[4, 20, 1, 150]]


def test_maximum_in_a_box_hits_it_and_the_one_beside_it_does_not() -> None:
    found = findings("a", {(5, 5): 2.0, (5, 10): 1.0}, [(5, 5, 1, 5, "mass")])
    assert found.hits.tolist() == [[True], [False]]
    assert found.lesions[0].area == 5


def test_hole_of_a_mask_is_not_hit() -> None:
    ring = np.zeros((20, 30), bool)
    ring[4:9, 4:9] = True
    ring[6, 6] = False
    case = case_of({(6, 6): 2.0, (12, 4): 1.0})._replace(segmentation=ring)
    found = find_in_image("a", find_candidates(case, 2), regions_of_mask(case), "centre_in_mask")
    assert found.hits.tolist() == [[False], [False]]
    assert found.lesions[0][:4] == (4, 4, 5, 5)
    assert found.lesions[0].area == 24


def test_lesion_of_which_no_pixel_counts_is_none() -> None:
    case = case_of({(5, 5): 2.0})
    ignored = np.zeros((20, 30), bool)
    ignored[:10] = True
    boxes = [(0, 0, 10, 10, ""), (8, 0, 4, 4, ""), (30, 0, 4, 4, "")]
    regions = regions_of_boxes(boxes, case._replace(ignore_mask=ignored))
    assert [region.lesion.area for region in regions] == [8]


@pytest.mark.parametrize(("column", "hit"), [(20, True), (21, False)])
def test_boxes_hit_by_their_overlap(column: int, hit: bool) -> None:
    # component of 1 x 10 pixels in columns 5 to 14; lesion of 1 x 10 from column 20 - 6 or 7
    peaks = {(5, c): 1.0 for c in range(5, 15)}
    found = findings("a", peaks, [(5, column - 7, 1, 10, "")], "iou")  # 2 or 1 of 18 or 19 pixels
    assert found.hits.tolist() == [[hit]]


@pytest.mark.parametrize(
    ("box", "hit"),
    [
        # the centre is at (150.5, 150.5)
        ((50, 150, 1, 1), True),  # 100 pixels above
        ((49, 150, 1, 1), False),
        ((0, 0, 200, 10), False),  # centre (100, 5); half the diagonal is 100.1
        ((0, 20, 300, 20), True),  # centre (150, 30); half the diagonal is 150.3
    ],
)
def test_rule_of_bcs_dbt_looks_at_the_distance_of_centres(box: tuple, hit: bool) -> None:
    found = findings("a", {(150, 150): 1.0}, [(*box, "")], "bcs_dbt", size=(400, 400))
    assert found.hits.tolist() == [[hit]]


def test_curve_of_two_images_by_hand() -> None:
    # scores falling: 5 false, 4 hits lesion 0, 3 hits it again, 2 false, 1 hits lesion 1
    first = findings("a", {(5, 5): 5.0, (10, 10): 4.0, (14, 10): 3.0}, [(9, 9, 8, 4, "")])
    second = findings("b", {(5, 5): 2.0, (10, 10): 1.0}, [(9, 9, 4, 4, ""), (0, 20, 4, 4, "")])
    events = FrocEvents(joined(first, second))
    curve = events.curve()
    assert curve.thresholds.tolist() == [np.inf, 5.0, 4.0, 2.0, 1.0]
    assert curve.false_positives.tolist() == [0, 0.5, 0.5, 1, 1]
    assert curve.sensitivity == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3])
    at = curve.at_rates()
    assert [at["0.125"], at["0.5"], at["1"], at["8"]] == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])
    assert at["mean"] == pytest.approx((0 + 0 + 1 / 3 + 4 * 2 / 3) / 7)


def test_candidates_of_one_score_count_together() -> None:
    first = findings("a", {(5, 5): 1.0, (10, 10): 1.0, (5, 20): 1.0}, [(9, 9, 4, 4, "")])
    curve = FrocEvents(joined(first)).curve()
    assert curve.false_positives.tolist() == [0, 2]
    assert curve.sensitivity.tolist() == [0, 1]


def test_false_positives_may_be_counted_on_normal_images_alone() -> None:
    sick = findings("a", {(5, 5): 5.0, (10, 10): 4.0}, [(9, 9, 4, 4, "")])
    normal = findings("b", {(5, 5): 3.0})
    curve = FrocEvents(joined(sick, normal), "normal").curve()
    assert curve.thresholds.tolist() == [np.inf, 4.0, 3.0]
    assert curve.false_positives.tolist() == [0, 0, 1]
    assert FrocEvents(joined(sick, normal)).curve().at_rates()["0.125"] == 0.0
    with pytest.raises(MetricError, match="needs a normal image"):
        FrocEvents(joined(sick), "normal")
    with pytest.raises(MetricError, match="needs a lesion"):
        FrocEvents(joined(normal))


def test_units_that_count_twice_are_as_two_units() -> None:
    images = [
        findings("a", {(5, 5): 5.0, (10, 10): 4.0}, [(9, 9, 4, 4, "")]),
        findings("b", {(5, 5): 2.0, (10, 10): 1.0}, [(9, 9, 4, 4, "")]),
    ]
    again = findings("c", {(5, 5): 5.0, (10, 10): 4.0}, [(9, 9, 4, 4, "")])
    weighted = FrocEvents(joined(*images)).curve(np.array([2.0, 1.0]))
    written_out = FrocEvents(joined(*images, again)).curve()
    for one, other in zip(weighted, written_out, strict=True):
        assert one == pytest.approx(other)


def test_some_lesions_are_sought_at_the_false_positives_of_all() -> None:
    image = findings("a", {(5, 5): 3.0, (10, 10): 2.0}, [(4, 4, 2, 2, "x"), (10, 10, 1, 1, "y")])
    events = FrocEvents(joined(image))
    assert events.at_rates(lesions=np.array([True, False]))["8"] == 1.0
    assert events.curve(lesions=np.array([False, True])).sensitivity.tolist() == [0, 0, 1]


def test_slices_of_a_volume_are_one_unit_and_a_lesion_seen_in_several_is_one() -> None:
    slices = [
        findings("v.dcm#000", {(5, 5): 1.0}, [(4, 4, 4, 4, "")]),
        findings("v.dcm#001", {(5, 5): 3.0, (15, 20): 2.0}, [(5, 5, 5, 5, "")]),
        findings("v.dcm#003", {(5, 5): 0.5}, [(14, 19, 3, 3, "")], volume_slices=40),
        findings("w.png", {}),
    ]
    found = joined(*slices)
    assert found.units == ["v.dcm", "w.png"]
    assert [lesion.image for lesion in found.lesions] == ["v.dcm#001", "v.dcm#003"]
    assert [lesion.score for lesion in found.lesions] == [3.0, -np.inf]
    # the three maxima at (5, 5) lie within 10 slices: one candidate
    rows = [(found.images[c["image"]], c["score"], c["lesion"]) for c in found.candidates]
    assert rows == [("v.dcm#001", 3.0, 0), ("v.dcm#001", 2.0, -1)]


def test_lesion_is_hit_from_a_quarter_of_the_slices_away_by_the_rule_of_bcs_dbt() -> None:
    def volume(slices: int) -> Detections:
        return joined(
            findings("v#000", {(5, 5): 1.0}, rule="bcs_dbt"),
            findings("v#010", {}, [(4, 4, 4, 4, "")], "bcs_dbt", volume_slices=slices),
            rule="bcs_dbt",
        )

    assert volume(40).lesions[0].score == 1.0
    assert volume(39).lesions[0].score == -np.inf


def test_order_of_slices_changes_nothing() -> None:
    slices = [
        findings(f"v#{n:03d}", {(5, 5): n + 1.0, (15, 20): 9.0 - n}, [(4, 4, 4, 4, "")])
        for n in range(6)
    ]
    there, back = FrocEvents(joined(*slices)).curve(), FrocEvents(joined(*slices[::-1])).curve()
    for one, other in zip(there, back, strict=True):
        assert one.tolist() == other.tolist()


def test_intervals_hold_the_values_and_are_made_by_unit() -> None:
    images = [
        findings(f"{n}", {(5, 5): 1.0 + n % 3, (10, 10): 2.0}, [(9, 9, 4, 4, "")])
        for n in range(12)
    ]
    events = FrocEvents(joined(*images))
    intervals = events.intervals(n_resamples=50, seed=0)
    assert intervals["mean"].low < intervals["mean"].value < intervals["mean"].high
    alone = events.intervals(units=np.array([3]), n_resamples=50, seed=0)
    assert alone["8"] == (1.0, None, None)


def test_candidates_curve_and_aupro_are_those_of_monai_and_anomalib() -> None:
    with np.load(REFERENCES, allow_pickle=False) as stored:
        reference = dict(stored)
    cases = [
        PixelCase(*pair) for pair in zip(reference["heatmaps"], reference["masks"], strict=True)
    ]
    images = []
    for number, case in enumerate(cases):
        candidates = find_candidates(case, int(reference["min_distance"]))
        expected = reference["candidates"][reference["candidates"][:, 0] == number, 1:3]
        assert sorted(places(candidates)) == sorted(map(tuple, expected.astype(int).tolist()))
        regions = regions_of_mask(case)
        images.append(find_in_image(f"{number}", candidates, regions, "centre_in_mask"))
    found = join_units(images, "centre_in_mask", 3)
    assert len(found.lesions) == reference["n_lesions"]
    assert tuple(reference["rates"]) == RATES
    at = FrocEvents(found).curve().at_rates()
    assert list(at.values())[:-1] == pytest.approx(reference["sensitivity"].tolist(), abs=1e-6)
    assert at["mean"] == pytest.approx(float(reference["froc_mean"]), abs=1e-6)
    assert pool_pixels(cases).pro == pytest.approx(float(reference["aupro"]), abs=1e-6)
