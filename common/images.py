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
from common.image_files import (
    DICOM_SUFFIXES,
    ImageError,
    Pixels,
    file_format,
    read_pixels,
    tiff_pages,
)
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
    has. white_value: the stored value that means white, where the file's bits hold it; fewer bits
    and DICOM files keep their own range. None = their largest. window: which stored values are
    shown black and white in grey images of more than 8 bits; see common.grey_range. auto = as
    above, and so are colour and bytes with any window.
    Raises ImageError, naming the file, where it cannot be read or its values have no known range.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels!r}")
    path = Path(path)
    try:
        pixels, alpha = _read(path, window, white_value)
        if alpha is not None and (alpha != alpha[0, 0]).any():
            notice(
                "alpha channel left out",
                f"{path} is transparent in places: its alpha channel is left out, the colours stay",
            )
        if white_value is None and window == "auto" and pixels.white is None:
            _note_small_values(pixels.values, path)
        image = torch.from_numpy(_to_unit_range(pixels, path, white_value))
        del pixels
        if channels is None or image.shape[0] == channels:
            return image
        return to_grey(image) if channels == 1 else image.expand(3, -1, -1).contiguous()
    except MemoryError as error:
        raise ImageError(f"{path}: there is not enough memory to read it.") from error


def read_mask(path: Path) -> np.ndarray:
    """Reads a mask file: (H, W) bool, True where its stored value is above 0.

    Values of any type and range, whatever the file says of how to show them: no window, no
    inversion, and of DICOM no rescaling. Palettes are looked up. Alpha counts: what is transparent
    is not marked, and where the colours are the same everywhere (black or white paint on a
    transparent ground) alpha alone is the mask. Turned as the orientation tag says. Raises
    ImageError.
    """
    path = Path(path)
    pixels, alpha = _read(path, stored=True)
    colours = pixels.values
    if colours.dtype.kind == "f" and not np.isfinite(colours).all():
        raise ImageError(f"{path} holds values that are not finite, so it is no mask.")
    marked = (colours > 0).any(axis=2)
    if alpha is not None and (alpha != alpha[0, 0]).any():
        marked = alpha > 0 if (colours == colours[0, 0]).all() else marked & (alpha > 0)
    if marked.mean() > 0.5:
        notice(
            "mask that marks more than half of its image",
            f"{path} marks {marked.mean():.1%} of its image: every stored value above 0 counts. If "
            "it is inverted, save it with 0 where there is nothing",
        )
    return marked


def largest_stored(path: Path, white_value: int | None = None) -> str:
    """For messages: the largest value in a file and the range it is read by."""
    pixels, _ = _read(Path(path))
    white, values = _white(pixels, white_value), pixels.values
    largest = white - values.min() if pixels.zero_is_white else values.max()
    return f"its largest value is {largest:g} of {white} ({largest / white:.4f} of the range)"


def _read(
    path: Path, window: Window = "auto", white_value: int | None = None, *, stored: bool = False
) -> tuple[Pixels, np.ndarray | None]:
    """A file's colours (H, W, 1 or 3) and alpha (H, W), None without; DICOM files as displayed.

    window: of other files too, so that those it holds for come in [0, 1]. stored: DICOM, NIfTI and
    NRRD as they are stored, not as displayed.
    """
    file, _ = split_slice(path)
    kind = file_format(file)
    if kind == "dicom" or (kind is None and file.suffix.lower() in DICOM_SUFFIXES):
        values = read_dicom(path, force=kind == "dicom", window=window, stored=stored)
        return Pixels(_samples(values, path)[0]), None
    if kind in ("nifti", "nrrd"):
        values = read_volume_slice(path, window=window, white_value=white_value, stored=stored)
        return Pixels(_samples(values, path)[0]), None
    pixels = read_pixels(path)
    if pixels.zero_is_white and not stored:
        notice("TIFF with white as zero inverted", f"{path} stores white as 0: inverted")
    colours, alpha = _samples(pixels.values, path)
    is_byte = colours.dtype.kind in "bu" and colours.dtype.itemsize == 1
    if window == "auto" or is_byte or colours.shape[2] > 1:
        return pixels._replace(values=colours), alpha
    unit = _windowed(colours, path, window)
    return Pixels(1 - unit if pixels.zero_is_white else unit), alpha


def _samples(values: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Values (H, W[, samples]) as colours (H, W, 1 or 3) and alpha (H, W), None without."""
    if values.ndim == 2:
        values = values[:, :, None]
    samples = values.shape[2] if values.ndim == 3 else 0
    if not 1 <= samples <= 4 or 0 in values.shape:
        raise ImageError(f"{path}: expected an image (H, W) of 1 to 4 samples, got {values.shape}.")
    return (values[:, :, :-1], values[:, :, -1]) if samples in (2, 4) else (values, None)


def _windowed(
    pixels: np.ndarray, path: Path, window: tuple[float, float] | Literal["percentile"]
) -> np.ndarray:
    """Stored grey values (H, W, 1) to float32 in [0, 1]: by level and width, or by percentiles.

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
                other = slice_path(file, page)
                return _samples(read_pixels(other).values, other)[0]

            found = volume_range(file, tiff_pages(file), read, (ImageError,))
        low, high = found or percentile_range(pixels)
        high = high if low < high else low + 1
    return in_range(pixels, low, high).astype(np.float32)


def _note_small_values(colours: np.ndarray, path: Path) -> None:
    """Says where a file of 16 or 32 bits uses a quarter of its range at most, as 12 bits do."""
    if colours.dtype not in (np.uint16, np.uint32):
        return
    largest, white = int(colours.max()), np.iinfo(colours.dtype).max
    if is_largest(8 * colours.dtype.itemsize, largest) and 0 < largest <= white // 4:
        share = f"{100 * largest / white:.2g}%"
        bits = next(bits for bits in (10, 12, 14, 16, 24, 30) if largest < 2**bits)
        notice(
            "small values in a wide type",
            f"{path}: its largest value is {largest}, {share} of the range to {white}, so it is "
            f"dark. If these images hold {bits} bits, set white_value: {2**bits - 1}",
        )


def _white(pixels: Pixels, white_value: int | None) -> int:
    """The stored value that means white (of inverted ones, black)."""
    dtype = pixels.values.dtype
    largest = pixels.white or (np.iinfo(dtype).max if dtype.kind in "iu" else 1)
    return white_value if white_value is not None and white_value <= largest else largest


def _to_unit_range(pixels: Pixels, path: Path, white_value: int | None) -> np.ndarray:
    """Stored values (H, W, C) to (C, H, W) float32 in [0, 1] by the range of their bits."""
    colours = pixels.values
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
    white = _white(pixels, white_value)
    if kind == "u" and high > white:
        raise ImageError(
            f"{path} holds the value {high}, above white_value: {white_value}. Set "
            "white_value to the largest value that these images can hold."
        )
    if pixels.zero_is_white:
        colours = white - colours
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
