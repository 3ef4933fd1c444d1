"""Decoded images in memory: exact, and within their budget."""

from pathlib import Path

import pytest
import torch

from common.images import read_image, write_image, write_image16
from inpainter.data import CropRule, NormalCrops, smallest_exact


def cached(paths: list[Path], crop_hw: tuple[int, int] = (16, 16)) -> NormalCrops:
    """Training data with 1 MiB for decoded images."""
    return NormalCrops(paths, CropRule(crop_hw), channels=1, seed=0, cache_mb=1)


@pytest.fixture
def mixed_files(tmp_path) -> list[Path]:
    """A grey image of 8 bits, one of 16, and one in colour."""
    write_image(tmp_path / "a.png", torch.rand(20, 30))
    write_image16(tmp_path / "b.png", torch.rand(20, 30))
    write_image(tmp_path / "c.png", torch.rand(3, 20, 30))
    return sorted(tmp_path.iterdir())


def test_cache_keeps_each_image_in_the_smallest_exact_type(mixed_files):
    images = [cached(mixed_files).decoded(number) for number in range(3)]
    types = [str(image.values.dtype) for image in images]
    assert types == ["uint8", "uint16", "float32"]  # colour turned grey gives floats
    for image, path in zip(images, mixed_files, strict=True):
        restored = torch.from_numpy(image.values.astype("float32")) / image.scale
        assert torch.equal(restored, read_image(path, 1))


def test_cache_stops_at_its_budget(tmp_path):
    for number in range(3):
        write_image(tmp_path / f"{number}.png", torch.rand(700, 900))
    data = cached(sorted(tmp_path.iterdir()))
    assert [data.decoded(n) is data.decoded(n) for n in range(3)] == [True, False, False]


@pytest.mark.parametrize("top", [255, 65535])
def test_smallest_type_holds_every_level(top):
    values = torch.arange(top + 1).float().div(top).numpy()
    stored = smallest_exact(values)
    assert stored.scale == top
    assert stored.values.tolist() == list(range(top + 1))


def test_images_are_enlarged_to_the_crop_before_they_are_kept(mixed_files):
    data = cached(mixed_files, crop_hw=(40, 40))
    assert data.decoded(0).values.shape == (1, 40, 60)
    assert data.decoded(0) is data.decoded(0)
