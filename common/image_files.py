"""Image files to arrays of their stored values: PNG, JPEG, BMP, PNM, TIFF and such, in full depth.

Damaged files are refused: an ImageError names the file, and what to do.
"""

import contextlib
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import imagecodecs
import numpy as np
from PIL import ExifTags, Image

from common.errors import UserError
from common.files import open_regular
from common.notices import notice
from common.volumes import slice_path, split_slice

if TYPE_CHECKING:
    import tifffile  # few sets have such files, and it takes half a second

DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff"),
    *DICOM_SUFFIXES,
    *(".nii", ".nii.gz", ".nrrd"),
)
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "GIF", "WEBP", "JPEG2000")
"""Formats that Pillow may decode: pixel formats alone, none that runs another program."""
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
    "nifti": rb".{344}n\+1\0|.{4}n\+2\0\r\n\x1a\n",
    "nrrd": rb"NRRD000[1-9]",
}
"""How files of each format begin; NIfTI also compressed by gzip."""
GZIP = b"\x1f\x8b"
J2K_BEGIN = b"\xff\x4f\xff\x51"
"""First markers of a JPEG 2000 codestream, which may lie in a box of a file."""
DICOM_DIRECTORY = rb"[^.0-9]1\.2\.840\.10008\.1\.3\.10[^.0-9]"
"""Class of a DICOMDIR, the index of a medium: DICOM, but no image."""
LARGEST_COMPRESSION = 2000
"""Decoded bytes per byte of a TIFF file, beyond what LZW and deflate (1032) can reach."""
MAX_SAMPLES = 400_000_000
"""Samples (pixels times channels) of the largest image that is read: 1.6 GB in float32."""
READ_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError),
    *(SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError),
    OSError,  # also Pillow's UnidentifiedImageError
    RuntimeError,  # also imagecodecs' errors
)
"""What the decoders raise for files that are truncated, corrupt or of no known kind."""

PILLOW_COMPRESSIONS = (
    *(1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32809, 32946, 34676, 34677, 34925, 50000),
)
"""TIFF compressions that Pillow decodes: fax, LZW, JPEG, deflate, PackBits and such."""
FAX = (2, 3, 4)
"""TIFF compressions of fax machines, whose bits are ink, so that 0 is always white."""

# What it logs of damaged files is in the ImageError, or does not matter.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class ImageError(UserError):
    """An image, or a folder of them, cannot be read; the message names it."""


class Pixels(NamedTuple):
    """Stored values of an image, and what they mean."""

    values: np.ndarray
    """(H, W) or (H, W, samples): grey, grey and alpha, RGB, or RGB and alpha."""
    white: int | None = None
    """The largest value that its bits hold where its type holds more: 4095 of 12 bits."""
    zero_is_white: bool = False


def check_samples(height: int, width: int, samples: int) -> None:
    """ValueError where an image would have more than MAX_SAMPLES."""
    if height * width * samples > MAX_SAMPLES:
        raise ValueError(
            f"it claims {height} x {width} pixels of {samples} samples, more than "
            f"{MAX_SAMPLES / 1e6:g} million in all; cut it into smaller images"
        )


def looks_like_image(path: Path) -> bool:
    """True for a regular file that begins as one of the formats read here; never blocks."""
    try:
        return file_format(path) is not None
    except ImageError:
        return False


def file_format(path: Path) -> str | None:
    """The format (a key of MAGIC) that a file's first bytes show; None where they show none.

    Raises ImageError, naming the file, where it cannot be opened.
    """
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    if re.search(DICOM_DIRECTORY, head):
        return None
    if head.startswith(GZIP):
        return "nifti" if re.match(MAGIC["nifti"], gunzipped(head), re.DOTALL) else None
    return next((name for name, begin in MAGIC.items() if re.match(begin, head, re.DOTALL)), None)


def gunzipped(begin: bytes) -> bytes:
    """The beginning of a file as far as its first bytes tell, uncompressed where it is gzip."""
    if not begin.startswith(GZIP):
        return begin
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(begin, HEAD_BYTES)
    except zlib.error:
        return b""


def slice_number(path: Path, numbers: Sequence[int], what: str) -> int:
    """The number that a path names among those of its file's slices; that of an only one.

    what: what the file's slices are called: frames, pages, slices. Raises ImageError, naming file
    and number, where it names none of them, or none at all.
    """
    file, number = split_slice(path)
    if number is None and len(numbers) == 1:
        return numbers[0]
    ends = [slice_path(file, end).name for end in (numbers[0], numbers[-1])]
    if number is None:
        raise ImageError(
            f"{path} has {len(numbers)} {what}; expected 1: name one of them, {' to '.join(ends)}."
        )
    if number not in numbers:
        raise ImageError(
            f"{path}: {file.name} has no such slice; it has {len(numbers)} {what}, "
            f"{' to '.join(ends)}."
        )
    return number


def is_lossy(path: Path) -> bool:
    """Whether a file's values may only be near those that were saved.

    So with JPEG, also in TIFF, lossy WebP, and JPEG 2000, whose files seldom tell.
    Raises ImageError, naming the file, where it cannot be opened.
    """
    path, _ = split_slice(path)
    kind = file_format(path)
    with open_regular(path) as file:
        if kind == "webp":
            return b"VP8 " in file.read(HEAD_BYTES)
        if kind == "tiff":
            import tifffile

            errors = (*READ_ERRORS, tifffile.TiffFileError)
            with contextlib.suppress(*errors), tifffile.TiffFile(file) as tiff:
                return bool(re.search("JPE?G|JP2|WEBP", tiff.pages[0].compression.name))
    return kind in ("jpeg", "jpeg2000")


def read_pixels(path: Path) -> Pixels:
    """Stored values of a file as a viewer turns them, in the file's own number type.

    path: that of the file or, of a TIFF of several pages, of one of them. Palettes are looked up,
    CMYK and YCbCr turned into RGB; nothing is scaled or inverted (but fax, to 1 for white). Raises
    ImageError, naming the file.
    """
    file_path, number = split_slice(path)
    page = 0
    try:
        with open_regular(file_path) as file, warnings.catch_warnings():
            # scans of 10 000 x 10 000 pixels are no attack; twice that still is an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            kind = file_format(file_path)
            if kind == "tiff":
                deep, page = _read_deep_tiff(file, path)
                if deep is not None:
                    return deep
                file.seek(0)
            elif number:
                slice_number(path, range(1), "picture")
            # From an open file: a TIFF that Pillow maps into memory comes with its rows torn where
            # its orientation swaps height and width.
            with Image.open(file, formats=PILLOW_FORMATS) as image:
                if page:
                    image.seek(page)
                return _decode(image, file, path)
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> ImageError:
    """The error of a file that could not be read, without a repetition of its name."""
    said = getattr(error, "strerror", None) or error or type(error).__name__
    reason = f"{said}. Remove the file or replace it."
    if isinstance(error, Image.UnidentifiedImageError):
        size = split_slice(path)[0].stat().st_size
        reason = f"no image format recognised ({size} bytes). Remove the file or replace it."
    elif isinstance(error, FileNotFoundError):
        reason = "there is no such file."
    elif isinstance(error, MemoryError):
        reason = "there is not enough memory for it. Make it smaller, or free memory."
    return ImageError(f"Cannot read the image {path}: {reason}")


def _decode(image: Image.Image, file: BinaryIO, path: Path) -> Pixels:
    """Decodes what Pillow opened from the file."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in ("MPO", "TIFF"):
        raise ImageError(f"{path} has {frames} frames; expected 1: save one file per frame.")
    if frames > 1 and image.format == "MPO":  # a camera's
        notice(
            "first of several pictures in a JPEG taken",
            f"{path} holds {frames} pictures: the first is taken",
        )
    check_samples(image.height, image.width, len(image.getbands()))
    if image.format == "TIFF":
        _note_turned(image.tag_v2.get(ExifTags.Base.Orientation, 1), path)
        values = _values(image)  # Pillow turns TIFF files itself, and inverts them
        inverted = image.tag_v2.get(262) == 0 and image.tag_v2.get(259) not in FAX
        return Pixels(np.invert(values) if inverted else values, zero_is_white=inverted)
    image.load()  # before a search for EXIF data behind the pixels, which would hide its errors
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except READ_ERRORS as error:
        orientation = 1
        notice(
            "orientation tag unreadable",
            f"{path}: its EXIF data cannot be read ({error}), so it is taken to be upright",
        )
    if image.format == "JPEG2000":
        file.seek(0)
        if (deep := _read_deep_jpeg2000(file.read())) is not None:
            return deep._replace(values=_turned(deep.values, orientation, path))
    if image.format == "PNG":
        file.seek(0)
        head = file.read(26)
        if head[24] == 16 and head[25] != 0:  # 16 bits with colour or alpha: Pillow keeps 8
            deep = imagecodecs.png_decode(head + file.read())
            return Pixels(_turned(deep, orientation, path))
    return Pixels(_turned(_values(image), orientation, path))


def _values(image: Image.Image) -> np.ndarray:
    """The pixels in the modes that keep their depth: (H, W) or (H, W, 2 to 4)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return np.asarray(image).astype(np.uint16)
    grey = image.mode in ("1", "L", "LA", "La", "F")
    if image.has_transparency_data:
        return np.asarray(image.convert("LA" if grey else "RGBA"))
    return np.asarray(image if grey or image.mode == "RGB" else image.convert("RGB"))


def _turned(pixels: np.ndarray, orientation: int, path: Path) -> np.ndarray:
    """Stored values (H, W[, samples]) turned or mirrored as the tag (1 to 8) says, for a viewer."""
    _note_turned(orientation, path)
    if orientation in (5, 6, 7, 8):  # the first stored row is a column
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):  # mirrored left to right
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):  # mirrored top to bottom
        pixels = pixels[::-1]
    return pixels


def _note_turned(orientation: int, path: Path) -> None:
    if orientation in range(2, 9):
        notice(
            "image turned as its orientation tag says",
            f"{path} is turned or mirrored, as viewers do, by its orientation tag {orientation}",
        )


def _read_deep_jpeg2000(data: bytes) -> Pixels | None:
    """Values of a JPEG 2000 file; None up to 8 bits, to which Pillow reduces deeper colours."""
    from pydicom.pixels.utils import get_j2k_parameters  # few sets have such files

    facts = get_j2k_parameters(data[data.find(J2K_BEGIN) :])
    bits = facts.get("precision", 8)
    if bits <= 8:
        return None
    pixels = imagecodecs.jpeg2k_decode(data)
    return Pixels(pixels, _white(pixels, bits))


def _white(pixels: np.ndarray, bits: int) -> int | None:
    """The largest value of unsigned integers of this many bits where their type holds more."""
    narrow = pixels.dtype.kind == "u" and bits < 8 * pixels.dtype.itemsize
    return 2**bits - 1 if narrow else None


def tiff_pages(path: Path) -> Sequence[int]:
    """Numbers, from 0, of a TIFF's pages that are pictures of their own. Raises ImageError.

    The others are smaller copies, as viewers show for a preview, and transparency masks.
    """
    import tifffile

    try:
        with open_regular(path) as file, tifffile.TiffFile(file) as tiff:
            return _own_pages(tiff, path)
    except (*READ_ERRORS, tifffile.TiffFileError) as error:
        raise _unreadable(path, error) from error


def _own_pages(tiff: "tifffile.TiffFile", path: Path) -> list[int]:
    flags = [(page.is_reduced or page.is_mask) for page in tiff.pages]
    hidden = int((tiff.imagej_metadata or {}).get("images", 1)) if tiff.is_imagej else 1
    if hidden > len(flags) == 1:
        raise ValueError(
            f"its {hidden} pages follow each other as ImageJ alone reads; save it anew"
        )
    if any(flags):
        notice(
            "smaller copies in a TIFF passed over",
            f"{path}: {sum(flags)} of its {len(flags)} pages are smaller copies or transparency "
            "masks: passed over",
        )
    return [number for number, is_other in enumerate(flags) if not is_other] or [0]


def _read_deep_tiff(file: BinaryIO, path: Path) -> tuple[Pixels | None, int]:
    """Values of a TIFF file; and the page read.

    None for a sound file that Pillow reads: of up to 8 unsigned bits, for it reduces deeper ones to
    8 bits.
    """
    import tifffile
    from tifffile import PHOTOMETRIC

    try:
        with tifffile.TiffFile(file) as tiff:
            number = slice_number(path, _own_pages(tiff, path), "pages")
            page = tiff.pages[number]
            _check_tiff_parts(page, tiff.filehandle.size)
            if page.samplesperpixel > 4:
                raise ValueError(
                    f"it has {page.samplesperpixel} samples per pixel; expected 1 to 4: grey or "
                    "RGB, and alpha"
                )
            if _is_for_pillow(page, big_endian=tiff.byteorder == ">", is_big=tiff.is_bigtiff):
                return None, number
            grey = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK)
            if page.photometric not in (*grey, PHOTOMETRIC.RGB):
                raise ValueError(
                    f"colours of kind {page.photometric!r} with {page.bitspersample} bits are not "
                    "read; save it as grey or RGB"
                )
            pixels = _decoded_tiff(page)
            orientation = page.tags.valueof(ExifTags.Base.Orientation, 1)
    except tifffile.TiffFileError as error:  # no ValueError in older versions
        raise ValueError(str(error)) from error
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.shape[:2] != (page.imagelength, page.imagewidth):
        raise ValueError(f"its pixels are {pixels.shape}, by its axes {page.axes}")
    white = _white(pixels, page.bitspersample)
    inverted = page.photometric == PHOTOMETRIC.MINISWHITE
    return Pixels(_turned(pixels, orientation, path), white, inverted), number


def _is_for_pillow(page: "tifffile.TiffPage", *, big_endian: bool, is_big: bool) -> bool:
    """Whether Pillow reads a page in full depth."""
    from tifffile import PHOTOMETRIC, SAMPLEFORMAT

    is_short = page.bitspersample <= 8 and page.sampleformat != SAMPLEFORMAT.INT
    colours_called_grey = page.photometric == PHOTOMETRIC.MINISBLACK and page.samplesperpixel > 2
    can_open = not (colours_called_grey or (is_big and big_endian))
    return is_short and can_open and page.compression in PILLOW_COMPRESSIONS


def _decoded_tiff(page: "tifffile.TiffPage") -> np.ndarray:
    """A page's pixels. Raises ValueError, naming its compression, where there is no decoder."""
    from tifffile import TIFF

    try:
        if page.compression != 1:
            TIFF.DECOMPRESSORS[page.compression]
        return page.asarray()
    except (KeyError, ImportError, NotImplementedError) as error:
        name = getattr(page.compression, "name", page.compression)
        raise ValueError(
            f"its compression {name} cannot be read; save it with LZW or deflate"
        ) from error


def _check_tiff_parts(page: "tifffile.TiffPage", file_bytes: int) -> None:
    """ValueError where the image is too large, or its file lacks strips or tiles.

    Neither Pillow nor tifffile minds missing ones: they would be black.
    """
    height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
    part = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
    sizes = (height, width, samples, page.bitspersample, page.imagedepth, *part)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"its sizes are damaged: {sizes}"[:200])
    check_samples(height, width, samples)
    planes = samples if page.planarconfig == 2 else 1  # of separate colours
    expected = -(-height // min(part[0], height)) * -(-width // part[1]) * planes * page.imagedepth
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    present = sum(n > 0 and 0 < start <= start + n <= file_bytes for start, n in parts)
    if len(parts) < expected or present < len(parts):
        raise ValueError(
            f"{height} x {width} pixels need {expected} strips or tiles, but {present} of "
            f"{len(parts)} are in the file"
        )
    decoded = height * planes * -(-width * (samples // planes) * page.bitspersample // 8)
    stored = sum(page.databytecounts)
    plain = page.compression == 1 and page.photometric != 6  # YCbCr stores fewer colour samples
    if decoded > stored * (1 if plain else LARGEST_COMPRESSION):
        raise ValueError(f"{height} x {width} pixels are {decoded} bytes, but it holds {stored}")
