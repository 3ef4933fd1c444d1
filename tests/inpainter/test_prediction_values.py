"""The prediction run as a function: what the numbers depend on."""

import pytest
import torch
from scipy.ndimage import gaussian_filter

from common.images import write_image, write_image16
from inpainter.heatmap import factors
from inpainter.settings import TestConfig
from tests.tiny_runs import (
    RGB,
    heatmaps_in,
    predicted,
    read_table,
    texture,
    tiny_config,
    with_test,
    write_checkpoint,
    write_every_format,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LIVELY = ("netG.dropout_which=ALL", "test.heatmap_metrics=[MCD_image, MCD_feature, no_dropout]")


def test_heatmaps_do_not_depend_on_batch_size_or_on_other_images(folder) -> None:
    config = tiny_config(folder, *LIVELY, "test.patch_stride=8")
    results = [
        predicted(
            folder, with_test(config, parallel_batchsize=size), output_dir=folder / f"by{size}"
        )
        for size in (1, 3, 32)
    ]
    (folder / "test" / "0.png").unlink()
    results.append(predicted(folder, config, output_dir=folder / "fewer"))
    for metric in config.test.heatmap_metrics:
        first, *others = (heatmaps_in(result.folder, metric) for result in results)
        assert len(first) == 3
        assert all(heat.std() > 0 for heat in first.values())
        for other in others:
            for name, heat in other.items():
                torch.testing.assert_close(heat, first[name], rtol=1e-4, atol=1e-5)
    with_dropout, without = (
        heatmaps_in(results[0].folder, metric) for metric in ("MCD_image", "no_dropout")
    )
    assert all(not torch.allclose(with_dropout[name], without[name]) for name in without)


LOCALISED = ("test.heatmap_type=averaged_hole", "test.heatmap_localise=0.5")


@pytest.mark.parametrize("refine", ["off", "2"])
def test_localised_and_smoothed_heatmaps_do_not_depend_on_the_batch_size(folder, refine) -> None:
    more = (*LIVELY, *LOCALISED, "test.heatmap_smooth=0.2", "test.patch_stride=8")
    config = tiny_config(folder, *more, f"test.refine={refine}")
    by_one, by_many = (
        predicted(
            folder, with_test(config, parallel_batchsize=size), output_dir=folder / f"by{size}"
        )
        for size in (1, 32)
    )
    for metric in config.test.heatmap_metrics:
        first, second = (heatmaps_in(run.folder, metric) for run in (by_one, by_many))
        for name, heat in first.items():
            torch.testing.assert_close(second[name], heat, rtol=1e-4, atol=1e-4)


def test_localising_moves_a_windows_score_within_its_hole(tmp_path) -> None:
    write_images(tmp_path / "test", n=1, size=(32, 32))  # one window, and its hole in the middle
    config = tiny_config(tmp_path, *LIVELY, *LOCALISED, "test.patch_stride=16")
    write_checkpoint(tmp_path / "model", config)
    localised = predicted(tmp_path, config, output_dir=tmp_path / "localised")
    even = predicted(
        tmp_path, with_test(config, heatmap_localise=0.0), output_dir=tmp_path / "even"
    )
    hole = (slice(8, 24), slice(8, 24))
    moved = heatmaps_in(localised.folder)["0.png"][hole]
    (score,) = heatmaps_in(even.folder)["0.png"].unique()
    assert moved.mean() == pytest.approx(score.item(), rel=1e-5)
    assert moved.min() >= 0.5 * score * (1 - 1e-6)  # half of the score is everywhere
    assert moved.std() > 0.01 * score


def test_factors_share_out_a_score_by_cell_and_sign() -> None:
    """Brighter by 3 in the first cell, darker by 1 in the second: mean squares 9 and 1 of 64."""
    detail = torch.zeros(1, 2, 8, 8)
    detail[0, 0, 0, 0], detail[0, 1, 0, 1] = 9.0, 1.0

    def first_cells(surprise: torch.Tensor | None = None, **test) -> list[float]:
        config = TestConfig(heatmap_type="averaged_hole", **test)
        return factors(detail, config, surprise)[0, 0, :3].tolist()

    assert first_cells(heatmap_localise=1.0) == pytest.approx([57.6, 6.4, 0])
    assert first_cells(heatmap_localise=0.5) == pytest.approx([29.3, 3.7, 0.5])
    brighter, darker = {"heatmap_sign": "brighter"}, {"heatmap_sign": "darker"}
    assert first_cells(**brighter) == [1, 0, 0]
    assert first_cells(**darker) == [0, 1, 0]
    assert first_cells(heatmap_localise=1.0, **darker) == pytest.approx([0, 6.4, 0])
    surprise = torch.tensor([2.0, 3.0] * 4).expand(1, 8, 8)
    assert first_cells(surprise, heatmap_localise=0.5) == pytest.approx([58.6, 11.1, 1])
    assert first_cells(surprise, heatmap_localise=0.5, **darker) == pytest.approx([0, 11.1, 0])
    assert first_cells(surprise, heatmap_localise=0.0) == [1, 1, 1]


@pytest.mark.parametrize("sign", ["both", "brighter", "darker"])
def test_factors_of_a_hole_that_is_completed_exactly_are_finite(sign) -> None:
    test = TestConfig(heatmap_type="averaged_hole", heatmap_localise=0.5, heatmap_sign=sign)
    assert factors(torch.zeros(2, 2, 8, 8), test).isfinite().all()


def test_only_what_is_brighter_than_its_completion_counts(tmp_path) -> None:
    write_images(tmp_path / "test", n=1, size=(32, 32))  # one window
    config = tiny_config(tmp_path, *LIVELY, *LOCALISED, "test.patch_stride=16")
    write_checkpoint(tmp_path / "model", config)
    parts = {}
    for sign in ("both", "brighter", "darker"):
        changed = with_test(config, heatmap_sign=sign)
        run = predicted(tmp_path, changed, output_dir=tmp_path / sign)
        parts[sign] = heatmaps_in(run.folder)["0.png"][8:24, 8:24]
    torch.testing.assert_close(parts["brighter"] + parts["darker"], parts["both"])
    assert min(parts["brighter"].max(), parts["darker"].max()) > 0.05 * parts["both"].max()


def test_smoothing_is_gaussian_and_in_sides_of_the_hole(tmp_path) -> None:
    write_images(tmp_path / "test", n=1)
    config = tiny_config(tmp_path, *LIVELY, "test.patch_stride=8")
    write_checkpoint(tmp_path / "model", config)
    smooth = predicted(tmp_path, with_test(config, heatmap_smooth=0.25), output_dir=tmp_path / "s")
    sharp = heatmaps_in(predicted(tmp_path, config, output_dir=tmp_path / "r").folder)["0.png"]
    found = heatmaps_in(smooth.folder)["0.png"]
    expected = gaussian_filter(sharp.double().numpy(), 4.0, mode="nearest")  # of 16 pixels
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_scores_csv_says_max_mean_and_p99_of_the_tensors(folder) -> None:
    result = predicted(folder, tiny_config(folder, *LIVELY))
    rows = read_table(result.folder / "scores.csv")
    assert [(row["image"], row["metric"]) for row in rows] == [
        (image, metric)
        for image in ("0.png", "1.png", "2.png")
        for metric in ("MCD_image", "MCD_feature", "no_dropout")
    ]
    for row in rows:
        heat = heatmaps_in(result.folder, row["metric"])[row["image"]]
        assert heat.shape == (48, 64)
        assert float(row["max"]) == pytest.approx(heat.max().item(), rel=1e-6)
        assert float(row["mean"]) == pytest.approx(heat.double().mean().item(), rel=1e-6)
        expected = heat.flatten().sort().values[round(0.99 * heat.numel()) - 1]
        assert float(row["p99"]) == pytest.approx(expected.item(), rel=1e-6)


def test_centred_heatmaps_cover_images_smaller_than_the_window(folder) -> None:
    write_image(folder / "test" / "small.png", texture(20, 25))
    config = tiny_config(folder, "test.heatmap_alignment=centred", "test.patch_stride=8")
    result = predicted(folder, config)
    assert result.bad == {}
    assert heatmaps_in(result.folder)["small.png"].shape == (20, 25)
    assert heatmaps_in(result.folder)["0.png"].shape == (48, 64)


def test_the_first_completions_of_a_larger_m_are_those_of_a_smaller(tmp_path) -> None:
    write_images(tmp_path / "test", size=(32, 32))  # one window: the heatmap is its score
    config = tiny_config(tmp_path, *LIVELY, "test.heatmap_metrics=[MCD_image, MeanCD_image]")
    write_checkpoint(tmp_path / "model", config)
    single = predicted(
        tmp_path, with_test(config, heatmap_M_inpaint=1), output_dir=tmp_path / "single"
    )
    double = predicted(
        tmp_path, with_test(config, heatmap_M_inpaint=2), output_dir=tmp_path / "double"
    )
    for name, first in heatmaps_in(single.folder).items():
        second = 2 * heatmaps_in(double.folder, "MeanCD_image")[name] - first
        assert not torch.allclose(first, second)
        torch.testing.assert_close(heatmaps_in(double.folder)[name], torch.minimum(first, second))


def test_without_dropout_every_metric_is_the_one_completions(folder) -> None:
    config = tiny_config(
        folder,
        "test.droprate=0",
        "test.heatmap_metrics=[MCD_image, MeanCD_image, MedCD_image, no_dropout]",
    )
    result = predicted(folder, config)
    first = heatmaps_in(result.folder, "no_dropout")
    for metric in ("MCD_image", "MeanCD_image", "MedCD_image"):
        for name, heat in heatmaps_in(result.folder, metric).items():
            torch.testing.assert_close(heat, first[name])


def test_windows_without_tissue_are_not_completed(folder) -> None:
    dark = torch.zeros(1, 48, 64)
    dark[:, 8:24, 8:24] = 0.7  # the first window's hole
    write_image(folder / "test" / "0.png", dark)
    config = tiny_config(
        folder, "test.only_check_nonblack_pixels=true", "test.log_compute_times=true"
    )
    result = predicted(folder, config)
    rows = {row["image"]: row for row in read_table(result.folder / "compute_times.csv")}
    counts = {name: (row["windows"], row["completed_windows"]) for name, row in rows.items()}
    assert counts == {"0.png": ("6", "1"), "1.png": ("6", "6"), "2.png": ("6", "6")}
    assert all(float(row["seconds"]) > 0 for row in rows.values())
    assert (heatmaps_in(result.folder)["0.png"][:, 48:].abs() < 1).all()


@pytest.mark.parametrize("heatmap_type", ["averaged", "averaged_hole"])
def test_averaged_heatmaps_leave_no_pixel_without_score(folder, heatmap_type) -> None:
    config = tiny_config(folder, f"test.heatmap_type={heatmap_type}")
    heat = heatmaps_in(predicted(folder, config).folder)["0.png"]
    assert (heat > 0).all()


def test_colour_and_16_bit_images_are_scored_at_full_depth(tmp_path) -> None:
    (tmp_path / "test").mkdir()
    names = write_every_format(tmp_path / "test", channels=3)
    config = tiny_config(tmp_path, *RGB)
    write_checkpoint(tmp_path / "model", config)
    assert predicted(tmp_path, config).finished == names

    faint = texture(40, 44) * 0.002 + 0.5  # half a level of 8 bits
    for path in (tmp_path / "test").iterdir():
        path.unlink()
    write_image16(tmp_path / "test" / "faint.png", faint)
    write_image16(tmp_path / "test" / "flat.png", torch.full((40, 44), 0.501))
    grey = tiny_config(tmp_path)
    write_checkpoint(tmp_path / "model", grey, step=2)
    maps = heatmaps_in(predicted(tmp_path, grey).folder)
    assert not torch.allclose(maps["faint.png"], maps["flat.png"], rtol=1e-6)
