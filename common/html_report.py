"""One HTML page of an evaluation, whole in one file: numbers, curves, and a gallery of images.

It needs no network, and nothing but a browser. Every text is escaped, and the page's own policy
lets a browser run only the script that is part of the template, so that no name of a file can be
more than a text. The pictures are small JPEGs, and as many as fit MOST_BYTES: the page of ten
thousand images can be sent by e-mail.
H W pixels of an image, h w of its picture.
"""

import base64
import hashlib
import io
import logging
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from scipy import ndimage

from common.checkpoint import save_text_atomic
from common.figures import BOX_COLOUR, as_map, as_picture, heat_colours, overlay
from common.files import escaped
from common.metrics import Interval, format_interval
from common.run_log import describe_environment

LOG = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
REPORT = "report.html"
GALLERY_IMAGES = 200
"""Images in a gallery unless another number is asked for."""
MOST_BYTES = 32 * 2**20
"""Of all pictures together, as files; as text in the page they take a third more."""
LONGEST_SIDE = 448
"""Pixels of a picture's longer side at most."""
STRIP_HEIGHT = 128
"""Pixels of each panel of a strip."""
STRIP_GAP = 8
QUALITY = 82
OUTLINE = 2
"""Width of an outline in pixels of the picture."""
UNPRINTABLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff\\ufffe\\uffff]"
)
"""Controls, marks of writing direction, halves of characters."""
LONGEST_RECORD = 60_000
"""Characters of a record that is shown."""


class Tile(NamedTuple):
    """A number that the page shows large."""

    label: str
    value: str
    note: str = ""


class Table(NamedTuple):
    """Rows of texts; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: bool = False
    """Shown when it is asked for: detail."""


class Chart(NamedTuple):
    """A plot."""

    title: str
    svg: bytes
    alt: str
    """What it shows, for those who do not see it."""


class Picture(NamedTuple):
    """A JPEG; of at most LONGEST_SIDE pixels unless it is wide."""

    caption: str
    data: bytes
    size: tuple[int, int]
    """Width, height in pixels."""
    alt: str
    outline: bytes = b""
    """The truth as a transparent PNG of the same size; the reader can hide it."""
    wide: bool = False
    """Shown below the others, over their whole width."""


class Entry(NamedTuple):
    """One image of the gallery."""

    name: str
    kind: str
    """A key of the gallery's kinds."""
    remark: str
    """Why it stands where it does, in a few words."""
    values: Mapping[str, float | None]
    """By the keys of the gallery's values."""
    wrongness: float
    """How wrong the scores are on it, in [0, 1]; the gallery begins with the largest."""
    pictures: Sequence[Picture]

    @property
    def size(self) -> int:
        """Bytes of its pictures."""
        return sum(len(picture.data) + len(picture.outline) for picture in self.pictures)


class Gallery(NamedTuple):
    """Images that the reader can sort and filter; `within_budget` says which fit."""

    entries: Sequence[Entry]
    kinds: Mapping[str, str]
    """Key -> what the reader is shown, such as "missed"."""
    values: Mapping[str, str]
    """Key -> name of a number of each image, by which the reader can sort and filter."""
    total: int
    """Images that were evaluated, of which the gallery shows the worst."""
    heat: Mapping[str, tuple[float, float]] = MappingProxyType({})
    """Kind of heatmap -> scores of the darkest and of the brightest colour, in all images."""
    note: str = ""


class Record(NamedTuple):
    """A text that is folded away until it is asked for: settings, versions, a list of names."""

    title: str
    text: str


@dataclass(frozen=True)
class Page:
    """Everything on the page, in the order in which it is shown."""

    title: str
    lead: str
    """One or two sentences: what was evaluated, and which way scores point."""
    tiles_title: str
    tiles: Sequence[Tile]
    warnings: Sequence[str]
    """What a reader must know before the numbers: images left out, thresholds chosen on them."""
    tables: Sequence[Table]
    charts: Sequence[Chart]
    gallery: Gallery
    facts: Sequence[tuple[str, str]]
    """Name and value: where the numbers come from."""
    records: Sequence[Record]


def write_page(page: Page, path: Path) -> None:
    """Writes the page; the file appears whole or not at all."""
    save_text_atomic(render(page), path)


def render(page: Page) -> str:
    """The page as text: HTML in which every value is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["data_uri"] = data_uri
    # Ours and part of the template, so not escaped; the policy names it by its hash.
    script, style = (
        Markup((TEMPLATES / name).read_text(encoding="utf-8"))
        for name in ("report.js", "report.css")
    )
    style = Markup(style.replace("HEAT_COLOURS", ", ".join(heat_colours())))
    text = environment.get_template("report.html").render(
        page=page,
        script=script,
        style=style,
        policy=f"default-src 'none'; img-src data:; style-src {source_hash(style)}; "
        f"script-src {source_hash(script)}; base-uri 'none'; form-action 'none'",
        shown=len(page.gallery.entries),
        outlined=any(p.outline for entry in page.gallery.entries for p in entry.pictures),
    )
    return printable(text)


def source_hash(text: str) -> str:
    """A script or style as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def printable(text: str) -> str:
    """The text with escapes for what UTF-8 cannot write, HTML forbids, or turns text round."""
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def data_uri(data: bytes, kind: str) -> str:
    """A file as an address that contains it. kind: jpeg, png or svg+xml."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def value_and_ends(interval: Interval) -> tuple[str, str]:
    """`0.912` and `[0.880, 0.934]` for a tile; the latter is empty where there is none."""
    value, _, ends = format_interval(interval).partition(" ")
    return value, ends


def as_svg(draw: Callable[[BinaryIO], object]) -> bytes:
    """What a function of common/figures.py draws into an open file."""
    file = io.BytesIO()
    draw(file)
    return file.getvalue()


def picture_of(
    image: np.ndarray | None,
    caption: str,
    alt: str,
    *,
    heatmap: np.ndarray | None = None,
    limits: tuple[float, float] = (0, 1),
    truth: np.ndarray | None = None,
) -> Picture:
    """A picture of an image, or of a heatmap over it, with the truth's outline.

    image: (H, W), (1, H, W) or (3, H, W) in [0, 1]; None shows the heatmap over black. heatmap:
    (H, W), in colours from limits[0] to limits[1]. truth: (H, W), non-zero = lesion. Raises
    ValueError where the sizes differ, or there is nothing to show.
    """
    if image is None:
        if heatmap is None:
            raise ValueError(f"{caption}: neither an image nor a heatmap to show")
        image = np.zeros_like(heatmap)
    picture = as_picture(image)
    size = small_size(picture.shape[1], picture.shape[0])
    if heatmap is not None:
        heat = shrunk(as_map(heatmap, picture, caption), size)
        pixels = overlay(shrunk_picture(picture, size), heat, limits)
    else:
        pixels = (shrunk_picture(picture, size) * 255).round().astype(np.uint8)
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, optimize=True)
    outline = b""
    if truth is not None and np.any(truth):
        outline = outline_png(as_map(truth, picture, caption), size)
    return Picture(caption, file.getvalue(), size, alt, outline)


def strip_picture(panels: Sequence[np.ndarray], caption: str, alt: str) -> Picture:
    """Panels side by side in one wide picture, all STRIP_HEIGHT high.

    panels: (h, w) or (h, w, 3) in [0, 1]; pixels of smaller ones are shown as squares.
    """
    drawn: list[np.ndarray] = []
    gap = np.full((STRIP_HEIGHT, STRIP_GAP, 3), 255, np.uint8)
    for panel in panels:
        pixels = (panel.clip(0, 1) * 255).round().astype(np.uint8)
        h, w = pixels.shape[:2]
        way = Image.Resampling.NEAREST if h <= STRIP_HEIGHT else Image.Resampling.BOX
        size = (max(1, round(w * STRIP_HEIGHT / h)), STRIP_HEIGHT)
        drawn += [np.asarray(Image.fromarray(pixels).convert("RGB").resize(size, way)), gap]
    whole = np.concatenate(drawn[:-1], axis=1)
    file = io.BytesIO()
    Image.fromarray(whole).save(file, "JPEG", quality=QUALITY, optimize=True)
    return Picture(caption, file.getvalue(), (whole.shape[1], whole.shape[0]), alt, wide=True)


def small_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a picture: not enlarged, and neither side above LONGEST_SIDE."""
    factor = min(1.0, LONGEST_SIDE / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def shrunk(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) as float32 (h, w), each the mean of what it stands for; size: (w, h)."""
    plane = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(plane.resize(size, Image.Resampling.BOX))


def shrunk_picture(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) or (H, W, 3) in [0, 1] as (h, w) or (3, h, w)."""
    planes = [picture] if picture.ndim == 2 else list(picture.transpose(2, 0, 1))
    small = np.stack([shrunk(plane, size) for plane in planes]).clip(0, 1)
    return small[0] if len(small) == 1 else small


def outline_png(truth: np.ndarray, size: tuple[int, int]) -> bytes:
    """The border of what is non-zero in (H, W), round it and not on it, as a transparent PNG."""
    inside = shrunk(np.asarray(truth) != 0, size) > 0  # a lesion of one pixel stays one
    edge = ndimage.binary_dilation(inside, np.ones((3, 3)), iterations=OUTLINE) & ~inside
    drawn = Image.fromarray(edge.astype(np.uint8), mode="P")
    colour = bytes.fromhex(BOX_COLOUR.removeprefix("#"))
    drawn.putpalette(b"\0\0\0" + colour)
    file = io.BytesIO()
    drawn.save(file, "PNG", transparency=0, optimize=True)
    return file.getvalue()


def within_budget(entries: Iterable[Entry], most_bytes: int = MOST_BYTES) -> list[Entry]:
    """The first entries whose pictures take no more bytes together; logs where that ends."""
    taken: list[Entry] = []
    left = most_bytes
    for entry in entries:
        left -= entry.size
        if left < 0:
            LOG.warning(
                "report.html: the pictures of %d images take %d MiB, so no more are shown",
                len(taken), most_bytes // 2**20,
            )  # fmt: skip
            break
        taken.append(entry)
    return taken


def wrongness(anomalous: Sequence[bool], scores: Sequence[float]) -> np.ndarray:
    """How wrong an image's score is beside those of the other kind: (N,) in [0, 1].

    scores: larger = more anomalous. For an anomalous image the share of normal ones that score as
    high or higher, for a normal one the share of anomalous ones that score as low or lower; 0 for
    all where there is only one kind.
    """
    labels, values = np.asarray(anomalous, dtype=bool), np.asarray(scores, dtype=float)
    normal, lesion = np.sort(values[~labels]), np.sort(values[labels])
    if not (normal.size and lesion.size):
        return np.zeros(values.size)
    as_high = 1 - np.searchsorted(normal, values, side="left") / normal.size
    as_low = np.searchsorted(lesion, values, side="right") / lesion.size
    return np.where(labels, as_high, as_low)


def common_facts(command: Sequence[str]) -> list[tuple[str, str]]:
    """Command, code and versions of this evaluation, as rows of the provenance."""
    environment = describe_environment()
    commit = environment["git_commit"] or "not known (no git clone)"
    if environment["git_dirty"]:
        commit += ", with uncommitted changes"
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", "torch", "numpy"))
    return [
        ("evaluated", str(environment["started"])),
        ("command", shlex.join(map(str, command))),
        ("code", commit),
        ("versions", f"{versions}, {environment['platform']}"),
    ]


def record(title: str, text: Any) -> Record:
    """A record of which at most LONGEST_RECORD characters are shown, and which says so."""
    text = str(text)
    if len(text) > LONGEST_RECORD:
        text = f"{text[:LONGEST_RECORD]}\n… {len(text) - LONGEST_RECORD} more characters"
    return Record(title, text)


def named(names: Iterable[str], most: int = 500) -> str:
    """Names, one in a line, and how many more there are."""
    every = list(map(escaped, names))
    more = [f"… and {len(every) - most} more"] if len(every) > most else []
    return "\n".join([*every[:most], *more])
