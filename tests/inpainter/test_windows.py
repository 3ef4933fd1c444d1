from dataclasses import replace

import pytest
import torch

from inpainter.heatmap import windows_to_score
from inpainter.settings import TestConfig
from inpainter.windows import (
    WindowError,
    averaged_heatmap,
    check_stride,
    cut_windows,
    filled_in,
    first_pass,
    heatmap_from_grid,
    leaves_border,
    pad_image,
    resized,
    scaled_hw,
    second_pass,
    tissue_fractions,
    window_grid,
)

GRID = window_grid((96, 112), (32, 32), 16, "stretched")  # 5 x 6 windows


@pytest.mark.parametrize(("side", "count"), [(256, 1), (287, 1), (288, 2), (512, 9), (2048, 57)])
def test_last_window_ends_inside_the_image_and_no_further_one_fits(side, count) -> None:
    grid = window_grid((side, 256), (256, 256), 32, "stretched")
    assert grid.grid_hw == (count, 1)
    assert grid.corner(count - 1)[0] + 256 <= side
    assert grid.corner(count - 1)[0] + 32 + 256 > side


@pytest.mark.parametrize("image_hw", [(32, 32), (50, 41), (100, 64)])
@pytest.mark.parametrize("stride", [4, 8, 16])
def test_centred_windows_have_their_centres_on_the_cells_of_the_image(image_hw, stride) -> None:
    grid = window_grid(image_hw, (32, 32), stride, "centred")
    left, _, top, _ = grid.pad
    centres = [(y + 16 - top, x + 16 - left) for y, x in (grid.corner(n) for n in range(len(grid)))]
    assert centres[0] == (stride // 2, stride // 2)
    assert centres[-1][0] >= image_hw[0] - stride // 2 - 1
    assert centres[-1][1] >= image_hw[1] - stride // 2 - 1
    padded = pad_image(torch.rand(1, *image_hw), grid)
    assert cut_windows(padded, grid, [0, len(grid) - 1]).shape == (2, 1, 32, 32)


def test_padding_mirrors_the_image() -> None:
    grid = window_grid((4, 4), (16, 16), 4, "centred")
    image = torch.arange(16.0).view(1, 4, 4)
    padded = pad_image(image, grid)
    left, _, top, _ = grid.pad
    assert torch.equal(padded[:, top : top + 4, left : left + 4], image)
    assert padded[0, top - 1, left] == image[0, 1, 0]
    assert padded[0, top, left - 2] == image[0, 0, 2]


def test_a_bright_window_lights_up_at_its_own_place() -> None:
    grid = window_grid((64, 96), (32, 32), 8, "centred")
    scores = torch.zeros(grid.grid_hw)
    scores[5, 2] = 1
    heat = heatmap_from_grid(scores, grid)
    assert heat.shape == (64, 96)
    row, col = divmod(heat.argmax().item(), 96)
    assert abs(row - (5 * 8 + 3.5)) <= 1
    assert abs(col - (2 * 8 + 3.5)) <= 1


def test_stretched_heatmap_covers_the_image_with_the_grids_corner_scores() -> None:
    grid = window_grid((100, 130), (64, 64), 12, "stretched")
    scores = torch.arange(float(len(grid))).view(grid.grid_hw)
    heat = heatmap_from_grid(scores, grid)
    assert heat.shape == (100, 130)
    assert heat[0, 0] == pytest.approx(scores[0, 0], abs=1.0)


def test_averaged_heatmap_is_the_mean_over_the_windows_that_cover_a_pixel() -> None:
    grid = window_grid((48, 32), (32, 32), 16, "stretched")
    heat = averaged_heatmap(torch.tensor([[1.0], [3.0]]), grid, (32, 32))
    assert heat[:16].unique().tolist() == [1.0]
    assert heat[16:32].unique().tolist() == [2.0]
    assert heat[32:].unique().tolist() == [3.0]


def test_averaging_over_holes_gives_the_border_the_nearest_score_that_there_is() -> None:
    grid = window_grid((48, 32), (32, 32), 16, "stretched")
    heat = averaged_heatmap(torch.tensor([[1.0], [3.0]]), grid, (16, 16))
    assert heat[:24].unique().tolist() == [1.0]
    assert heat[24:].unique().tolist() == [3.0]
    overlapping = averaged_heatmap(torch.tensor([[1.0], [3.0]]), grid, (24, 16))  # rows 4-27, 20-43
    assert overlapping[:, 0].tolist() == [1.0] * 20 + [2.0] * 8 + [3.0] * 20


def test_details_share_out_a_windows_score_over_the_cells_of_its_hole() -> None:
    grid = window_grid((48, 32), (32, 32), 16, "stretched")
    details = torch.ones(2, 2, 2)
    details[1] = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    heat = averaged_heatmap(torch.tensor([[1.0], [3.0]]), grid, (16, 16), details)
    assert heat[8:24, 8:24].unique().tolist() == [1.0]
    assert heat[24:32, 8:16].unique().tolist() == [12.0]
    assert heat[24:40, 16:24].unique().tolist() == heat[32:40, 8:16].unique().tolist() == [0.0]
    assert heat[24:40, 8:24].mean() == 3  # what the window has


def test_tissue_fraction_counts_bright_pixels_of_the_hole() -> None:
    image = torch.zeros(1, 32, 48)
    image[:, 8:16, 8:24] = 0.5
    grid = window_grid((32, 48), (32, 32), 16, "stretched")
    assert tissue_fractions(image, grid, (16, 16), 0.1).tolist() == [0.5, 0.0]
    skipping = TestConfig(
        patch_shape=(32, 32, 1),
        mask_shape=(16, 16),
        patch_stride=16,
        only_check_nonblack_pixels=True,
        tissue_threshold=0.1,
    )
    assert windows_to_score(image, grid, skipping) == [0]


def test_what_is_mirrored_at_the_border_is_no_tissue() -> None:
    grid = window_grid((32, 32), (32, 32), 8, "centred")  # centres at 4, 12, 20, 28
    padded = pad_image(torch.ones(1, 32, 32), grid)
    shares = tissue_fractions(padded, grid, (16, 16), 0.1).view(4, 4)
    assert shares[1:3, 1:3].unique().tolist() == [1.0]
    assert shares[0, 1:3].tolist() == shares[1:3, 3].tolist() == [0.75, 0.75]
    assert shares[0, 0] == 0.75 * 0.75


def test_an_image_smaller_than_the_hole_is_scored_where_the_most_of_it_is_in_the_hole() -> None:
    grid = window_grid((8, 8), (32, 32), 4, "centred")  # centres at 2 and 6
    padded = pad_image(torch.ones(1, 8, 8), grid)
    assert tissue_fractions(padded, grid, (16, 16), 0.1).tolist() == [1.0] * 4


def test_an_image_smaller_than_the_window_is_refused_or_padded() -> None:
    with pytest.raises(WindowError, match="20 x 40 pixels is smaller than the window, 32 x 32"):
        window_grid((20, 40), (32, 32), 8, "stretched")
    assert len(window_grid((20, 40), (32, 32), 8, "centred")) == 15
    assert window_grid((100, 100), (32, 32), 32, "centred").grid_hw == (4, 4)


@pytest.mark.parametrize(
    ("heatmap_type", "alignment", "largest"),
    [
        ("averaged_hole", "stretched", 16),
        ("averaged_hole", "centred", 16),
        ("averaged", "stretched", 32),
        ("averaged", "centred", 32),
        ("nonaveraged", "centred", 32),
    ],
)
def test_the_largest_stride_without_gaps_is_named(heatmap_type, alignment, largest) -> None:
    kind = {"heatmap_type": heatmap_type, "heatmap_alignment": alignment}
    sizes = {"patch_shape": (32, 48, 1), "mask_shape": (16, 32)}
    check_stride(TestConfig(**sizes, **kind, patch_stride=largest))
    with pytest.raises(WindowError, match=rf"would leave gaps .*Use a stride of {largest} or less"):
        check_stride(TestConfig(**sizes, **kind, patch_stride=largest + 1))


def test_border_that_no_window_covers_is_told_apart() -> None:
    averaged = TestConfig(
        patch_shape=(32, 32, 1), mask_shape=(16, 16), patch_stride=16, heatmap_type="averaged"
    )
    assert leaves_border(averaged, (49, 48))
    assert not leaves_border(averaged, (48, 64))
    assert not leaves_border(replace(averaged, heatmap_alignment="centred"), (49, 48))


def test_first_pass_takes_every_other_window_and_the_last_ones() -> None:
    rows, cols = (0, 2, 4), (0, 2, 4, 5)
    assert first_pass(GRID, 2) == [6 * row + col for row in rows for col in cols]


def test_second_pass_takes_the_neighbours_of_the_highest() -> None:
    scores = torch.zeros(30)
    scores[6 * 2 + 2] = 1.0
    first = first_pass(GRID, 2)
    around = {6 * row + col for row in (1, 2, 3) for col in (1, 2, 3)}
    assert set(second_pass(scores[None], GRID, 2, first)) == around - set(first)


def test_background_does_not_lower_the_bar_for_what_counts_as_high() -> None:
    grid = window_grid((32 * 24, 32 * 24), (32, 32), 32, "stretched")  # 24 x 24 windows
    numbers = torch.arange(24 * 24).view(24, 24)
    tissue = numbers[8:16, 8:16].flatten().tolist()  # a ninth; 8 x 8 windows
    values = torch.zeros(24 * 24)
    values[tissue] = torch.arange(1.0, 65.0)
    first = sorted(set(first_pass(grid, 2)).intersection(tissue))  # rows and columns 8, 10, 12, 14
    assert len(first) == 16
    closer = set(second_pass(values[None], grid, 2, first)).intersection(tissue)
    # above the 0.8 quantile of the 16: row 14 (4 values: 12 of 16 are lower, so the upper 3 of it
    # are) with the windows within 1 of columns 10, 12, 14; and the border to the background, which
    # row 16 and column 16 of the first pass say nothing about: row 15 and column 15
    high = set(numbers[13:16, 9:16].flatten().tolist())
    border = {*numbers[15, 8:16].tolist(), *numbers[8:16, 15].tolist()}
    assert closer == (high | border) - set(first)
    assert len(first) + len(closer) < len(tissue)


def test_tissue_between_the_windows_of_the_first_pass_is_scored_all_the_same() -> None:
    tissue = [6 * 1 + 1, 6 * 3 + 3]  # of the 5 x 6 windows, none of the first pass
    closer = second_pass(torch.zeros(1, 30), GRID, 2, [])
    assert set(tissue) <= set(closer)


def test_windows_between_are_interpolated_and_known_ones_stay() -> None:
    rows, cols = torch.arange(5.0)[:, None], torch.arange(6.0)[None, :]
    plane = (10 * rows + cols).flatten()
    values = torch.zeros(30)
    done = first_pass(GRID, 2)
    values[done] = plane[done]
    values[7] = -3.0
    expected = plane.clone()
    expected[7] = -3.0
    torch.testing.assert_close(filled_in(values[None], GRID, 2, [*done, 7])[0], expected)


def test_smaller_images_keep_at_least_a_pixel_and_the_same_size_changes_nothing() -> None:
    assert scaled_hw((41, 3), 0.25) == (10, 1)
    assert scaled_hw((3, 3), 0.01) == (1, 1)
    image = torch.rand(1, 5, 7)
    assert resized(image, (5, 7)) is image
    constant = torch.full((2, 9, 9), 0.3)
    assert torch.allclose(resized(constant, (4, 5)), torch.full((2, 4, 5), 0.3))
