"""Decoders: the stored values of PNG, JPEG, BMP, PNM and TIFF files, in full depth."""

import io
import math
import os
import re
import stat
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from common.errors import UserError

READ_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,  # also Pillow's UnidentifiedImageError
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What the decoders raise for files that are truncated, corrupt or of no known kind."""


class ImageError(UserError):
    """An image, or a folder of them, cannot be read; the message names it."""


HEAD_BYTES = 512
"""Bytes at a file's beginning that show its format."""
MAGIC = {
    "dicom": rb".{128}DICM"
    # without preamble: group 2 or 8, its first elements, with a value type or a short length
    rb"|[\x02\x08]\0[\0-\x20]\0(CS|DA|IS|LO|OB|SH|TM|UI|UL)"
    rb"|\x08\0[\0-\x20]\0[\0-\x40]\0\0\0"
    rb"|\0\x08\0[\0-\x20](CS|DA|IS|LO|SH|TM|UI|UL)",
    "png": rb"\x89PNG\r\n\x1a\n",
    "jpeg": rb"\xff\xd8\xff",
    "bmp": rb"BM.{4}.{8}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "pnm": rb"P[1-6f]\s+(#|[0-9])",
    "tiff": rb"II[*+]\0|MM\0[*+]",
    "gif": rb"GIF8[79]a",
    "webp": rb"RIFF.{4}WEBP",
    "jpeg2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "avif": rb".{4}ftypavi[fs]",
}
"""How files of each format begin."""
DICOM_DIRECTORY = b"1.2.840.10008.1.3.10\0"
"""Class of a DICOMDIR, the index of a medium: DICOM, but no image."""


def looks_like_image(path: Path) -> bool:
    """True for a regular file that begins as one of the formats read here; never blocks."""
    try:
        return file_format(path) is not None
    except OSError:
        return False


def file_format(path: Path) -> str | None:
    """The format (a key of MAGIC) that a file's first bytes show; None where they show none."""
    with open_regular(path) as file:
        head = file.read(HEAD_BYTES)
    if DICOM_DIRECTORY in head:
        return None
    for name, pattern in MAGIC.items():
        if re.match(pattern, head, re.DOTALL):
            return name
    return None


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading. OSError where it is a folder, a pipe or a device."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_pixels(path: Path) -> np.ndarray:
    """Stored values of a file, (H, W) or (H, W, 3 or more), in the file's own number type."""
    try:
        if _is_deep_colour_png(path):
            return _read_deep_png(path)
        with warnings.catch_warnings():
            # scans of 10 000 x 10 000 pixels are no attack; twice that still is an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format == "TIFF" and _pillow_would_narrow(image):
                    return _read_with_tifffile(path)
                return _decode(image, path)
    except ImageError:
        raise
    except READ_ERRORS as error:
        if isinstance(error, Image.UnidentifiedImageError) and _looks_like_tiff(path):
            return _read_with_tifffile(path)
        raise ImageError(f"Cannot read the image {path}: {_reason(error, path)}") from error


def _decode(image: Image.Image, path: Path) -> np.ndarray:
    """Decodes what Pillow reads without loss."""
    if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"{path} has {image.n_frames} pages; expected 1: save one file per page.")
    pixels = np.asarray(image)
    if image.mode in ("1", "L", "F"):
        return pixels
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow inverts "0 is white" for 1 and 8 bits alone
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
        return 65535 - pixels if white_is_zero else pixels.astype(np.uint16)
    return np.asarray(image.convert("L" if image.mode == "LA" else "RGB"))


def _pillow_would_narrow(image: Image.Image) -> bool:
    """True for a TIFF that Pillow reduces to 8 bits or reads with the wrong sign."""
    bits = image.tag_v2.get(258, (1,))
    signed = 2 in image.tag_v2.get(339, ())
    return signed or (max(bits) > 8 and image.mode not in ("I;16", "I;16B", "F"))


def _looks_like_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _read_with_tifffile(path: Path) -> np.ndarray:
    """Values of a TIFF of a type that Pillow does not know, such as 16-bit RGB or 64-bit floats."""
    try:
        import tifffile
    except ImportError as error:
        raise ImageError(f"{path} needs tifffile to be read: pip install tifffile") from error
    try:
        with tifffile.TiffFile(path) as file:
            if len(file.pages) > 1:
                raise ImageError(
                    f"{path} has {len(file.pages)} pages; expected 1: save one file per page."
                )
            page = file.pages[0]
            if page.imagelength * page.imagewidth > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ImageError(f"{path} claims {page.imagewidth} x {page.imagelength} pixels.")
            pixels = page.asarray()
            if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype.kind == "u":
                pixels = np.iinfo(pixels.dtype).max - pixels
    except (*READ_ERRORS, tifffile.TiffFileError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"Cannot read the image {path}: {_reason(error, path)}") from error
    return np.moveaxis(pixels, 0, -1) if page.axes == "SYX" else pixels


def _is_deep_colour_png(path: Path) -> bool:
    """True for a PNG of 16 bits with colour or alpha, which Pillow reduces to 8 bits."""
    with path.open("rb") as file:
        head = file.read(26)
    return head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 26 and head[24] == 16 and head[25] != 0


def _read_deep_png(path: Path) -> np.ndarray:
    """Values of a 16-bit PNG with colour or alpha; (H, W, 1 to 4), uint16.

    Pillow keeps one byte of each value: the file is decoded for the high and for the low bytes.
    (torchvision's PNG decoder knows 16 bits, but a corrupt file crashes the process.)
    """
    data = path.read_bytes()
    if data[25] == 4:  # grey and alpha: four bytes per pixel, which can be read as 8-bit RGBA
        head = data[12:24] + b"\x08\x06" + data[26:29]
        data = data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
        with Image.open(io.BytesIO(data)) as image:
            bytes_ = np.asarray(image, dtype=np.uint16)
        return bytes_[:, :, :1] * 256 + bytes_[:, :, 1:2]
    halves = []
    for first_byte in ("B", "L"):
        with Image.open(io.BytesIO(data)) as image:
            mode = f"{image.mode};16{first_byte}"
            image.tile = [tile._replace(args=mode) for tile in image.tile]
            halves.append(np.asarray(image, dtype=np.uint16))
    return halves[0] * 256 + halves[1]


def _reason(error: BaseException, path: Path) -> str:
    """Why a file could not be read, without repeating its name."""
    if isinstance(error, Image.UnidentifiedImageError):
        size = path.stat().st_size
        return f"no image format recognised ({size} bytes). Remove the file or replace it."
    if isinstance(error, FileNotFoundError):
        return "there is no such file."
    return f"{error or type(error).__name__}. Remove the file or replace it."
