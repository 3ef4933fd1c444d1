"""Decoded images in memory: exact, and within their budget."""

from pathlib import Path

import pytest
import torch

from common.images import read_image, write_image, write_image16
from inpainter.data import ImageStore, smallest_exact


@pytest.fixture
def mixed_files(tmp_path) -> list[Path]:
    """A grey image of 8 bits, one of 16, and one in colour."""
    write_image(tmp_path / "a.png", torch.rand(20, 30))
    write_image16(tmp_path / "b.png", torch.rand(20, 30))
    write_image(tmp_path / "c.png", torch.rand(3, 20, 30))
    return sorted(tmp_path.iterdir())


def test_cache_keeps_each_image_in_the_smallest_exact_type(mixed_files):
    store = ImageStore(mixed_files, channels=1, cache_mb=1)
    types = [str(store[number].values.dtype) for number in range(3)]
    assert types == ["uint8", "uint16", "float32"]  # colour turned grey gives floats
    for number, path in enumerate(mixed_files):
        restored = torch.from_numpy(store[number].values.astype("float32")) / store[number].scale
        assert torch.equal(restored, read_image(path, 1))


def test_cache_stops_at_its_budget(tmp_path):
    for number in range(3):
        write_image(tmp_path / f"{number}.png", torch.rand(700, 900))
    store = ImageStore(sorted(tmp_path.iterdir()), channels=1, cache_mb=1)
    assert [store[number] is store[number] for number in range(3)] == [True, False, False]


@pytest.mark.parametrize("top", [255, 65535])
def test_smallest_type_holds_every_level(top):
    values = torch.arange(top + 1).float().div(top).numpy()
    stored = smallest_exact(values)
    assert stored.scale == top
    assert stored.values.tolist() == list(range(top + 1))


def test_images_are_prepared_before_they_are_kept(mixed_files):
    store = ImageStore(mixed_files, channels=1, cache_mb=1, prepare=lambda x: x[:, ::2])
    assert store[0].values.shape == (1, 10, 30)
    assert store[0] is store[0]
