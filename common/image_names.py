"""Which image an annotation means by its name."""

import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Literal

from common.errors import UserError
from common.image_files import IMAGE_SUFFIXES
from common.image_folders import shown
from common.volumes import split_slice

OnUnknown = Literal["error", "skip"]
KNOWN_SUFFIXES = (*IMAGE_SUFFIXES, ".jfif", ".jpe", ".webp", ".gif", ".jp2", ".j2k")
"""Endings that say a file's format and nothing of which image it is, in lower case."""
SLICE = re.compile(r"(.+)#([0-9]+)")
"""How annotations may call a slice: scan.dcm#017, as common.volumes does, or with fewer digits."""


class AnnotationError(UserError):
    """An annotation cannot be read or does not fit its image."""


def without_suffix(name: str) -> str:
    """The name without the ending of an image file: scan.2.png is scan.2, scan.2 is scan.2.

    A slice keeps its number, in three digits at least: scan.dcm#17 is scan#017.
    """
    if found := SLICE.fullmatch(name):
        return f"{without_suffix(found[1])}#{int(found[2]):03d}"
    folded, stem = name.lower(), PurePosixPath(name).name
    ending = next((end for end in KNOWN_SUFFIXES if folded.endswith(end)), "")
    return name[: -len(ending)] if 0 < len(ending) < len(stem) else name


def without_suffixes(name: str) -> str:
    """The same; of a file that is named after a slice, scan.dcm#017.png, without both endings."""
    stem = without_suffix(name)
    return without_suffix(stem) if SLICE.fullmatch(stem) else stem


def volume_of(name: str) -> str:
    """The volume that a slice is of: scan.dcm of scan.dcm#017; any other name as it is."""
    return split_slice(name)[0]


def composed(name: str) -> str:
    """The name with each accent in its letter (Unicode NFC); disks and spreadsheets differ."""
    return unicodedata.normalize("NFC", name)


class ImageNames:
    """The names of all images, relative to their folder, "/" between folders."""

    def __init__(
        self, images: Iterable[str], on_unknown: OnUnknown = "error", remedy: str = ""
    ) -> None:
        """images: repetitions are dropped. on_unknown: what `match` does with an unknown name.

        remedy: what else than correcting it the user can do then, such as a flag that skips.
        """
        self.images, self.on_unknown, self.remedy = dict.fromkeys(images), on_unknown, remedy
        self.by_name: dict[str, list[str]] = {}
        self.by_stem: dict[str, list[str]] = {}
        for image in self.images:
            self.by_name.setdefault(composed(image), []).append(image)
            self.by_stem.setdefault(composed(without_suffix(image)), []).append(image)

    def find(self, name: str) -> str | None:
        """The image of this name, or else the only one that differs in the suffix alone, or None.

        Only the endings of image files are suffixes: 1.2.840.7 is not 1.2.840.png. P1 and P1.tif
        mean the only P1.png, scan#17 the only scan.dcm#017, and so does scan.dcm#017.png, as a mask
        is called. Raises AnnotationError where that is true of several.
        """
        if name in self.images:
            return name
        if any(unicodedata.category(letter) == "Cc" for letter in name):
            return None  # a line break in a name is a damaged file, not a near miss
        name = composed(PurePosixPath(name.replace("\\", "/")).as_posix())
        stems = dict.fromkeys((name, without_suffix(name), without_suffixes(name)))
        of_stem = dict.fromkeys(image for stem in stems for image in self.by_stem.get(stem, ()))
        found = self.by_name.get(name) or list(of_stem)
        if len(found) < 2:
            return found[0] if found else None
        if len({composed(image) for image in found}) == 1:
            raise AnnotationError(
                f"{name!r} may mean {' or '.join(map(ascii, found))}, which differ in the Unicode "
                "composition of their letters alone; rename one"
            )
        raise AnnotationError(f"{name!r} may mean {' or '.join(found)}; write the suffix")

    def knows(self, name: str) -> bool:
        """Whether a name means an image, or may mean one of several."""
        try:
            return self.find(name) is not None
        except AnnotationError:
            return True

    def match(self, name: str, where: str) -> str | None:
        """The image a name means; None for an unknown one that is to be skipped.

        where: file and line, for the AnnotationError that an ambiguous name raises, and an unknown
        one that is not to be skipped.
        """
        try:
            image = self.find(name)
        except AnnotationError as error:
            raise AnnotationError(f"{where}: {error}") from None
        if image is None and self.on_unknown == "error":
            alternative = f", or {self.remedy}" if self.remedy else ""
            raise AnnotationError(
                f"{where}: no image is called '{shown(name)}'. {self.hint(name)} "
                f"Correct the name{alternative}."
            )
        return image

    def hint(self, name: str) -> str:
        """Says which image a name that matches none may have meant."""
        folded = composed(name).casefold()
        slices = [image for image in self.images if volume_of(image) != image]
        of_it = [i for i in slices if name in (volume_of(i), without_suffix(volume_of(i)))]
        if of_it:
            return f"It is a volume of {len(of_it)} slices; name one, such as '{shown(of_it[0])}'."
        same = [image for image in self.images if composed(image).casefold() == folded]
        same += [image for image in self.images if without_suffix(image).casefold() == folded]
        close = same or get_close_matches(name, self.images, 1)
        if close:
            return f"Did you mean '{shown(close[0])}'?"
        first = shown(next(iter(self.images), "none"))
        return f"There are {len(self.images)}, the first is '{first}'."
