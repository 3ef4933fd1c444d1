"""Whose images they are: a CSV file about them, and which are drawn as one for intervals."""

import csv
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import read_regular
from common.image_folders import shown, shown_names
from common.image_names import AnnotationError, ImageNames, volume_of

LOG = logging.getLogger(__name__)
MAX_BYTES = 256 * 2**20
PATIENT = "patient"


class MetadataError(UserError):
    """A file about the images cannot be read or does not fit them."""


@dataclass(frozen=True)
class Metadata:
    """A CSV file about images: of each its values by column."""

    path: Path
    columns: list[str]
    """Without `image`."""
    of_image: dict[str, dict[str, str]]
    """The values of a volume's row are those of its slices."""
    unknown: int
    """Rows of images that are not among those looked at."""

    def values(self, column: str) -> dict[str, str]:
        """Image -> its value of a column, without images that have none.

        Raises MetadataError, naming the columns, where there is no such column.
        """
        if column not in self.columns:
            raise MetadataError(
                f"{self.path} has no column '{shown(column)}'. Its columns: "
                f"{shown(', '.join(self.columns))}."
            )
        return {image: row[column] for image, row in self.of_image.items() if row[column]}


def read_metadata(path: Path, images: Iterable[str]) -> Metadata:
    """Reads a CSV file in UTF-8 with a column `image`, the name of an image or of a volume.

    images: those looked at; rows of others are counted and passed over, for such a file may be on a
    whole archive. Raises MetadataError for what is no such file, for two rows that say different
    things of one image, and where no row is of these images.
    """
    images = list(dict.fromkeys(images))
    names = ImageNames([*images, *map(volume_of, images)], on_unknown="skip")
    of_name: dict[str, dict[str, str]] = {}
    rows, columns, unknown = *_read(path), 0
    for where, row in rows:
        try:
            name = names.match(row.pop("image"), where)
        except AnnotationError as error:
            raise MetadataError(str(error)) from None
        if name is None:
            unknown += 1
        elif of_name.setdefault(name, row) != row:
            raise MetadataError(f"{where}: {shown(name)} has an earlier row that says otherwise")
    nothing = dict.fromkeys(columns, "")
    of_image = {
        image: {**nothing, **of_name.get(volume_of(image), {}), **of_name.get(image, {})}
        for image in images
        if image in of_name or volume_of(image) in of_name
    }
    if not of_image:
        first = shown(images[0]) if images else "none"
        raise MetadataError(
            f"{path}: none of its {unknown} rows is of these images, of which the first is "
            f"'{first}'. Its column image must hold their names."
        )
    missing = [image for image in images if image not in of_image]
    if missing:
        LOG.warning("%s: no row of %d images: %s", path, len(missing), shown_names(missing))
    return Metadata(path, columns, of_image, unknown)


def _read(path: Path) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """(file and line, row) of each row, and the columns but `image`. Raises MetadataError."""
    remedy = "Pass a CSV file in UTF-8 with a column image."
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MetadataError(f"{path} is larger than {MAX_BYTES // 2**20} MiB. {remedy}")
        reader = csv.DictReader(
            io.StringIO(read_regular(path).decode("utf-8-sig"), newline=""), strict=True
        )
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        if "image" not in columns:
            raise MetadataError(f"{path}: no column image in {shown(','.join(columns))}. {remedy}")
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise MetadataError(f"{path}: the first line names {', '.join(twice)} twice")
        rows = []
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                expected = f"{len(columns)} values, as the first line has"
                raise MetadataError(f"{where}: expected {expected}. Correct the line.")
            rows.append((where, {name: value.strip() for name, value in row.items()}))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MetadataError(f"{path} cannot be read: {error}. {remedy}") from error
    return rows, [name for name in columns if name != "image"]


@dataclass(frozen=True)
class Clusters:
    """Which images are drawn together when an interval is made, for they are not independent."""

    unit: str
    """What is drawn: patient, volume or image."""
    of_image: Mapping[str, str] | None
    """Image -> cluster; None where each image is one by itself."""
    unknown: int = 0
    """Images whose patient nobody says, each a patient by itself (a volume's slices together)."""

    def numbers(self, images: Sequence[str]) -> np.ndarray | None:
        """(n,) the clusters of images, numbered from 0 without gaps; None: each its own."""
        if self.of_image is None or not images:
            return None
        return np.unique([self.of_image[image] for image in images], return_inverse=True)[1]

    def count(self, images: Sequence[str]) -> int:
        """How many clusters these images are."""
        numbers = self.numbers(images)
        return len(images) if numbers is None else int(numbers.max()) + 1


def cluster_images(
    images: Iterable[str], *patient_of: Callable[[str], str | None] | None
) -> Clusters:
    """By patient where any of the sources knows one, else by volume where there are slices.

    patient_of: sources of an image's patient, the first that knows counts; None where there is no
    such source.
    """
    images = list(dict.fromkeys(images))
    known = {}
    for image in images:
        found = (source(image) for source in patient_of if source is not None)
        known[image] = next((patient for patient in found if patient), None)
    unknown = sum(patient is None for patient in known.values())
    if unknown < len(images):
        if unknown:
            LOG.warning("no patient is known of %d of %d images", unknown, len(images))
        # a number keeps a patient's name apart from that of an image
        named = {image: f"0 {patient}" for image, patient in known.items() if patient is not None}
        return Clusters(
            PATIENT, {image: named.get(image, f"1 {volume_of(image)}") for image in images}, unknown
        )
    volumes = {image: volume_of(image) for image in images}
    if any(volume != image for image, volume in volumes.items()):
        return Clusters("volume", volumes)
    return Clusters("image", None)
