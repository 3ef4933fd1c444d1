"""TIFF files of every depth, and those that are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import ImageError, read_image
from tests.image_files import unit, values

tifffile = pytest.importorskip("tifffile")


@pytest.mark.parametrize(
    ("dtype", "samples"),
    [("u2", 3), ("u2", 4), ("u4", 1), ("f2", 1), ("f4", 1), ("f4", 3), ("f8", 1)],
)
def test_deep_tiff_keeps_its_depth(tmp_path, dtype, samples):
    stored = values(dtype, 5, 7, samples).squeeze()
    photometric = "rgb" if samples > 1 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric=photometric)
    expected = unit(stored[:, :, :3] if samples == 4 else stored)
    assert torch.equal(read_image(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_tiff_in_which_zero_is_white_is_inverted(tmp_path, dtype):
    stored = values(dtype, 5, 7)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="miniswhite")
    assert torch.equal(read_image(tmp_path / "a.tif"), unit(np.iinfo(dtype).max - stored))


def test_planar_tiff_is_read_as_colour(tmp_path):
    stored = values("u2", 3, 5, 7)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig="separate")
    assert torch.equal(read_image(tmp_path / "a.tif"), unit(stored.transpose(1, 2, 0)))


@pytest.mark.parametrize(("low", "high"), [(-0.5, 1), (0, 255), (0, float("nan"))])
def test_float_tiff_beyond_zero_to_one_is_refused_with_its_range(tmp_path, low, high):
    stored = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    stored[0, 0], stored[4, 6] = low, high
    Image.fromarray(stored).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a.tif holds floats from .* expected \[0, 1\]. Rescale"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4"])
def test_signed_tiff_is_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", np.array([[-5, 9]], dtype=dtype))
    with pytest.raises(ImageError, match=r"a.tif holds signed integers \(int\d+, -5 to 9\)"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", ["u1", "f8"])
def test_tiff_of_several_pages_is_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", values(dtype, 6, 5, 7), photometric="minisblack")
    with pytest.raises(ImageError, match=r"a.tif has 6 pages; expected 1"):
        read_image(tmp_path / "a.tif")
