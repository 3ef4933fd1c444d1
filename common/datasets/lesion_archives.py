"""Readers of the archives with circles or masks: which picture is what, and where its lesions are.

Coordinates are in stored pixels, from the top left, whatever the archive counts from.
"""

import csv
import io
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from common.datasets import DatasetError
from common.datasets.pictures import ArchiveBox, Circle, Part, Picture
from common.files import open_regular, read_regular
from common.image_files import PILLOW_FORMATS, READ_ERRORS
from common.image_folders import find_images, shown_names

LOG = logging.getLogger(__name__)
MIAS_SIDE = 1024
"""Pixels of the film that Info.txt counts in; copies of another size are scaled."""
MIAS_LINE = re.compile(r"(mdb(\d{3}))\s+[FGD]\s+([A-Z]{4})(?:\s+[BM]\s+(\d+)\s+(\d+)\s+(\d+))?\b.*")
IDRID_LESIONS = ("MA", "HE", "EX", "SE")
"""Microaneurysms, haemorrhages, hard and soft exudates; OD, the optic disc, is none."""
IDRID_TWIN = "IDRiD_118"
"""Training photograph of grade 0 that is test photograph IDRiD_064, there of grade 3."""
BUSI_NAME = re.compile(r"((benign|malignant|normal) \(\d+\))(_mask(?:_\d+)?)?")


class LayoutError(Exception):
    """A folder is not laid out as its archive; the message says how."""


def images_below(folder: Path) -> list[Path]:
    """All images below a folder, sorted; LayoutError without any. Logs what is passed over."""
    found = find_images(folder, recursive=True)
    if not found.files:
        raise LayoutError(f"no image below it. {found.summary()}".strip())
    found.report()
    return found.files


def files_like(folder: Path, pattern: str) -> list[Path]:
    """Files below a folder whose name fits, the least deep first; hidden ones are passed over."""
    found = [p for p in folder.rglob(pattern) if p.is_file() and not p.name.startswith(".")]
    return sorted(found, key=lambda path: (len(path.parts), path))


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of an archive's CSV file with any of these columns filled, blanks stripped.

    Raises DatasetError where the file lacks a column.
    """
    binary = open_regular(path)
    with io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(line.replace("\0", "") for line in file)
        names = {(name or "").strip(): name for name in reader.fieldnames or ()}
        missing = [column for column in columns if column not in names]
        if missing:
            raise DatasetError(
                f"{path} lacks the column {', '.join(missing)}; it has {', '.join(names)}. Is it "
                "the file as downloaded?"
            )
        for row in reader:
            values = {column: (row[names[column]] or "").strip() for column in columns}
            if any(values.values()):
                yield values


def by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Files by their name without suffix. Raises LayoutError where two have one."""
    found: dict[str, Path] = {}
    for file in files:
        other = found.setdefault(file.stem, file)
        if other != file:
            raise LayoutError(f"{other} and {file} have one name; pass the folder of one copy")
    return found


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) of a picture, from its header. Raises DatasetError."""
    try:
        with open_regular(path) as file, Image.open(file, formats=PILLOW_FORMATS) as image:
            return image.height, image.width
    except READ_ERRORS as error:
        raise DatasetError(f"{path} cannot be read: {error}. Download it anew.") from error


def read_mias(source: Path) -> list[Picture]:
    """mini-MIAS: circles counted from the bottom left; films 2k - 1 and 2k are one woman's."""
    lists = files_like(source, "[Ii]nfo.txt")
    if not lists:
        raise LayoutError("no Info.txt below it")
    films = by_name([p for p in images_below(source) if re.fullmatch(r"mdb\d{3}", p.stem)])
    circles: dict[str, list[tuple[str, Circle]]] = defaultdict(list)
    listed: dict[str, str] = {}
    for line in read_regular(lists[0]).decode("latin-1").splitlines():
        if found := MIAS_LINE.fullmatch(line.strip()):
            film, _, kind, x, y, radius = found.groups()
            listed[film] = kind
            if radius:
                row = MIAS_SIDE - 1 - int(y)
                circles[film].append((kind, Circle(row, int(x), int(radius))))
    missing = sorted(set(listed) - set(films))
    if len(missing) == len(listed):
        raise LayoutError(f"none of the {len(listed)} films of {lists[0]}")
    if missing:
        LOG.warning("%d films of %s are not there: %s", len(missing), lists[0],
                    shown_names(missing))  # fmt: skip
    return [
        _film(films[film], kind, circles[film]) for film, kind in listed.items() if film in films
    ]


def _film(file: Path, kind: str, circles: Sequence[tuple[str, Circle]]) -> Picture:
    """A film of mini-MIAS, its circles scaled to the file's size."""
    woman = f"woman {(int(file.stem[3:]) + 1) // 2:03d}"
    if kind == "NORM":
        return Picture(file, "normal", None, "", woman)
    if not circles:
        return Picture(file, "abnormal", "left out", f"{kind} without a circle in Info.txt", woman)
    size = size_of(file)
    if size[0] != size[1]:
        raise DatasetError(
            f"{file} is {size} pixels (height, width); films of mini-MIAS are square, and Info.txt "
            "counts in their pixels. Get films that nobody has cropped."
        )
    scale = size[0] / MIAS_SIDE
    boxes, scaled = [], []
    for label, (row, column, radius) in circles:
        top, left, side = row - radius, column - radius, 2 * radius + 1
        boxes.append(ArchiveBox(top * scale, left * scale, side * scale, side * scale, label))
        centre = ((row + 0.5) * scale - 0.5, (column + 0.5) * scale - 0.5)
        scaled.append(Circle(*centre, radius * scale))
    return Picture(
        file, "abnormal", "test", f"circles in Info.txt: {len(circles)}", woman,
        boxes=tuple(boxes), circles=tuple(scaled), size=size,
    )  # fmt: skip


def read_busi(source: Path) -> list[Picture]:
    """BUSI: the masks of an image, `name (3)_mask.png` and `name (3)_mask_1.png`, are united."""
    images: dict[str, Path] = {}
    masks: dict[str, list[Path]] = defaultdict(list)
    named = [(BUSI_NAME.fullmatch(p.stem), p) for p in images_below(source)]
    for found, path in named:
        if found and found[3]:
            masks[found[1]].append(path)
        elif found:
            other = images.setdefault(found[1], path)
            if other != path:
                raise LayoutError(f"{other} and {path} have one name; pass the folder of one copy")
    if not images:
        raise LayoutError("no image called like 'benign (1).png'")
    pictures = []
    for name, path in images.items():
        label = name.partition(" ")[0]
        if label == "normal":  # its masks are black
            pictures.append(Picture(path, label, None, ""))
        elif masks[name]:
            pictures.append(Picture(path, label, None, "", masks=tuple(masks[name])))
        else:
            pictures.append(Picture(path, label, "left out", "it has no mask"))
    return pictures


def read_idrid(source: Path) -> list[Picture]:
    """IDRiD for pixels: grade 0 to train on and to test, all photographs with masks to test.

    Those of grades 1 to 4 without masks are left out, for they would count as normal.
    """
    pictures = _reduced_idrid(source)
    if pictures:
        return pictures
    for picture in read_idrid_grading(source):
        if picture.label != "0":
            why = f"grade {picture.label} without masks"
            pictures.append(Picture(picture.file, "lesions", "left out", why))
        else:
            part, why = picture.part, picture.why
            pictures.append(Picture(picture.file, "normal", part, why))
    photographs = [p for p in files_like(source, "IDRiD_??.jpg") if "Original Images" in str(p)]
    if not photographs:
        raise LayoutError("no photographs IDRiD_01.jpg … of A. Segmentation below it")
    masks = {path.stem: path for path in files_like(source, "IDRiD_??_??.tif")}
    for file in photographs:
        names = [f"{file.stem}_{kind}" for kind in IDRID_LESIONS]
        own = tuple(masks[name] for name in names if name in masks)
        if own:
            why = f"masks of {len(own)} kinds of lesion; nothing is trained on it"
            pictures.append(Picture(file, "lesions", "test", why, masks=own))
        else:
            pictures.append(Picture(file, "lesions", "left out", "it has no mask"))
    return pictures


def _reduced_idrid(source: Path) -> list[Picture]:
    """The photographs of a reduced copy with the folders normal_train, lesion_images and so on."""
    folders = [p for p in source.rglob("normal_train") if (p.parent / "lesion_images").is_dir()]
    if not folders:
        return []
    root = folders[0].parent
    pictures = []
    for part in ("train", "test"):
        for file in images_below(root / f"normal_{part}"):
            pictures.append(_idrid_photograph(file, "normal", part, f"grade 0, {part}ing set"))
    masks = by_name(images_below(root / "masks_any"))
    for file in images_below(root / "lesion_images"):
        if file.stem in masks:
            own, why = (masks[file.stem],), "mask of any lesion; nothing is trained on it"
            pictures.append(Picture(file, "lesions", "test", why, masks=own))
        else:
            pictures.append(Picture(file, "lesions", "left out", "it has no mask"))
    return pictures


def _idrid_photograph(file: Path, label: str, part: Part, why: str) -> Picture:
    if part == "train" and file.stem == IDRID_TWIN:
        part, why = "left out", "known to be test photograph IDRiD_064, there of grade 3"
    return Picture(file, label, part, why)


def read_idrid_grading(source: Path) -> list[Picture]:
    """IDRiD for images: the grades 0 to 4 of the official training and test sets."""
    pictures = []
    for part, which, folder in (
        ("train", "Training", "a. Training Set"),
        ("test", "Testing", "b. Testing Set"),
    ):
        lists = files_like(source, f"*Disease Grading_{which} Labels.csv")
        if not lists:
            raise LayoutError(f"no '… IDRiD_Disease Grading_{which} Labels.csv' below it")
        photographs = by_name([p for p in files_like(source, "IDRiD_???.jpg")
                               if p.parent.name == folder and "Grading" in str(p)])  # fmt: skip
        for row in csv_rows(lists[0], ("Image name", "Retinopathy grade")):
            name, grade = row["Image name"], row["Retinopathy grade"]
            if name not in photographs:
                raise LayoutError(f"{folder} lacks {name}.jpg, which {lists[0].name} lists")
            why = f"grade {grade}, official {which.lower()} set"
            pictures.append(_idrid_photograph(photographs[name], grade, part, why))
    return pictures


def read_defects(source: Path) -> list[Picture]:
    """MVTec and BMAD: train/good, test/<defect>, ground_truth/<defect> or test/<defect>/label."""
    trains = (source / "train", *sorted(source.glob("*/train")))
    roots = [path.parent for path in trains if (path / "good").is_dir()]
    if not roots:
        raise LayoutError("no folder train/good in it")
    if len(roots) > 1:
        names = shown_names([root.name for root in roots])
        raise LayoutError(f"it holds {len(roots)} sets ({names}); pass the folder of one")
    root = roots[0]
    masks: dict[tuple[str, str], Path] = {}
    images: list[tuple[Part, str, Path]] = []
    astray: list[Picture] = []
    for file in images_below(root):
        folders = file.relative_to(root).parts[:-1]
        if len(folders) < 2:
            astray.append(Picture(file, "", "left out", "in no class's folder"))
            continue
        part, label, *between = folders
        if part == "ground_truth":
            masks[label, re.sub(r"_mask$", "", file.stem)] = file
        elif between and between[0] in ("label", "anomaly_mask"):
            if part == "test":
                masks[label, file.stem] = file
        else:
            images.append((part if part in ("train", "test") else "left out", label, file))
    some = any((label, file.stem) in masks for _, label, file in images if label != "good")
    pictures = []
    for part, label, file in images:
        mask = masks.get((label, file.stem)) if label != "good" and part == "test" else None
        why = "the archive's own part" if part != "left out" else "the archive's validation part"
        if some and part == "test" and label != "good" and mask is None:
            part, why = "left out", "it has no mask, others have"
        own = () if mask is None else (mask,)
        pictures.append(Picture(file, label, part, why, masks=own))
    return pictures + astray
