"""Slices of volumes as images: how they are named, and which of a volume's are used.

A slice of a file that holds several is an image whose name is the file's, `#` and the slice's
number from 0 in three digits or more: scan.dcm#017. In code it is a path that no file has.
"""

import re
from pathlib import Path
from typing import TypeVar

Name = TypeVar("Name", str, Path)
SLICE = re.compile(r"(.*[^/])#([0-9]{3,})", re.DOTALL)


def split_slice(name: Name) -> tuple[Name, int | None]:
    """The file of an image, and the number of its slice; None where the image is a whole file.

    Given a path, a file that really has that name wins; a text is split by its letters alone.
    """
    if isinstance(name, Path):
        found = SLICE.fullmatch(name.name)
        if found is None or name.is_file():
            return name, None
        return name.with_name(found[1]), int(found[2])
    found = SLICE.fullmatch(name)
    return (name, None) if found is None else (found[1], int(found[2]))


def slice_path(file: Path, number: int) -> Path:
    """The path that stands for a slice of a file."""
    return file.with_name(f"{file.name}#{number:03d}")


def chosen_slices(count: int, which: str) -> range:
    """Which of `count` slices are used.

    which: all; middle (of an even number the one after the middle); or every_N, each N-th from the
    first on.
    """
    if which == "middle":
        return range(count // 2, count // 2 + 1)
    step = 1 if which == "all" else int(which.removeprefix("every_"))
    return range(0, count, step)
