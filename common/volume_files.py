"""NIfTI and NRRD volumes, slice by slice: axial, and turned as a radiologist sees them.

A volume's axes are reordered and flipped, never resampled, so that they lie closest to the
patient's (nibabel's closest canonical orientation). Slices count from the feet up; in each, the top
is anterior and the left is the patient's right side. One slice is in memory at a time.
"""

import bz2
import contextlib
import gzip
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from common.files import open_regular
from common.grey_range import Window, in_range, range_of, volume_range
from common.image_files import (
    READ_ERRORS,
    ImageError,
    check_samples,
    file_format,
    gunzipped,
    slice_number,
)
from common.notices import notice
from common.volumes import split_slice

if TYPE_CHECKING:
    from nibabel.arrayproxy import ArrayProxy  # few sets have volumes

NRRD_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": (
        "longlong",
        "long long",
        "long long int",
        "signed long long",
        "signed long long int",
        "int64",
        "int64_t",
    ),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
"""Numbers of a NRRD file, by the format's names for them."""
PLAIN_KINDS = ("domain", "space", "none", "???")
"""What a NRRD file may call an axis that runs through the patient."""
POSITIVE = {"right": 1, "anterior": 1, "superior": 1, "left": -1, "posterior": -1, "inferior": -1}
"""Whether an axis points as NIfTI's do."""
ABBREVIATED = {word[0]: word for word in POSITIVE}
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Affine of voxels of 1 mm whose axes point left, back and up: the order of DICOM's pixels."""
VALUES_AT_ONCE = 4_000_000
"""Values in memory where a slice lies across the order of the file."""
SQUARE = 1.1
"""Ratio of a pixel's sides up to which it counts as square."""


@dataclass(frozen=True)
class Volume:
    """An open volume."""

    data: "ArrayProxy"
    """Values after the file's scaling, (I, J, K) and perhaps axes of length 1; read when asked."""
    affine: np.ndarray
    """(4, 4): from places along I, J, K to mm rightwards, forwards, upwards (RAS)."""
    stated: tuple[float, float] | None
    """Values that the file wants shown black and white."""
    is_plain: bool
    """Whether the values are the stored integers."""

    @property
    def axes(self) -> list[tuple[int, int]]:
        """The stored axis that runs rightwards, forwards, upwards, and 1, or -1 if it runs back."""
        from nibabel.orientations import io_orientation

        found = io_orientation(self.affine)
        if np.isnan(found).any():
            raise ValueError("its axes are damaged: they do not span the patient's space")
        order = np.argsort(found[:, 0])
        return [(int(axis), int(found[axis, 1])) for axis in order]

    @property
    def n_slices(self) -> int:
        """Axial slices."""
        return self.data.shape[self.axes[2][0]]

    def slice(self, number: int) -> np.ndarray:
        """Values (H, W) of an axial slice, counted from the feet, as a radiologist sees it."""
        (across, rightwards), (along, forwards), (up, upwards) = self.axes
        shape = self.data.shape
        check_samples(shape[along], shape[across], 1)
        values = self._plane(up, number if upwards > 0 else shape[up] - 1 - number)
        rows = values if along < across else values.T
        rows = rows[::-1] if forwards > 0 else rows  # the top is anterior
        return rows[:, ::-1] if rightwards > 0 else rows  # the left is the patient's right

    def _plane(self, axis: int, number: int) -> np.ndarray:
        """The values at one place of a stored axis, in the order of the other two."""
        rest, every = (0,) * (len(self.data.shape) - 3), slice(None)
        if axis > 0:
            place = [every, every, every]
            place[axis] = number
            return np.asarray(self.data[(*place, *rest)])
        # One value of each stored row: to read row by row is much faster than value by value.
        rows_length, rows, count = self.data.shape[:3]
        step = max(1, VALUES_AT_ONCE // (rows_length * rows))
        parts = [
            self.data[(every, every, slice(start, start + step), *rest)][number].copy()
            for start in range(0, count, step)
        ]
        return np.concatenate(parts, axis=1)


def count_slices(path: Path) -> int:
    """Axial slices of a NIfTI or NRRD file, by its header. Raises ImageError, naming the file."""
    with _opened(path) as volume:
        return volume.n_slices


def axis_codes(path: Path) -> str | None:
    """Where the stored axes of a NIfTI or NRRD file run, such as LPS: left, back, up.

    None for other files. Raises ImageError, naming the file.
    """
    if file_format(path) not in ("nifti", "nrrd"):
        return None
    with _opened(path) as volume:
        letters = [""] * 3
        for (axis, sign), line in zip(volume.axes, ("LR", "PA", "IS"), strict=True):
            letters[axis] = line[sign > 0]
        return "".join(letters)


def read_volume_slice(
    path: Path, *, window: Window = "auto", white_value: int | None = None, stored: bool = False
) -> np.ndarray:
    """One slice of a NIfTI or NRRD file, (H, W): float32 in [0, 1], or unsigned integers.

    path: that of the slice, or of a file of one slice. window: level and width in the file's values
    (CT: Hounsfield units), or percentile. auto: what the file says (NIfTI's cal_min and cal_max),
    else bytes as they are, and other unsigned integers where white_value is given, else
    percentiles of the volume, with a notice. Bytes (unsigned, not rescaled) have no other window
    than auto. stored: the values without any window, for masks. Raises ImageError, naming the file.
    """
    with _opened(path) as volume:
        count = volume.n_slices
        values = volume.slice(slice_number(path, range(count), "slices"))
        if stored:
            return values
        _note_flat_pixels(volume, path)
        plain = volume.is_plain and values.dtype.kind == "u"
        is_byte = plain and values.dtype.itemsize == 1
        window = "auto" if is_byte else window
        keeps = is_byte or (plain and white_value is not None)
        if window == "auto" and volume.stated is None and keeps:
            return values
        if isinstance(window, tuple):
            low, high = range_of(window)
        elif window == "auto" and volume.stated is not None:
            low, high = volume.stated
        else:
            found = volume_range(path, range(count), volume.slice, READ_ERRORS)
            if found is None:
                finite = values[np.isfinite(values)]
                if not finite.size:
                    raise ValueError("no voxel of it has a value: all are NaN or infinite")
                found = float(finite.min()), float(finite.min()) + 1
            low, high = found
            if window == "auto":
                notice(
                    "volume without a range",
                    f"{path} does not say what is black and white: {low:g} is shown black and "
                    f"{high:g} white, percentiles of the volume. If that is not what you want, set "
                    "window: [level, width]",
                )
        return in_range(_finite(values, low, path), low, high).astype(np.float32)


def _finite(values: np.ndarray, low: float, path: Path) -> np.ndarray:
    """The values, with `low` for those that are no number."""
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(1, dtype=bool)
    if not missing.any():
        return values
    notice(
        "voxels without a value made black",
        f"{path}: {missing.mean():.1%} of its pixels are not a number (NaN): black",
    )
    return np.where(missing, low, values)


def _note_flat_pixels(volume: Volume, path: Path) -> None:
    sides = np.linalg.norm(volume.affine[:3, :3], axis=0)
    (across, _), (along, _), _ = volume.axes
    if max(sides[across], sides[along]) > SQUARE * min(sides[across], sides[along]):
        notice(
            "pixels that are not square",
            f"{path}: its pixels are {sides[along]:.3g} mm high and {sides[across]:.3g} mm wide; "
            "they are shown as if they were square",
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Volume]:
    """The volume that a path, or one of its slice, names; what goes wrong is an ImageError."""
    try:
        file_path, _ = split_slice(path)
        read = _nifti if file_format(file_path) == "nifti" else _nrrd
        with open_regular(file_path) as file:
            volume = read(file, path)
            _check_shape(volume)
            yield volume
    except ImportError as error:
        raise ImageError(f"{path} needs nibabel to be read: pip install nibabel") from error
    except READ_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"Cannot read the volume {path}: {reason}. Replace or remove it.") from (
            error
        )


def _check_shape(volume: Volume) -> None:
    shape, kind = volume.data.shape, volume.data.dtype.kind
    if kind not in "iuf":
        raise ValueError(f"its voxels are {volume.data.dtype}; expected one number each")
    if len(shape) < 3 or min(shape) < 1 or any(length != 1 for length in shape[3:]):
        raise ValueError(
            f"its axes have the lengths {tuple(map(int, shape))}; expected three. Save one file "
            "for each time, direction or channel"
        )
    if not np.isfinite(volume.affine).all():
        raise ValueError("its axes are damaged: their directions are not finite")


def _nifti(file: BinaryIO, _: Path) -> Volume:
    """Opens NIfTI-1 or NIfTI-2, compressed by gzip or not."""
    import nibabel
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.spatialimages import HeaderDataError

    begin = gunzipped(file.read(4096))
    file.seek(0)
    version = nibabel.Nifti1Header if begin[344:348] == b"n+1\0" else nibabel.Nifti2Header
    source = file
    if file.read(2) == b"\x1f\x8b":
        source = gzip.GzipFile(fileobj=file)
    file.seek(0)
    try:
        header = version.from_fileobj(source)
    except HeaderDataError as error:  # no ValueError
        raise ValueError(str(error)) from error
    shape = header.get_data_shape()
    slope, intercept = header.get_slope_inter()
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    layout = (_three(shape), header.get_data_dtype(), header.get_data_offset(), slope, intercept)
    low, high = (float(header[name]) for name in ("cal_min", "cal_max"))
    stated = (low, high) if np.isfinite(high - low) and low < high else None
    is_plain = (slope, intercept) == (1, 0)
    return Volume(ArrayProxy(source, layout), header.get_best_affine(), stated, is_plain)


def _three(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of at least three axes."""
    return (*shape, *itertools.repeat(1, 3 - len(shape)))


def _nrrd(file: BinaryIO, path: Path) -> Volume:
    """Opens a NRRD file whose header and data are one file, raw or compressed."""
    import nrrd
    from nibabel.arrayproxy import ArrayProxy

    try:
        header = nrrd.read_header(file)
    except nrrd.NRRDError as error:  # no ValueError
        raise ValueError(str(error)) from error
    missing = [key for key in ("type", "dimension", "encoding", "sizes") if key not in header]
    if missing:
        raise ValueError(f"its header lacks {', '.join(missing)}")
    if "data file" in header or "datafile" in header:
        raise ValueError("its values lie in another file; save both as one .nrrd file")
    skips = [header.get(key, 0) for key in ("line skip", "lineskip", "byte skip", "byteskip")]
    encoding, rest = str(header["encoding"]), _Rest(file, file.tell())
    opened: dict[str, Callable[[], BinaryIO]] = {
        "raw": lambda: rest,
        **dict.fromkeys(("gzip", "gz"), lambda: gzip.GzipFile(fileobj=rest)),
        **dict.fromkeys(("bzip2", "bz2"), lambda: bz2.BZ2File(rest)),
    }
    if encoding not in opened or any(skips):
        raise ValueError(
            f"its encoding is {encoding!r} with skips {skips}; expected raw, gzip or bzip2 without"
        )
    codes = (code for code, names in NRRD_TYPES.items() if header["type"] in names)
    code = next(codes, None)
    if code is None:
        raise ValueError(f"its voxels are {header['type']!r}; expected one number each")
    kinds = [str(kind) for kind in header.get("kinds", ())]
    if not set(kinds[:3]) <= set(PLAIN_KINDS):
        raise ValueError(
            f"its axes are {', '.join(kinds)}; expected domain or space. Save one file for each "
            "colour, direction or time"
        )
    order = ">" if header.get("endian", "little") == "big" else "<"
    shape = tuple(int(length) for length in header["sizes"])
    data = ArrayProxy(opened[encoding](), (_three(shape), np.dtype(order + code)))
    return Volume(data, _nrrd_affine(header, path), None, is_plain=True)


def _nrrd_affine(header: Mapping[str, Any], path: Path) -> np.ndarray:
    """(4, 4): from places along the stored axes to mm rightwards, forwards, upwards.

    Raises ValueError where the header's axes are no three directions of a patient.
    """
    space, directions = str(header.get("space", "")).lower(), header.get("space directions")
    if len(space) in (3, 4) and "-" not in space:
        space = "-".join(ABBREVIATED.get(letter, letter) for letter in space.removesuffix("t"))
    names = space.split("-")[:3]
    if directions is None or sorted(map(_line, names)) != [0, 1, 2]:
        notice(
            "volume without orientation",
            f"{path} has no anatomical space or directions: its axes are taken to run left, back "
            "and up, as DICOM's do",
        )
        return LPS
    vectors = [[np.nan] * 3 if row is None else row for row in directions]
    steps = np.asarray(vectors, dtype=float)  # a row per stored axis
    if steps.ndim != 2 or steps.shape[1] != 3 or not np.isfinite(steps).all():
        raise ValueError(
            "some of its axes have no direction in space, as those of colours or times have; save "
            "one file for each"
        )
    affine = np.eye(4)
    for i, step in enumerate(steps[:3]):
        for name, length in zip(names, step, strict=True):
            affine[_line(name), i] = POSITIVE[name] * length
    if len(steps) == 2:  # one slice: it faces the axis that is left
        affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
    return affine


def _line(name: str) -> int:
    """Which line a direction is on: 0 left and right, 1 front and back, 2 down and up; else -1."""
    return list(POSITIVE).index(name) % 3 if name in POSITIVE else -1


class _Rest(io.RawIOBase):
    """What follows a place in a file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self.file, self.start = file, start
        file.seek(start)

    def readinto(self, buffer: Any) -> int:
        return self.file.readinto(buffer)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset + (0 if whence else self.start), whence) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start
