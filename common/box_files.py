"""Boxes of lesions in a CSV file, read so that a damaged file is an error and never fewer boxes."""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.decoders import open_regular
from common.image_folders import shown
from common.image_names import AnnotationError

BOX_COLUMNS = ("image", "top", "left", "height", "width")
MAX_BYTES = 64 * 2**20
"""A box file of more than 64 MiB, about a million boxes, is taken for another file."""
MAX_PIXELS = 10_000_000
"""Boxes of numbers beyond this are taken for a slip: no image is that large."""
PLAIN_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", re.ASCII)
SAVE_AS = "Save it as CSV in UTF-8, separated by commas"
FOREIGN = {
    b"\xff\xfe": "text in UTF-16 (a spreadsheet's Unicode text)",
    b"\xfe\xff": "text in UTF-16 (a spreadsheet's Unicode text)",
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


class BoxRow(NamedTuple):
    """One row of a box file."""

    where: str
    """File and line, for messages."""
    image: str
    """The name in the file."""
    box: Box | None
    """None where the row says that the image is normal."""


def read_box_rows(path: Path) -> list[BoxRow]:
    """The rows of a CSV file with columns image, top, left, height, width and perhaps label.

    Rows without any value are dropped. Raises AnnotationError, with the line where there is one:
    for a malformed row, and for what is no such file.
    """
    rows = _split(path, _read_text(path))
    _, first = next(rows, ("", []))
    columns = [name.strip() for name in first]
    check_columns(path, columns)
    found = []
    for where, values in rows:
        if len(values) > len(columns):
            left_over = values[len(columns) :]
            raise AnnotationError(f"{where}: more values than columns, {left_over} left over")
        if not any(value.strip() for value in values):
            continue
        padded = [*values, *[""] * (len(columns) - len(values))]
        row = dict(zip(columns, padded, strict=True))
        if not row["image"].strip():
            raise AnnotationError(f"{where}: no image is called ''; name the row's image")
        found.append(BoxRow(where, row["image"], parse_box(row, where)))
    return found


def _read_text(path: Path) -> str:
    """The file's text. Raises AnnotationError for what is no text in UTF-8; never blocks."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AnnotationError(
            f"The annotations {path} cannot be read: {error.strerror or error}. Pass a CSV file of "
            "boxes or a folder of masks."
        ) from error
    if len(data) > MAX_BYTES:
        raise AnnotationError(
            f"{path} is larger than {MAX_BYTES // 2**20} MiB: it is no file of boxes. Pass a CSV "
            "file of boxes or a folder of masks."
        )
    if not data.strip():
        raise AnnotationError(
            f"{path} is empty; the first line must name the columns {','.join(BOX_COLUMNS)}"
        )
    for magic, what in FOREIGN.items():
        if data.startswith(magic):
            raise AnnotationError(f"{path} is {what}. {SAVE_AS}")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise AnnotationError(
            f"{path}, line {line}: NUL bytes; it is no text in UTF-8 but binary or in UTF-16. "
            f"{SAVE_AS}"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise AnnotationError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8, the file is "
            f"perhaps in Latin-1 or Windows-1252. {SAVE_AS}"
        ) from error
    if text.lstrip()[:1] in ("{", "[", "<"):
        raise AnnotationError(f"{path} is JSON or XML, not CSV. {SAVE_AS}")
    return text


def _split(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    """(file and line, values) of each row that is not blank. Raises AnnotationError.

    A quote that is not closed would swallow the rows after it: neither that nor a value of several
    lines is accepted.
    """
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
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
        if values:
            yield where, values


def check_columns(path: Path, columns: Sequence[str]) -> None:
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


def parse_box(row: dict[str, str], where: str) -> Box | None:
    """The box of a row, None where all its numbers are empty. Raises AnnotationError."""
    texts = {name: row[name].strip() for name in BOX_COLUMNS[1:]}
    if not any(texts.values()):
        return None
    values = {name: _pixels(text, name, where) for name, text in texts.items()}
    top, left, height, width = values.values()
    if not (top + height > top and left + width > left):
        raise AnnotationError(
            f"{where}: height and width must be above 0, "
            f"got {shown(texts['height'])} and {shown(texts['width'])}"
        )
    return Box(top, left, height, width, row.get("label", "").strip())


def _pixels(text: str, name: str, where: str) -> float:
    """A number of pixels, plain and finite. Raises AnnotationError."""
    value = float(text) if PLAIN_NUMBER.fullmatch(text) else math.nan
    if math.isnan(value):
        raise AnnotationError(
            f"{where}: {name} must be a number of pixels, got '{shown(text)}'; write plain digits, "
            "such as 12 or 3.5"
        )
    if abs(value) > MAX_PIXELS:
        raise AnnotationError(
            f"{where}: {name} must be a number of pixels up to {MAX_PIXELS}, got {shown(text)}"
        )
    return value
