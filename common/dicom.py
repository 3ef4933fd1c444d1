"""DICOM files to grey or RGB images in [0, 1], as a viewer would show them."""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from common.decoders import ImageError


def read_dicom(path: Path) -> np.ndarray:
    """Reads a DICOM file of one frame: (1 or 3, H, W) float32 in [0, 1].

    Grey: rescale slope and intercept, then the file's first window, else its first VOI table, else
    the range of the stored bits; MONOCHROME1 (0 is white) is inverted, so that larger is brighter.
    Raises ImageError, naming the file, where it cannot be read or pydicom is not installed.
    """
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise ImageError(f"{path} needs pydicom to be read: pip install pydicom") from error
    try:
        dataset = pydicom.dcmread(path)
        pixels = dataset.pixel_array
        return _displayed(dataset, pixels, path)
    except ImageError:
        raise
    except (
        InvalidDicomError,
        AttributeError,
        EOFError,
        ImportError,
        KeyError,
        NotImplementedError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise ImageError(
            f"Cannot read the DICOM file {path}: {error}. Remove or replace it; for compressed "
            "pixel data install pydicom's decoders: pip install pylibjpeg[all]"
        ) from error


def _displayed(dataset: Any, pixels: np.ndarray, path: Path) -> np.ndarray:
    """Stored values of a dataset to (1 or 3, H, W) in [0, 1]."""
    kind = str(dataset.PhotometricInterpretation)
    frames = int(dataset.get("NumberOfFrames", None) or 1)
    if frames > 1:
        raise ImageError(f"{path} has {frames} frames; expected 1: save one file per frame.")
    if pixels.ndim == 3 and pixels.shape[2] == 3:  # pydicom has turned YBR into RGB
        unit = pixels.astype(np.float32) / np.float32(2 ** int(dataset.BitsStored) - 1)
        return np.ascontiguousarray(unit.transpose(2, 0, 1)).clip(0, 1)
    if kind not in ("MONOCHROME1", "MONOCHROME2") or pixels.ndim != 2:
        raise ImageError(
            f"{path}: cannot show {kind} with pixels {pixels.shape}; expected MONOCHROME1, "
            "MONOCHROME2, RGB or YBR."
        )
    unit = _windowed(dataset, pixels)
    if kind == "MONOCHROME1":
        unit = 1 - unit
    return unit[None].astype(np.float32)


def _windowed(dataset: Any, pixels: np.ndarray) -> np.ndarray:
    """Grey values (H, W) in [0, 1], float64, 0 = the smallest value the window shows."""
    slope = float(dataset.get("RescaleSlope", None) or 1)
    intercept = float(dataset.get("RescaleIntercept", None) or 0)
    values = pixels * slope + intercept
    centre, width = (_first(dataset.get(key)) for key in ("WindowCenter", "WindowWidth"))
    if centre is not None and width is not None:
        return _window(values, centre, width, str(dataset.get("VOILUTFunction", "LINEAR")))
    if dataset.get("VOILUTSequence"):
        from pydicom.pixels import apply_voi_lut

        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        # the table is indexed by rescaled values; one that rescaling makes fractional is rounded
        shown = apply_voi_lut(np.rint(values).astype(np.int64), dataset, index=0)
        return (shown / (2.0**bits - 1)).clip(0, 1)
    bits = int(dataset.BitsStored)
    low = -(2 ** (bits - 1)) if int(dataset.PixelRepresentation) == 1 else 0
    ends = np.array([low, low + 2**bits - 1]) * slope + intercept
    return ((values - ends.min()) / (ends.max() - ends.min())).clip(0, 1)


def _first(value: Any) -> float | None:
    """The first of one or several values of an attribute; None where it is absent or empty."""
    if value is None or value == "":
        return None
    return float(value if np.isscalar(value) else value[0])


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Window functions of DICOM PS3.3 C.11.2.1.2, scaled to [0, 1]."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / max(width, math.ulp(1.0))))
    if function == "LINEAR":  # by the standard half a grey value lower and one narrower
        centre, width = centre - 0.5, width - 1
    return ((values - centre) / max(width, math.ulp(1.0)) + 0.5).clip(0, 1)
