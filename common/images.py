"""Image files to tensors in [0, 1] and back: the only readers and the only range conversions.

C channels (1 grey, 3 RGB), H W in pixels. Values are divided by the largest value of the file's
type (255 for 8 bits, 65535 for 16), never by the largest value in the image.
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.decoders import ImageError, read_pixels
from common.dicom import read_dicom
from common.files import write_atomic

DICOM_SUFFIXES = (".dcm", ".dicom")
TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm"),
    *TIFF_SUFFIXES,
    *DICOM_SUFFIXES,
)
GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""ITU-R BT.601 luma of R, G, B."""


def list_images(folder: Path, recursive: bool) -> list[Path]:
    """The image files of a folder, sorted; with recursive also those of its subfolders.

    Hidden files (a leading dot) are left out. Raises ImageError where the folder is missing or has
    no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ImageError(f"The image folder {folder} {what}. Absolute path: {folder.absolute()}.")
    found = _images_below(folder) if recursive else _images_in(folder)
    if found:
        return sorted(found)
    hint = ""
    if not recursive and _images_below(folder):
        hint = " Its subfolders have some: set data_with_subfolder: true to take those."
    raise ImageError(
        f"No image in {folder}. Expected files that end in {', '.join(IMAGE_SUFFIXES)}.{hint}"
    )


def _images_in(folder: Path) -> list[Path]:
    """The image files directly in a folder."""
    return [path for path in folder.iterdir() if _is_image_name(path.name) and path.is_file()]


def _images_below(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, linked ones too, each folder once."""
    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()  # a link that leads back
            continue
        seen.add(real)
        found += [Path(parent, name) for name in names if _is_image_name(name)]
    return found


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def read_image(path: Path, channels: int | None = None) -> Tensor:
    """Reads an image file of 1, 8, 16 or 32 bits or floats in [0, 1]; a DICOM file as displayed.

    channels: 1 turns RGB grey (ITU-R BT.601), 3 repeats grey three times, None keeps what the file
    has. Alpha is dropped. Returns (C, H, W) float32 in [0, 1].
    Raises ImageError, naming the file, where it cannot be read or its values have no known range.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels!r}")
    path = Path(path)
    if path.suffix.lower() in DICOM_SUFFIXES:
        image = read_dicom(path)
    else:
        image = _to_unit_range(read_pixels(path), path)
    return _to_channels(torch.from_numpy(image), channels)


def _to_unit_range(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Stored values (H, W[, samples]) to (1 or 3, H, W) float32 in [0, 1] by their type's range."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    samples = pixels.shape[2] if pixels.ndim == 3 else 0
    if not 1 <= samples <= 4 or 0 in pixels.shape:
        raise ImageError(f"{path}: expected an image (H, W) of 1 to 4 samples, got {pixels.shape}.")
    colour = pixels[:, :, : 1 if samples < 3 else 3]  # alpha dropped
    if colour.dtype.kind == "b":
        return np.ascontiguousarray(colour.transpose(2, 0, 1), dtype=np.float32)
    if colour.dtype.kind == "u":
        wide = np.float32 if colour.dtype.itemsize <= 2 else np.float64
        unit = np.ascontiguousarray(colour.transpose(2, 0, 1), dtype=wide)
        unit /= wide(np.iinfo(colour.dtype).max)
        return unit.astype(np.float32, copy=False)
    if colour.dtype.kind != "f":
        raise ImageError(
            f"{path} holds signed integers ({colour.dtype}, {colour.min()} to {colour.max()}), for "
            "which black and white are not defined. Save it as unsigned 8 or 16 bits, or as "
            "floats in [0, 1]."
        )
    low, high = float(colour.min()), float(colour.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ImageError(
            f"{path} holds floats from {low:g} to {high:g}; expected [0, 1]. Rescale it, with the "
            "same numbers for all images, or save it as unsigned 16 bits."
        )
    return colour.transpose(2, 0, 1).astype(np.float32, order="C")  # a copy: files are read-only


def _to_channels(image: Tensor, channels: int | None) -> Tensor:
    """Grey (1, H, W) to RGB (3, H, W) or back; None keeps the image."""
    if channels is None or image.shape[0] == channels:
        return image
    return to_grey(image) if channels == 1 else image.expand(3, -1, -1).contiguous()


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
    values = _to_levels(image, 255).astype(np.uint8)
    _save_png(Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0)), path)


def write_image16(path: Path, image: Tensor) -> None:
    """Writes (H, W) or (1, H, W) in [0, 1] as a grey PNG of 16 bits; values beyond are cut."""
    values = _to_levels(image, 65535)
    if len(values) != 1:
        raise ValueError(f"A 16-bit PNG is written in grey alone, got {tuple(image.shape)}")
    _save_png(Image.fromarray(values[0].astype(np.uint16)), path)


def _to_levels(image: Tensor, levels: int) -> np.ndarray:
    """Checks the shape and rounds [0, 1] to whole levels: (C, H, W) float64."""
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"Expected (H, W), (1, H, W) or (3, H, W), got {tuple(image.shape)}")
    unit = image.detach().to("cpu", torch.float64).clamp(0, 1)
    return (unit * levels).round().numpy()


def _save_png(image: Image.Image, path: Path) -> None:
    """Saves a picture that appears whole or not at all."""
    write_atomic(path, lambda file: image.save(file, format="PNG"))
