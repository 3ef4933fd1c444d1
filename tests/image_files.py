"""Random image files for the tests of the readers."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch

RNG = np.random.default_rng(5)


def values(dtype: str, *shape: int) -> np.ndarray:
    if dtype.startswith("f"):
        return RNG.random(shape).astype(dtype)
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def unit(stored: np.ndarray) -> torch.Tensor:
    """What read_image should return for grey (H, W) or colour (H, W, 3) values."""
    if stored.ndim == 2:
        stored = stored[:, :, None]
    top = 1 if stored.dtype.kind == "f" else np.iinfo(stored.dtype).max
    return torch.from_numpy((stored.astype(np.float64) / top).astype(np.float32)).permute(2, 0, 1)


def write_png16(path: Path, stored: np.ndarray) -> None:
    """A 16-bit PNG (H, W, 1 to 4), which Pillow cannot write in colour."""
    height, width, samples = stored.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[samples]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in stored)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
