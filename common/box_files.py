"""The CSV file of boxes: its text, its rows, what each says; damaged, it is never fewer boxes."""

import codecs
import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.files import open_regular
from common.image_folders import shown
from common.image_names import AnnotationError
from common.shapes import Box

BOX_COLUMNS = ("image", "top", "left", "height", "width")
FACT_COLUMNS = ("patient", "volume_slices")
"""Columns that a box file may have besides, on the image and not on the box."""
MAX_BYTES = 64 * 2**20
"""A box file of more than 64 MiB, about a million boxes, is taken for another file."""
MAX_PIXELS = 10_000_000
"""Boxes of numbers beyond this are taken for a slip: no image is that large."""
PLAIN_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", re.ASCII)
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


def box_rows(path: Path, remedy: str) -> Iterator[tuple[str, dict[str, str], Box | None]]:
    """(file and line, values by column, box) of each row; no box where its numbers are empty.

    remedy: what to pass instead of what is no such file. Raises AnnotationError.
    """
    for where, row in _rows(path, _read_text(path, remedy)):
        yield where, row, _box(row, where)


def note_facts(known: dict[str, str], row: dict[str, str], where: str) -> None:
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


def _read_text(path: Path, remedy: str) -> str:
    """The file's text. Raises AnnotationError for what is no text in UTF-8; never blocks."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AnnotationError(
            f"The annotations {path} cannot be read: {error.strerror or error}. {remedy}"
        ) from error
    if len(data) > MAX_BYTES:
        raise AnnotationError(
            f"{path} is larger than {MAX_BYTES // 2**20} MiB: it is no file of boxes. {remedy}"
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
