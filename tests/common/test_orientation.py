"""Orientation tags: every file is read as a viewer turns it, whatever reads it."""

import io
import logging

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from common.images import read_image, read_mask
from common.notices import counts, forget
from tests.image_files import unit, values, write_png16

SHOWN = values("u2", 5, 7)
STORED_AS = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: np.rot90(shown),  # shown after a quarter turn clockwise
    7: lambda shown: shown[::-1, ::-1].swapaxes(0, 1),
    8: lambda shown: np.rot90(shown, -1),
}
"""What a file with this tag stores of what is shown, by the EXIF and TIFF standards."""


@pytest.fixture(autouse=True)
def _anew():
    forget()


def test_tag_6_is_shown_after_a_quarter_turn_clockwise(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.array([[0, 51], [102, 153], [204, 255]], dtype=np.uint8)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    shown = (read_image(tmp_path / "a.png")[0] * 255).round().tolist()
    assert shown == [[204, 102, 0], [255, 153, 51]]


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "zlib"}, {"compression": "lzw"}, {"rowsperstrip": 2}, {"tile": (16, 16)}],
)
@pytest.mark.parametrize("kind", ["u1", "u2", "f4", "u1 rgb", "u2 rgb"])
def test_tiff_of_every_kind_is_turned_by_its_tag(tmp_path, orientation, options, kind):
    shown = {"u1": (SHOWN // 257).astype(np.uint8), "u2": SHOWN, "f4": values("f4", 5, 7)}[kind[:2]]
    if "rgb" in kind:
        shown = np.stack([shown, shown[::-1], shown[:, ::-1]], axis=2)
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.ascontiguousarray(STORED_AS[orientation](shown)),
        photometric="rgb" if "rgb" in kind else "minisblack",
        extratags=[(274, "H", 1, orientation, True)],
        **options,
    )
    assert torch.equal(read_image(tmp_path / "a.tif"), unit(shown))


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_exif_tag_of_every_format_is_followed(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = values("u1", 5, 7, 3)
    stored = np.ascontiguousarray(STORED_AS[orientation](shown))
    options = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif, **options)
    assert torch.equal(read_image(tmp_path / f"a{suffix}"), unit(shown))


@pytest.mark.parametrize("orientation", STORED_AS)
def test_jpeg_is_turned(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = np.zeros((16, 24), np.uint8)
    shown[:8, :8] = 255
    stored = np.ascontiguousarray(STORED_AS[orientation](shown))
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert torch.equal(read_image(tmp_path / "a.jpg")[0] > 0.5, torch.from_numpy(shown > 127))


@pytest.mark.parametrize("orientation", STORED_AS)
def test_png_of_16_bits_in_colour_is_turned(tmp_path, orientation):
    shown = values("u2", 5, 7, 3)
    write_png16(tmp_path / "a.png", np.ascontiguousarray(STORED_AS[orientation](shown)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG", exif=exif)
    data = buffer.getvalue()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:33] + chunk + whole[33:])  # after the header
    assert torch.equal(read_image(tmp_path / "a.png"), unit(shown))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_tag_without_a_meaning_turns_nothing(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = values("u1", 5, 7)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "a.png"), unit(stored))
    assert counts() == {}


def test_broken_exif_data_does_not_lose_the_image_but_is_said(tmp_path, caplog):
    stored = values("u1", 8, 8)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF header at all")
    assert torch.equal(read_image(tmp_path / "a.png"), unit(stored))
    assert "a.png: its EXIF data cannot be read" in caplog.text


def test_turning_is_said_once_with_the_first_files_name_and_counted(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3
    for name in ("a.png", "b.png"):
        Image.fromarray(values("u1", 4, 4)).save(tmp_path / name, exif=exif)
    with caplog.at_level(logging.WARNING, logger="common.images"):
        read_image(tmp_path / "a.png")
        read_image(tmp_path / "b.png")
    assert [record.name for record in caplog.records] == ["common.images"]
    assert "a.png is turned or mirrored" in caplog.text
    assert counts() == {"image turned as its orientation tag says": 2}


def test_mask_is_turned_as_its_image_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.array([[0, 0, 9]], dtype=np.uint8)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert read_mask(tmp_path / "a.png").tolist() == [[False], [False], [True]]
