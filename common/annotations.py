"""Where the lesions are: boxes in a CSV file, or a folder of mask images, to pixel labels.

An image without annotation is normal. An annotation without image is an error, since a misspelt
name would silently turn a lesion image into a normal one. Sizes and boxes are in pixels,
(height, width) and (top, left, height, width).
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from common.decoders import ImageError
from common.image_names import AnnotationError, ImageNames, OnUnknown
from common.images import list_images, read_image

BOX_COLUMNS = ("image", "top", "left", "height", "width")
LOSSY_SUFFIXES = (".jpg", ".jpeg")
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class Box(NamedTuple):
    """A lesion's rectangle; the pixels that it touches are lesion."""

    top: float
    left: float
    height: float
    width: float
    label: str = ""


def boxes_to_labels(boxes: Iterable[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """Labels (H, W) bool, True in the union of the boxes (top, left, height, width).

    Boxes are cut at the border; fractions count as the whole pixel.
    """
    labels = np.zeros(size, dtype=bool)
    for box in boxes:
        top, left, height, width = box[:4]
        rows = slice(max(0, math.floor(top)), max(0, math.ceil(top + height)))
        columns = slice(max(0, math.floor(left)), max(0, math.ceil(left + width)))
        labels[rows, columns] = True
    return labels


def labels_to_boxes(labels: np.ndarray) -> list[Box]:
    """One Box round each 8-connected region of labels (H, W)."""
    regions, _ = ndimage.label(labels, structure=EIGHT_NEIGHBOURS)
    return [
        Box(y.start, x.start, y.stop - y.start, x.stop - x.start)
        for y, x in ndimage.find_objects(regions)
    ]


@dataclass(frozen=True)
class BoxAnnotations:
    """Boxes read from one CSV file."""

    path: Path
    of_image: dict[str, list[Box]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    """Names in the file that no image has, where those are skipped."""

    def labels(self, image: str, size: tuple[int, int]) -> np.ndarray:
        """Labels (H, W) bool of an image of this size, all False for a normal one.

        Raises AnnotationError for a box that lies wholly outside.
        """
        boxes = self.of_image.get(image, [])
        for box in boxes:
            if not boxes_to_labels([box], size).any():
                raise AnnotationError(
                    f"{self.path}: box {tuple(box[:4])} (top, left, height, width) of {image} lies "
                    f"outside the image of {size} pixels. Are its numbers from another resolution?"
                )
        return boxes_to_labels(boxes, size)

    def boxes(self, image: str, size: tuple[int, int]) -> list[Box]:
        """The image's boxes, for figures."""
        del size  # boxes need none, masks do
        return self.of_image.get(image, [])


@dataclass(frozen=True)
class MaskAnnotations:
    """Mask images in a folder, one per annotated image; a pixel above 0 is marked."""

    path: Path
    of_image: dict[str, Path] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    """Files that belong to no image, where those are skipped."""

    def labels(self, image: str, size: tuple[int, int]) -> np.ndarray:
        """Labels (H, W) bool of an image of this size, all False where it has no mask.

        Raises AnnotationError where the mask has another size, ImageError where it is unreadable.
        """
        if image not in self.of_image:
            return np.zeros(size, dtype=bool)
        path = self.of_image[image]
        labels = read_image(path, channels=1)[0].numpy() > 0
        if labels.shape != tuple(size):
            raise AnnotationError(
                f"{path} is {labels.shape} pixels (height, width), {image} is {tuple(size)}; "
                f"a mask must have its image's size"
            )
        return labels

    def boxes(self, image: str, size: tuple[int, int]) -> list[Box]:
        """Boxes round the mask's regions, for figures."""
        return labels_to_boxes(self.labels(image, size))


Annotations = BoxAnnotations | MaskAnnotations


def read_annotations(
    path: Path, images: Iterable[str], *, on_unknown: OnUnknown = "error"
) -> Annotations:
    """Reads boxes from a CSV file or finds the masks in a folder.

    images: names of all images, relative to their folder. on_unknown: what to do with an annotation
    of an image that is not among them. Raises AnnotationError.
    """
    if not path.exists():
        raise AnnotationError(
            f"No annotations at {path.absolute()}. Pass a CSV file of boxes or a folder of masks."
        )
    if path.is_dir():
        return find_masks(path, images, on_unknown=on_unknown)
    return read_boxes(path, images, on_unknown=on_unknown)


def read_boxes(
    path: Path, images: Iterable[str], *, on_unknown: OnUnknown = "error"
) -> BoxAnnotations:
    """Reads a CSV file with columns image, top, left, height, width and perhaps label.

    An image may have any number of rows; a row of an image with nothing after it says that it is
    normal. Raises AnnotationError, naming the line, for a malformed row.
    """
    names, of_image, skipped = ImageNames(images), {}, []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            check_columns(path, reader.fieldnames or [])
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise AnnotationError(
                        f"{where}: more values than columns, {row[None]} left over"
                    )
                image = names.match(row["image"] or "", where, on_unknown)
                box = parse_box(row, where)
                if image is None:
                    skipped.append(row["image"])
                elif box is not None:
                    of_image.setdefault(image, []).append(box)
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{path} is not a CSV file in UTF-8: {error}") from error
    return BoxAnnotations(path, of_image, tuple(dict.fromkeys(skipped)))


def check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [name for name in BOX_COLUMNS if name not in columns]
    if missing:
        raise AnnotationError(
            f"{path}: the first line must name the columns {','.join(BOX_COLUMNS)}[,label], "
            f"separated by commas; {', '.join(missing)} not found in {','.join(columns)!r}"
        )


def parse_box(row: dict[str, str | None], where: str) -> Box | None:
    """The box of a row, None where all its numbers are empty. Raises AnnotationError."""
    texts = {name: (row[name] or "").strip() for name in BOX_COLUMNS[1:]}
    if not any(texts.values()):
        return None
    values = {}
    for name, text in texts.items():
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = math.nan
        if not math.isfinite(values[name]):
            raise AnnotationError(f"{where}: {name} must be a number of pixels, got {text!r}")
    if values["height"] <= 0 or values["width"] <= 0:
        raise AnnotationError(
            f"{where}: height and width must be above 0, got {texts['height']} and {texts['width']}"
        )
    return Box(**values, label=(row.get("label") or "").strip())


def find_masks(
    folder: Path, images: Iterable[str], *, on_unknown: OnUnknown = "error"
) -> MaskAnnotations:
    """Finds each image's mask: the file at the same place in the folder, with any image suffix.

    Raises AnnotationError for a file that belongs to no image, a second mask of an image, or a
    lossy format.
    """
    names, of_image, skipped = ImageNames(images), {}, []
    try:
        files = list_images(folder, recursive=True)
    except ImageError as error:
        raise AnnotationError(f"masks: {error}") from error
    for file in files:
        image = names.match(file.relative_to(folder).as_posix(), str(folder), on_unknown)
        if image is None:
            skipped.append(str(file))
            continue
        if file.suffix.lower() in LOSSY_SUFFIXES:
            raise AnnotationError(
                f"{file}: JPEG's noise would mark pixels round each lesion; save masks as PNG"
            )
        if image in of_image:
            raise AnnotationError(f"{image} has two masks, {of_image[image]} and {file}; keep one")
        of_image[image] = file
    return MaskAnnotations(folder, of_image, tuple(skipped))
