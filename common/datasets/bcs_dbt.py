"""BCS-DBT, the tomosynthesis archive that PICARD was published on: which view is what, and boxes.

Its boxes refer to images that its own tools may have turned; here they are in stored pixels.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from common.datasets import DatasetError
from common.datasets.lesion_archives import LayoutError, csv_rows, files_like
from common.datasets.pictures import ArchiveBox, Part, Picture
from common.image_files import READ_ERRORS
from common.image_folders import shown_names

LOG = logging.getLogger(__name__)
LABELS = ("Normal", "Actionable", "Benign", "Cancer")
KEYS = ("PatientID", "StudyUID", "View")
PARTS = ("train", "validation", "test")
ViewKey = tuple[str, ...]


def read_bcs_dbt(source: Path) -> list[Picture]:
    """BCS-DBT: normal views of the training part to train on, of the test part to test.

    Tested are also views with boxes. Views without boxes that are not normal are left out, and so
    are normal views of patients who have other ones in training. Without the CSV files of the test
    part, that of training is divided by patient.
    """
    tables = {part: _tables(source, part) for part in PARTS}
    if not tables["train"]["file-paths"] or not tables["train"]["labels"]:
        raise LayoutError("no BCS-DBT-file-paths-train*.csv and BCS-DBT-labels-train*.csv below it")
    pictures: list[Picture] = []
    absent: list[str] = []
    folders = sorted({p.parent for p in source.rglob("Breast-Cancer-Screening-DBT")})
    whole = {part for part, files in tables.items() if files["file-paths"] and files["labels"]}
    for part, files in tables.items():
        if part not in whole:
            LOG.warning("no BCS-DBT-{file-paths,labels}-%s*.csv: that part is passed over", part)
            continue
        labels = {_key(row): _label(row, files["labels"])
                  for row in csv_rows(files["labels"], (*KEYS, *LABELS))}  # fmt: skip
        boxes = _boxes(files["boxes"])
        ill = {key[0] for key, label in labels.items() if label != "Normal"}
        divided = part == "train" and "test" not in whole
        columns = (*KEYS, "descriptive_path", "classic_path")
        for row in csv_rows(files["file-paths"], columns):
            key = _key(row)
            file = _file(row, [source, *folders])
            if file is None:
                absent.append(row["descriptive_path"])
                continue
            label = labels.get(key)
            place = _part(part, divided, label, key in boxes, key[0] in ill)
            pictures.append(_picture(file, key, label or "unknown", place, boxes.get(key, ())))
    if absent:
        LOG.warning("%d files of the CSV files are not there: %s", len(absent), shown_names(absent))
    if not pictures:
        raise LayoutError(f"none of the {len(absent)} files that its CSV files name")
    return pictures


def _tables(source: Path, part: str) -> dict[str, Path | None]:
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


def _label(row: dict[str, str], table: Path) -> str:
    """The one of LABELS that a row has 1 for."""
    found = [label for label in LABELS if row[label] == "1"]
    if len(found) != 1:
        raise DatasetError(
            f"{table}: {' '.join(_key(row))} must have a 1 in one of {', '.join(LABELS)}, it "
            f"has {', '.join(row[label] for label in LABELS)}. Download the file anew."
        )
    return found[0]


def _boxes(table: Path | None) -> dict[ViewKey, list[dict[str, str]]]:
    """Rows of the boxes' file, by view; none without the file."""
    boxes: dict[ViewKey, list[dict[str, str]]] = defaultdict(list)
    columns = (*KEYS, "Slice", "X", "Y", "Width", "Height", "Class", "VolumeSlices")
    for row in () if table is None else csv_rows(table, columns):
        boxes[_key(row)].append(row)
    return boxes


def _key(row: dict[str, str]) -> ViewKey:
    return tuple(row[name] for name in KEYS)


def _file(row: dict[str, str], folders: Sequence[Path]) -> Path | None:
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


def _part(
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


def _picture(
    file: Path,
    key: ViewKey,
    label: str,
    place: tuple[Part | None, str],
    rows: Sequence[dict[str, str]],
) -> Picture:
    part, why = place
    boxes = ()
    if part == "test" and rows:
        found = [_box(file, key[2], row) for row in rows]
        boxes = tuple(box for box, _ in found)
        if any(turned for _, turned in found):
            why += "; boxes turned by 180°, as the file is"
    name = f"{'_'.join(key)}{file.suffix or '.dcm'}"
    return Picture(file, label.lower(), part, why, key[0], name, boxes=boxes)


def _box(file: Path, view: str, row: dict[str, str]) -> tuple[ArchiveBox, bool]:
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
