"""Crops that are turned and scaled: where their pixels come from."""

import math

import numpy as np
import pytest
import torch

from inpainter.data import CropRule, StoredImage, warped_crop


def ramp(height: int, width: int) -> np.ndarray:
    """A plane whose value is 100 * row + column, (1, H, W) float32."""
    rows, columns = np.mgrid[:height, :width]
    return (100 * rows + columns)[None].astype(np.float32)


def test_neither_turned_nor_scaled_is_the_crop_itself():
    values = ramp(20, 30)
    np.testing.assert_allclose(
        warped_crop(values, (3, 5), (8, 6), 0.0, 1.0), values[:, 3:11, 5:11], rtol=1e-6
    )


def test_a_quarter_turn_turns_the_crop_about_its_own_centre():
    values = ramp(20, 30)
    turned = warped_crop(values, (3, 5), (8, 8), math.pi / 2, 1.0)
    np.testing.assert_allclose(turned[0], np.rot90(values[0, 3:11, 5:13], k=-1), atol=1e-3)


def test_a_factor_of_two_shows_half_as_much():
    crop = warped_crop(ramp(20, 30), (4, 4), (9, 9), 0.0, 2.0)[0]
    assert crop[4, 4] == pytest.approx(808)  # the centre stays: row 8, column 8
    assert crop[4, 8] - crop[4, 0] == pytest.approx(4)
    assert crop[8, 4] - crop[0, 4] == pytest.approx(400)


def test_beyond_the_border_the_image_goes_on_mirrored():
    crop = warped_crop(ramp(16, 16), (0, 0), (16, 16), 0.0, 0.8)[0]
    assert crop.min() >= 0
    assert crop.max() <= 1515
    assert crop[0, 8] > crop[1, 8]  # row -2 is row 1 again, row -1 is row 0


def test_every_channel_is_warped_alike_and_bytes_stay_in_range():
    values = np.stack([ramp(16, 16)[0] // 8] * 3).astype(np.uint8)
    crop = warped_crop(values, (0, 0), (16, 16), 0.3, 1.1)
    assert crop.shape == (3, 16, 16)
    assert crop.dtype == np.float32
    assert np.array_equal(crop[0], crop[2])
    assert crop.min() >= 0
    assert crop.max() <= 255


def test_draws_vary_within_the_limits_and_repeat_with_the_seed():
    image = StoredImage(ramp(40, 40) / 4000, 1.0)
    rule = CropRule((16, 16), max_rotation=10.0, max_scale=1.2)

    def draws(seed: int) -> list[np.ndarray]:
        generator = torch.Generator().manual_seed(seed)
        return [rule.draw(image, generator) for _ in range(20)]

    first, again = draws(1), draws(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    inner = [(crop[0, 8, 9] - crop[0, 8, 7]) / 2 * 4000 for crop in first]  # 1 where upright
    limit = 1.2 * (100 * math.sin(math.radians(10)) + 1)
    assert max(map(abs, inner)) <= limit
    assert len({round(float(step), 3) for step in inner}) > 10
