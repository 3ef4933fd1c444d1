"""Image files to tensors in [0, 1] and back: the only readers and the only range conversions.

C channels (1 grey, 3 RGB), H W in pixels. Values are divided by the largest value of the file's
type (255 for 8 bits, 65535 for 16), never by the largest value in the image.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.dicom import read_dicom
from common.files import write_atomic
from common.grey_range import Window, in_range, percentile_range, range_of, volume_range
from common.image_files import DICOM_SUFFIXES, ImageError, file_format, read_pixels, tiff_pages
from common.notices import is_largest, notice
from common.volume_files import read_volume_slice
from common.volumes import slice_path, split_slice

GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""ITU-R BT.601 luma of R, G, B."""


def read_image(
    path: Path,
    channels: int | None = None,
    *,
    white_value: int | None = None,
    window: Window = "auto",
) -> Tensor:
    """Reads an image file as a viewer shows it, in float32 in [0, 1]: (C, H, W).

    path: of a file, or of a slice of one that has several (common.volumes); then nothing but that
    slice is read. The file's first bytes tell its format, its suffix does not. Integers of 1 to 32
    bits are divided by their type's largest value; floats must be in [0, 1]; DICOM files: see
    common.dicom.read_dicom, NIfTI and NRRD: common.volume_files.read_volume_slice. The picture
    is turned as its orientation tag says. Alpha is left out: colours below transparent pixels stay
    as stored.
    channels: 1 turns RGB grey (ITU-R BT.601), 3 repeats grey three times, None keeps what the file
    has. white_value: the stored value that means white, where the file's type holds it; smaller
    types and DICOM files keep their own range. None = the type's largest. window: what is shown
    black and white in grey images of more than 8 bits; see common.grey_range. auto = as above.
    Raises ImageError, naming the file, where it cannot be read or its values have no known range.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels!r}")
    path = Path(path)
    try:
        colours, alpha = _read(path, window, white_value)
        if alpha is not None and (alpha != alpha[0, 0]).any():
            notice(
                "alpha channel left out",
                f"{path} is transparent in places: its alpha channel is left out, the colours stay",
            )
        if white_value is None and window == "auto" and colours.dtype in (np.uint16, np.uint32):
            _note_small_values(colours, path)
        image = torch.from_numpy(_to_unit_range(colours, path, white_value))
        del colours
        if channels is None or image.shape[0] == channels:
            return image
        return to_grey(image) if channels == 1 else image.expand(3, -1, -1).contiguous()
    except MemoryError as error:
        raise ImageError(f"{path}: there is not enough memory to read it.") from error


def read_mask(path: Path) -> np.ndarray:
    """Reads a mask file: (H, W) bool, True where a viewer shows something that is not black.

    Alpha counts: what is transparent is not marked, and where the colours are the same everywhere
    (black or white paint on a transparent ground) alpha alone is the mask. Palettes are looked up.
    Values of any type and range; turned as the orientation tag says. Raises ImageError.
    """
    path = Path(path)
    colours, alpha = _read(path, stored=True)
    if colours.dtype.kind == "f" and not np.isfinite(colours).all():
        raise ImageError(f"{path} holds values that are not finite, so it is no mask.")
    marked = (colours > 0).any(axis=2)
    if alpha is None or (alpha == alpha[0, 0]).all():
        return marked
    if (colours == colours[0, 0]).all():
        return alpha > 0
    return marked & (alpha > 0)


def largest_stored(path: Path, white_value: int | None = None) -> str:
    """For messages: the largest value in a file and the range it is read by."""
    colours, _ = _read(Path(path))
    white, largest = _white(colours.dtype, white_value), colours.max()
    return f"its largest value is {largest:g} of {white} ({largest / white:.4f} of the range)"


def _read(
    path: Path, window: Window = "auto", white_value: int | None = None, *, stored: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """A file's colours (H, W, 1 or 3) and alpha (H, W), None without; DICOM files as displayed.

    stored: NIfTI and NRRD as they are stored, not as displayed.
    """
    file, _ = split_slice(path)
    kind = file_format(file)
    if kind == "dicom" or (kind is None and file.suffix.lower() in DICOM_SUFFIXES):
        pixels = read_dicom(path, force=kind == "dicom", window=window)
    elif kind in ("nifti", "nrrd"):
        pixels = read_volume_slice(path, window=window, white_value=white_value, stored=stored)
    else:
        pixels = read_pixels(path)
        if window != "auto" and pixels.ndim == 2 and pixels.dtype != np.uint8:
            pixels = _windowed(pixels, path, window)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    samples = pixels.shape[2] if pixels.ndim == 3 else 0
    if not 1 <= samples <= 4 or 0 in pixels.shape:
        raise ImageError(f"{path}: expected an image (H, W) of 1 to 4 samples, got {pixels.shape}.")
    return (pixels[:, :, :-1], pixels[:, :, -1]) if samples in (2, 4) else (pixels, None)


def _windowed(
    pixels: np.ndarray, path: Path, window: tuple[float, float] | Literal["percentile"]
) -> np.ndarray:
    """Stored grey values (H, W) to float32 in [0, 1]: by level and width, or by percentiles.

    Of a TIFF of several pages the percentiles are those of all. Raises ImageError for NaN.
    """
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ImageError(f"{path} holds values that are not finite. Remove or replace it.")
    if isinstance(window, tuple):
        low, high = range_of(window)
    else:
        file, number = split_slice(path)
        found = None
        if number is not None:

            def read(page: int) -> np.ndarray:
                return read_pixels(slice_path(file, page))

            found = volume_range(file, tiff_pages(file), read, (ImageError,))
        low, high = found or percentile_range(pixels)
        high = high if low < high else low + 1
    return in_range(pixels, low, high).astype(np.float32)


def _note_small_values(colours: np.ndarray, path: Path) -> None:
    """Says where a file of 16 or 32 bits uses a quarter of its range at most, as 12 bits do."""
    largest, white = int(colours.max()), np.iinfo(colours.dtype).max
    if is_largest(8 * colours.dtype.itemsize, largest) and 0 < largest <= white // 4:
        share = f"{100 * largest / white:.2g}%"
        bits = next(bits for bits in (10, 12, 14, 16, 24, 30) if largest < 2**bits)
        notice(
            "small values in a wide type",
            f"{path}: its largest value is {largest}, {share} of the range to {white}, so it is "
            f"dark. If these images hold {bits} bits, set white_value: {2**bits - 1}",
        )


def _white(dtype: np.dtype, white_value: int | None) -> int:
    """The stored value that means white."""
    largest = np.iinfo(dtype).max if dtype.kind in "iu" else 1
    return white_value if white_value is not None and white_value <= largest else largest


def _to_unit_range(colours: np.ndarray, path: Path, white_value: int | None) -> np.ndarray:
    """Stored values (H, W, C) to (C, H, W) float32 in [0, 1] by their type's range."""
    kind, low, high = colours.dtype.kind, colours.min(), colours.max()
    if kind == "i":
        raise ImageError(
            f"{path} holds signed integers ({colours.dtype}, {low} to {high}), for which black and "
            "white are not defined. Save it as unsigned 8 or 16 bits, or as floats in [0, 1]."
        )
    if kind == "c":
        raise ImageError(
            f"{path} holds complex numbers ({colours.dtype}). Save their size, as floats in [0, 1] "
            "or unsigned 16 bits."
        )
    if kind == "f" and not (low >= 0 and high <= 1):  # also true for NaN
        raise ImageError(
            f"{path} holds floats from {low:g} to {high:g}; expected [0, 1]. Rescale it, with the "
            "same numbers for all images, or save it as unsigned 16 bits."
        )
    white = _white(colours.dtype, white_value)
    if kind == "u" and high > white:
        raise ImageError(
            f"{path} holds the value {high}, above white_value: {white_value}. Set "
            "white_value to the largest value that these images can hold."
        )
    wide = np.float64 if kind == "u" and colours.dtype.itemsize > 2 else np.float32
    unit = colours.transpose(2, 0, 1).astype(wide, order="C")  # a copy: files are read-only
    unit /= wide(white)
    return unit.astype(np.float32, copy=False)


def to_grey(image: Tensor) -> Tensor:
    """RGB (3, H, W) to grey (1, H, W) by ITU-R BT.601; exact where R = G = B."""
    red, green, blue = image
    if torch.equal(red, green) and torch.equal(red, blue):
        return red[None].clone()
    weights = image.new_tensor(GREY_WEIGHTS)[:, None, None]
    return (image * weights).sum(0, keepdim=True).clamp(max=1)


def to_signed(x: Tensor) -> Tensor:
    """[0, 1] to the networks' [-1, 1]."""
    return x * 2 - 1


def to_unit(x: Tensor) -> Tensor:
    """The networks' [-1, 1] to [0, 1]."""
    return (x + 1) / 2


def write_image(path: Path, image: Tensor) -> None:
    """Writes (H, W), (1, H, W) or (3, H, W) in [0, 1] as a PNG of 8 bits; values beyond are cut."""
    _write_png(path, image, np.uint8)


def write_image16(path: Path, image: Tensor) -> None:
    """Writes (H, W) or (1, H, W) in [0, 1] as a grey PNG of 16 bits; values beyond are cut."""
    if image.ndim == 3 and len(image) != 1:
        raise ValueError(f"A 16-bit PNG is written in grey alone, got {tuple(image.shape)}")
    _write_png(path, image, np.uint16)


def _write_png(path: Path, image: Tensor, dtype: type[np.unsignedinteger]) -> None:
    """Rounds [0, 1] to the type's levels; the file appears whole or not at all."""
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"Expected (H, W), (1, H, W) or (3, H, W), got {tuple(image.shape)}")
    unit = image.detach().to("cpu", torch.float64).clamp(0, 1)
    levels = (unit * np.iinfo(dtype).max).round().numpy().astype(dtype)
    picture = Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0))
    write_atomic(path, lambda file: picture.save(file, format="PNG"))
