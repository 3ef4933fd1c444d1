"""The model of what predictions cost."""

import runpy

import pytest

from common.config import REPOSITORY

COST = runpy.run_path(str(REPOSITORY / "benchmarks" / "scaling.py"), run_name="scaling")["Cost"]


@pytest.mark.parametrize(
    ("processes", "images", "seconds"),
    [
        (1, 10, 8 + 1 + 10 * 20 + 10 * 3),
        (4, 10, 8 + 1 + 2.5 * 20 + 3 * 3),  # the last images' windows are shared out, not plots
    ],
)
def test_run_is_as_long_as_its_parts(processes: int, images: int, seconds: float) -> None:
    cost = COST(start=8, window=0.2, read=1, write=3)
    assert cost.seconds(images, 100, processes) == pytest.approx(seconds)


def test_reading_that_takes_longer_than_scoring_is_waited_for() -> None:
    cost = COST(start=0, window=0.001, read=1, write=0)
    assert cost.seconds(10, 100, 1) == pytest.approx(1 + 10)
