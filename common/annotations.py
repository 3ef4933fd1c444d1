"""Where the lesions are: boxes in a CSV file, or a folder of mask images, to pixel labels.

An image without annotation is normal. An annotation without image is an error, since a misspelt
name would silently turn a lesion image into a normal one. Sizes and boxes are in pixels,
(height, width) and (top, left, height, width).
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import ndimage

from common.box_files import Box, read_box_rows
from common.decoders import file_format
from common.image_errors import ImageError
from common.image_folders import find_images, shown_names
from common.image_names import AnnotationError, ImageNames, OnUnknown
from common.images import read_mask

LOG = logging.getLogger(__name__)
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
LOSSY = "JPEG's noise would mark pixels round each lesion; save masks as PNG"
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def boxes_to_labels(boxes: Iterable[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """Labels (H, W) bool, True in the union of the boxes (top, left, height, width).

    Boxes are cut at the border; fractions count as the whole pixel.
    """
    labels = np.zeros(size, dtype=bool)
    for box in boxes:
        labels[_pixels_of(box, size)] = True
    return labels


def _pixels_of(box: Sequence[float], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of an image of this size that a box touches; empty where it lies outside.

    Raises AnnotationError for a box that is not a number.
    """
    top, left, height, width = box[:4]
    slices = []
    for start, length, limit in ((top, height, size[0]), (left, width, size[1])):
        if math.isnan(start + length):
            raise AnnotationError(f"box {tuple(box[:4])} (top, left, height, width): not a number")
        first, end = (min(max(edge, 0), limit) for edge in (start, start + length))
        slices.append(slice(math.floor(first), math.ceil(end)))
    return slices[0], slices[1]


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
        self.check(image, size)
        return boxes_to_labels(self.of_image.get(image, []), size)

    def check(self, image: str, size: tuple[int, int]) -> None:
        """Raises AnnotationError for a box of this image that lies wholly outside its size.

        Cheap: call it before an image is scored.
        """
        for box in self.of_image.get(image, []):
            rows, columns = _pixels_of(box, size)
            if rows.start >= rows.stop or columns.start >= columns.stop:
                raise AnnotationError(
                    f"{self.path}: box {tuple(box[:4])} (top, left, height, width) of {image} lies "
                    f"outside the image of {size} pixels. Are its numbers from another resolution?"
                )

    def boxes(self, image: str, size: tuple[int, int]) -> list[Box]:
        """The image's boxes, for figures. Raises AnnotationError as `check` does."""
        self.check(image, size)
        return self.of_image.get(image, [])


@dataclass(frozen=True)
class MaskAnnotations:
    """Mask images in a folder, one per annotated image; see common.images.read_mask."""

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
        try:
            if file_format(path) == "jpeg":  # under another suffix
                raise AnnotationError(f"{path}: {LOSSY}")
        except OSError as error:
            raise ImageError(
                f"Cannot read the mask {path}: {error.strerror or error}. Replace it."
            ) from error
        labels = read_mask(path)
        if labels.shape != tuple(size):
            raise AnnotationError(
                f"{path} is {labels.shape} pixels (height, width), {image} is {tuple(size)}; "
                f"a mask must have its image's size"
            )
        return labels

    def check(self, image: str, size: tuple[int, int]) -> None:
        """Raises what `labels` raises: call it before an image is scored. Reads the mask."""
        self.labels(image, size)

    def boxes(self, image: str, size: tuple[int, int]) -> list[Box]:
        """Boxes round the mask's regions, for figures."""
        return labels_to_boxes(self.labels(image, size))


Annotations = BoxAnnotations | MaskAnnotations


def read_annotations(
    path: Path, images: Iterable[str], *, on_unknown: OnUnknown = "error", remedy: str = ""
) -> Annotations:
    """Reads boxes from a CSV file or finds the masks in a folder.

    images: names of all images, relative to their folder. on_unknown: what to do with an annotation
    of an image that is not among them: an error, or said and put into `skipped`.
    remedy: what else than correcting the name the user can do then, for the error. Raises
    AnnotationError.
    """
    if not path.exists():
        raise AnnotationError(
            f"No annotations at {path.absolute()}. Pass a CSV file of boxes or a folder of masks."
        )
    if path.is_dir():
        return find_masks(path, images, on_unknown=on_unknown, remedy=remedy)
    return read_boxes(path, images, on_unknown=on_unknown, remedy=remedy)


def read_boxes(
    path: Path, images: Iterable[str], *, on_unknown: OnUnknown = "error", remedy: str = ""
) -> BoxAnnotations:
    """Reads a CSV file with columns image, top, left, height, width and perhaps label.

    An image may have any number of rows; a row of an image with nothing after it says that it is
    normal. Raises AnnotationError, naming the line, for a malformed row; see common.box_files.
    """
    names, of_image, skipped = ImageNames(images), {}, []
    for where, name, box in read_box_rows(path):
        image = names.match(name, where, on_unknown, remedy)
        if image is None:
            skipped.append(name)
        elif box is not None:
            of_image.setdefault(image, []).append(box)
    return BoxAnnotations(path, of_image, _said(path, skipped))


def find_masks(
    folder: Path, images: Iterable[str], *, on_unknown: OnUnknown = "error", remedy: str = ""
) -> MaskAnnotations:
    """Finds each image's mask: the file at the same place in the folder, with any image suffix.

    A mask that is empty or a broken link is found too, so that its image is not taken for normal:
    reading it raises ImageError. Raises AnnotationError for a file that belongs to no image, a
    second mask of an image, or a lossy format.
    """
    names, of_image, skipped = ImageNames(images), {}, []
    try:
        found = find_images(folder, recursive=True)
    except ImageError as error:
        raise AnnotationError(f"masks: {error}") from error
    found.report()
    files = sorted([*found.files, *found.damaged])
    if not files:
        raise AnnotationError(
            f"No image in the folder of masks {folder}. Pass a folder of masks that are named like "
            f"the images, or a CSV file of boxes. {found.summary()}"
        )
    for file in files:
        name = file.relative_to(folder).as_posix()
        image = names.match(name, str(folder), on_unknown, remedy)
        if image is None:
            skipped.append(str(file))
            continue
        if file.suffix.lower() in LOSSY_SUFFIXES:
            raise AnnotationError(f"{file}: {LOSSY}")
        if image in of_image:
            raise AnnotationError(f"{image} has two masks, {of_image[image]} and {file}; keep one")
        of_image[image] = file
    return MaskAnnotations(folder, of_image, _said(folder, skipped))


def _said(path: Path, skipped: Sequence[str]) -> tuple[str, ...]:
    """The names without repetitions; logs how many they are."""
    names = tuple(dict.fromkeys(skipped))
    if names:
        LOG.warning("%s: %d of unknown images: %s", path, len(names), shown_names(names))
    return names
