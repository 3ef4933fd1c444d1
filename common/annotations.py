"""Where the lesions are, to pixel labels: boxes in a CSV file, mask images, labelling tools' files.

An image without annotation is normal. An annotation without image is an error, since a misspelt
name would silently turn a lesion image into a normal one. Sizes and boxes are in pixels,
(height, width) and (top, left, height, width).
"""

import contextlib
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from common import annotation_formats
from common.annotation_formats import Format
from common.box_files import box_rows, note_facts
from common.dicom import NO_SEGMENTATION, is_segmentation
from common.image_files import ImageError, is_lossy
from common.image_folders import (
    find_images,
    may_have_slices,
    shown_names,
    slice_numbers,
    with_slices,
)
from common.image_names import (
    AnnotationError,
    ImageNames,
    OnUnknown,
    volume_of,
    without_suffixes,
)
from common.images import read_mask
from common.notices import notice
from common.shapes import (
    Box,
    Shape,
    box_of,
    boxes_to_labels,
    content,
    draw,
    labels_to_boxes,
    pixels_of_box,
)
from common.volume_files import axis_codes
from common.volumes import split_slice

LOG = logging.getLogger(__name__)
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
LOSSY = "the noise of JPEG, JPEG 2000 and lossy WebP marks pixels beside lesions; save masks as PNG"
RESIZE = " (eval.py --resize_masks stretches it)"
SAME_RATIO = 0.02
"""By how much the ratio of the sides of a mask that is stretched may differ from its image's."""
MASK_ENDING = re.compile(r"(.+)[_-](?:mask|seg|segmentation|label)(#[0-9]+)?", re.IGNORECASE)
"""What masks' names have behind the image's; and the number of a slice."""
S = TypeVar("S", bound=Shape)
PASS = "Pass a CSV file of boxes or a folder of masks."


@dataclass(frozen=True)
class _Facts:
    """What annotations say of the images themselves."""

    _: KW_ONLY
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Image -> column -> value, of FACT_COLUMNS; box files alone have them."""

    def patient(self, image: str) -> str | None:
        """Whose image it is, by the column `patient`; None where the file does not say."""
        return self.facts.get(image, {}).get("patient")

    def volume_slices(self, image: str) -> int | None:
        """How many slices its volume has, by the column `volume_slices`; None if not said."""
        value = self.facts.get(image, {}).get("volume_slices")
        return None if value is None else int(value)


@dataclass(frozen=True)
class BoxAnnotations(_Facts):
    """Boxes read from one CSV file."""

    path: Path
    of_image: dict[str, list[Box]]
    skipped: tuple[str, ...]
    """Names in the file that no image has, where those are skipped."""

    def labels(self, image: str, size: tuple[int, int]) -> np.ndarray:
        """Labels (H, W) bool of an image of this size, all False for a normal one.

        Raises AnnotationError for a box that lies wholly outside.
        """
        return boxes_to_labels(self.boxes(image, size), size)

    def check(self, image: str, size: tuple[int, int]) -> None:
        """Raises AnnotationError for a box of this image that lies wholly outside its size.

        Cheap: call it before an image is scored.
        """
        for box in self.of_image.get(image, []):
            rows, columns = pixels_of_box(box, size)
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
class MaskAnnotations(_Facts):
    """Mask images in a folder, one per annotated image; see common.images.read_mask."""

    path: Path
    of_image: dict[str, Path]
    skipped: tuple[str, ...]
    """Files that belong to no image, where those are skipped."""
    resize: bool = False
    """Whether a mask of another size is stretched to its image's."""

    def labels(self, image: str, size: tuple[int, int]) -> np.ndarray:
        """Labels (H, W) bool of an image of this size, all False where it has no mask.

        Raises AnnotationError where the mask has another size (with `resize`: another ratio of its
        sides), ImageError where it is unreadable.
        """
        if image not in self.of_image:
            return np.zeros(size, dtype=bool)
        path = self.of_image[image]
        if is_lossy(path):
            raise AnnotationError(f"{path}: {LOSSY}")
        labels = read_mask(path)
        if labels.shape == tuple(size):
            return labels
        differ = f"{path} is {labels.shape} pixels (height, width), {image} is {tuple(size)}"
        if not self.resize:
            raise AnnotationError(f"{differ}; a mask must have its image's size{RESIZE}")
        height, width = (new / old for new, old in zip(size, labels.shape, strict=True))
        if abs(height / width - 1) > SAME_RATIO:
            raise AnnotationError(
                f"{differ}; stretched, it would change its shape. Is it another's?"
            )
        notice("mask of another size stretched", f"{differ}: it is stretched to that")
        rows, columns = (
            (np.arange(new) + 0.5) * old // new for new, old in zip(size, labels.shape, strict=True)
        )
        return labels[np.ix_(rows.astype(int), columns.astype(int))]

    def check(self, image: str, size: tuple[int, int]) -> None:
        """Raises what `labels` raises: call it before an image is scored. Reads the mask."""
        self.labels(image, size)

    def boxes(self, image: str, size: tuple[int, int]) -> list[Box]:
        """Boxes round the mask's regions, for figures."""
        return labels_to_boxes(self.labels(image, size))


@dataclass(frozen=True)
class ShapeAnnotations(_Facts):
    """Boxes, polygons and pixels from COCO, LabelMe or YOLO."""

    path: Path
    of_image: dict[str, list[Shape]]
    skipped: tuple[str, ...]
    """Names in the file that no image has, where those are skipped."""
    sizes: dict[str, tuple[int, int]]
    """Sizes (height, width) of the images, where the file states them."""

    def labels(self, image: str, size: tuple[int, int]) -> np.ndarray:
        """Labels (H, W) bool of an image of this size, all False for a normal one.

        Raises AnnotationError as `check` does.
        """
        labels = np.zeros(size, dtype=bool)
        for _, marked in self.shapes(image, size):
            labels |= marked
        return labels

    def shapes(self, image: str, size: tuple[int, int]) -> Iterator[tuple[Box, np.ndarray]]:
        """Of each shape the box round it, and its pixels (H, W) bool.

        Raises AnnotationError as `check` does.
        """
        self.check(image, size)
        for shape in self.of_image.get(image, []):
            marked = np.zeros(size, dtype=bool)
            draw(shape, marked)
            yield box_of(shape, size), marked

    def check(self, image: str, size: tuple[int, int]) -> None:
        """Raises AnnotationError for a shape wholly outside, and for an image of another size.

        Cheap: call it before an image is scored.
        """
        stated = self.sizes.get(image, tuple(size))
        if stated != tuple(size):
            raise AnnotationError(
                f"{self.path}: {image} was annotated at {stated} pixels (height, width), it has "
                f"{tuple(size)}. Annotate it as it is, or pass the images that were annotated."
            )
        for shape in self.of_image.get(image, []):
            box = box_of(shape, size)
            rows, columns = pixels_of_box(box, size)
            if rows.start >= rows.stop or columns.start >= columns.stop:
                raise AnnotationError(
                    f"{self.path}: a shape of {image} lies outside the image of {tuple(size)} "
                    f"pixels, in the box {tuple(box[:4])} (top, left, height, width). Correct it."
                )

    def boxes(self, image: str, size: tuple[int, int]) -> list[Box]:
        """The box round each shape. Raises AnnotationError as `check` does."""
        self.check(image, size)
        return [box_of(shape, size) for shape in self.of_image.get(image, [])]


Annotations = BoxAnnotations | MaskAnnotations | ShapeAnnotations


def read_annotations(
    path: Path,
    images: Iterable[str],
    *,
    on_unknown: OnUnknown = "error",
    remedy: str = "",
    resize_masks: bool = False,
    files: Mapping[str, Path] | None = None,
) -> Annotations:
    """Reads boxes from a CSV file, finds the masks in a folder, or reads COCO, LabelMe or YOLO.

    path: a CSV file, COCO's or LabelMe's JSON file, or a folder of masks, of LabelMe's JSON or of
    YOLO's text; which it is, its content says. images: names of all images, relative to their
    folder. on_unknown: what to do with an annotation of an image that is not among them: an error,
    or logged and put into `skipped`. remedy: what else than correcting the name the user can do
    then, for the error. resize_masks: see MaskAnnotations. files: see find_masks. Raises
    AnnotationError.
    """
    if not path.exists():
        raise AnnotationError(f"No annotations at {path.absolute()}. {PASS}")
    names = ImageNames(images, on_unknown, remedy)
    of_tool = (annotation_formats.read_folder if path.is_dir() else annotation_formats.read_file)(
        path
    )
    if of_tool is not None:
        return _shapes(path, of_tool, names)
    if path.is_dir():
        return find_masks(path, names, resize=resize_masks, files=files)
    return read_boxes(path, names)


def _shapes(path: Path, found: Format, names: ImageNames) -> ShapeAnnotations:
    """What a tool's file or folder says, by image. Raises AnnotationError for a name that is not
    one image's, or that two entries have."""
    of_image: dict[str, list[Shape]] = {}
    sizes, skipped, seen = {}, [], {}
    for entry in found.images:
        known = [name for name in entry.names if names.knows(name)] or entry.names[:1]
        images = [names.match(name, entry.where) for name in known]
        image = images[0]
        if image is None:
            skipped.append(entry.names[0])
            continue
        if images[-1] != image:
            raise AnnotationError(
                f"{entry.where}: by its own name it is of {image}, by the one it states of "
                f"{images[-1]}. Correct one."
            )
        other = seen.setdefault(image, entry.where)
        if other != entry.where:
            raise AnnotationError(f"{image} is annotated twice: in {other} and in {entry.where}")
        if entry.shapes:
            of_image[image] = entry.shapes
        if entry.size is not None:
            sizes[image] = entry.size
    of_image = _each_once(path, of_image)
    n = sum(map(len, of_image.values()))
    LOG.info("%s: read as %s: %d lesions in %d of %d images", path, found.name, n, len(of_image),
             len(seen))  # fmt: skip
    return ShapeAnnotations(path, of_image, _log_skipped(path, skipped), sizes)


def _each_once(path: Path, of_image: Mapping[str, list[S]]) -> dict[str, list[S]]:
    """The shapes of each image without repetitions, which would count as several lesions; says how
    many those are."""
    once = {i: list({content(s): s for s in shapes}.values()) for i, shapes in of_image.items()}
    if fewer := {i: n for i in once if (n := len(of_image[i]) - len(once[i]))}:
        LOG.warning("%s: lesions that are there again, number for number, count once: %d (%s)",
                    path, sum(fewer.values()), shown_names(list(fewer)))  # fmt: skip
    return once


def read_boxes(path: Path, names: ImageNames) -> BoxAnnotations:
    """Reads a CSV file with columns image, top, left, height, width and perhaps label.

    The columns of FACT_COLUMNS are kept as well, all others are passed over. An image may have any
    number of rows; a row of an image with nothing after it says that it is normal. Raises
    AnnotationError, naming the line, for a malformed row, for an image that is normal and has a
    box, and for what is no such file: a damaged file is an error and never fewer boxes.
    """
    of_image, skipped, facts = {}, [], {}
    said: dict[
        tuple[str, bool], str
    ] = {}  # (image, whether it has a box) -> first row that says so
    for where, row, box in box_rows(path, PASS):
        image = names.match(row["image"], where)
        if image is None:
            skipped.append(row["image"])
            continue
        said.setdefault((image, box is not None), where)
        if (image, box is None) in said:
            raise AnnotationError(
                f"{image} has a box ({said[image, True]}), and a row without numbers says that it "
                f"is normal ({said[image, False]}). Remove one of them."
            )
        if box is not None:
            of_image.setdefault(image, []).append(box)
        note_facts(facts.setdefault(image, {}), row, where)
    of_image = _each_once(path, of_image)
    return BoxAnnotations(path, of_image, _log_skipped(path, skipped), facts=facts)


def find_masks(
    folder: Path,
    names: ImageNames,
    *,
    resize: bool = False,
    files: Mapping[str, Path] | None = None,
) -> MaskAnnotations:
    """Finds each image's mask: the file at the same place in the folder, with any image suffix.

    Its name may end in _mask or _seg where no image has that whole name. resize: see
    MaskAnnotations. files: where images lie, by their names, as far as known; the slices and axes
    of volumes are compared with theirs.

    A mask that is empty or a broken link is found too, so that its image is not taken for normal:
    reading it raises ImageError. Raises AnnotationError for a file that belongs to no image, a
    second mask of an image, a lossy format, or a volume of other slices or axes than its image's.
    """
    of_image, skipped = {}, []
    try:
        found = find_images(folder, recursive=True)
    except ImageError as error:
        raise AnnotationError(f"masks: {error}") from error
    found.report()
    masks = sorted([*found.files, *found.damaged])
    if not masks:
        raise AnnotationError(
            f"No image in the folder of masks {folder}. Pass a folder of masks that are named like "
            f"the images, or a CSV file of boxes. {found.summary()}"
        )
    volumes = _Volumes(names, files or {})
    for file in itertools.chain.from_iterable(volumes.masks_of(mask, folder) for mask in masks):
        image = names.match(_meant(file.relative_to(folder).as_posix(), names), str(folder))
        if image is None:
            skipped.append(str(file))
            continue
        if file.suffix.lower() in LOSSY_SUFFIXES:
            raise AnnotationError(f"{file}: {LOSSY}")
        if image in of_image:
            raise AnnotationError(f"{image} has two masks, {of_image[image]} and {file}; keep one")
        of_image[image] = file
    return MaskAnnotations(folder, of_image, _log_skipped(folder, skipped), resize)


def _meant(name: str, names: ImageNames) -> str:
    """The name of a mask's image: its own, or without _mask or the like where that is known."""
    ending = MASK_ENDING.fullmatch(without_suffixes(name))
    bare = f"{ending[1]}{ending[2] or ''}" if ending else name
    return bare if not names.knows(name) and names.knows(bare) else name


class _Volumes:
    """The volumes that images are slices of, for their masks."""

    def __init__(self, names: ImageNames, files: Mapping[str, Path]) -> None:
        self.names, self.files = names, files
        self.last: dict[str, int] = {}
        """The largest number of a slice that a name has, by volume."""
        for volume, number in map(split_slice, names.images):
            if number is not None:
                self.last[volume] = max(number, self.last.get(volume, 0))

    def masks_of(self, file: Path, folder: Path) -> Sequence[Path]:
        """A mask file, or of one with a slice for each slice of a volume those that images have.

        All of them where no image has one, so that the first is named as unknown. Raises
        AnnotationError where the file does not fit its image's volume.
        """
        if not may_have_slices(file):
            return [file]
        masks = with_slices([file])
        of = {mask: _meant(mask.relative_to(folder).as_posix(), self.names) for mask in masks}
        used = [mask for mask in masks if self.names.knows(of[mask])]
        if (used or self.names.on_unknown == "error") and is_segmentation(file):
            raise AnnotationError(NO_SEGMENTATION.format(file))
        image = None
        with contextlib.suppress(AnnotationError):  # of one that means several images, when matched
            image = self.names.find(of[used[0]]) if used else None
        if image is not None:
            self._check(file, masks, image)
        if used and len(used) < len(masks):
            LOG.info("%s: %d of its %d slices are of images here", file, len(used), len(masks))
        return used or masks

    def _check(self, file: Path, masks: Sequence[Path], image: str) -> None:
        """Raises AnnotationError where a mask's slices or axes are not those of its image."""
        image_file = split_slice(self.files[image])[0] if image in self.files else None
        numbers, volume = [split_slice(mask)[1] or 0 for mask in masks], volume_of(image)
        known = [] if image_file is None else list(slice_numbers(image_file))
        last = known[-1] if len(known) > 1 else self.last.get(volume, 0)
        if len(masks) > 1 and (numbers != known if len(known) > 1 else last > numbers[-1]):
            raise AnnotationError(
                f"{file} has {len(masks)} slices, the last is #{numbers[-1]:03d}; that of its "
                f"image {volume} is #{last:03d}. A mask must have all slices of its image's "
                "volume, empty ones too: save it with the image's size"
            )
        with contextlib.suppress(ImageError):  # reading says what is damaged
            axes = axis_codes(file), None if image_file is None else axis_codes(image_file)
            if None not in axes and axes[0] != axes[1]:
                raise AnnotationError(
                    f"{file}: its axes run {axes[0]}, those of its image {image_file} "
                    f"{axes[1]} (R right, L left, A front, P back, S up, I down), so it would be "
                    "turned differently. Save the mask with its image's axes and header"
                )


def _log_skipped(path: Path, skipped: Sequence[str]) -> tuple[str, ...]:
    """The names without repetitions; logs how many they are."""
    names = tuple(dict.fromkeys(skipped))
    if names:
        LOG.warning("%s: %d of unknown images: %s", path, len(names), shown_names(names))
    return names
