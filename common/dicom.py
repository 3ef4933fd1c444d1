"""DICOM files to grey or RGB images in [0, 1], as a viewer would show them."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np

from common.files import open_regular
from common.grey_range import (
    PERCENTILES,
    Window,
    in_range,
    percentile_range,
    range_of,
    volume_range,
)
from common.image_files import (
    READ_ERRORS,
    ImageError,
    check_samples,
    file_format,
    slice_number,
)
from common.notices import notice
from common.volumes import split_slice

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
"""Class of DICOM's own masks."""
NO_SEGMENTATION = (
    "{} is a DICOM segmentation object, which is not read as a mask: to which slices its frames "
    "belong is named inside. Convert it to NIfTI with the image's slices, or to one PNG for each "
    "slice"
)
MAX_FRAMES = 100_000
"""A file that claims more frames is damaged."""
Modality = Callable[[np.ndarray], np.ndarray]


def count_frames(path: Path, *, force: bool = False) -> int:
    """Frames of a DICOM file, by its header, at least 1. Raises ImageError, naming the file.

    force: read it without preamble.
    """
    with _named_errors(path), open_regular(path) as file:
        import pydicom

        tags: list[Any] = ["NumberOfFrames"]
        header = pydicom.dcmread(file, stop_before_pixels=True, force=force, specific_tags=tags)
        return _frames_of(header)


def is_segmentation(path: Path) -> bool:
    """Whether a file is one of DICOM's own masks, by its header; False where it is unreadable."""
    try:
        if file_format(path) != "dicom":
            return False
        with _named_errors(path), open_regular(path) as file:
            import pydicom

            tags: list[Any] = ["SOPClassUID"]
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=tags)
            return header.get("SOPClassUID") == SEGMENTATION
    except ImageError:
        return False


def _frames_of(dataset: Any) -> int:
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > MAX_FRAMES:
        raise ValueError(f"it claims {frames} frames")
    return max(1, frames)


def read_dicom(
    path: Path, *, force: bool = False, window: Window = "auto", stored: bool = False
) -> np.ndarray:
    """Reads a DICOM image or one frame of several: grey (H, W) or RGB (H, W, 3), in [0, 1] float32.

    path: that of the file, or of one of its frames (common.volumes); no other frame is decoded.
    Grey: the modality's table or rescaling, then `window`. auto: the first usable window, else the
    first VOI table, else the smallest and largest pixel value that a file of one frame names, else
    percentiles 0.1 and 99.9 of the slice, or of all frames. (level, width): those, in the
    modality's values (CT: Hounsfield units). percentile: percentiles, whatever the file says.
    MONOCHROME1 (0 is white) and presentation shape INVERSE are inverted, so that larger is
    brighter. Padding is 0. Colour: palettes are looked up, YBR is turned into RGB, no window. Bytes
    (unsigned, of up to 8 bits, without table or rescaling) have no other window than auto.
    stored: grey as it is stored, without any of this, for masks; a segmentation object is refused.
    force: read it without preamble (check that it begins as DICOM does). Raises ImageError, naming
    the file, where it cannot be read.
    """
    with _named_errors(path):
        import pydicom

        file_path, number = split_slice(path)
        with open_regular(file_path) as file:
            dataset = pydicom.dcmread(file, force=force, stop_before_pixels=number is not None)
            frame = _check_size(dataset, path)
            if stored and dataset.get("SOPClassUID") == SEGMENTATION:
                raise ImageError(NO_SEGMENTATION.format(path))
            _name_transfer_syntax(dataset)
            show = functools.partial(_displayed, window=window, stored=stored)
            if number is None:
                return show(_Frame(dataset, dataset.pixel_array, frame, path))
            if dataset.file_meta.TransferSyntaxUID.is_deflated:  # no frame lies at a known place
                file.seek(0)
                dataset = pydicom.dcmread(file, force=force)
            read = functools.partial(_frame_pixels, dataset, file)
            return show(_Frame(dataset, read(frame), frame, path, read))


def _frame_pixels(dataset: Any, file: BinaryIO, frame: int) -> np.ndarray:
    """Stored values of one frame, (H, W) or (H, W, 3)."""
    from pydicom.pixels import pixel_array

    if "PixelData" in dataset:
        return pixel_array(dataset, index=frame)
    syntax = dataset.file_meta.TransferSyntaxUID
    return pixel_array(file, index=frame, transfer_syntax_uid=syntax)


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turns what goes wrong into an ImageError that names the file."""
    try:
        import pydicom  # noqa: F401
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError as error:
        raise ImageError(f"{path} needs pydicom to be read: pip install pydicom") from error
    _add_decoders()
    try:
        yield
    except (*READ_ERRORS, ImportError, InvalidDicomError, BytesLengthException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__  # pydicom's has many lines
        raise ImageError(
            f"Cannot read the DICOM file {path}: {reason}. Remove or "
            "replace it; for compressed pixel data install pydicom's decoders: "
            "pip install pylibjpeg-openjpeg pyjpegls python-gdcm"
        ) from error


@functools.cache
def _add_decoders() -> None:
    """Lets pydicom fall back on decode_frame, for what no decoder it knows is installed or able."""
    from pydicom import uid
    from pydicom.pixels import get_decoder

    jpeg = (uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
    for syntax in (*jpeg, uid.JPEGLSLossless, uid.JPEGLSNearLossless):
        get_decoder(syntax).add_plugin("imagecodecs", (__name__, decode_frame.__name__))


def is_available(transfer_syntax: str) -> bool:
    """Whether decode_frame can be used: pydicom asks this of a plugin's module."""
    return bool(transfer_syntax)


def decode_frame(frame: bytes, runner: Any) -> bytes:
    """The pixels of a frame of JPEG of 12 bits, lossless JPEG or JPEG-LS: a plugin of pydicom.

    runner: pydicom's; it is told how the pixels lie.
    """
    is_ls = "JPEG-LS" in runner.transfer_syntax.name
    same = {"colorspace": "RGB", "outcolorspace": "RGB"} if runner.samples_per_pixel > 1 else {}
    # in the file's colours: pydicom turns YBR into RGB
    pixels = imagecodecs.jpegls_decode(frame) if is_ls else imagecodecs.jpeg8_decode(frame, **same)
    runner.set_option("bits_allocated", 8 * pixels.dtype.itemsize)
    if runner.samples_per_pixel > 1:
        runner.set_option("planar_configuration", 0)
    return pixels.tobytes()


def _check_size(dataset: Any, path: Path) -> int:
    """The frame that a path names. Refuses sizes beyond common.image_files.MAX_SAMPLES."""
    frame = slice_number(path, range(_frames_of(dataset)), "frames")
    if "Rows" not in dataset or "Columns" not in dataset:
        kind = str(getattr(dataset.get("SOPClassUID"), "name", "unknown"))[:64]
        raise ImageError(f"{path} holds no image (its kind is {kind!r}). Remove it.")
    samples = int(dataset.get("SamplesPerPixel") or 1)
    check_samples(int(dataset.Rows), int(dataset.Columns), samples)
    return frame


@dataclass(frozen=True)
class _Frame:
    """One frame of a dataset."""

    dataset: Any
    pixels: np.ndarray
    """Its stored values, (H, W) or (H, W, 3)."""
    number: int
    path: Path
    """For messages."""
    read: Callable[[int], np.ndarray] | None = None
    """Stored values of any frame, where there are several."""

    def places(self) -> Iterator[Any]:
        """Where its attributes may stand: its own groups, the shared ones, then the top level."""
        own = list(self.dataset.get("PerFrameFunctionalGroupsSequence") or ())
        shared = list(self.dataset.get("SharedFunctionalGroupsSequence") or ())
        for group in (*own[self.number : self.number + 1], *shared):
            for macro in ("FrameVOILUTSequence", "PixelValueTransformationSequence"):
                yield from group.get(macro) or ()
        yield self.dataset

    def other(self, number: int) -> "_Frame":
        """Another frame of its dataset."""
        return replace(self, number=number, pixels=self.read(number))


def _name_transfer_syntax(dataset: Any) -> None:
    """Adds the transfer syntax by which a file without that entry was read."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little_endian = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _displayed(frame: _Frame, window: Window, *, stored: bool) -> np.ndarray:
    """Stored values of a frame to (H, W) or (H, W, 3) in [0, 1]; stored: grey as it is."""
    dataset, pixels, path = frame.dataset, frame.pixels, frame.path
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
    if stored:
        return pixels
    padding = _padding(frame)
    unit = _windowed(frame, padding, "auto" if _holds_bytes(frame) else window)
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


def _padding(frame: _Frame) -> np.ndarray:
    """Where pixels are padding, (H, W) bool."""
    dataset, pixels = frame.dataset, frame.pixels
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
            f"{frame.path}: {padding.mean():.1%} of its pixels are padding ({low} to {high}): "
            "black",
        )
    return padding


def _windowed(frame: _Frame, padding: np.ndarray, window: Window) -> np.ndarray:
    """Grey values (H, W) in [0, 1], float64, 0 = the smallest value the window shows."""
    values = _modality(frame)(frame.pixels)
    if not np.isfinite(values).all():
        raise ImageError(f"{frame.path} holds pixels that are not finite. Remove or replace it.")
    if isinstance(window, tuple):
        return in_range(values, *range_of(window))
    if window == "auto" and (view := _window(frame)) is not None:
        from pydicom.pixels import apply_windowing

        with np.errstate(over="ignore"):  # exp of far below a narrow sigmoid: infinite, so 0
            return apply_windowing(values, view)
    tables = frame.dataset.get("VOILUTSequence")
    if window == "auto" and tables:
        # the table is indexed by rescaled values; one that rescaling makes fractional is rounded
        found, bits = _look_up(np.rint(values).astype(np.int64), tables[0])
        return (found / (2.0**bits - 1)).clip(0, 1)
    ranges = _ranges(frame, padding, values, window)
    low, high, source = next(found for found in ranges if found[0] < found[1])
    if window == "auto":
        notice(
            "DICOM without a window",
            f"{frame.path} names no usable window: {low:g} is shown black and {high:g} white, "
            f"{source}",
        )
    return in_range(values, low, high)


def _holds_bytes(frame: _Frame) -> bool:
    """Whether its values are unsigned, of up to 8 bits, and the modality's as they are."""
    is_short = frame.pixels.dtype.kind == "u" and int(frame.dataset.BitsStored) <= 8
    is_plain = not frame.dataset.get("ModalityLUTSequence")
    return is_short and is_plain and _rescaling(frame) == (1, 0)


def _modality(frame: _Frame) -> Modality:
    """What makes the modality's values, float64, of stored ones: a table, or slope and intercept.

    Raises ImageError where the slope or the intercept makes no picture.
    """
    if tables := frame.dataset.get("ModalityLUTSequence"):
        return lambda pixels: _look_up(pixels.astype(np.int64), tables[0])[0].astype(np.float64)
    slope, intercept = _rescaling(frame)
    return lambda pixels: pixels * slope + intercept


def _rescaling(frame: _Frame) -> tuple[float, float]:
    """Slope and intercept. Raises ImageError where they make no picture."""
    path = frame.path
    numbers = {"RescaleSlope": 1.0, "RescaleIntercept": 0.0}
    for keyword, default in numbers.items():
        stated = (place.get(keyword) for place in frame.places())
        value = next((value for value in stated if value not in (None, "")), default)
        numbers[keyword] = float(value)
        if not math.isfinite(numbers[keyword]):
            raise ImageError(f"{path}: {keyword} is {value}. Correct or remove the file.")
    slope, intercept = numbers.values()
    if slope == 0:
        raise ImageError(
            f"{path}: RescaleSlope is 0, which makes all pixels the same. Correct or remove it."
        )
    return slope, intercept


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


def _window(frame: _Frame) -> Any | None:
    """The first usable window of a frame, as pydicom's apply_windowing takes it; None without."""
    from pydicom.dataset import Dataset

    path = frame.path
    for place in frame.places():
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
    frame: _Frame, padding: np.ndarray, values: np.ndarray, window: Window
) -> Iterator[tuple[float, float, str]]:
    """Values to show as black and white without a window, and what they are: best ones first.

    padding, values: (H, W), the modality's. A range whose low is not below its high is of no use;
    the last one always is.
    """
    dataset, modality = frame.dataset, _modality(frame)
    pixels, values = frame.pixels[~padding], values[~padding]
    integers = pixels.dtype.kind in "iu"
    if frame.read is not None:
        yield from _range_of_all(frame)
    elif pixels.size and integers and window == "auto":
        yield from _named_range(dataset, pixels, modality)
    if pixels.size:
        yield *percentile_range(values), f"percentiles {PERCENTILES} of its own pixels"
    if integers:
        bits = int(dataset.BitsStored)
        smallest = -(2 ** (bits - 1)) if pixels.dtype.kind == "i" else 0
        low, high = np.sort(modality(np.array([smallest, smallest + 2**bits - 1])))
        yield low, high if low < high else low + 1, "the range of its stored bits"
    yield 0.0, 1.0, "the range of no pixels that differ"


def _range_of_all(frame: _Frame) -> Iterator[tuple[float, float, str]]:
    """The percentiles of all frames together."""

    def values_of(number: int) -> np.ndarray:
        other = frame.other(number)
        return _modality(other)(other.pixels)[~_padding(other)]

    numbers, errors = range(_frames_of(frame.dataset)), (*READ_ERRORS, ImageError)
    if (found := volume_range(frame.path, numbers, values_of, errors)) is not None:
        yield *found, f"percentiles {PERCENTILES} of its frames"


def _named_range(
    dataset: Any, pixels: np.ndarray, modality: Modality
) -> Iterator[tuple[float, float, str]]:
    """The smallest and largest value that the file names, where its pixels are of that image."""
    named = [dataset.get(f"{which}ImagePixelValue") for which in ("Smallest", "Largest")]
    if dataset.get("ModalityLUTSequence") or None in named:
        return
    ends = np.array([int(end) for end in named], dtype=np.int64).astype(pixels.dtype)
    first, smallest, largest, last = map(int, (ends[0], pixels.min(), pixels.max(), ends[1]))
    # pixels that are beyond, or fill less than half of it: it is of another image
    if first <= smallest <= largest <= last and 2 * (largest - smallest) > last - first:
        low, high = np.sort(modality(ends))
        yield low, high, "the smallest and largest pixel value that it names"
