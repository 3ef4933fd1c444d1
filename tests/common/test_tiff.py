"""TIFF files of every depth, and those that are refused."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from common.image_files import is_lossy
from common.images import ImageError, read_image, read_mask
from common.notices import counts, forget
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


@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "i2", "f4"])
def test_mask_in_a_tiff_in_which_zero_is_white_is_its_stored_values(tmp_path, dtype):
    forget()
    stored = np.array([[0, 1], [0, 0]]).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="miniswhite")
    assert read_mask(tmp_path / "a.tif").tolist() == [[False, True], [False, False]]
    tifffile.imwrite(tmp_path / "b.tif", stored)  # tifffile's own choice for bool: miniswhite
    assert read_mask(tmp_path / "b.tif").tolist() == [[False, True], [False, False]]
    assert counts() == {}  # nothing was inverted


def test_mask_in_a_fax_is_what_it_shows(tmp_path):
    """The bits of these compressions are ink: programs turn them when they write a mask."""
    shown = np.zeros((4, 8), bool)
    shown[1, 2:5] = True
    Image.fromarray(~shown).save(tmp_path / "a.tif", compression="group4")
    data = (tmp_path / "a.tif").read_bytes()
    one, zero = (struct.pack("<HHIHH", 262, 3, 1, value, 0) for value in (1, 0))
    assert one in data
    (tmp_path / "a.tif").write_bytes(data.replace(one, zero))
    assert read_mask(tmp_path / "a.tif").tolist() == shown.tolist()


def test_window_comes_before_the_inversion_of_a_tiff_in_which_zero_is_white(tmp_path):
    stored = np.array([[0, 500, 1250, 4095]], dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="miniswhite")
    shown = read_image(tmp_path / "a.tif", window=(2000.0, 3000.0)).flatten().tolist()
    assert shown == pytest.approx([1, 1, 0.75, 0])  # from 500 to 3500
    shown = read_image(tmp_path / "a.tif", white_value=4095).flatten().tolist()
    assert shown == pytest.approx([1, 1 - 500 / 4095, 1 - 1250 / 4095, 0])


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


@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits", "zstd"])
@pytest.mark.parametrize("kind", ["u2", "u2 rgb", "f4"])
def test_compressed_deep_tiff_is_read_exactly(tmp_path, compression, kind):
    stored = values(kind[:2], 5, 7, 3 if "rgb" in kind else 1).squeeze()
    photometric = "rgb" if "rgb" in kind else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric=photometric, compression=compression)
    assert torch.equal(read_image(tmp_path / "a.tif"), unit(stored))


def test_packed_12_bits_are_divided_by_4095(tmp_path):
    stored = np.array([[0, 4095, 2048, 819]], dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stored, bitspersample=12)
    assert read_image(tmp_path / "a.tif").flatten().tolist() == pytest.approx(
        [0, 1, 2048 / 4095, 0.2]
    )


@pytest.mark.parametrize("compression", ["jpeg2000", "lerc", "png", "webp"])
@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 3)])
def test_bytes_that_pillow_does_not_decode_are_read_exactly(tmp_path, compression, shape):
    if compression == "webp" and len(shape) == 2:
        pytest.skip("is for colours")
    lossless = {"compressionargs": {"lossless": True}} if compression == "webp" else {}
    stored, photometric = values("u1", *shape), "minisblack" if len(shape) == 2 else "rgb"
    tifffile.imwrite(
        tmp_path / "a.tif", stored, photometric=photometric, compression=compression, **lossless
    )
    assert torch.equal(read_image(tmp_path / "a.tif"), unit(stored))
    assert is_lossy(tmp_path / "a.tif") == (compression in ("jpeg2000", "webp"))


def test_big_tiff_of_big_endian_bytes_is_read(tmp_path):
    stored = values("u1", 5, 7)
    tifffile.imwrite(tmp_path / "a.tif", stored, bigtiff=True, byteorder=">")
    assert torch.equal(read_image(tmp_path / "a.tif"), unit(stored))


def test_three_samples_that_are_called_grey_are_colours(tmp_path):
    stored = values("u1", 5, 7, 3)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig="contig")
    assert torch.equal(read_image(tmp_path / "a.tif"), unit(stored))


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_compression_without_a_decoder_is_named_with_what_to_save_instead(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", values(dtype, 5, 7))
    change_tag(tmp_path / "a.tif", 259, 34661)
    with pytest.raises(ImageError, match=r"compression JBIG cannot be read; save it with LZW or d"):
        read_image(tmp_path / "a.tif")


def test_window_and_white_value_are_stored_values_of_packed_12_bits(tmp_path):
    stored = np.array([[0, 500, 1250, 4095]], dtype=np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stored, bitspersample=12)
    shown = read_image(path, window=(2000.0, 3000.0)).flatten().tolist()
    assert shown == pytest.approx([0, 0, 0.25, 1])
    own = read_image(path)
    assert torch.equal(read_image(path, white_value=65535), own)  # its bits do not hold that
    assert torch.equal(read_image(path, white_value=4095), own)
    with pytest.raises(ImageError, match=r"a.tif holds the value 4095, above white_value: 2047"):
        read_image(path, white_value=2047)


def change_tag(path, tag: int, value: int) -> None:
    """Overwrites the first value of a tag of one long or short number."""
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[start : start + 2])
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack("<H", data[entry : entry + 2])[0] == tag:
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, value)
    path.write_bytes(data)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize(("tag", "value"), [(257, 2_097_192), (257, 41), (256, 2_000_000)])
def test_size_that_the_file_cannot_hold_is_refused(tmp_path, compression, dtype, tag, value):
    stored = values(dtype, 40, 44, 3)
    tifffile.imwrite(
        tmp_path / "a.tif", stored, photometric="rgb", compression=compression, rowsperstrip=8
    )
    change_tag(tmp_path / "a.tif", tag, value)
    with pytest.raises(ImageError, match=r"Cannot read the image .*a.tif: "):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_missing_strip_does_not_become_zeros(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", values(dtype, 40, 44), rowsperstrip=8)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        tag = file.pages[0].tags[279]  # byte counts
        counts = list(tag.value)
        tag.overwrite([*counts[:2], 0, *counts[3:]])
    with pytest.raises(ImageError, match=r"need 5 strips or tiles, but 4 of 5 are in the file"):
        read_image(tmp_path / "a.tif")


def test_deep_cmyk_is_refused_rather_than_read_as_rgb(tmp_path):
    stored = values("u2", 5, 7, 4)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="separated")
    with pytest.raises(ImageError, match=r"a.tif: colours of kind .*SEPARATED.* are not read"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_tiff_of_many_samples_is_refused_with_their_number(tmp_path, dtype):
    stored = values(dtype, 5, 7, 5)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig="contig")
    with pytest.raises(ImageError, match=r"a.tif: it has 5 samples per pixel; expected 1 to 4"):
        read_image(tmp_path / "a.tif")


def test_stack_that_imagej_alone_reads_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", values("u2", 3, 5, 7), imagej=True, truncate=True)
    with pytest.raises(ImageError, match=r"its 3 pages follow each other as ImageJ alone"):
        read_image(tmp_path / "a.tif")
