"""Metrics against hand-computed values, scikit-learn and the recorded answers."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from common.metrics import (
    Interval,
    MetricError,
    PixelCase,
    binary_intervals,
    binary_score,
    bootstrap_draws,
    bootstrap_intervals,
    delong,
    format_interval,
    mean_intervals,
    pixel_scores,
    score_heatmap,
)
from common.pooled_metrics import (
    PRO_MAX_FPR,
    LesionScores,
    count_pixels,
    curve_areas,
    curves,
    pool_pixels,
    pooled_intervals,
    score_pixels,
    thresholds_kept,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "picard_score_heatmap.npz"


def random_cases(seed: int, n: int = 5, decimals: int = 1) -> list[PixelCase]:
    """Heatmaps with ties, lesions that overlap, ignored pixels, and a normal image at the end."""
    draw = np.random.default_rng(seed)
    cases = []
    for i in range(n):
        segmentation = np.zeros((20, 24), bool)
        for _ in range(0 if i == n - 1 else 2):
            top, left = draw.integers(0, 16, 2)
            segmentation[top : top + 5, left : left + 6] = True
        heatmap = np.round(draw.normal(size=(20, 24)) + segmentation, decimals).astype(np.float32)
        ignore = draw.random((20, 24)) < 0.2 if i % 2 else None
        cases.append(PixelCase(heatmap, segmentation, ignore))
    return cases


def all_pixels(cases: list[PixelCase]) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = zip(*map(pixel_scores, cases), strict=True)
    return np.concatenate(scores), np.concatenate(labels)


def test_recorded_heatmap_scores_as_published() -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        heatmap, segmentation, ignore = (
            golden[name] for name in ("heatmap", "segmentation", "ignore_mask")
        )
        expected = [float(golden[n]) for n in ("pixel_AUC", "AP")]
        intended = [float(golden[f"intended_{n}_with_ignore"]) for n in ("pixel_AUC", "AP")]
    assert score_heatmap(heatmap, segmentation) == pytest.approx(expected, abs=1e-9)
    assert score_heatmap(heatmap, segmentation, ignore) == pytest.approx(intended, abs=1e-9)


def test_auroc_and_ap_of_four_pixels() -> None:
    # lesion 4 and 2, background 3 and 1: 3 of 4 pairs in order; precision 1 at the first, 2/3 then
    score = score_heatmap(np.array([[4.0, 3.0], [2.0, 1.0]]), np.array([[1, 0], [1, 0]]))
    assert score == pytest.approx((3 / 4, (1 + 2 / 3) / 2))


def test_tied_pixels_count_half() -> None:
    score = score_heatmap(np.array([[1.0, 1.0, 0.0]]), np.array([[1, 0, 0]]))
    assert score == pytest.approx((3 / 4, 1 / 2))


def test_ignored_pixels_do_not_count_even_if_they_are_not_finite() -> None:
    heatmap = np.array([[4.0, 3.0, 2.0, 1.0, np.nan]])
    ignore = np.array([[0, 1, 0, 0, 1]])
    assert score_heatmap(heatmap, np.array([[1, 0, 1, 0, 0]]), ignore).auroc == 1.0


def test_monotone_transform_of_the_heatmap_changes_nothing() -> None:
    case = random_cases(1)[0]
    transformed = np.exp(3 * case.heatmap.astype(float)) - 7
    assert score_heatmap(transformed, case.segmentation) == pytest.approx(
        score_heatmap(case.heatmap, case.segmentation), abs=1e-12
    )


def test_negated_heatmap_has_the_complementary_auroc() -> None:
    case = random_cases(2)[0]
    there = score_heatmap(case.heatmap, case.segmentation).auroc
    assert score_heatmap(-case.heatmap, case.segmentation).auroc == pytest.approx(1 - there)


@pytest.mark.parametrize(
    ("heatmap", "segmentation", "ignore", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), None, r"same size, got \(2, 3\), \(3, 2\)"),
        (np.zeros((2, 2)), np.eye(2), np.zeros((1, 2)), r"same size, .* and \(1, 2\)"),
        (np.zeros(4), np.zeros(4), None, r"must be \(H, W\)"),
        (np.array([[1.0, np.nan]]), np.array([[1, 0]]), None, "1 of 2 scores are NaN or infinite"),
        (np.ones((2, 2)), np.zeros((2, 2)), None, "got 0 anomalous of 4"),
        (np.ones((2, 2)), np.ones((2, 2)), None, "got 4 anomalous of 4"),
        (np.ones((2, 2)), np.eye(2), np.ones((2, 2)), "all pixels .* are ignored"),
    ],
)
def test_heatmap_that_has_no_score_is_refused(
    heatmap: np.ndarray, segmentation: np.ndarray, ignore: np.ndarray | None, message: str
) -> None:
    with pytest.raises((MetricError, ValueError), match=message):
        score_heatmap(heatmap, segmentation, ignore)


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_pooled_auroc_and_ap_are_scikit_learns_on_all_pixels(decimals: int) -> None:
    cases = random_cases(3, decimals=decimals)
    pooled = pool_pixels(cases)
    scores, labels = all_pixels(cases)
    assert pooled.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert pooled.ap == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_counting_gives_one_image_the_values_of_scikit_learn(decimals: int) -> None:
    scores, labels = pixel_scores(random_cases(16, decimals=decimals)[0])
    assert score_pixels(scores, labels) == pytest.approx(binary_score(labels, scores), abs=1e-12)


def test_pooled_metrics_do_not_depend_on_the_order_of_images() -> None:
    cases = random_cases(4)
    assert pool_pixels(cases)[:3] == pytest.approx(pool_pixels(cases[::-1])[:3], abs=1e-12)


def test_pro_is_the_area_under_the_mean_region_overlap() -> None:
    cases = random_cases(5)
    scores, labels = all_pixels(cases)
    regions = []
    for case in cases:
        counted = (
            np.ones(case.heatmap.shape, bool) if case.ignore_mask is None else ~case.ignore_mask
        )
        numbered, n = ndimage.label(case.segmentation & counted, np.ones((3, 3)))
        regions += [case.heatmap[numbered == i + 1] for i in range(n)]
    thresholds = np.unique(scores)[::-1]
    fpr = [0.0, *((scores[~labels] >= t).mean() for t in thresholds)]
    overlap = [0.0, *(np.mean([(r >= t).mean() for r in regions]) for t in thresholds)]
    grid = np.linspace(0, PRO_MAX_FPR, 30001)
    expected = np.interp(grid, fpr, overlap).mean()
    assert pool_pixels(cases).pro == pytest.approx(expected, abs=1e-4)


def test_pro_weighs_a_small_lesion_like_a_large_one() -> None:
    # the one-pixel lesion is found first of all, the nine-pixel one never
    heatmap, segmentation = np.arange(100.0).reshape(10, 10) + 100, np.zeros((10, 10))
    segmentation[0, 0] = segmentation[5:8, 5:8] = 1
    heatmap[0, 0], heatmap[5:8, 5:8] = 999, 0
    assert pool_pixels([PixelCase(heatmap, segmentation)]).pro == pytest.approx(0.5)


def test_curves_give_the_exact_areas_if_every_threshold_is_kept() -> None:
    pooled = pool_pixels(random_cases(6))
    assert curve_areas(curves(pooled.found)) == pytest.approx(
        {"auroc": pooled.auroc, "ap": pooled.ap, "pro": pooled.pro}, abs=1e-12
    )


def test_curves_of_a_draw_are_those_of_the_drawn_images() -> None:
    cases, draw = random_cases(7), np.array([0, 3, 3, 4, 1])
    expected = pool_pixels([cases[i] for i in draw])
    assert curve_areas(curves(pool_pixels(cases).found, draw)) == pytest.approx(
        {"auroc": expected.auroc, "ap": expected.ap, "pro": expected.pro}, abs=1e-12
    )


def test_few_thresholds_stay_near_the_exact_areas() -> None:
    pooled = pool_pixels(random_cases(8, decimals=6), max_thresholds=50)
    assert curve_areas(curves(pooled.found)) == pytest.approx(
        {"auroc": pooled.auroc, "ap": pooled.ap, "pro": pooled.pro}, abs=0.02
    )


def test_histogram_holds_every_pixel_once() -> None:
    cases = random_cases(9)
    histogram, (_, labels) = pool_pixels(cases, bins=7).histogram, all_pixels(cases)
    assert histogram.lesion.sum() == labels.sum()
    assert histogram.background.sum() == (~labels).sum()


def test_pooling_without_a_lesion_pixel_is_refused() -> None:
    with pytest.raises(MetricError, match="no lesion pixel that counts in any image"):
        pool_pixels(random_cases(10, n=1))


def test_pooling_without_background_is_refused() -> None:
    with pytest.raises(MetricError, match="all pixels that count are lesion"):
        pool_pixels([PixelCase(np.zeros((2, 2)), np.ones((2, 2)))])


def test_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(5, 2, size=400)
    interval = mean_intervals({"x": values}, n_resamples=2000, seed=1)["x"]
    half = 1.96 * values.std() / 20
    assert interval == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half), abs=0.02
    )


def test_same_seed_gives_the_same_interval_and_one_image_gives_none() -> None:
    values = {"x": np.arange(10.0)}
    runs = [mean_intervals(values, n_resamples=50, seed=seed)["x"] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert mean_intervals({"x": [3.0]}, n_resamples=50, seed=1)["x"] == (3.0, None, None)


def test_draws_without_both_kinds_of_image_are_left_out() -> None:
    labels, scores = np.array([0, 0, 0, 1]), np.array([0.1, 0.4, 0.2, 0.3])
    interval = binary_intervals(labels, scores, n_resamples=200, seed=0)["auroc"]
    assert interval.value == pytest.approx(2 / 3)
    assert 0 <= interval.low < interval.value < interval.high <= 1
    undefined = bootstrap_intervals(
        {"x": 1.0}, lambda draw: {"x": np.nan}, 4, n_resamples=9, seed=0
    )
    assert undefined["x"] == (1.0, None, None)


def test_interval_of_an_image_auroc_is_that_of_scikit_learn_on_the_same_draws() -> None:
    draw = np.random.default_rng(11)
    labels = draw.random(30) < 0.4
    scores = np.round(draw.normal(size=30) + labels, 1)

    def on_draw(drawn: np.ndarray) -> dict[str, float]:
        return binary_score(labels[drawn], scores[drawn])._asdict()

    settings = {"n_resamples": 100, "seed": 3}
    expected = bootstrap_intervals(on_draw(np.arange(30)), on_draw, 30, **settings)
    ours = binary_intervals(labels, scores, **settings)
    for name in ("auroc", "ap"):
        assert ours[name] == pytest.approx(expected[name], abs=1e-12)


def test_interval_is_written_with_what_there_is_of_it() -> None:
    assert format_interval(Interval(0.9123, 0.88, 0.9345)) == "0.912 [0.880, 0.934]"
    assert format_interval(Interval(0.9123, None, None), 4) == "0.9123"
    assert format_interval(Interval(0.9123, None, None), deviation=0.01) == "0.912 ± 0.010"
    assert format_interval(None) == "-"


def test_pooled_interval_contains_the_value() -> None:
    intervals = pooled_intervals(pool_pixels(random_cases(12, n=12)), n_resamples=100, seed=0)
    assert set(intervals) == {"auroc", "ap", "pro"}
    assert all(low < value < high for value, low, high in intervals.values())


def test_best_f1_is_the_best_of_all_thresholds() -> None:
    cases = random_cases(13)
    scores, labels = all_pixels(cases)
    f1 = {
        t: 2 * labels[scores >= t].sum() / ((scores >= t).sum() + labels.sum())
        for t in np.unique(scores)
    }
    best = pool_pixels(cases).best_f1
    assert best.value == pytest.approx(max(f1.values()))
    assert best.threshold == max(f1, key=f1.get)


def test_best_dice_is_the_mean_of_images_with_a_lesion_at_one_threshold() -> None:
    # at 3 the images have Dice 1 and 2/3, at 2 they have 2/3 and 1
    first = PixelCase(np.array([[3.0, 2.0, 1.0]]), np.array([[1, 0, 0]]))
    second = PixelCase(np.array([[3.0, 2.0, 2.0]]), np.array([[1, 1, 1]]))
    normal = PixelCase(np.array([[9.0, 9.0, 9.0]]), np.zeros((1, 3)))
    best = pool_pixels([first, second, normal]).best_dice
    assert best == pytest.approx((np.mean([2 / 3, 1]), 2.0))


def test_more_lesion_scores_than_are_kept_shift_the_areas_little() -> None:
    cases = random_cases(14, n=8, decimals=6)
    lesions = LesionScores(most_steps=200)
    for case in cases:
        lesions.add(case)
    exact, near = pool_pixels(cases), count_pixels(cases, lesions)
    assert (exact.exact, near.exact) == (True, False)
    assert 100 <= lesions.steps().size <= 200
    assert near[:3] == pytest.approx(exact[:3], abs=0.005)
    assert near.totals == exact.totals


def test_fewer_thresholds_are_kept_of_many_images() -> None:
    assert [thresholds_kept(n) for n in (1, 4000, 10_000, 10**6)] == [1000, 1000, 400, 250]


def test_clusters_are_drawn_whole() -> None:
    clusters = np.array([1, 0, 1, 2, 0])
    for draw in bootstrap_draws(5, clusters, n_resamples=20, seed=0):
        times = np.bincount(draw, minlength=5)
        assert times[1] == times[4]
        assert times[0] == times[2]
        assert times[1] + times[0] + times[3] == 3


def test_interval_by_patient_is_wider_than_by_image_where_a_patient_s_images_are_alike() -> None:
    values = np.repeat(np.random.default_rng(1).normal(size=30), 4)
    settings = {"n_resamples": 200, "seed": 0}
    by_image = mean_intervals({"x": values}, **settings)["x"]
    by_patient = mean_intervals({"x": values}, clusters=np.repeat(range(30), 4), **settings)["x"]
    assert by_patient.high - by_patient.low > 1.5 * (by_image.high - by_image.low)
    one = mean_intervals({"x": values}, clusters=np.zeros(120, int), **settings)["x"]
    assert one == (values.mean(), None, None)


def test_delong_is_the_formula_written_out_over_all_pairs() -> None:
    draw = np.random.default_rng(15)
    labels = draw.random(40) < 0.4
    one, other = (np.round(draw.normal(size=40) + shift * labels, 1) for shift in (1.5, 0.5))

    def parts(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pairs = scores[labels][:, None] - scores[~labels][None]
        order = (pairs > 0) + 0.5 * (pairs == 0)
        return order.mean(axis=1), order.mean(axis=0)

    of_anomalous, of_normal = (a - b for a, b in zip(parts(one), parts(other), strict=True))
    variance = of_anomalous.var(ddof=1) / labels.sum() + of_normal.var(ddof=1) / (~labels).sum()
    difference = delong(labels, one, other)
    assert difference.value == pytest.approx(
        roc_auc_score(labels, one) - roc_auc_score(labels, other)
    )
    assert difference.high - difference.low == pytest.approx(2 * 1.959964 * np.sqrt(variance))
    assert 0 < difference.p < 1
    assert delong(labels, one, one) == (0, 0, 0, 1)
    with pytest.raises(MetricError, match="two images of each kind, got 1 and 2 normal"):
        delong(np.array([1, 0, 0]), one[:3], other[:3])
