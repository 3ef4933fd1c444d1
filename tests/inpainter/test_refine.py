"""Scoring in two passes, and reading ahead."""

import threading

import pytest
import torch

from common.prefetch import prefetched
from inpainter.windows import filled_in, first_pass, second_pass, window_grid
from tests.tiny_runs import PATIENCE

GRID = window_grid((96, 112), (32, 32), 16, "stretched")  # 5 x 6 windows


def test_first_pass_takes_every_other_window_and_the_last_ones() -> None:
    rows, cols = (0, 2, 4), (0, 2, 4, 5)
    assert first_pass(GRID, 2) == [6 * row + col for row in rows for col in cols]


def test_second_pass_takes_the_neighbours_of_the_highest() -> None:
    scores = torch.zeros(30)
    scores[6 * 2 + 2] = 1.0
    first = first_pass(GRID, 2)
    around = {6 * row + col for row in (1, 2, 3) for col in (1, 2, 3)}
    assert set(second_pass({"MCD_image": scores}, GRID, 2, first)) == around - set(first)


def test_background_does_not_lower_the_bar_for_what_counts_as_high() -> None:
    grid = window_grid((32 * 24, 32 * 24), (32, 32), 32, "stretched")  # 24 x 24 windows
    numbers = torch.arange(24 * 24).view(24, 24)
    tissue = numbers[8:16, 8:16].flatten().tolist()  # a ninth; 8 x 8 windows
    values = torch.zeros(24 * 24)
    values[tissue] = torch.arange(1.0, 65.0)
    first = sorted(set(first_pass(grid, 2)).intersection(tissue))  # rows and columns 8, 10, 12, 14
    assert len(first) == 16
    closer = set(second_pass({"MCD_image": values}, grid, 2, first)).intersection(tissue)
    # above the 0.8 quantile of the 16: row 14 (4 values: 12 of 16 are lower, so the upper 3 of it
    # are) with the windows within 1 of columns 10, 12, 14; and the border to the background, which
    # row 16 and column 16 of the first pass say nothing about: row 15 and column 15
    high = set(numbers[13:16, 9:16].flatten().tolist())
    border = {*numbers[15, 8:16].tolist(), *numbers[8:16, 15].tolist()}
    assert closer == (high | border) - set(first)
    assert len(first) + len(closer) < len(tissue)


def test_tissue_between_the_windows_of_the_first_pass_is_scored_all_the_same() -> None:
    tissue = [6 * 1 + 1, 6 * 3 + 3]  # of the 5 x 6 windows, none of the first pass
    closer = second_pass({"MCD_image": torch.zeros(30)}, GRID, 2, [])
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
    torch.testing.assert_close(filled_in(values, GRID, 2, [*done, 7]), expected)


def test_the_next_item_is_loaded_while_the_present_one_is_used() -> None:
    loaded = {number: threading.Event() for number in range(3)}

    def load(number: int) -> int:
        loaded[number].set()
        return number * 10

    seen = []
    for number, get in prefetched(range(3), load):
        if number < 2:
            assert loaded[number + 1].wait(timeout=PATIENCE)
        seen.append((number, get()))
    assert seen == [(0, 0), (1, 10), (2, 20)]


def test_what_goes_wrong_in_loading_is_raised_where_the_item_is_used() -> None:
    def load(number: int) -> int:
        if number == 1:
            raise OSError("unreadable")
        return number

    gets = dict(prefetched(range(2), load))
    assert gets[0]() == 0
    with pytest.raises(OSError, match="unreadable"):
        gets[1]()
