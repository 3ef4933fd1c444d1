"""A CSV table with a few rows per image, to which a run adds image by image."""

import csv
import io
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from common.checkpoint import save_text_atomic
from common.files import escaped, unescaped
from inpainter.heatmap_files import EvaluationError

Row = Mapping[str, object]


class ImageTable:
    """The rows of a CSV file by image; its first column is `image`, the name.

    Names are written as `common.files.escaped` does. Rows of one image are added behind the
    others and flushed to disk, so that a run takes no longer the more images there are; a line that
    a kill cut short is dropped when the table is next read.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Reads what is there. Raises EvaluationError for a file that is no such table."""
        self.path, self.columns = path, tuple(columns)
        self.of_image: dict[str, list[dict[str, str]]] = {}
        if path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            text = self.path.read_bytes().decode("utf-8")
            whole = io.StringIO(text[: text.rfind("\n") + 1], newline="")
            reader = csv.DictReader(whole, strict=True)
            missing = set(self.columns) - set(reader.fieldnames or self.columns)
            if missing:
                raise self._unusable(f"column {', '.join(sorted(missing))} is missing")
            for row in reader:
                if None in row or None in row.values():
                    expected = f"expected {len(self.columns)} values"
                    raise self._unusable(f"line {reader.line_num}: {expected}")
                self.of_image.setdefault(unescaped(row["image"]), []).append(row)
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._unusable(f"no CSV file in UTF-8 ({error})") from None

    def _unusable(self, reason: str) -> EvaluationError:
        return EvaluationError(
            f"{self.path} is not as predict_heatmap.py writes it: {reason}. Pass another "
            "--output_dir, or --overwrite to score all images anew."
        )

    def rows(self, image: str) -> list[dict[str, str]]:
        """The rows of an image, none where it has none."""
        return self.of_image.get(image, [])

    def start(self) -> None:
        """Writes the heading where there is no file yet: a run that scores nothing says so."""
        if not self.path.is_file():
            save_text_atomic(self._lines([], header=True), self.path)

    def keep(self, images: Container[str]) -> None:
        """Drops the rows of all other images, and what a kill left of a line."""
        self.of_image = {name: rows for name, rows in self.of_image.items() if name in images}
        if not self.of_image:
            self.path.unlink(missing_ok=True)
            return
        text = self._lines([row for rows in self.of_image.values() for row in rows], header=True)
        if self.path.read_bytes() != text.encode():
            save_text_atomic(text, self.path)

    def add(self, image: str, rows: Sequence[Row]) -> None:
        """Adds the rows of an image that has none, without their column `image`."""
        full = [{"image": escaped(image)} | {k: str(v) for k, v in row.items()} for row in rows]
        self.of_image[image] = full
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._lines(full, header=file.tell() == 0))
            file.flush()
            os.fsync(file.fileno())

    def _lines(self, rows: Sequence[Row], *, header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n", extrasaction="ignore")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
