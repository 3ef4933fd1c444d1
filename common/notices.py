"""What reading had to guess or to change: logged once per kind, then only counted.

The counts are shared with processes that are forked later, such as those that read training images,
so that each kind is logged once for all of them. (Processes that are spawned log it once each.)
"""

import ctypes
import logging
from multiprocessing.sharedctypes import RawArray
from typing import Literal, get_args

LOG = logging.getLogger("common.images")

Kind = Literal[
    "image turned as its orientation tag says",
    "orientation tag unreadable",
    "alpha channel left out",
    "TIFF with white as zero inverted",
    "first of several pictures in a JPEG taken",
    "small values in a wide type",
    "DICOM window chosen among several",
    "DICOM window unusable",
    "DICOM window function unknown",
    "DICOM without a window",
    "DICOM padding made black",
    "DICOM presentation inverted",
    "mask of another size stretched",
    "mask that marks more than half of its image",
    "volume without a range",
    "volume without orientation",
    "voxels without a value made black",
    "pixels that are not square",
    "smaller copies in a TIFF passed over",
    "image smaller than a crop enlarged",
    "image smaller than the window mirrored",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
_COUNTS = RawArray(ctypes.c_int64, len(KINDS))
_LARGEST = RawArray(ctypes.c_uint64, 65)  # by bits of the type


def notice(kind: Kind, message: str) -> None:
    """Counts one more read of this kind; logs the message (which names the file) for the first."""
    number = KINDS.index(kind)
    _COUNTS[number] += 1
    if _COUNTS[number] == 1:
        LOG.warning("%s (said once; further reads are only counted)", message)


def counts() -> dict[Kind, int]:
    """In how many reads each kind was met so far, without those that were not.

    A file counts each time it is read: for its grey range, for each epoch, for each metric.
    """
    return {kind: n for kind, n in zip(KINDS, _COUNTS, strict=True) if n}


def sum_up() -> None:
    """Logs the counts of what was met more than once; for a program's end."""
    for kind, n in counts().items():
        if n > 1:
            LOG.warning("in %d reads: %s", n, kind)


def is_largest(bits: int, value: int) -> bool:
    """Whether no file of this many bits per value had a larger one so far; remembers it."""
    _LARGEST[bits] = max(_LARGEST[bits], value)
    return _LARGEST[bits] == value


def forget() -> None:
    """Starts anew, so that each kind is logged again; for a program's start."""
    for shared in (_COUNTS, _LARGEST):
        ctypes.memset(shared, 0, ctypes.sizeof(shared))
