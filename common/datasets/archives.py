"""THE table of archives: how each is laid out as downloaded, and which picture is what.

A reader finds an archive's pictures wherever below the given folder it was unpacked, and says of
each its class, its part where the archive tells, its patient where names tell, and its lesions.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.datasets import (
    DATASETS,
    MEDMNIST_SIZES,
    NO_REMEDIES,
    DatasetError,
    dataset_row,
    is_dataset,
    read_medmnist,
)
from common.datasets.bcs_dbt import read_bcs_dbt
from common.datasets.lesion_archives import (
    LayoutError,
    by_name,
    csv_rows,
    files_like,
    images_below,
    read_busi,
    read_defects,
    read_idrid,
    read_idrid_grading,
    read_mias,
)
from common.datasets.pictures import Part, Picture
from common.image_folders import find_images

LOG = logging.getLogger(__name__)
DEEPEST = 4
"""Folders below the given one in which an archive's own folder is looked for."""
OCT_PATIENT = r"[A-Z]+-(\d+)-\d+"
XRAY_PATIENT = r"((?:NORMAL2-)?IM-\d+|person\d+_(?:bacteria|virus)).*"
"""Persons are numbered anew for bacterial and for viral pneumonia."""
KVASIR_NORMAL = ("normal-cecum", "normal-pylorus", "normal-z-line")


@dataclass(frozen=True)
class Archive:
    """One archive that `python -m common.datasets prepare` takes."""

    name: str
    about: str
    obtain: str
    """Where to get it."""
    layout: str
    """What must lie somewhere below its folder, for messages and the list."""
    read: Callable[[Path], list[Picture]]
    normal: str
    """The class that is trained on."""
    marks: tuple[str, ...] = ()
    """Patterns of paths any of which shows that a folder holds the archive unsorted."""

    @property
    def dataset(self) -> str:
        """Its name as DIA's --dataset: that of the archive where the table has it, or folder."""
        return self.name if is_dataset(self.name) else "folder"

    def pictures(self, source: Path) -> list[Picture]:
        """The archive's pictures. Raises DatasetError where the folder is not this archive."""
        if not source.is_dir():
            raise DatasetError(f"{source} is no folder. Pass that of the unpacked {self.name}.")
        try:
            return self.read(source)
        except LayoutError as error:
            raise DatasetError(
                f"{source}: {error}. Expected {self.name} as downloaded, {self.layout}. Get it "
                f"from {self.obtain} and unpack it."
            ) from error


def is_unsorted(dataset: str, folder: Path) -> bool:
    """Whether a folder holds the archive of a data set as downloaded; looks at few names only."""
    archive = ARCHIVES.get(dataset)
    return archive is not None and any(any(folder.glob(mark)) for mark in archive.marks)


def _read_aptos(source: Path) -> list[Picture]:
    """APTOS 2019: train.csv has the grades; the unlabelled test images are not used."""
    lists = files_like(source, "train.csv")
    if not lists:
        raise LayoutError("no train.csv below it")
    images = by_name(images_below(lists[0].parent / "train_images"))
    rows = list(csv_rows(lists[0], ("id_code", "diagnosis")))
    missing = [row["id_code"] for row in rows if row["id_code"] not in images]
    if missing:
        raise LayoutError(
            f"train_images lacks {len(missing)} images of train.csv, {missing[0]} first"
        )
    return [Picture(images[row["id_code"]], row["diagnosis"], None, "") for row in rows]


def _read_official(source: Path, classes: Sequence[str], patient: str) -> list[Picture]:
    """An archive of train/<class>, test/<class> and perhaps val/<class>; the last is left out.

    Of the copies that one download may hold, the least deep is taken. patient: pattern of a file's
    name without suffix, whose group is the patient. The first class is the normal one.
    """
    roots = [
        root
        for root in _folders(source)
        if (root / "train" / classes[0]).is_dir()
        and all((root / "test" / name).is_dir() for name in classes)
    ]
    if not roots:
        raise LayoutError(f"no folder with train/ and test/ of {', '.join(classes)}")
    if roots[1:]:
        LOG.warning("%s is taken; passed over: %s", roots[0], ", ".join(map(str, roots[1:])))
    pictures = []
    for part in ("train", "test", "val"):
        for folder in (roots[0] / part / name for name in classes):
            for file in images_below(folder) if folder.is_dir() else ():
                found = re.fullmatch(patient, file.stem)
                of: Part = part if part != "val" else "left out"
                why = "official part" if part != "val" else "official validation part"
                pictures.append(Picture(file, folder.name, of, why, found[1] if found else ""))
    return pictures


def _folders(source: Path) -> list[Path]:
    """The folder and those below it, hidden ones aside, the least deep first."""
    found = [source]
    for folder in found:
        if len(folder.parts) - len(source.parts) < DEEPEST:
            inner = (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
            found += sorted(p for p in inner if p.name != "__MACOSX")
    return found


def _read_classes(source: Path, classes: dict[str, str], others: str = "") -> list[Picture]:
    """An archive of one folder for each class, not divided into parts.

    classes: folder -> class in the prepared tree. others: why further folders are left out.
    """
    roots = [root for root in _folders(source) if all((root / name).is_dir() for name in classes)]
    if not roots:
        raise LayoutError(f"no folder with {', '.join(classes)}")
    pictures = []
    for folder in sorted(p for p in roots[0].iterdir() if p.is_dir()):
        if folder.name in classes:
            for file in images_below(folder):
                why = "" if classes[folder.name] == folder.name else f"of {folder.name}"
                pictures.append(Picture(file, classes[folder.name], None, why))
        elif others:
            for file in find_images(folder, recursive=True).files:
                pictures.append(Picture(file, folder.name, "left out", f"{folder.name}: {others}"))
    return pictures


def _read_medmnist(source: Path, name: str) -> list[Picture]:
    """The images of a MedMNIST file, which is linked as a whole; val is left out."""
    row = dataset_row(name)
    files = files_like(source, f"{name}.npz")
    if not files:
        raise LayoutError(f"no {name}.npz below it")
    pictures = []
    for part in ("train", "test"):
        images, labels = read_medmnist(row, files[0].parent, part, NO_REMEDIES)
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()
            kind = (row.classes or ())[label]
            member = f"{part}/{number}"
            pictures.append(
                Picture(files[0], kind, part, "official part", member=member, digest=digest)
            )
    return pictures


def _of_row(name: str, about: str, layout: str, read: Callable[[Path], list[Picture]],
            normal: str, *marks: str) -> Archive:  # fmt: skip
    """An archive that the table of data sets has a row for."""
    return Archive(name, about, DATASETS[name].obtain, layout, read, normal, marks)


def _medmnist(name: str) -> Archive:
    row = dataset_row(name)
    about = f"MedMNIST, {row.size} x {row.size}: {' / '.join(row.classes or ())}"
    normal = (row.classes or ())[row.normal]
    read = partial(_read_medmnist, name=name)
    return Archive(name, about, row.obtain, f"the file {name}.npz", read, normal)


_IDRID = "doi:10.21227/H25W98 (IEEE DataPort)"
_ROWS = (
    Archive(
        "bcs-dbt",
        "breast tomosynthesis, boxes; what PICARD was published on",
        "doi:10.7937/E4WT-CD02 (TCIA)",
        "BCS-DBT-{file-paths,labels,boxes}-{train,validation,test}*.csv beside the retriever's "
        "folders of DICOM files",
        read_bcs_dbt,
        "normal",
    ),
    Archive(
        "mias",
        "mini-MIAS mammograms, circles",
        "http://peipa.essex.ac.uk/info/mias.html",
        "Info.txt and mdb001.pgm … mdb322.pgm (or .png, of any size)",
        read_mias,
        "normal",
    ),
    Archive(
        "idrid",
        "retinal photographs, masks of lesions",
        _IDRID,
        "the folders 'A. Segmentation' and 'B. Disease Grading'",
        read_idrid,
        "normal",
    ),
    Archive(
        "idrid-grading",
        "retinal photographs, grades 0 to 4",
        _IDRID,
        "the folder 'B. Disease Grading'",
        read_idrid_grading,
        "0",
    ),
    Archive(
        "busi",
        "breast ultrasound, masks",
        "https://scholar.cu.edu.eg/?q=afahmy/pages/dataset",
        "Dataset_BUSI_with_GT/{benign,malignant,normal}/benign (1).png, benign (1)_mask.png …",
        read_busi,
        "normal",
    ),
    Archive(
        "bmad",
        "one set of BMAD or MVTec AD, masks where it has any",
        "https://github.com/DorisBao/BMAD",
        "train/good and test/<class>, with ground_truth/<class> or test/<class>/label",
        read_defects,
        "good",
    ),
    _of_row(
        "aptos",
        "retinal photographs, grades 0 to 4",
        "train.csv and train_images/",
        _read_aptos,
        "0",
        *("train_images", "*/train_images"),
    ),
    _of_row(
        "retina",
        "OCT of the retina, Kermany 2018 (OCT2017)",
        "'OCT2017 ' with train/ and test/ of CNV, DME, DRUSEN, NORMAL",
        partial(_read_official, classes=DATASETS["retina"].classes, patient=OCT_PATIENT),
        "NORMAL",
        *("OCT2017 ", "*/OCT2017 ", "train/CNV"),
    ),
    _of_row(
        "chestxray",
        "chest radiographs of children, Kermany 2018",
        "chest_xray with train/ and test/ of NORMAL, PNEUMONIA",
        partial(_read_official, classes=DATASETS["chestxray"].classes, patient=XRAY_PATIENT),
        "NORMAL",
        *("train/PNEUMONIA", "*/*/train/PNEUMONIA"),
    ),
    _of_row(
        "covid",
        "chest CT slices, SARS-COV-2",
        "the folders COVID/ and non-COVID/",
        partial(_read_classes, classes={"COVID": "COVID", "non-COVID": "non-COVID"}),
        "non-COVID",
        *("non-COVID", "*/non-COVID"),
    ),
    _of_row(
        "kvasir",
        "endoscopy, Kvasir v2: its three normal classes and polyps",
        f"kvasir-dataset-v2/ with {', '.join(KVASIR_NORMAL)}, polyps and others",
        partial(
            _read_classes,
            classes={**dict.fromkeys(KVASIR_NORMAL, "normal"), "polyps": "polyps"},
            others="neither normal nor polyps",
        ),
        "normal",
        *("normal-cecum", "*/normal-cecum"),
    ),
    *(
        _medmnist(f"{row.name}{size}")
        for row in DATASETS.values()
        if row.source == "medmnist"
        for size in ("", *(f"_{side}" for side in MEDMNIST_SIZES))
    ),
)
ARCHIVES: dict[str, Archive] = {archive.name: archive for archive in _ROWS}
