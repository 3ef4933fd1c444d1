"""Which files a run was trained on: known by name, size and samples of their bytes."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SAMPLE = 4096
"""Bytes read at the start, in the middle and at the end of each file."""


def data_identity(paths: Sequence[Path], root: Path) -> dict[str, Any]:
    """Number of files, and a SHA-256 over their names below root, sizes and sampled bytes.

    The same after a copy to another folder or machine. Files of up to 12 KiB are read whole; of a
    larger one three places, so that ten thousand files take seconds.
    """
    digest = hashlib.sha256()
    for path in paths:
        name = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        digest.update(bytes(name) + b"\0" + sampled(path))
    return {"images": len(paths), "sha256": digest.hexdigest()}


def sampled(path: Path) -> bytes:
    """Size and three pieces of a file; nothing of one that cannot be read."""
    try:
        if not path.is_file():
            return b""
        size = path.stat().st_size
        with path.open("rb") as file:
            pieces = [b"%d" % size]
            for place in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
                file.seek(place)
                pieces.append(file.read(SAMPLE))
    except OSError:
        return b""
    return b"".join(pieces)


def data_changes(saved: object, found: Mapping[str, Any]) -> str | None:
    """In words, how the files differ from those of an earlier run; none where they are the same.

    saved: what data_identity returned then; anything else, as of older runs, counts as the same.
    """
    if not isinstance(saved, Mapping) or "sha256" not in saved:
        return None
    if saved["sha256"] == found["sha256"]:
        return None
    return (
        f"{saved.get('images')} training images when it was saved, {found['images']} now"
        if saved.get("images") != found["images"]
        else f"of the {found['images']} training images some have other contents or names now"
    )
