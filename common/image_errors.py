"""The error of an unreadable image, and what decoders raise for damaged files."""

import struct
import zlib

from PIL import Image

from common.errors import UserError

READ_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,  # also Pillow's UnidentifiedImageError
    RuntimeError,  # also imagecodecs' errors
    SyntaxError,
    TypeError,
    ValueError,  # also tifffile's TiffFileError
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What the decoders raise for files that are truncated, corrupt or of no known kind."""
MAX_SAMPLES = 400_000_000
"""Samples (pixels times channels) of the largest image that is read: 1.6 GB in float32."""


class ImageError(UserError):
    """An image, or a folder of them, cannot be read; the message names it."""


def check_samples(height: int, width: int, samples: int) -> None:
    """ValueError where an image would have more than MAX_SAMPLES."""
    if height * width * samples > MAX_SAMPLES:
        raise ValueError(
            f"it claims {height} x {width} pixels of {samples} samples, more than "
            f"{MAX_SAMPLES / 1e6:g} million in all; cut it into smaller images"
        )
