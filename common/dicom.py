"""DICOM files to grey or RGB images in [0, 1], as a viewer would show them."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.image_files import READ_ERRORS, ImageError, check_samples, open_regular
from common.notices import notice

PERCENTILES = (0.1, 99.9)
"""Percentiles of a slice that become black and white where its file says nothing of a window."""
Modality = Callable[[np.ndarray], np.ndarray]


def read_dicom(path: Path, *, force: bool = False) -> np.ndarray:
    """Reads a DICOM file of one frame: grey (H, W) or RGB (H, W, 3), float32 in [0, 1].

    Grey: the modality's table or rescaling, then the first usable window, else the first VOI table,
    else the smallest and largest pixel value that the file names, else percentiles 0.1 and 99.9 of
    the slice. MONOCHROME1 (0 is white) and presentation shape INVERSE are inverted, so that larger
    is brighter. Padding is 0. Colour: palettes are looked up, YBR is turned into RGB.
    force: read it without preamble (check that it begins as DICOM does). Raises ImageError, naming
    the file, where it cannot be read.
    """
    try:
        import pydicom
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError as error:
        raise ImageError(f"{path} needs pydicom to be read: pip install pydicom") from error
    try:
        with open_regular(path) as file:
            dataset = pydicom.dcmread(file, force=force)
        _check_size(dataset, path)
        _name_transfer_syntax(dataset)
        return _displayed(dataset, dataset.pixel_array, path)
    except (*READ_ERRORS, ImportError, InvalidDicomError, BytesLengthException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__  # pydicom's has many lines
        raise ImageError(
            f"Cannot read the DICOM file {path}: {reason}. Remove or "
            "replace it; for compressed pixel data install pydicom's decoders: "
            "pip install pylibjpeg[all]"
        ) from error


def _check_size(dataset: Any, path: Path) -> None:
    """Refuses files of several frames and beyond common.image_files.MAX_SAMPLES."""
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ImageError(f"{path} has {frames} frames; expected 1: save one file per frame.")
    if "Rows" not in dataset or "Columns" not in dataset:
        kind = str(getattr(dataset.get("SOPClassUID"), "name", "unknown"))[:64]
        raise ImageError(f"{path} holds no image (its kind is {kind!r}). Remove it.")
    samples = int(dataset.get("SamplesPerPixel") or 1)
    check_samples(int(dataset.Rows), int(dataset.Columns), samples)


def _name_transfer_syntax(dataset: Any) -> None:
    """Adds the transfer syntax by which a file without that entry was read."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little_endian = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _displayed(dataset: Any, pixels: np.ndarray, path: Path) -> np.ndarray:
    """Stored values of a dataset to (H, W) or (H, W, 3) in [0, 1]."""
    kind = str(dataset.PhotometricInterpretation).strip()
    tables = ("RedPaletteColorLookupTableDescriptor", "PaletteColorLookupTableUID")
    if kind == "PALETTE COLOR" and any(key in dataset for key in tables):
        from pydicom.pixels import apply_color_lut

        pixels = apply_color_lut(pixels, dataset)
        return _colour(pixels, np.iinfo(pixels.dtype).max)
    if pixels.ndim == 3 and pixels.shape[2] == 3:  # pydicom has turned YBR into RGB
        return _colour(pixels, 2 ** int(dataset.BitsStored) - 1)
    if kind not in ("MONOCHROME1", "MONOCHROME2") or pixels.ndim != 2:
        raise ImageError(
            f"{path}: cannot show {kind} with pixels {pixels.shape}; expected MONOCHROME1, "
            "MONOCHROME2, PALETTE COLOR, RGB or YBR."
        )
    padding = _padding(dataset, pixels, path)
    unit = _windowed(dataset, pixels, padding, path)
    # One inversion, not two: MONOCHROME1 of a radiograph demands the shape INVERSE.
    shape = str(dataset.get("PresentationLUTShape", "")).strip().upper()
    if kind == "MONOCHROME2" and shape == "INVERSE":
        notice("DICOM presentation inverted", f"{path} is inverted: PresentationLUTShape INVERSE")
    if kind == "MONOCHROME1" or shape == "INVERSE":
        np.subtract(1, unit, out=unit)
    unit[padding] = 0
    return unit.astype(np.float32)


def _colour(pixels: np.ndarray, white: int) -> np.ndarray:
    """(H, W, 3) stored values to float32 in [0, 1]."""
    return (pixels.astype(np.float32) / np.float32(white)).clip(0, 1)


def _padding(dataset: Any, pixels: np.ndarray, path: Path) -> np.ndarray:
    """Where pixels are padding, (H, W) bool."""
    value, limit = (dataset.get(key) for key in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value in (None, "") or pixels.dtype.kind not in "iu":
        return np.zeros(pixels.shape, dtype=bool)
    # In the pixels' own type: files confuse signed and unsigned entries.
    ends = np.array([value, value if limit in (None, "") else limit], dtype=np.int64)
    low, high = np.sort(ends.astype(pixels.dtype))
    padding = (pixels >= low) & (pixels <= high)
    if padding.any():
        notice(
            "DICOM padding made black",
            f"{path}: {padding.mean():.1%} of its pixels are padding ({low} to {high}): black",
        )
    return padding


def _windowed(dataset: Any, pixels: np.ndarray, padding: np.ndarray, path: Path) -> np.ndarray:
    """Grey values (H, W) in [0, 1], float64, 0 = the smallest value the window shows."""
    modality = _modality(dataset, path)
    values = modality(pixels)
    if not np.isfinite(values).all():
        raise ImageError(f"{path} holds pixels that are not finite. Remove or replace it.")
    if (window := _window(dataset, path)) is not None:
        from pydicom.pixels import apply_windowing

        with np.errstate(over="ignore"):  # exp of far below a narrow sigmoid: infinite, so 0
            return apply_windowing(values, window)
    if dataset.get("VOILUTSequence"):
        # the table is indexed by rescaled values; one that rescaling makes fractional is rounded
        found, bits = _look_up(np.rint(values).astype(np.int64), dataset.VOILUTSequence[0])
        return (found / (2.0**bits - 1)).clip(0, 1)
    ranges = _ranges(dataset, pixels[~padding], values[~padding], modality)
    low, high, source = next(found for found in ranges if found[0] < found[1])
    notice(
        "DICOM without a window",
        f"{path} names no usable window: {low:g} is shown black and {high:g} white, {source}",
    )
    return ((values - low) / (high - low)).clip(0, 1)


def _modality(dataset: Any, path: Path) -> Modality:
    """What makes the modality's values, float64, of stored ones: a table, or slope and intercept.

    Raises ImageError where the slope or the intercept makes no picture.
    """
    if tables := dataset.get("ModalityLUTSequence"):
        return lambda pixels: _look_up(pixels.astype(np.int64), tables[0])[0].astype(np.float64)
    numbers = {"RescaleSlope": 1.0, "RescaleIntercept": 0.0}
    for keyword, default in numbers.items():
        stated = (place.get(keyword) for place in _places(dataset))
        value = next((value for value in stated if value not in (None, "")), default)
        numbers[keyword] = float(value)
        if not math.isfinite(numbers[keyword]):
            raise ImageError(f"{path}: {keyword} is {value}. Correct or remove the file.")
    slope, intercept = numbers.values()
    if slope == 0:
        raise ImageError(
            f"{path}: RescaleSlope is 0, which makes all pixels the same. Correct or remove it."
        )
    return lambda pixels: pixels * slope + intercept


def _places(dataset: Any) -> Iterator[Any]:
    """Where a frame's attributes may stand: its own groups, the shared ones, then the top level."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in dataset.get(groups) or ():
            for macro in ("FrameVOILUTSequence", "PixelValueTransformationSequence"):
                yield from group.get(macro) or ()
    yield dataset


def _look_up(values: np.ndarray, item: Any) -> tuple[np.ndarray, int]:
    """Values by a table of the dataset, and the bits of its entries.

    Not by pydicom 3.0, which indexes a table of 8 bits by 8 bits, and fails on packed ones.
    """
    length, first, bits = (int(number) for number in item.LUTDescriptor)
    length = length or 2**16
    if first >= 2**15 and values.min() < 0:
        first -= 2**16  # a signed number stored as an unsigned one
    data = item.LUTData
    if isinstance(data, bytes):  # of 8 bits: one or two bytes per entry
        data = np.frombuffer(data, dtype="<u2" if len(data) >= 2 * length else "u1")
    table = np.asarray(data)[:length]
    if not 1 <= bits <= 16 or len(table) < length:
        raise ValueError(f"its table has {len(table)} entries of {bits} bits, not {length}")
    return table[np.clip(values - first, 0, length - 1)], bits


def _window(dataset: Any, path: Path) -> Any | None:
    """The first usable window of the file, as pydicom's apply_windowing takes it; None without."""
    from pydicom.dataset import Dataset

    for place in _places(dataset):
        centres, widths = (_numbers(place.get(key)) for key in ("WindowCenter", "WindowWidth"))
        windows = list(zip(centres, widths, strict=False))
        for centre, width in windows:
            if not (math.isfinite(centre) and math.isfinite(width) and width > 0):
                notice(
                    "DICOM window unusable",
                    f"{path}: the window of centre {centre:g} and width {width:g} is left aside",
                )
                continue
            if len(windows) > 1:
                notice(
                    "DICOM window chosen among several",
                    f"{path} has {len(windows)} windows: that of centre {centre:g} and width "
                    f"{width:g} is shown",
                )
            view = Dataset()
            view.PhotometricInterpretation = "MONOCHROME2"
            view.BitsStored, view.PixelRepresentation = 1, 0  # the window's ends become 0 and 1
            view.WindowCenter, view.WindowWidth = centre, width
            view.VOILUTFunction = _window_function(place, width, path)
            return view
    return None


def _window_function(place: Any, width: float, path: Path) -> str:
    """LINEAR, LINEAR_EXACT or SIGMOID. LINEAR is for widths of at least 1: else LINEAR_EXACT."""
    stated = str(place.get("VOILUTFunction") or "LINEAR").strip().upper().replace(" ", "_")
    if stated not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        notice(
            "DICOM window function unknown",
            f"{path}: VOILUTFunction {stated!r} is unknown: LINEAR is taken",
        )
        stated = "LINEAR"
    return "LINEAR_EXACT" if stated == "LINEAR" and width < 1 else stated


def _numbers(value: Any) -> list[float]:
    """The values of an attribute of one or several numbers; [] where it is absent or empty."""
    several = [value] if value is None or np.isscalar(value) else value
    return [float(one) for one in several if one not in (None, "")]


def _ranges(
    dataset: Any, pixels: np.ndarray, values: np.ndarray, modality: Modality
) -> Iterator[tuple[float, float, str]]:
    """Values to show as black and white without a window, and what they are: best ones first.

    pixels, values: those that are no padding, as stored and the modality's, (n,). A range whose low
    is not below its high is of no use; the last one always is.
    """
    integers = pixels.dtype.kind in "iu"
    named = [dataset.get(f"{which}ImagePixelValue") for which in ("Smallest", "Largest")]
    by_table = bool(dataset.get("ModalityLUTSequence"))
    if pixels.size and integers and not by_table and None not in named:
        ends = np.array([int(end) for end in named], dtype=np.int64).astype(pixels.dtype)
        first, smallest, largest, last = map(int, (ends[0], pixels.min(), pixels.max(), ends[1]))
        # pixels that are beyond, or fill less than half of it: it is of another image
        if first <= smallest <= largest <= last and 2 * (largest - smallest) > last - first:
            low, high = np.sort(modality(ends))
            yield low, high, "the smallest and largest pixel value that it names"
    if pixels.size:
        low = np.percentile(values, PERCENTILES[0], method="lower")
        high = np.percentile(values, PERCENTILES[1], method="higher")
        yield low, high, f"percentiles {PERCENTILES} of its own pixels"
    if integers:
        bits = int(dataset.BitsStored)
        smallest = -(2 ** (bits - 1)) if pixels.dtype.kind == "i" else 0
        low, high = np.sort(modality(np.array([smallest, smallest + 2**bits - 1])))
        yield low, high if low < high else low + 1, "the range of its stored bits"
    yield 0.0, 1.0, "the range of no pixels that differ"
