"""DICOM files to grey or RGB images in [0, 1], as a viewer would show them."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from common.image_files import READ_ERRORS, ImageError, check_samples
from common.notices import notice

PERCENTILES = (0.1, 99.9)
"""Percentiles of a slice that become black and white where its file says nothing of a window."""
WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def read_dicom(file: BinaryIO, path: Path, *, force: bool = False) -> np.ndarray:
    """Reads a DICOM file of one frame: (1 or 3, H, W) float32 in [0, 1].

    Grey: the modality's table or rescaling, then the first usable window, else the first VOI table,
    else the smallest and largest pixel value that the file names, else percentiles 0.1 and 99.9 of
    the slice. MONOCHROME1 (0 is white) and presentation shape INVERSE are inverted, so that larger
    is brighter. Padding is 0. Colour: palettes are looked up, YBR is turned into RGB.
    path: the file's name for messages. force: read it without preamble (check that it begins as
    DICOM does). Raises ImageError, naming the file, where it cannot be read.
    """
    try:
        import pydicom
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError as error:
        raise ImageError(f"{path} needs pydicom to be read: pip install pydicom") from error
    try:
        dataset = pydicom.dcmread(file, force=force)
        _check_size(dataset, path)
        _name_transfer_syntax(dataset)
        return _displayed(dataset, dataset.pixel_array, path)
    except ImageError:
        raise
    except (*READ_ERRORS, ImportError, InvalidDicomError, BytesLengthException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__  # pydicom's has many lines
        raise ImageError(
            f"Cannot read the DICOM file {path}: {reason}. Remove or "
            "replace it; for compressed pixel data install pydicom's decoders: "
            "pip install pylibjpeg[all]"
        ) from error


def _check_size(dataset: Any, path: Path) -> None:
    """Refuses files of several frames and beyond common.image_files.MAX_SAMPLES."""
    frames = int(dataset.get("NumberOfFrames", None) or 1)
    if frames > 1:
        raise ImageError(f"{path} has {frames} frames; expected 1: save one file per frame.")
    if "Rows" not in dataset or "Columns" not in dataset:
        kind = str(getattr(dataset.get("SOPClassUID", None), "name", "unknown"))[:64]
        raise ImageError(f"{path} holds no image (its kind is {kind!r}). Remove it.")
    samples = int(dataset.get("SamplesPerPixel", None) or 1)
    check_samples(int(dataset.Rows), int(dataset.Columns), samples)


def _name_transfer_syntax(dataset: Any) -> None:
    """Adds the transfer syntax by which a file without that entry was read."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if getattr(dataset, "file_meta", None) is None:
        dataset.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little_endian = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _displayed(dataset: Any, pixels: np.ndarray, path: Path) -> np.ndarray:
    """Stored values of a dataset to (1 or 3, H, W) in [0, 1]."""
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
    if padding is not None:
        unit[padding] = 0
    return unit[None].astype(np.float32)


def _colour(pixels: np.ndarray, white: int) -> np.ndarray:
    """(H, W, 3) stored values to (3, H, W) float32 in [0, 1]."""
    unit = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    unit /= np.float32(white)
    return unit.clip(0, 1, out=unit)


def _padding(dataset: Any, pixels: np.ndarray, path: Path) -> np.ndarray | None:
    """Where pixels are padding, (H, W) bool; None where none is."""
    value = dataset.get("PixelPaddingValue", None)
    if value is None or value == "" or pixels.dtype.kind not in "iu":
        return None
    limit = dataset.get("PixelPaddingRangeLimit", None)
    ends = [value, value if limit is None or limit == "" else limit]
    # In the pixels' own type: files confuse signed and unsigned entries.
    low, high = np.sort(np.array(ends, dtype=np.int64).astype(pixels.dtype))
    padding = (pixels >= low) & (pixels <= high)
    if not padding.any():
        return None
    notice(
        "DICOM padding made black",
        f"{path}: {padding.mean():.1%} of its pixels are padding ({low} to {high}): black",
    )
    return padding


def _windowed(
    dataset: Any, pixels: np.ndarray, padding: np.ndarray | None, path: Path
) -> np.ndarray:
    """Grey values (H, W) in [0, 1], float64, 0 = the smallest value the window shows."""
    modality = _Modality.of(dataset, path)
    values = modality.apply(pixels)
    if not np.isfinite(values).all():
        raise ImageError(f"{path} holds pixels that are not finite. Remove or replace it.")
    window = _window(dataset, path)
    if window is not None:
        return _apply_window(values, window)
    if dataset.get("VOILUTSequence"):
        item = dataset.VOILUTSequence[0]
        # the table is indexed by rescaled values; one that rescaling makes fractional is rounded
        shown, bits = _look_up(np.rint(values).astype(np.int64), item)
        return (shown / (2.0**bits - 1)).clip(0, 1)
    low, high = _range_without_window(dataset, pixels, values, modality, padding, path)
    return ((values - low) / (high - low)).clip(0, 1)


class _Modality(NamedTuple):
    """From stored values to the modality's: by a table or by value * slope + intercept."""

    slope: float
    intercept: float
    table: Any = None
    """Item of the Modality LUT Sequence."""

    @classmethod
    def of(cls, dataset: Any, path: Path) -> "_Modality":
        if dataset.get("ModalityLUTSequence"):
            return cls(1.0, 0.0, dataset.ModalityLUTSequence[0])
        numbers = {}
        for keyword, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
            found = (place.get(keyword, None) for place in _places(dataset))
            value = next((value for value in found if value not in (None, "")), default)
            numbers[keyword] = float(value)
            if not math.isfinite(numbers[keyword]):
                raise ImageError(f"{path}: {keyword} is {value}. Correct or remove the file.")
        if numbers["RescaleSlope"] == 0:
            raise ImageError(
                f"{path}: RescaleSlope is 0, which makes all pixels the same. Correct or remove it."
            )
        return cls(*numbers.values())

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """The modality's values, float64."""
        if self.table is not None:
            return _look_up(pixels.astype(np.int64), self.table)[0].astype(np.float64)
        return pixels * self.slope + self.intercept


def _places(dataset: Any) -> Iterator[Any]:
    """Where a frame's attributes may stand: its own groups, the shared ones, then the top level."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in dataset.get(groups, None) or ():
            for macro in ("FrameVOILUTSequence", "PixelValueTransformationSequence"):
                yield from group.get(macro, None) or ()
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


class _Window(NamedTuple):
    centre: float
    width: float
    function: str


def _window(dataset: Any, path: Path) -> _Window | None:
    """The first usable window of the file; None where there is none."""
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
            return _Window(centre, width, _window_function(place, width, path))
    return None


def _window_function(place: Any, width: float, path: Path) -> str:
    """LINEAR, LINEAR_EXACT or SIGMOID. LINEAR is for widths of at least 1: else LINEAR_EXACT."""
    stated = str(place.get("VOILUTFunction", None) or "LINEAR").strip().upper().replace(" ", "_")
    if stated not in WINDOW_FUNCTIONS:
        notice(
            "DICOM window function unknown",
            f"{path}: VOILUTFunction {stated!r} is unknown: LINEAR is taken",
        )
        stated = "LINEAR"
    return "LINEAR_EXACT" if stated == "LINEAR" and width < 1 else stated


def _numbers(value: Any) -> list[float]:
    """The values of an attribute of one or several numbers; none where it is absent or empty."""
    if value is None or value == "":
        return []
    several = [value] if np.isscalar(value) else value
    return [float(one) for one in several if one not in (None, "")]


def _apply_window(values: np.ndarray, window: _Window) -> np.ndarray:
    """Window functions of DICOM PS3.3 C.11.2.1.2 and .3, scaled to [0, 1]."""
    from pydicom.dataset import Dataset
    from pydicom.pixels import apply_windowing

    view = Dataset()
    view.PhotometricInterpretation = "MONOCHROME2"
    view.BitsStored, view.PixelRepresentation = 1, 0  # the window's ends become 0 and 1
    view.WindowCenter, view.WindowWidth, view.VOILUTFunction = window
    with np.errstate(over="ignore"):  # far below a narrow sigmoid exp is infinite, so the result 0
        return apply_windowing(values, view)


def _range_without_window(
    dataset: Any,
    pixels: np.ndarray,
    values: np.ndarray,
    modality: _Modality,
    padding: np.ndarray | None,
    path: Path,
) -> tuple[float, float]:
    """Values to show as black and white of a file that names no window; low < high."""
    counted = np.ones(pixels.shape, dtype=bool) if padding is None else ~padding
    named = [dataset.get(f"{which}ImagePixelValue", None) for which in ("Smallest", "Largest")]
    if counted.any() and modality.table is None and pixels.dtype.kind in "iu" and None not in named:
        ends = np.array([int(end) for end in named], dtype=np.int64).astype(pixels.dtype)
        smallest, largest = int(pixels[counted].min()), int(pixels[counted].max())
        inside = ends[0] <= smallest <= largest <= ends[1]
        if inside and 2 * (largest - smallest) > int(ends[1]) - int(
            ends[0]
        ):  # else of something else
            low, high = np.sort(ends * modality.slope + modality.intercept)
            return _said(low, high, "the smallest and largest pixel value that it names", path)
    if counted.any():
        low = np.percentile(values[counted], PERCENTILES[0], method="lower")
        high = np.percentile(values[counted], PERCENTILES[1], method="higher")
        if low < high:
            return _said(low, high, f"percentiles {PERCENTILES} of its own pixels", path)
    if pixels.dtype.kind not in "iu":
        return _said(0.0, 1.0, "the range of no pixels that differ", path)
    bits = int(dataset.BitsStored)
    smallest = -(2 ** (bits - 1)) if pixels.dtype.kind == "i" else 0
    ends = modality.apply(np.array([smallest, smallest + 2**bits - 1]))
    low, high = float(ends.min()), float(ends.max())
    return _said(low, high if low < high else low + 1, "the range of its stored bits", path)


def _said(low: float, high: float, source: str, path: Path) -> tuple[float, float]:
    notice(
        "DICOM without a window",
        f"{path} names no usable window: {low:g} is shown black and {high:g} white, {source}",
    )
    return float(low), float(high)
