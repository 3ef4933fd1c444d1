"""Which files of a folder are images, and what else lies there: nothing is passed over in silence.

A file counts as an image by its suffix, which spares opening it, or else by its first bytes (DICOM
files without suffix, .jfif). Everything else is counted by kind and logged, once per program.
"""

import functools
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, get_args

from common.dicom import count_frames
from common.image_files import (
    DICOM_SUFFIXES,
    IMAGE_SUFFIXES,
    ImageError,
    file_format,
    looks_like_image,
    tiff_pages,
)
from common.volume_files import count_slices
from common.volumes import chosen_slices, slice_path

LOG = logging.getLogger(__name__)
SYSTEM_FOLDERS = (
    *("@eadir", "$recycle.bin", "system volume information", "__macosx", "lost+found"),
    *("__pycache__", "#recycle"),
)
"""Folders that systems make beside the user's own, in lower case; so are all with a leading dot."""
SYSTEM_FILES = (".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "dicomdir")
VOLUME_SUFFIXES = (*DICOM_SUFFIXES, ".tif", ".tiff", ".nii", ".nii.gz", ".nrrd")
"""Suffixes of files that may hold several slices."""
COPY_SUFFIXES = ("~", ".tmp", ".part", ".partial", ".crdownload", ".download", ".bak", ".orig")
"""Endings of half-written files and safety copies, which may hold an image."""
SHOWN = 3
"""Names of one kind that a message spells out."""
LONGEST = 1000
"""Letters of a name that a message spells out."""

FolderKind = Literal["hidden or system folder", "subfolder not searched", "folder of no class"]
DamagedKind = Literal["broken link", "unreadable", "no regular file", "empty"]
Kind = (
    FolderKind
    | DamagedKind
    | Literal["unknown kind", "hidden", "temporary or safety copy", "made by the system"]
    | Literal["beside the class folders"]
)
"""Why something in a folder is no image. Folders count as one, whatever they hold; damaged files
cannot be read, whatever their name says."""


@dataclass
class ImageFolder:
    """What lies in a folder."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    """The images, sorted."""
    passed_over: dict[Kind, list[Path]] = field(default_factory=dict)
    """Everything else, by kind."""

    def pass_over(self, kind: Kind, paths: Iterable[Path]) -> None:
        """Counts these under a kind."""
        if paths := list(paths):
            self.passed_over.setdefault(kind, []).extend(paths)

    @property
    def damaged(self) -> list[Path]:
        """Files that have an image's name but cannot be read, sorted."""
        found = [path for kind in get_args(DamagedKind) for path in self.passed_over.get(kind, ())]
        return sorted(path for path in found if _has_image_suffix(path.name))

    def summary(self) -> str:
        """One line such as "scans: 2 files passed over: 1 hidden (.a.png), 1 empty (b.png)".

        Empty where nothing was passed over.
        """
        if not self.passed_over:
            return ""
        n = {"file": 0, "folder": 0}
        kinds = []
        for kind, paths in self.passed_over.items():
            n["folder" if kind in get_args(FolderKind) else "file"] += len(paths)
            names = [path.relative_to(self.folder).as_posix() for path in sorted(paths)]
            kinds.append(f"{len(paths)} {kind} ({shown_names(names)})")
        counts = [f"{count} {what}{'s' if count > 1 else ''}" for what, count in n.items() if count]
        what = " and ".join(counts)
        return f"{shown(str(self.folder))}: {what} passed over: {', '.join(kinds)}"

    def report(self) -> None:
        """Logs the summary, once per program: a warning, unless it is the system's files alone."""
        if self.passed_over:
            noise = set(self.passed_over) == {"made by the system"}
            _log_once(logging.INFO if noise else logging.WARNING, self.summary())


@functools.cache
def _log_once(level: int, message: str) -> None:
    LOG.log(level, "%s", message)


def shown(name: str) -> str:
    """A name for a message: as it is, or shortened, or with escapes where it is not printable."""
    if len(name) > LONGEST:
        name = f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 :]}"
    return name if name.isprintable() else ascii(name)[1:-1]


def shown_names(names: Sequence[str]) -> str:
    """The first names, and how many others there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown(name) for name in names[:SHOWN]) + more


def list_images(
    folder: Path,
    recursive: bool,
    *,
    on_bad: Literal["skip", "error"] = "skip",
    remedy: str = "pass one of those, or move their images up",
    slices: str = "all",
) -> list[Path]:
    """The images of a folder, sorted; with recursive also those of its subfolders.

    Files of several slices are listed slice by slice; slices: which of them, see common.volumes.

    Logs what was passed over. on_bad: error refuses files with an image's name that are empty,
    unreadable, broken links or no files. remedy: what the user can do where images lie in
    subfolders alone. Raises ImageError where the folder is missing, cannot be read or has no image.
    """
    found = find_images(folder, recursive)
    if on_bad == "error" and found.damaged:
        names = [path.relative_to(folder).as_posix() for path in found.damaged]
        raise ImageError(
            f"{shown(str(folder))}: {len(names)} of its images cannot be read, being empty, broken "
            f"links, forbidden or no files: {shown_names(names)}. Replace or remove them, or skip "
            "bad images."
        )
    if found.files:
        found.report()
        return with_slices(found.files, slices)
    passed_over = f" {found.summary()}." if found.passed_over else ""
    hint = ""
    if not recursive and find_images(folder, recursive=True).files:
        hint = f" Its subfolders have some: {remedy}."
    raise ImageError(
        f"No image in {shown(str(folder))}. Expected files that end in "
        f"{', '.join(IMAGE_SUFFIXES)}.{passed_over}{hint}"
    )


def with_slices(files: Iterable[Path], which: str = "all") -> list[Path]:
    """The images that files hold: themselves, or their slices; see common.volumes.

    which: all, middle or every_N, of the slices of each file. Only files that may hold several are
    opened, and of those the headers alone; of one whose header is damaged, reading says why.
    Raises ImageError where a slice has the name of a file beside it.
    """
    images: list[Path] = []
    for file in files:
        numbers = slice_numbers(file)
        if len(numbers) < 2:
            images.append(file)
            continue
        chosen = [numbers[place] for place in chosen_slices(len(numbers), which)]
        slices = [slice_path(file, number) for number in chosen]
        if taken := next((path for path in slices if os.path.lexists(path)), None):
            raise ImageError(
                f"{taken} is a file, and {file.name} has a slice of that name. Rename it."
            )
        images += slices
    return images


def may_have_slices(file: Path) -> bool:
    """False where a file's name says that it holds one picture."""
    lower = file.name.lower()
    return lower.endswith(VOLUME_SUFFIXES) or not lower.endswith(IMAGE_SUFFIXES)


def slice_numbers(file: Path) -> Sequence[int]:
    """Numbers of a file's slices, by its header; of what has no slices, or is damaged, [0]."""
    if not may_have_slices(file):
        return range(1)
    lower = file.name.lower()
    try:
        kind = file_format(file)
        if kind == "dicom" or (kind is None and lower.endswith(DICOM_SUFFIXES)):
            return range(count_frames(file, force=kind == "dicom"))
        if kind == "tiff":
            return tiff_pages(file)
        return range(count_slices(file) if kind in ("nifti", "nrrd") else 1)
    except ImageError:
        return range(1)


def find_images(folder: Path, recursive: bool) -> ImageFolder:
    """Searches a folder, and with recursive its subfolders, linked ones too, each folder once.

    Opens only files whose name does not say what they are, and none that could block. Raises
    ImageError where the folder is missing or a folder cannot be read.
    """
    found = ImageFolder(Path(folder))
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        if real in seen:  # a link leads back
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(folders):
            if not (recursive and _is_searched(name)):
                kind = "subfolder not searched" if _is_searched(name) else "hidden or system folder"
                path = Path(parent, name)
                found.pass_over(kind, [path] if _holds_something(path) else [])
        folders[:] = sorted(name for name in folders if recursive and _is_searched(name))
        for path in (Path(parent, name) for name in sorted(files)):
            kind = _kind_of_file(path)
            if kind is None:
                found.files.append(path)
            else:
                found.pass_over(kind, [path])
    found.files.sort()
    return found


def subfolder_names(folder: Path) -> list[str]:
    """Names of the subfolders that hold the user's files, sorted. Raises ImageError."""
    _, folders, _ = next(os.walk(folder, onerror=_refuse))
    return sorted(name for name in folders if _is_searched(name))


def _refuse(error: OSError) -> NoReturn:
    """Raises ImageError for a folder that cannot be listed."""
    folder = error.filename
    problem = f"cannot be read: {error.strerror or error}"
    if isinstance(error, FileNotFoundError):
        problem = "does not exist"
    elif isinstance(error, NotADirectoryError):
        problem = "is a file, not a folder"
    raise ImageError(
        f"The image folder {shown(folder)} {problem}. Absolute path: "
        f"{shown(str(Path(folder).absolute()))}."
    ) from error


def _is_searched(folder_name: str) -> bool:
    """False for hidden folders and those of the system."""
    return not folder_name.startswith(".") and folder_name.lower() not in SYSTEM_FOLDERS


def _holds_something(folder: Path) -> bool:
    """False for an empty folder; True for one that cannot be read."""
    try:
        return any(folder.iterdir())
    except OSError:
        return True


def _has_image_suffix(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _kind_of_file(path: Path) -> Kind | None:
    """Why a file is passed over; None for an image."""
    name = path.name
    if name.lower() in SYSTEM_FILES or name.startswith("._"):
        return "made by the system"
    if name.startswith("."):
        return "hidden"
    try:
        status = path.stat()
    except OSError:
        return "broken link" if path.is_symlink() else "unreadable"
    if not stat.S_ISREG(status.st_mode):
        return "no regular file"
    if not status.st_size:
        return "empty"
    if not os.access(path, os.R_OK):
        return "unreadable"
    if _has_image_suffix(name):
        return None
    if name.lower().endswith(COPY_SUFFIXES):
        return "temporary or safety copy"
    return None if looks_like_image(path) else "unknown kind"
