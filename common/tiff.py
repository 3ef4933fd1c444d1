"""TIFF files of more than 8 bits or signed values, and checks of all TIFF files.

Pillow reduces some of them to 8 bits, and neither it nor tifffile minds strips that are missing.
"""

import logging
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile

from common.image_errors import READ_ERRORS, ImageError, check_samples
from common.notices import notice

GREY = (tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.MINISBLACK)
LARGEST_COMPRESSION = 2000
"""Decoded bytes per byte of a file, beyond what LZW and deflate (1032) can reach."""

# What it logs of damaged files is in the ImageError, or does not matter.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def read_deep_tiff(file: BinaryIO, path: Path) -> tuple[np.ndarray, int] | None:
    """Values (H, W) or (H, W, samples) of a TIFF file and its orientation tag, 1 to 8.

    Of whole bytes in their own type; other depths, such as 12 bits, are floats in [0, 1]. None for
    a sound file of up to 8 unsigned bits, which Pillow reads. Raises ImageError, naming the file.
    """
    try:
        with tifffile.TiffFile(file) as tiff:
            if len(tiff.pages) != 1:
                raise ImageError(
                    f"{path} has {len(tiff.pages)} pages; expected 1: save one file per page."
                )
            page = tiff.pages.first
            _check_size(page, tiff.filehandle.size)
            if page.bitspersample <= 8 and page.sampleformat != tifffile.SAMPLEFORMAT.INT:
                return None
            if page.photometric not in (*GREY, tifffile.PHOTOMETRIC.RGB):
                raise ValueError(
                    f"colours of kind {page.photometric!r} with {page.bitspersample} bits are not "
                    "read; save it as grey or RGB"
                )
            pixels = page.asarray()
            if page.axes == "SYX":
                pixels = np.moveaxis(pixels, 0, -1)
            if pixels.shape[:2] != (page.imagelength, page.imagewidth):
                raise ValueError(f"its pixels are {pixels.shape}, by its axes {page.axes}")
            orientation = page.tags.valueof(274, 1)
    except (*READ_ERRORS, tifffile.TiffFileError) as error:
        raise ImageError(f"Cannot read the image {path}: {error}. Remove or replace it.") from error
    if pixels.dtype.kind == "u" and page.bitspersample < 8 * pixels.dtype.itemsize:
        pixels = (pixels / (2.0**page.bitspersample - 1)).astype(np.float32)
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype.kind in "uf":
        notice("TIFF with white as zero inverted", f"{path} stores white as 0: inverted")
        pixels = (1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max) - pixels
    return pixels, orientation


def _check_size(page: tifffile.TiffPage, file_bytes: int) -> None:
    """ValueError where the image is too large, or the file has not all parts that it needs."""
    height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
    part = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip,)
    sizes = (height, width, samples, page.bitspersample, page.imagedepth, *part)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"its sizes are damaged: {sizes}"[:200])
    check_samples(height, width, samples)
    planes = samples if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else 1
    if page.is_tiled:
        expected = -(-height // page.tilelength) * -(-width // page.tilewidth)
    else:
        expected = -(-height // min(page.rowsperstrip, height))
    expected *= planes * page.imagedepth
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    present = sum(n > 0 and 0 < start <= start + n <= file_bytes for start, n in parts)
    if len(parts) < expected or present < len(parts):
        raise ValueError(
            f"{height} x {width} pixels need {expected} strips or tiles, but {present} of "
            f"{len(parts)} are in the file"
        )
    decoded = height * planes * -(-width * (samples // planes) * page.bitspersample // 8)
    stored = sum(page.databytecounts)
    # YCbCr stores fewer samples of its colours
    plain = page.compression == 1 and page.photometric != tifffile.PHOTOMETRIC.YCBCR
    if decoded > stored * (1 if plain else LARGEST_COMPRESSION):
        raise ValueError(f"{height} x {width} pixels are {decoded} bytes, but it holds {stored}")
