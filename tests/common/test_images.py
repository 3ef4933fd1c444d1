"""Reading images of every kind, and refusing files that are none."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import (
    ImageError,
    read_image,
    to_signed,
    to_unit,
    write_image,
    write_image16,
)
from tests.image_files import RNG, unit, values, write_png16


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".pgm"])
def test_grey_8_bit_file_is_read_exactly(tmp_path, suffix):
    stored = values("u1", 5, 7)
    Image.fromarray(stored).save(tmp_path / f"a{suffix}")
    image = read_image(tmp_path / f"a{suffix}")
    assert image.dtype == torch.float32
    assert torch.equal(image, unit(stored))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".ppm"])
def test_rgb_8_bit_file_is_read_exactly(tmp_path, suffix):
    stored = values("u1", 5, 7, 3)
    Image.fromarray(stored).save(tmp_path / f"a{suffix}")
    assert torch.equal(read_image(tmp_path / f"a{suffix}"), unit(stored))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_grey_16_bit_file_keeps_its_16_bits(tmp_path, suffix):
    stored = values("u2", 5, 7)
    Image.fromarray(stored).save(tmp_path / f"a{suffix}")
    assert torch.equal(read_image(tmp_path / f"a{suffix}"), unit(stored))


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_16_bit_png_keeps_its_16_bits_in_colour_too_and_drops_alpha(tmp_path, samples):
    stored = values("u2", 5, 7, samples)
    write_png16(tmp_path / "a.png", stored)
    without_alpha = stored[:, :, : 1 if samples < 3 else 3]
    assert torch.equal(read_image(tmp_path / "a.png"), unit(without_alpha))


def test_jpeg_is_read_in_grey_and_colour(tmp_path):
    Image.new("RGB", (32, 16), (200, 100, 50)).save(tmp_path / "a.jpg", quality=95)
    Image.new("L", (32, 16), 51).save(tmp_path / "b.jpeg")
    Image.new("CMYK", (32, 16), (0, 0, 0, 0)).save(tmp_path / "c.jpg")
    colour = read_image(tmp_path / "a.jpg")
    assert colour.shape == (3, 16, 32)
    assert torch.allclose(colour.mean((1, 2)) * 255, torch.tensor([200.0, 100.0, 50.0]), atol=2)
    assert torch.equal(read_image(tmp_path / "b.jpeg"), torch.full((1, 16, 32), 0.2))
    assert torch.equal(read_image(tmp_path / "c.jpg"), torch.ones(3, 16, 32))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(tmp_path, mode):
    stored = values("u1", 5, 7, len(mode))
    Image.fromarray(stored, mode=mode).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), unit(stored[:, :, :-1]))


def test_pgm_is_divided_by_the_largest_value_that_it_declares(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 4095\n" + bytes([0x0F, 0xFF, 0x03, 0x33]))
    assert read_image(tmp_path / "a.pgm").flatten().tolist() == pytest.approx([1, 0.2], abs=1e-5)


def test_one_bit_file_is_black_and_white(tmp_path):
    stored = values("u1", 5, 7) > 127
    Image.fromarray(stored).save(tmp_path / "a.png")
    Image.fromarray(stored).save(tmp_path / "a.tif")
    expected = torch.from_numpy(stored.astype(np.float32))[None]
    assert torch.equal(read_image(tmp_path / "a.png"), expected)
    assert torch.equal(read_image(tmp_path / "a.tif"), expected)


def test_palette_is_looked_up(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png")
    colours = (read_image(tmp_path / "a.png") * 255).permute(1, 2, 0).tolist()
    assert colours == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]]


def test_colour_turns_grey_by_itu_r_601_and_grey_is_repeated(tmp_path):
    Image.new("RGB", (2, 2), (255, 102, 51)).save(tmp_path / "colour.png")
    Image.new("RGB", (2, 2), (77, 77, 77)).save(tmp_path / "grey.png")
    grey = read_image(tmp_path / "colour.png", 1)
    assert grey.shape == (1, 2, 2)
    assert grey[0, 0, 0].item() == pytest.approx(0.299 + 0.587 * 0.4 + 0.114 * 0.2, abs=1e-7)
    assert torch.equal(read_image(tmp_path / "grey.png", 1), torch.full((1, 2, 2), 77 / 255))
    assert torch.equal(read_image(tmp_path / "grey.png", 3), torch.full((3, 2, 2), 77 / 255))


def test_number_of_channels_is_checked(tmp_path):
    with pytest.raises(ValueError, match="must be 1, 3 or None, got 2"):
        read_image(tmp_path / "a.png", 2)


def test_scan_of_2000_by_2500_pixels_loads(tmp_path):
    Image.fromarray(values("u2", 2000, 2500)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif", 1).shape == (1, 2000, 2500)


def test_scan_above_pillows_warning_loads_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (15, 10)).save(tmp_path / "a.png")
    Image.new("L", (25, 10)).save(tmp_path / "b.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png").shape == (1, 10, 15)
    with pytest.raises(ImageError, match=r"Cannot read the image .*b.png: .*exceeds limit"):
        read_image(tmp_path / "b.png")


def kinds_of_files(folder: Path) -> list[Path]:
    Image.fromarray(values("u1", 40, 40, 3)).save(folder / "a.png")
    Image.fromarray(values("u1", 40, 40)).save(folder / "b.jpg")
    Image.fromarray(values("u1", 40, 40)).save(folder / "c.bmp")
    Image.fromarray(values("u2", 40, 40)).save(folder / "d.tif")
    Image.fromarray(values("u2", 40, 40)).save(folder / "e.png")
    write_png16(folder / "f.png", values("u2", 40, 40, 3))
    return sorted(folder.iterdir())


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on corrupt tags
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_file_is_refused_by_name(tmp_path, share):
    for path in kinds_of_files(tmp_path):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ImageError, match=rf"Cannot read the image .*{path.name}: .*Remove"):
            read_image(path)


def test_file_that_is_no_image_is_refused_by_name(tmp_path):
    for name in ("a.png", "b.tif", "c.jpg"):
        (tmp_path / name).write_text("<html>404</html>")
        with pytest.raises(ImageError, match=rf"{name}: no image format recognised \(16 bytes\)"):
            read_image(tmp_path / name)


def test_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ImageError, match=r"gone.png: there is no such file"):
        read_image(tmp_path / "gone.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on corrupt tags
def test_corrupt_bytes_are_refused_or_read_but_never_crash(tmp_path):
    kinds = [path.read_bytes() for path in kinds_of_files(tmp_path)]
    outcomes = {"read": 0, "refused": 0}
    for trial in range(200):
        data = bytearray(kinds[trial % len(kinds)])
        for position in RNG.integers(0, min(len(data), 10 ** (2 + trial % 3)), size=3):
            data[position] ^= int(RNG.integers(1, 256))
        path = tmp_path / f"x{('.png', '.jpg', '.bmp', '.tif', '.png', '.png')[trial % len(kinds)]}"
        path.write_bytes(data)
        try:
            image = read_image(path)
        except ImageError as error:
            assert path.name in str(error)  # noqa: PT017
            outcomes["refused"] += 1
        else:
            assert 0 <= image.min() <= image.max() <= 1
            outcomes["read"] += 1
    assert min(outcomes.values()) > 0


def test_ranges_are_converted_there_and_back():
    x = torch.tensor([0.0, 0.25, 1.0])
    assert to_signed(x).tolist() == [-1.0, -0.5, 1.0]
    assert torch.equal(to_unit(to_signed(x)), x)


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (3, 5, 7)])
def test_written_image_comes_back_to_8_bits(tmp_path, shape):
    image = torch.rand(shape)
    write_image(tmp_path / "new" / "a.png", image)
    back = read_image(tmp_path / "new" / "a.png")
    assert (back - image).abs().max() <= 0.5 / 255 + 1e-6
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_written_16_bit_image_comes_back_to_16_bits(tmp_path):
    image = torch.rand(5, 7)
    write_image16(tmp_path / "a.png", image)
    assert (read_image(tmp_path / "a.png")[0] - image).abs().max() <= 0.5 / 65535 + 1e-7


def test_values_beyond_the_range_are_cut_on_writing(tmp_path):
    write_image(tmp_path / "a.png", torch.tensor([[-3.0, 0.0, 1.0, 1.5]]))
    assert read_image(tmp_path / "a.png").flatten().tolist() == [0, 0, 1, 1]


def test_writing_something_that_is_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got \(2, 5, 7\)"):
        write_image(tmp_path / "a.png", torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match="grey alone"):
        write_image16(tmp_path / "a.png", torch.zeros(3, 5, 7))
