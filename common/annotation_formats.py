"""Annotations as labelling tools write them: COCO, LabelMe, YOLO. Which it is, its content says.

Each reader gives the shapes of every image that its file or folder names; an image without any is
named, too, for that says that it is normal.
"""

import base64
import binascii
import io
import itertools
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from common.files import open_regular
from common.image_files import MAX_SAMPLES, READ_ERRORS
from common.image_folders import shown, shown_names
from common.image_names import AnnotationError
from common.shapes import Box, Pixels, Polygons, Shape, ShareBox

LOG = logging.getLogger(__name__)
LONGEST = 2**24
"""Bytes of a text file that is read; longer ones are no labels of one image."""
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
YOLO_LINE = re.compile(rf"\d+(?:\s+{NUMBER}){{4,}}", re.ASCII)
YOLO_NAMES = "classes.txt"
"""File of the classes' names, one a line, that tools put beside YOLO's labels."""
LARGEST = 1e9
"""Numbers beyond this are taken for a slip."""
ROUNDING = 0.01
"""By how many pixels an upright rectangle's corner may lie beside its place."""
LABELME_POINTS = {
    "rectangle": "two opposite corners, or four with upright sides",
    "circle": "two points, its centre and one of its rim",
    "mask": "two points, its top left and its bottom right",
}
"""What LabelMe's shapes other than the polygon have as points."""
SLACK = 1e-3
"""By how much a share may leave [0, 1], for rounding."""


@dataclass
class Named:
    """What a file or folder says of one image, by the name that it gives the image."""

    where: str
    """File, and place in it, for messages."""
    names: tuple[str, ...]
    """Names that all must mean the same image; of those after the first, unknown ones do not
    count."""
    shapes: list[Shape] = field(default_factory=list)
    size: tuple[int, int] | None = None
    """(height, width) that the file states."""


@dataclass(frozen=True)
class Format:
    """What was read."""

    name: str
    images: list[Named]


def read_file(path: Path) -> Format | None:
    """A file that is COCO's or LabelMe's JSON; None for any other. Raises AnnotationError."""
    data = _json_of(path)
    if isinstance(data, Mapping) and {"images", "annotations"} <= set(data):
        return Format("COCO", _coco(data, path))
    if isinstance(data, Mapping) and "shapes" in data:
        return Format("LabelMe", [_labelme(data, path, path.parent)])
    return None


def read_folder(folder: Path) -> Format | None:
    """A folder of LabelMe's JSON files, or of YOLO's text files; None for any other.

    Images beside them are the scans, not masks. Raises AnnotationError where a file is damaged, and
    for another JSON file among LabelMe's, for its image would count as normal.
    """
    inner = [p for p in sorted(folder.rglob("*")) if not (_hidden(p, folder) or p.is_dir())]
    documents = {path: _json_of(path) for path in inner if path.suffix.lower() == ".json"}
    labelme = {p: d for p, d in documents.items() if isinstance(d, Mapping) and "shapes" in d}
    texts = [p for p in inner if p.suffix.lower() == ".txt" and p.name.lower() != YOLO_NAMES]
    lines = {path: _lines_of(path) for path in texts}
    yolo = any(found and all(map(YOLO_LINE.fullmatch, found)) for found in lines.values())
    if labelme and yolo:
        raise AnnotationError(f"{folder} holds LabelMe's JSON and YOLO's text; keep one of them")
    if labelme:
        if others := [path for path in documents if path not in labelme]:
            raise AnnotationError(
                f"{shown_names([str(path) for path in others])}: not LabelMe's JSON, an object "
                f"with 'shapes', as others of {folder} are; an image of that name would count as "
                "normal. Export it anew, or put it elsewhere."
            )
        return Format("LabelMe", [_labelme(data, path, folder) for path, data in labelme.items()])
    if yolo:
        names = _yolo_names(folder)
        return Format("YOLO", [_yolo(path, lines[path], folder, names) for path in lines])
    return None


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _json_of(path: Path) -> object:
    """What a JSON file holds; None for what begins as none. Raises AnnotationError if damaged."""
    try:
        with open_regular(path) as file:
            if not file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                return None
            return json.loads(file.read().decode("utf-8-sig"))
    except OSError:
        return None  # said by whoever reads it as something else
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() != ".json":
            return None
        raise AnnotationError(f"{path} is damaged JSON: {error}. Export it anew.") from error


def _lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not blank; [""] where it is no text."""
    try:
        with open_regular(path) as file:
            text = file.read(LONGEST).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return [""]
    return [line.strip() for line in text.splitlines() if line.strip()]


def _numbers(values: object, where: str, what: str, n: int | None = None) -> list[float]:
    """A list of n numbers within ±LARGEST. Raises AnnotationError."""
    if (
        isinstance(values, list)
        and n in (None, len(values))
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        and all(-LARGEST <= v <= LARGEST for v in values)
    ):
        return list(map(float, values))
    expected = f"{n} numbers" if n else "numbers"
    raise AnnotationError(f"{where}: {what} must be {expected}, got {shown(str(values))[:80]}")


def _field(entry: object, key: str, where: str) -> Any:
    """An entry's value. Raises AnnotationError where it has none."""
    if isinstance(entry, Mapping) and key in entry:
        return entry[key]
    raise AnnotationError(f"{where}: lacks '{key}'; export it anew")


def _entries(
    data: Mapping[str, Any], key: str, path: Path
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The entries of a list, and their places. Raises AnnotationError."""
    if not isinstance(data[key], list):
        raise AnnotationError(f"{path}: {key} must be a list; export it anew")
    for number, entry in enumerate(data[key]):
        where = f"{path}, {key}[{number}]"
        if not isinstance(entry, Mapping):
            raise AnnotationError(f"{where}: must be an object, got {shown(str(entry))[:80]}")
        yield entry, where


def _id(entry: Mapping[str, Any], key: str, where: str) -> int | str:
    """A number or text that other entries refer to. Raises AnnotationError."""
    value = _field(entry, key, where)
    if isinstance(value, int | str):
        return value
    raise AnnotationError(f"{where}: {key} must be a number, got {shown(str(value))[:80]}")


def _size(entry: Mapping[str, Any], keys: tuple[str, str], where: str) -> tuple[int, int] | None:
    """(height, width) where the entry states both, null being nothing. Raises AnnotationError."""
    height, width = (
        None if entry.get(key) is None else _pixels(entry[key], where, key) for key in keys
    )
    return None if height is None or width is None else (height, width)


def _pixels(value: object, where: str, what: str) -> int:
    """A side of an image: 80, 80.0 or "80". Raises AnnotationError for all else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value.strip(), re.ASCII):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST:
        return value
    raise AnnotationError(
        f"{where}: {what} must be a whole number of pixels above 0, got "
        f"{shown(repr(value))[:80]}. Correct it, or remove it if it is not known."
    )


def _box(left: float, top: float, width: float, height: float, label: str, where: str) -> Box:
    if not (width > 0 and height > 0):
        raise AnnotationError(f"{where}: width and height must be above 0, got {width}, {height}")
    return Box(top, left, height, width, label)


def _outline(values: object, where: str) -> np.ndarray:
    """x, y, x, y … to (corners, 2): row, column. Raises AnnotationError."""
    numbers = _numbers(values, where, "a polygon")
    if len(numbers) < 6 or len(numbers) % 2:
        raise AnnotationError(
            f"{where}: a polygon needs x and y of three corners or more, got {len(numbers)} numbers"
        )
    return np.array(numbers).reshape(-1, 2)[:, ::-1]


def _coco(data: Mapping[str, Any], path: Path) -> list[Named]:
    """COCO: boxes [left, top, width, height], polygons, run lengths as lists or as text."""
    classes: dict[object, str] = {}
    if data.get("categories"):
        for entry, where in _entries(data, "categories", path):
            classes[_id(entry, "id", where)] = str(entry.get("name", ""))
    images: dict[object, Named] = {}
    for entry, where in _entries(data, "images", path):
        name, key = str(_field(entry, "file_name", where)), _id(entry, "id", where)
        if key in images:
            raise AnnotationError(f"{where}: two images have the id {key}")
        images[key] = Named(where, (name,), size=_size(entry, ("height", "width"), where))
    for entry, where in _entries(data, "annotations", path):
        key = _id(entry, "image_id", where)
        if key not in images:
            raise AnnotationError(f"{where}: no image has the id {key}")
        kind = _id(entry, "category_id", where) if "category_id" in entry else ""
        label = classes.get(kind, str(kind))
        image = images[key]
        shape = _coco_shape(entry, label, image.size, where)
        image.shapes.append(shape)
        if isinstance(shape, Pixels):
            image.size = shape.marked.shape
    return list(images.values())


def _coco_shape(
    entry: Mapping[str, Any], label: str, size: tuple[int, int] | None, where: str
) -> Shape:
    """One annotation: its segmentation where it has any, else its box."""
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, Mapping):
        return Pixels(_decoded(segmentation, size, where), label)
    if segmentation:
        if not isinstance(segmentation, list) or not all(isinstance(s, list) for s in segmentation):
            raise AnnotationError(
                f"{where}: segmentation must be polygons, a list of lists, or RLE"
            )
        if outlines := [outline for outline in segmentation if outline]:  # [[]] is none, as []
            return Polygons(tuple(_outline(outline, where) for outline in outlines), label)
    left, top, width, height = _numbers(_field(entry, "bbox", where), where, "bbox", 4)
    return _box(left, top, width, height, label, where)


def _decoded(run: Mapping[str, Any], size: tuple[int, int] | None, where: str) -> np.ndarray:
    """COCO's run lengths to (H, W) bool: columns one after the other, first a run of background.

    Raises AnnotationError where they do not fill the size.
    """
    sides = _numbers(_field(run, "size", where), where, "size", 2)
    height, width = (_pixels(side, where, "size") for side in sides)
    if height * width > MAX_SAMPLES:
        raise AnnotationError(f"{where}: {height} x {width} pixels are no image's size")
    if size is not None and (height, width) != size:
        raise AnnotationError(f"{where}: its size is {(height, width)}, its image's {size}")
    counts = _field(run, "counts", where)
    if isinstance(counts, str):
        counts = _counts_of_text(counts, where)
    numbers = np.array(_numbers(counts, where, "counts"), dtype=np.int64)
    if (numbers < 0).any() or numbers.sum() != height * width:
        raise AnnotationError(
            f"{where}: its runs are {numbers.sum()} pixels, {height} x {width} are {height * width}"
        )
    marked = np.repeat(np.arange(len(numbers)) % 2 == 1, numbers)
    if not marked.any():
        raise AnnotationError(f"{where}: marks no pixel; remove it")
    return marked.reshape(height, width, order="F")


def _counts_of_text(text: str, where: str) -> list[int]:
    """COCO's compressed run lengths: 5 bits a letter from "0" on, a sixth where more follow.

    From the fourth number on, each is the difference to the one before the last.
    """
    counts: list[int] = []
    number, shift = 0, 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise AnnotationError(
                f"{where}: counts has the letter '{shown(letter)}', no run length"
            )
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (1 << shift) if bits & 16 else 0  # the highest bit is the sign
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number, shift = 0, 0
    if shift:
        raise AnnotationError(f"{where}: counts ends within a number")
    return counts


def _labelme(data: Mapping[str, Any], path: Path, folder: Path) -> Named:
    """One file of LabelMe. Its image has the file's name, and the name that it states, if known."""
    named = [path.relative_to(folder).with_suffix("").as_posix()]
    if stated := data.get("imagePath"):
        beside = (
            path.relative_to(folder).parent / PurePosixPath(str(stated).replace("\\", "/")).name
        )
        named.append(beside.as_posix())
    found = Named(
        str(path), tuple(named), size=_size(data, ("imageHeight", "imageWidth"), str(path))
    )
    for entry, where in _entries(data, "shapes", path):
        found.shapes.append(_labelme_shape(entry, where))
    return found


def _labelme_shape(entry: Mapping[str, Any], where: str) -> Shape:
    points = _field(entry, "points", where)
    if not isinstance(points, list):
        raise AnnotationError(f"{where}: points must be a list")
    corners = [tuple(_numbers(point, where, "a point", 2)) for point in points]
    kind, label = str(entry.get("shape_type") or "polygon"), str(entry.get("label") or "")
    if kind == "polygon":
        return Polygons((_outline([n for corner in corners for n in corner], where),), label)
    if kind == "rectangle" and len(corners) == 4:
        corners = _opposite(corners) or corners
    if kind in LABELME_POINTS and len(corners) == 2:
        (x0, y0), (x1, y1) = corners
        if kind == "circle":
            angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
            radius = math.dist((x0, y0), (x1, y1))
            circle = np.stack([y0 + radius * np.sin(angles), x0 + radius * np.cos(angles)], axis=1)
            return Polygons((circle,), label)
        if kind == "mask":
            return Pixels(
                _labelme_mask(entry, where), label, round(min(y0, y1)), round(min(x0, x1))
            )
        return _box(min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0), label, where)
    if kind in LABELME_POINTS:
        raise AnnotationError(
            f"{where}: a {kind} needs {LABELME_POINTS[kind]}, got {len(corners)} points: "
            f"{shown(str(points))[:80]}. Draw it anew, or as a polygon."
        )
    raise AnnotationError(
        f"{where}: a {shown(kind)[:80]} of {len(corners)} points marks no area; only polygon, "
        "rectangle, circle and mask do. Draw one of those, or remove it"
    )


def _opposite(corners: Sequence[tuple[float, ...]]) -> list[tuple[float, float]] | None:
    """Two opposite ones of a rectangle's four corners; None where its sides are not upright."""
    xs, ys = zip(*corners, strict=True)
    ends = list(itertools.product((min(xs), max(xs)), (min(ys), max(ys))))
    upright = all(any(math.dist(corner, end) <= ROUNDING for corner in corners) for end in ends)
    return [ends[0], ends[-1]] if upright else None


def _labelme_mask(entry: Mapping[str, Any], where: str) -> np.ndarray:
    """A mask's picture, (h, w) bool. Raises AnnotationError."""
    try:
        data = base64.b64decode(_field(entry, "mask", where), validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            marked = np.asarray(image.convert("L")) > 0
    except (*READ_ERRORS, binascii.Error) as error:
        raise AnnotationError(f"{where}: its mask cannot be read: {error}") from error
    if not marked.any():
        raise AnnotationError(f"{where}: marks no pixel; remove it")
    return marked


def _yolo(path: Path, lines: Sequence[str], folder: Path, names: Sequence[str]) -> Named:
    """One file of YOLO: class, centre x, centre y, width, height; or class and a polygon's x, y.

    Numbers are shares of the image's width and height.
    """
    found = Named(str(path), (path.relative_to(folder).with_suffix("").as_posix(),))
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not YOLO_LINE.fullmatch(line):
            raise AnnotationError(
                f"{where}: '{shown(line)[:80]}' is no line of YOLO: a class's number, then x, y, "
                "width and height, or the corners of a polygon. Put other texts elsewhere"
            )
        kind, *rest = line.split()
        shares = list(map(float, rest))
        label = names[int(kind)] if int(kind) < len(names) else kind
        if len(shares) == 5:
            raise AnnotationError(
                f"{where}: five numbers behind the class are a prediction with its confidence, "
                "or a turned box; neither is an annotation"
            )
        if not all(-SLACK <= share <= 1 + SLACK for share in shares):
            raise AnnotationError(
                f"{where}: numbers must be shares of width and height, in [0, 1], got {line[:80]}. "
                "Are they pixels?"
            )
        if len(shares) == 4:
            x, y, width, height = shares
            _box(x, y, width, height, label, where)
            found.shapes.append(ShareBox(y - height / 2, x - width / 2, height, width, label))
        else:
            found.shapes.append(Polygons((_outline(shares, where),), label, shares=True))
    return found


def _yolo_names(folder: Path) -> list[str]:
    """The classes' names, where the folder or the one above has them; else none."""
    for place in (folder, folder.parent):
        if (place / YOLO_NAMES).is_file():
            return _lines_of(place / YOLO_NAMES)
    return []
