"""Which image an annotation means by its name."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Literal

from common.errors import UserError

OnUnknown = Literal["error", "skip"]


class AnnotationError(UserError):
    """An annotation cannot be read or does not fit its image."""


def without_suffix(name: str) -> str:
    """The name up to the last dot of its last part."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.name else name


class ImageNames:
    """The names of all images, relative to their folder, "/" between folders."""

    def __init__(self, images: Iterable[str]) -> None:
        """images: as in heatmaps.csv; repetitions are dropped."""
        self.images = dict.fromkeys(images)
        self.by_stem: dict[str, list[str]] = {}
        for image in self.images:
            self.by_stem.setdefault(without_suffix(image), []).append(image)

    def find(self, name: str) -> str | None:
        """The image of this name, or else the only one that differs in the suffix alone, or None.

        Raises AnnotationError where that is true of several.
        """
        name = PurePosixPath(name.replace("\\", "/")).as_posix()
        if name in self.images:
            return name
        for stem in (name, without_suffix(name)):
            found = self.by_stem.get(stem, [])
            if len(found) > 1:
                raise AnnotationError(f"{name!r} may mean {' or '.join(found)}; write the suffix")
            if found:
                return found[0]
        return None

    def match(self, name: str, where: str, on_unknown: OnUnknown) -> str | None:
        """The image a name means; None for an unknown one that is to be skipped.

        where: file and line, for the AnnotationError that an ambiguous name raises, and an unknown
        one that is not to be skipped.
        """
        try:
            image = self.find(name)
        except AnnotationError as error:
            raise AnnotationError(f"{where}: {error}") from None
        if image is None and on_unknown == "error":
            raise AnnotationError(
                f"{where}: no image is called {name!r}. {self.hint(name)} Correct the name, or "
                f"skip such annotations (eval.py: --on_unknown_image skip)."
            )
        return image

    def hint(self, name: str) -> str:
        """Says which image a name that matches none may have meant."""
        close = get_close_matches(name, self.images, 1)
        if close:
            return f"Did you mean {close[0]!r}?"
        return f"There are {len(self.images)}, the first is {next(iter(self.images), 'none')!r}."
