"""What stored values mean: white_value, masks, alpha, formats by content, limits, and notices."""

import io
import logging
import os
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from common import image_files
from common.config import load_config
from common.image_files import looks_like_image
from common.image_sets import ImageSet
from common.images import ImageError, read_image, read_mask, write_image
from common.notices import counts, forget, sum_up
from diffusion_models.settings import DataConfig
from inpainter.data import CropRule, NormalCrops
from inpainter.settings import PicardConfig
from tests.common.test_dicom import STORED, write_dicom
from tests.image_files import unit, values, write_png16
from tests.tiny_runs import tiny_config


@pytest.fixture(autouse=True)
def _anew():
    forget()


def twelve_bits(path: Path) -> Path:
    Image.fromarray(np.array([[0, 1000], [2048, 4095]], dtype=np.uint16)).save(path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_twelve_bits_in_sixteen_are_said_with_the_setting_that_mends_them(tmp_path, suffix, caplog):
    path = twelve_bits(tmp_path / f"a{suffix}")
    assert read_image(path).max() == pytest.approx(4095 / 65535)
    assert "its largest value is 4095, 6.2% of the range to 65535" in caplog.text
    assert "set white_value: 4095" in caplog.text
    read_image(path)
    assert len(caplog.records) == 1


def test_nothing_is_said_where_the_range_is_used_or_white_is_given(tmp_path):
    path = twelve_bits(tmp_path / "a.png")
    Image.fromarray(np.array([[40000]], dtype=np.uint16)).save(tmp_path / "b.png")
    read_image(tmp_path / "b.png")
    read_image(path)  # 4095 is no longer the largest
    read_image(path, white_value=4095)
    write_image(tmp_path / "c.png", torch.full((4, 4), 0.1))
    read_image(tmp_path / "c.png")
    assert counts() == {}


def test_white_value_is_the_value_that_becomes_1(tmp_path):
    image = read_image(twelve_bits(tmp_path / "a.png"), white_value=4095)
    assert image.flatten().tolist() == pytest.approx([0, 1000 / 4095, 2048 / 4095, 1])


def test_value_above_white_value_is_refused_with_both(tmp_path):
    path = twelve_bits(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a.png holds the value 4095, above white_value: 1023"):
        read_image(path, white_value=1023)


def test_white_value_leaves_smaller_types_floats_and_dicom_as_they_are(tmp_path):
    stored = values("u1", 5, 7)
    Image.fromarray(stored).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png", white_value=4095), unit(stored))
    floats = values("f4", 5, 7)
    tifffile.imwrite(tmp_path / "b.tif", floats)
    assert torch.equal(read_image(tmp_path / "b.tif", white_value=4095), unit(floats))
    path = write_dicom(tmp_path / "c.dcm", STORED, WindowCenter=2048, WindowWidth=4096)
    assert torch.equal(read_image(path, white_value=100), read_image(path))


def test_training_data_and_image_set_pass_white_value_on(tmp_path):
    path = twelve_bits(tmp_path / "a.png")
    expected = read_image(path, 1, white_value=4095)
    stored = NormalCrops(
        [path], CropRule((1, 1)), channels=1, seed=0, cache_mb=1, white_value=4095
    ).decoded(0)
    assert stored.values.dtype == np.uint16
    assert torch.equal(torch.from_numpy(stored.values.astype("f4")) / stored.scale, expected)
    files = ImageSet([path], [0], ["a"], classes=("x",), size=None, white_value=4095)
    assert torch.equal(files.subset([0])[0].image, expected.expand(3, -1, -1))


def test_white_value_is_a_setting_of_both_systems(tmp_path):
    config = load_config(PicardConfig, Path("configs/default.yaml"), ["white_value=4095"])
    assert config.white_value == 4095
    assert tiny_config(tmp_path).white_value is None
    assert DataConfig(white_value=1023).white_value == 1023


def rgba(path: Path, colours: np.ndarray, alpha: np.ndarray) -> Path:
    Image.fromarray(np.dstack([colours, alpha]).astype(np.uint8), mode="RGBA").save(path)
    return path


LESION = np.array([[0, 255], [0, 0]])


@pytest.mark.parametrize("colour", [0, 255])
def test_mask_painted_in_one_colour_on_a_transparent_ground_is_its_alpha(tmp_path, colour):
    path = rgba(tmp_path / "a.png", np.full((2, 2, 3), colour), LESION)
    assert read_mask(path).tolist() == [[False, True], [False, False]]


def test_transparent_ground_of_another_colour_is_not_marked(tmp_path):
    colours = np.full((2, 2, 3), 255)
    colours[0, 1] = (255, 0, 0)
    path = rgba(tmp_path / "a.png", colours, LESION)
    assert read_mask(path).tolist() == [[False, True], [False, False]]


def test_opaque_mask_is_its_colours(tmp_path):
    colours = np.zeros((2, 2, 3))
    colours[1, 0] = (0, 0, 1)
    path = rgba(tmp_path / "a.png", colours, np.full((2, 2), 255))
    assert read_mask(path).tolist() == [[False, False], [True, False]]


def test_palette_mask_is_what_its_palette_shows(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 0, 0])
    image.save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "i4", "f4"])
def test_mask_of_labels_counts_every_value_above_0(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0, 1], [7, 0]], dtype=dtype))
    assert read_mask(tmp_path / "a.tif").tolist() == [[False, True], [True, False]]


def test_mask_that_marks_more_than_half_is_said(tmp_path, caplog):
    Image.fromarray(np.array([[0, 1], [0, 1]], np.uint8)).save(tmp_path / "a.png")
    read_mask(tmp_path / "a.png")
    assert not caplog.records
    Image.fromarray(np.array([[255, 0], [255, 255]], np.uint8)).save(tmp_path / "b.png")
    assert read_mask(tmp_path / "b.png").sum() == 3
    assert "b.png marks 75.0% of its image" in caplog.text


def test_alpha_of_a_photograph_is_left_out_with_a_word(tmp_path, caplog):
    colours = values("u1", 2, 2, 3)
    opaque = rgba(tmp_path / "a.png", colours, np.full((2, 2), 255))
    assert torch.equal(read_image(opaque), unit(colours))
    assert not caplog.records
    assert torch.equal(read_image(rgba(tmp_path / "b.png", colours, LESION)), unit(colours))
    assert "b.png is transparent in places" in caplog.text


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp"])
def test_animation_is_refused(tmp_path, suffix):
    frames = [Image.fromarray(values("u1", 9, 9)) for _ in range(3)]
    path = tmp_path / f"a{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=rf"a{suffix} has 3 frames; expected 1"):
        read_image(path)


def test_file_is_read_by_its_content_whatever_its_name(tmp_path):
    stored = values("u1", 5, 7)
    picture = Image.fromarray(stored)
    for name, kind in (("a.dcm", "PNG"), ("b.JPG", "BMP"), ("c", "TIFF"), ("d.png", "PPM")):
        picture.save(tmp_path / name, format=kind)
        assert torch.equal(read_image(tmp_path / name), unit(stored))
        assert looks_like_image(tmp_path / name)
    Image.new("L", (8, 8), 51).save(tmp_path / "e.jfif", format="JPEG")
    assert read_image(tmp_path / "e.jfif").mean() == pytest.approx(0.2)
    write_dicom(tmp_path / "IM000001", STORED, WindowCenter=2048, WindowWidth=4096)
    assert read_image(tmp_path / "IM000001").max() == 1
    write_dicom(tmp_path / "f.png", STORED, WindowCenter=2048, WindowWidth=4096)
    assert read_image(tmp_path / "f.png").max() == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"BM is a town\n", b"P5 is a paper\n", b"\x08\0", b"GIF", bytes(200), b"%!PS-Adobe-3.0"],
)
def test_other_content_is_no_image(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert not looks_like_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"Cannot read the image .*a.png"):
        read_image(tmp_path / "a.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_folder_and_device_are_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for path in (tmp_path / "a.png", tmp_path / "b.png", Path("/dev/zero")):
        assert not looks_like_image(path)
        with pytest.raises(ImageError, match=rf"Cannot read the image {path}"):
            read_image(path)
    assert not looks_like_image(tmp_path / "gone.png")


def test_image_of_too_many_samples_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_SAMPLES", 100)
    Image.fromarray(values("u1", 6, 6, 3)).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "b.tif", values("u2", 6, 6, 3), photometric="rgb")
    write_png16(tmp_path / "c.png", values("u2", 6, 6, 3))
    write_dicom(tmp_path / "d.dcm", values("u1", 6, 6, 3))
    for name in ("a.png", "b.tif", "c.png", "d.dcm"):
        with pytest.raises(ImageError, match=rf"{name}.*6 x 6 pixels of 3 samples, more than"):
            read_image(tmp_path / name)


def test_cameras_jpeg_of_several_pictures_gives_the_first_with_a_word(tmp_path, caplog):
    first, second = (Image.new("L", (8, 8), grey) for grey in (51, 204))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert read_image(tmp_path / "a.jpg").mean() == pytest.approx(0.2)
    assert "a.jpg holds 2 pictures: the first is taken" in caplog.text


def test_forked_readers_share_what_was_said(tmp_path):
    path = twelve_bits(tmp_path / "a.png")
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    child = os.fork()
    if child == 0:
        logging.disable(logging.CRITICAL)
        read_image(path)
        os._exit(0)
    os.waitpid(child, 0)
    assert counts() == {"small values in a wide type": 1}


def test_transparent_colour_of_a_grey_png_is_not_lost_from_a_mask(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.array([[9, 200], [9, 9]], np.uint8)).save(buffer, "PNG", transparency=9)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert read_mask(tmp_path / "a.png").tolist() == [[False, True], [False, False]]


def test_what_was_counted_is_summed_up_at_a_programs_end(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(values("u1", 4, 4)).save(tmp_path / "a.png", exif=exif)
    for _ in range(3):
        read_image(tmp_path / "a.png")
    assert caplog.text.count("said once; further reads are only counted") == 1
    caplog.clear()
    sum_up()
    assert caplog.messages == ["in 3 reads: image turned as its orientation tag says"]


@pytest.mark.parametrize("suffix", [".jp2", ".j2k"])
def test_jpeg_2000_keeps_its_depth(tmp_path, suffix):
    codec = "jp2" if suffix == ".jp2" else "j2k"
    for shape in ((9, 7), (9, 7, 3)):
        stored = values("u2", *shape)
        path = tmp_path / f"a{suffix}"
        path.write_bytes(imagecodecs.jpeg2k_encode(stored, level=0, codecformat=codec))
        assert torch.equal(read_image(path), unit(stored))
        twelve = stored >> 4
        data = imagecodecs.jpeg2k_encode(twelve, level=0, codecformat=codec, bitspersample=12)
        path.write_bytes(data)
        expected = unit((twelve / 4095).astype(np.float32))
        torch.testing.assert_close(read_image(path), expected)
        path.write_bytes(
            imagecodecs.jpeg2k_encode(values("u1", *shape), level=0, codecformat=codec)
        )
        assert read_image(path).shape[1:] == (9, 7)


def test_window_and_white_value_are_stored_values_of_jpeg_2000_of_12_bits(tmp_path):
    stored = np.array([[0, 500], [1250, 4095]], dtype=np.uint16).repeat(8, 0).repeat(8, 1)
    path = tmp_path / "a.jp2"
    path.write_bytes(imagecodecs.jpeg2k_encode(stored, level=0, bitspersample=12, reversible=True))
    shown = read_image(path, window=(2000.0, 3000.0))[0, ::8, ::8].flatten().tolist()
    assert shown == pytest.approx([0, 0, 0.25, 1])
    assert torch.equal(read_image(path, white_value=65535), read_image(path))
    with pytest.raises(ImageError, match=r"a.jp2 holds the value 4095, above white_value: 2047"):
        read_image(path, white_value=2047)


@pytest.mark.parametrize("window", [(2000.0, 3000.0), "percentile"])
def test_window_holds_for_grey_beside_alpha(tmp_path, window):
    grey = np.array([[500, 1250], [2000, 3500]], dtype=np.uint16)
    stored = np.dstack([grey, np.full_like(grey, 65535)])
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(stored))
    shown = read_image(tmp_path / "a.png", window=window).flatten().tolist()
    assert shown == pytest.approx([0, 0.25, 0.5, 1])


@pytest.mark.parametrize("window", [(40.0, 400.0), "percentile"])
def test_pictures_of_up_to_8_bits_have_no_window(tmp_path, window):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", window=window).flatten().tolist() == [1, 0]
    Image.fromarray(np.array([[255, 51]], np.uint8)).save(tmp_path / "b.png")
    shown = read_image(tmp_path / "b.png", window=window).flatten().tolist()
    assert shown == pytest.approx([1, 0.2])
