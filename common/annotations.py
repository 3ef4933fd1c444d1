"""Where the lesions are: boxes in a CSV file, or a folder of mask images, to pixel labels.

An image without annotation is normal. An annotation without image is an error, since a misspelt
name would silently turn a lesion image into a normal one. Sizes and boxes are in pixels,
(height, width) and (top, left, height, width).
"""

import codecs
import csv
import io
import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from common.image_files import ImageError, is_lossy, open_regular
from common.image_folders import find_images, shown, shown_names
from common.image_names import AnnotationError, ImageNames, OnUnknown
from common.images import read_mask

LOG = logging.getLogger(__name__)
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
LOSSY = "the noise of JPEG, JPEG 2000 and lossy WebP marks pixels beside lesions; save masks as PNG"
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
BOX_COLUMNS = ("image", "top", "left", "height", "width")
FACT_COLUMNS = ("patient", "volume_slices")
"""Columns that a box file may have besides, on the image and not on the box."""
MAX_BYTES = 64 * 2**20
"""A box file of more than 64 MiB, about a million boxes, is taken for another file."""
MAX_PIXELS = 10_000_000
"""Boxes of numbers beyond this are taken for a slip: no image is that large."""
PLAIN_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", re.ASCII)
PASS = "Pass a CSV file of boxes or a folder of masks."
SAVE_AS = "Save it as CSV in UTF-8, separated by commas"
_UTF16, _TEXT = "text in UTF-16 (a spreadsheet's Unicode text)", "JSON or XML, not CSV"
FOREIGN = {
    **{b"\xff\xfe": _UTF16, b"\xfe\xff": _UTF16, b"{": _TEXT, b"[": _TEXT, b"<": _TEXT},
    b"PK\x03\x04": "a zip file, such as a spreadsheet's workbook (.xlsx, .ods)",
    b"\xd0\xcf\x11\xe0": "an old workbook (.xls)",
    b"\x1f\x8b": "compressed (gzip)",
    b"%PDF": "a PDF",
}
"""What people pass instead of CSV, by its first bytes."""


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
class MaskAnnotations(_Facts):
    """Mask images in a folder, one per annotated image; see common.images.read_mask."""

    path: Path
    of_image: dict[str, Path]
    skipped: tuple[str, ...]
    """Files that belong to no image, where those are skipped."""

    def labels(self, image: str, size: tuple[int, int]) -> np.ndarray:
        """Labels (H, W) bool of an image of this size, all False where it has no mask.

        Raises AnnotationError where the mask has another size, ImageError where it is unreadable.
        """
        if image not in self.of_image:
            return np.zeros(size, dtype=bool)
        path = self.of_image[image]
        if is_lossy(path):
            raise AnnotationError(f"{path}: {LOSSY}")
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
    of an image that is not among them: an error, or logged and put into `skipped`.
    remedy: what else than correcting the name the user can do then, for the error. Raises
    AnnotationError.
    """
    if not path.exists():
        raise AnnotationError(f"No annotations at {path.absolute()}. {PASS}")
    read = find_masks if path.is_dir() else read_boxes
    return read(path, ImageNames(images, on_unknown, remedy))


def read_boxes(path: Path, names: ImageNames) -> BoxAnnotations:
    """Reads a CSV file with columns image, top, left, height, width and perhaps label.

    The columns of FACT_COLUMNS are kept as well, all others are passed over. An image may have any
    number of rows; a row of an image with nothing after it says that it is normal. Raises
    AnnotationError, naming the line, for a malformed row and for what is no such file: a damaged
    file is an error and never fewer boxes.
    """
    of_image, skipped, facts = {}, [], {}
    for where, row in _rows(path, _read_text(path)):
        box = _box(row, where)
        image = names.match(row["image"], where)
        if image is None:
            skipped.append(row["image"])
            continue
        if box is not None:
            of_image.setdefault(image, []).append(box)
        _note_facts(facts.setdefault(image, {}), row, where)
    return BoxAnnotations(path, of_image, _log_skipped(path, skipped), facts=facts)


def _note_facts(known: dict[str, str], row: dict[str, str], where: str) -> None:
    """Adds what a row says of its image. Raises AnnotationError where another row says otherwise.

    known: column -> value.
    """
    for column in FACT_COLUMNS:
        value = row.get(column, "").strip()
        if not value:
            continue
        if column == "volume_slices" and not re.fullmatch(r"[1-9][0-9]{0,5}", value, re.ASCII):
            raise AnnotationError(
                f"{where}: volume_slices must be a whole number of slices, got '{shown(value)}'"
            )
        if known.setdefault(column, value) != value:
            raise AnnotationError(
                f"{where}: {column} of {row['image']} is '{shown(value)}', in an earlier row "
                f"'{shown(known[column])}'; correct one"
            )


def find_masks(folder: Path, names: ImageNames) -> MaskAnnotations:
    """Finds each image's mask: the file at the same place in the folder, with any image suffix.

    A mask that is empty or a broken link is found too, so that its image is not taken for normal:
    reading it raises ImageError. Raises AnnotationError for a file that belongs to no image, a
    second mask of an image, or a lossy format.
    """
    of_image, skipped = {}, []
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
        image = names.match(file.relative_to(folder).as_posix(), str(folder))
        if image is None:
            skipped.append(str(file))
            continue
        if file.suffix.lower() in LOSSY_SUFFIXES:
            raise AnnotationError(f"{file}: {LOSSY}")
        if image in of_image:
            raise AnnotationError(f"{image} has two masks, {of_image[image]} and {file}; keep one")
        of_image[image] = file
    return MaskAnnotations(folder, of_image, _log_skipped(folder, skipped))


def _log_skipped(path: Path, skipped: Sequence[str]) -> tuple[str, ...]:
    """The names without repetitions; logs how many they are."""
    names = tuple(dict.fromkeys(skipped))
    if names:
        LOG.warning("%s: %d of unknown images: %s", path, len(names), shown_names(names))
    return names


def _read_text(path: Path) -> str:
    """The file's text. Raises AnnotationError for what is no text in UTF-8; never blocks."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AnnotationError(
            f"The annotations {path} cannot be read: {error.strerror or error}. {PASS}"
        ) from error
    if len(data) > MAX_BYTES:
        raise AnnotationError(
            f"{path} is larger than {MAX_BYTES // 2**20} MiB: it is no file of boxes. {PASS}"
        )
    begin = data.removeprefix(codecs.BOM_UTF8).lstrip()
    if not begin:
        raise AnnotationError(
            f"{path} is empty; the first line must name the columns {','.join(BOX_COLUMNS)}"
        )
    for magic, what in FOREIGN.items():
        if begin.startswith(magic):
            raise AnnotationError(f"{path} is {what}. {SAVE_AS}")
    place, problem = data.find(b"\0"), "NUL bytes; it is no text in UTF-8 but binary or in UTF-16"
    if place < 0:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            place = error.start
            problem = f"byte 0x{data[place]:02x} is not UTF-8, perhaps Latin-1 or Windows-1252"
    line = data[:place].count(b"\n") + 1
    raise AnnotationError(f"{path}, line {line}: {problem}. {SAVE_AS}")


def _rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(file and line, values by column) of each row that has any. Raises AnnotationError.

    A quote that is not closed would swallow the lines after it: neither that nor a value of several
    lines is accepted.
    """
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    columns: list[str] = []
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error)
            if "unexpected end of data" in reason:
                reason = "a quote is opened and never closed"
            raise AnnotationError(f"{where}: not CSV: {reason}. Correct the line.") from error
        if any("\n" in value or "\r" in value for value in values):
            raise AnnotationError(
                f"{where}: a value goes on over the end of the line; is its quote not closed?"
            )
        if values and not columns:
            columns = [name.strip() for name in values]
            _check_columns(path, columns)
        elif len(values) > len(columns):
            left_over = values[len(columns) :]
            raise AnnotationError(f"{where}: more values than columns, {left_over} left over")
        elif any(value.strip() for value in values):
            row = dict(itertools.zip_longest(columns, values, fillvalue=""))
            if not row["image"].strip():
                raise AnnotationError(f"{where}: no image is called ''; name the row's image")
            yield where, row


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    """Raises AnnotationError where a column is missing or there twice."""
    missing = [name for name in BOX_COLUMNS if name not in columns]
    if missing:
        found = shown(",".join(columns))
        for separator, what in ((";", "semicolons"), ("\t", "tabs")):
            if any(separator in column for column in columns):
                found += f", which are separated by {what}"
        raise AnnotationError(
            f"{path}: the first line must name the columns {','.join(BOX_COLUMNS)}[,label], "
            f"separated by commas; {', '.join(missing)} not found in {found}"
        )
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise AnnotationError(
            f"{path}: the first line names {', '.join(twice)} twice; which one counts is not "
            "known. Remove or rename one"
        )


def _box(row: dict[str, str], where: str) -> Box | None:
    """The box of a row, None where all its numbers are empty. Raises AnnotationError."""
    texts = {name: row[name].strip() for name in BOX_COLUMNS[1:]}
    if not any(texts.values()):
        return None
    for name, text in texts.items():
        if not PLAIN_NUMBER.fullmatch(text):
            raise AnnotationError(
                f"{where}: {name} must be a number of pixels, got '{shown(text)}'; write plain "
                "digits, such as 12 or 3.5"
            )
        if abs(float(text)) > MAX_PIXELS:
            raise AnnotationError(
                f"{where}: {name} must be a number of pixels up to {MAX_PIXELS}, got {shown(text)}"
            )
    top, left, height, width = map(float, texts.values())
    if not (top + height > top and left + width > left):
        raise AnnotationError(
            f"{where}: height and width must be above 0, "
            f"got {shown(texts['height'])} and {shown(texts['width'])}"
        )
    return Box(top, left, height, width, row.get("label", "").strip())
