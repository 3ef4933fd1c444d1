"""Readers of the archives that say where lesions are: which picture is what, boxes, circles, masks.

Coordinates are in stored pixels, from the top left, whatever the archive counts from.
"""

import csv
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from common.datasets import DatasetError
from common.datasets.preparing import ArchiveBox, Circle, Part, Picture
from common.image_files import READ_ERRORS
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
DBT_LABELS = ("Normal", "Actionable", "Benign", "Cancer")
DBT_KEYS = ("PatientID", "StudyUID", "View")
DBT_PARTS = ("train", "validation", "test")
DbtKey = tuple[str, ...]


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
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
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
        with Image.open(path) as image:
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
    for line in lists[0].read_text(encoding="latin-1").splitlines():
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
    for file in images_below(root):
        part, label, *between = file.relative_to(root).parts[:-1]
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
    return pictures


def read_bcs_dbt(source: Path) -> list[Picture]:
    """BCS-DBT: normal views of the training part to train on, of the test part to test.

    Tested are also views with boxes. Views without boxes that are not normal are left out, and so
    are normal views of patients who have other ones in training. Without the CSV files of the test
    part, that of training is divided by patient.
    """
    tables = {part: _dbt_tables(source, part) for part in DBT_PARTS}
    if not tables["train"]["file-paths"] or not tables["train"]["labels"]:
        raise LayoutError("no BCS-DBT-file-paths-train*.csv and BCS-DBT-labels-train*.csv below it")
    pictures: list[Picture] = []
    absent: list[str] = []
    folders = sorted({p.parent for p in source.rglob("Breast-Cancer-Screening-DBT")})
    for part, files in tables.items():
        if files["file-paths"] is None or files["labels"] is None:
            continue
        labels = {_key(row): _dbt_label(row, files["labels"])
                  for row in csv_rows(files["labels"], (*DBT_KEYS, *DBT_LABELS))}  # fmt: skip
        boxes = _dbt_boxes(files["boxes"])
        ill = {key[0] for key, label in labels.items() if label != "Normal"}
        divided = part == "train" and tables["test"]["file-paths"] is None
        columns = (*DBT_KEYS, "descriptive_path", "classic_path")
        for row in csv_rows(files["file-paths"], columns):
            key = _key(row)
            file = _dbt_file(row, [source, *folders])
            if file is None:
                absent.append(row["descriptive_path"])
                continue
            place = _dbt_part(part, divided, labels.get(key), key in boxes, key[0] in ill)
            pictures.append(_dbt_picture(file, key, labels.get(key, "unknown"), place,
                                         boxes.get(key, ())))  # fmt: skip
    if absent:
        LOG.warning("%d files of the CSV files are not there: %s", len(absent), shown_names(absent))
    if not pictures:
        raise LayoutError(f"none of the {len(absent)} files that its CSV files name")
    return pictures


def _dbt_tables(source: Path, part: str) -> dict[str, Path | None]:
    """The part's CSV files by what they hold; their names end in versions (-v2, -PHASE-2-…)."""
    tables: dict[str, Path | None] = {}
    for what in ("file-paths", "labels", "boxes"):
        found = files_like(source, f"BCS-DBT-{what}-{part}*.csv")
        if len(found) > 1:
            raise LayoutError(
                f"{len(found)} files BCS-DBT-{what}-{part}*.csv; keep the newest "
                f"({shown_names([str(path) for path in found])})"
            )
        tables[what] = found[0] if found else None
    return tables


def _dbt_label(row: dict[str, str], table: Path) -> str:
    """The one of DBT_LABELS that a row has 1 for."""
    found = [label for label in DBT_LABELS if row[label] == "1"]
    if len(found) != 1:
        raise DatasetError(
            f"{table}: {' '.join(_key(row))} must have a 1 in one of {', '.join(DBT_LABELS)}, it "
            f"has {', '.join(row[label] for label in DBT_LABELS)}. Download the file anew."
        )
    return found[0]


def _dbt_boxes(table: Path | None) -> dict[DbtKey, list[dict[str, str]]]:
    """Rows of the boxes' file, by view; none without the file."""
    boxes: dict[DbtKey, list[dict[str, str]]] = defaultdict(list)
    columns = (*DBT_KEYS, "Slice", "X", "Y", "Width", "Height", "Class", "VolumeSlices")
    for row in () if table is None else csv_rows(table, columns):
        boxes[_key(row)].append(row)
    return boxes


def _key(row: dict[str, str]) -> DbtKey:
    return tuple(row[name] for name in DBT_KEYS)


def _dbt_file(row: dict[str, str], folders: Sequence[Path]) -> Path | None:
    """A view's file: where the CSV file says, or where other versions of the retriever put it.

    Those call the series' folder 21990.000000-NA-76228 instead of 21990.000000-76228, or give the
    only file in the classic folder another name.
    """
    described = row["descriptive_path"]
    newer = re.sub(r"(/\d+\.\d+-)(?!NA-)", r"\1NA-", described)
    for folder in folders:
        for name in (described, newer, row["classic_path"]):
            if name and (folder / name).is_file():
                return folder / name
        only = list((folder / row["classic_path"]).parent.glob("*.dcm"))
        if row["classic_path"] and len(only) == 1:
            return only[0]
    return None


def _dbt_part(
    part: str, divided: bool, label: str | None, boxed: bool, ill: bool
) -> tuple[Part | None, str]:
    """Where a view belongs, and why; the part is None where it is to be drawn.

    divided: training is all there is. ill: the patient has views that are not normal.
    """
    of = f"{part} part"
    if label is None:
        return "left out", f"not among the labels of the {of}"
    if part == "validation":
        return "left out", f"{of}, for you to choose settings on"
    if label == "Actionable":
        return "left out", "actionable: neither normal nor annotated"
    if label == "Normal":
        if divided:
            return None, f"normal view of the {of}, which is all there is"
        if part == "train" and ill:
            return "left out", "normal view of a patient with other views"
        return part, f"normal view, {of}"
    if not boxed:
        return "left out", "biopsied, but without a box"
    if part == "train" and not divided:
        return "left out", f"biopsied, {of}"
    return "test", f"biopsied, with boxes, {of}"


def _dbt_picture(
    file: Path,
    key: DbtKey,
    label: str,
    place: tuple[Part | None, str],
    rows: Sequence[dict[str, str]],
) -> Picture:
    part, why = place
    boxes = ()
    if part == "test" and rows:
        found = [_dbt_box(file, key[2], row) for row in rows]
        boxes = tuple(box for box, _ in found)
        if any(turned for _, turned in found):
            why += "; boxes turned by 180°, as the file is"
    name = f"{'_'.join(key)}{file.suffix or '.dcm'}"
    return Picture(file, label.lower(), part, why, key[0], name, boxes=boxes)


def _dbt_box(file: Path, view: str, row: dict[str, str]) -> tuple[ArchiveBox, bool]:
    """A box in stored pixels, and whether it had to be turned.

    The archive's tools (duke_dbt_data.py, dcmread_image) turn a slice by 180° where its brighter
    edge is not on the side of the view's name, and boxes refer to the turned slice. The file is
    linked as it is, so the box is turned back.
    """
    from pydicom.pixels import pixel_array

    names = ("Slice", "X", "Y", "Width", "Height", "VolumeSlices")
    try:
        number, left, top, width, height, total = (int(row[name]) for name in names)
    except ValueError:
        found = ", ".join(f"{name} '{row[name]}'" for name in names)
        raise DatasetError(
            f"a box of {' '.join(_key(row))} must have whole numbers, it has {found}. Download the "
            "file of boxes anew."
        ) from None
    try:
        pixels = pixel_array(file, index=number)  # (H, W)
    except (*READ_ERRORS, ImportError) as error:
        raise DatasetError(
            f"slice {number} of {file} cannot be read: {' '.join(str(error).split())}. Download it "
            'anew; JPEG 2000 needs a decoder: pip install "pylibjpeg[openjpeg]"'
        ) from error
    side = "R" if pixels[:, 0].sum() < pixels[:, -1].sum() else "L"
    turned = side != view[0].upper()
    if turned:
        top, left = pixels.shape[0] - top - height, pixels.shape[1] - left - width
    return ArchiveBox(top, left, height, width, row["Class"], number, total), turned
