"""What reading had to guess or to change: said once per kind, then only counted.

The counts are shared with processes that are forked later, such as those that read training images,
so that each kind is said once for all of them.
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
]
KINDS: tuple[Kind, ...] = get_args(Kind)
_COUNTS = RawArray(ctypes.c_int64, len(KINDS))


def notice(kind: Kind, message: str) -> None:
    """Counts one more file of this kind; logs the message (which names the file) for the first."""
    number = KINDS.index(kind)
    _COUNTS[number] += 1
    if _COUNTS[number] == 1:
        LOG.warning("%s (said once; further files are only counted)", message)


def counts() -> dict[Kind, int]:
    """How often each kind was met so far, without those that were not."""
    return {kind: n for kind, n in zip(KINDS, _COUNTS, strict=True) if n}


def forget() -> None:
    """Starts counting anew, so that each kind is said again."""
    for number in range(len(KINDS)):
        _COUNTS[number] = 0
