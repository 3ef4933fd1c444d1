"""An image of an archive, and what the archive says of it: what the readers of archives give."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Part = Literal["train", "test", "left out"]


class ArchiveBox(NamedTuple):
    """A lesion's rectangle in stored pixels, as the annotation CSV has it."""

    top: float
    left: float
    height: float
    width: float
    label: str
    slice: int | None = None
    """Number of the slice, from 0; None for an image that is no volume."""
    volume_slices: int | None = None


class Circle(NamedTuple):
    """A lesion's circle in pixels, from the top left."""

    row: float
    column: float
    radius: float


@dataclass(frozen=True)
class Picture:
    """One image of an archive, and what the archive says of it."""

    file: Path
    label: str
    """Its class, and its folder's name."""
    part: Part | None
    """None: the archive leaves it open; it is drawn, all images of a patient together."""
    why: str
    patient: str = ""
    """Whose it is, in the archive's words; empty where names do not tell."""
    name: str = ""
    """Its link's name; empty = the file's."""
    boxes: tuple[ArchiveBox, ...] = ()
    circles: tuple[Circle, ...] = ()
    size: tuple[int, int] = (0, 0)
    """(height, width) in pixels, for the circles."""
    masks: tuple[Path, ...] = ()
    """Mask images, which are united where there are several."""
    member: str = ""
    """Its name inside the file, where that holds many images (npz) and is linked as a whole."""
    digest: str = ""
    """Hash of a member's pixels; that of files is computed where it is needed."""

    @property
    def link(self) -> Path:
        """Where its link lies below the prepared folder."""
        if self.member:
            return Path(self.file.name)
        return Path(str(self.part), self.label, self.name or self.file.name)

    @property
    def image(self) -> str:
        """How predictions and annotations call it: its name below test/."""
        return f"{self.label}/{self.name or self.file.name}"
