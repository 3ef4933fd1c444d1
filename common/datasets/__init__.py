"""THE table of named datasets, and the downloaded files of MedMNIST and CIFAR.

One row per dataset: where its files are, its classes, which one is normal, the image size and how
images are fitted to the size at which they are dissolved. Class numbers follow the row's `classes`,
in the diffusion program and in the classifier alike. Downloaded files are checked before they are
believed. N images, H W pixels.
"""

import hashlib
import json
import pickle
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from common.errors import UserError
from common.files import read_regular

Source = Literal["folders", "cifar", "medmnist"]
Fit = Literal["resize", "pad", "none"]
"""resize: bilinearly; pad: by a rim of zeros; none: images have that size already."""


class DatasetError(UserError):
    """A dataset is unknown, or its files are not as they should be; the message has the remedy."""


class Remedies(NamedTuple):
    """What its user can do about a set, in the words of the program that loads it."""

    other_folder: str = "pass another folder"
    """Completes "Get it from ..., unpack it there, or ..."."""
    check_folder: str = "Check the folder of the data"
    check_class: str = "Check the class's number"
    allow_grey: str = "let grey images be converted"
    """Completes "Convert or remove it, or ..."."""
    skip_bad: str = "skip bad images"
    """Completes "To go on without it, ..."."""


NO_REMEDIES = Remedies()
"""Those of no program in particular."""


@dataclass(frozen=True)
class DatasetRow:
    """One named dataset."""

    name: str
    folder: str
    """Below the data root: holds train/<class> and test/<class>, or the downloaded archive's."""
    obtain: str
    """Where to get it."""
    source: Source = "folders"
    classes: tuple[str, ...] | None = None
    """Class folders by class number; None = the sorted folders of train/."""
    normal: int = 0
    """Class number of the normal class."""
    binary: bool = False
    """Every class but `normal` counts as one class of anomalies, number 1."""
    size: int = 224
    """Side in pixels to which images are resized; that of the files for cifar and medmnist."""
    fit: Fit = "resize"
    """How images are brought to the dissolving size and back."""


def _medmnist(name: str, *classes: str) -> DatasetRow:
    return DatasetRow(name, "", "https://medmnist.com", "medmnist", classes, size=28, fit="pad")


def _cifar(classes: tuple[str, ...], number: int, folder: str) -> DatasetRow:
    obtain = f"https://www.cs.toronto.edu/~kriz/cifar.html (CIFAR-{number} python version)"
    return DatasetRow(f"cifar{number}", folder, obtain, "cifar", classes, size=32, fit="none")


KAGGLE = "https://www.kaggle.com"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_ROWS = (
    # The published diffusion program trains on "non-COVID" (folder 1), the published classifier
    # command on folder 0, "COVID"; here non-COVID is class 0, the normal one, in both.
    DatasetRow(
        "covid",
        "covid",
        f"{KAGGLE}/datasets/plameneduardo/sarscov2-ctscan-dataset",
        classes=("non-COVID", "COVID"),
    ),
    DatasetRow("kvasir", "kvasir-anomaly-polyps", "https://datasets.simula.no/kvasir/"),
    DatasetRow(
        "retina",
        "OCT2017",
        f"{KAGGLE}/datasets/paultimothymooney/kermany2018",
        classes=("NORMAL", "CNV", "DME", "DRUSEN"),
        binary=True,
    ),
    # The published code tests against grade 1 alone; here grades 1 to 4 are the anomalies.
    DatasetRow(
        "aptos",
        "APTOS2019/split",
        f"{KAGGLE}/competitions/aptos2019-blindness-detection",
        binary=True,
    ),
    DatasetRow(
        "chestxray",
        "chest_xray",
        f"{KAGGLE}/datasets/paultimothymooney/chest-xray-pneumonia",
        classes=("NORMAL", "PNEUMONIA"),
    ),
    DatasetRow("breakhis", "BreaKHis400X", f"{KAGGLE}/datasets/forderation/breakhis-400x"),
    _medmnist("pneumoniamnist", "normal", "pneumonia"),
    # Class 0, which the published programs train on, is "malignant" in this set.
    _medmnist("breastmnist", "malignant", "normal, benign"),
    _medmnist("chestmnist", "no finding", "finding"),
    _cifar(tuple(CIFAR10_CLASSES.split()), 10, "cifar-10-batches-py"),
    _cifar(tuple(f"coarse class {i}" for i in range(20)), 100, "cifar-100-python"),
    DatasetRow("catsdogs", "CatsVSDogs", f"{KAGGLE}/c/dogs-vs-cats"),
    DatasetRow("imagenet", "imagenet", "https://www.image-net.org"),
    DatasetRow("folder", "", "your own images"),
)
DATASETS: dict[str, DatasetRow] = {row.name: row for row in _ROWS}
ALIASES = {
    **{"sars-covid": "covid", "pneumonia": "pneumoniamnist"},
    **{"breast": "breastmnist", "chest": "chestmnist"},
}
"""Spellings of the published diffusion program."""
DATASET_NAMES = (*DATASETS, *ALIASES)
MEDMNIST_SIZES = (64, 128, 224)
"""Sides in pixels of MedMNIST+: pneumoniamnist_64 is a data set, too."""
RECORD = "prepared.json"
"""What `python -m common.datasets prepare` writes into a folder: which archive it holds."""
NPZ_ERRORS = (
    *(OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What numpy raises for a file that is no npz, is damaged or holds pickled objects."""


def dataset_row(name: str) -> DatasetRow:
    """The row of a dataset by either program's spelling; DatasetError lists the names."""
    row = DATASETS.get(ALIASES.get(name, name))
    if row is not None:
        return row
    base, _, side = name.rpartition("_")
    row = DATASETS.get(ALIASES.get(base, base))
    if row is not None and row.source == "medmnist" and side in map(str, MEDMNIST_SIZES):
        return replace(row, name=f"{row.name}_{side}", size=int(side), fit="resize")
    raise DatasetError(f"dataset {name!r} is unknown; choose from {', '.join(DATASET_NAMES)}.")


def is_dataset(name: str) -> bool:
    """Whether there is a data set of this name."""
    try:
        return bool(dataset_row(name))
    except DatasetError:
        return False


def dataset_folder(row: DatasetRow, data_root: Path) -> Path:
    """Where a set's files are: in its folder below data_root, or in data_root itself.

    The latter where `prepare` sorted this very archive into it.
    """
    folder = data_root / row.folder
    if folder.is_dir():
        return folder
    try:
        record = json.loads(read_regular(data_root / RECORD))
        return data_root if record["archive"] == row.name else folder
    except (OSError, ValueError, KeyError, TypeError):
        return folder


def read_medmnist(
    row: DatasetRow, data_root: Path, split: str, remedies: Remedies
) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W[, 3]) uint8 and labels (N,) int64 of a split. Raises DatasetError."""
    file = data_root / f"{row.name}.npz"
    remedy = f"Download {row.name}.npz from {row.obtain} into {data_root}"
    if not file.is_file():
        raise DatasetError(f"{file} does not exist. {remedy}, or {remedies.other_folder}.")
    wanted = (f"{split}_images", f"{split}_labels")
    try:
        data = np.load(file, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise DatasetError(f"{file} is one array (npy), not an npz archive. {remedy}.")
        with data:
            missing = [name for name in wanted if name not in data.files]
            if missing:
                raise DatasetError(
                    f"{file} lacks the array {', '.join(missing)}; it holds "
                    f"{', '.join(data.files[:10]) or 'none'}. {remedy}."
                )
            pixels, labels = (data[name] for name in wanted)
    except NPZ_ERRORS as error:
        raise DatasetError(f"{file} cannot be read: {error}. {remedy} anew.") from error
    problem = _problem(row, wanted, pixels, labels)
    if problem:
        raise DatasetError(f"{file}: {problem}. {remedy} anew.")
    if labels.shape[1] > 1:  # chestmnist has 14 findings per image: any of them is an anomaly
        return pixels, labels.any(axis=1).astype(np.int64)
    return pixels, labels[:, 0].astype(np.int64)


def _problem(
    row: DatasetRow, names: tuple[str, str], pixels: np.ndarray, labels: np.ndarray
) -> str | None:
    """What is wrong with a split's arrays; None where they are as published."""
    images_name, labels_name = names
    side = (row.size, row.size)
    if pixels.dtype != np.uint8 or pixels.shape[1:] not in (side, (*side, 3)):
        return (
            f"{images_name} must be uint8 of shape (N, {row.size}, {row.size}) or with 3 colours "
            f"behind, got {pixels.dtype} {pixels.shape}"
        )
    if labels.dtype.kind not in "uib" or labels.ndim != 2 or labels.shape[1] < 1:
        return (
            f"{labels_name} must be whole numbers of shape (N, labels per image), got "
            f"{labels.dtype} {labels.shape}"
        )
    if len(labels) != len(pixels) or not len(pixels):
        return f"{len(pixels)} images in {images_name} and {len(labels)} rows in {labels_name}"
    top = 1 if labels.shape[1] > 1 else len(row.classes or ()) - 1
    if labels.min() < 0 or labels.max() > top:
        return f"{labels_name} must be 0 to {top}, got {labels.min()} to {labels.max()}"
    return None


def read_cifar(
    row: DatasetRow, data_root: Path, split: str, remedies: Remedies
) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and labels (N,) int64 of a split. Raises DatasetError.

    The files are pickles: they are opened only where their MD5 is the published one.
    """
    import torchvision  # slow to import, and needed for these two sets alone

    folder = data_root / row.folder
    remedy = f"Download {row.obtain}, unpack it into {data_root}"
    if not folder.is_dir():
        raise DatasetError(f"{folder} does not exist. {remedy}, or {remedies.other_folder}.")
    ten = row.name == "cifar10"
    published = torchvision.datasets.CIFAR10 if ten else torchvision.datasets.CIFAR100
    try:
        data = published(str(data_root), train=split == "train")
    except RuntimeError as error:  # a file is missing or has another MD5
        raise DatasetError(
            f"{folder} does not hold the published files (by their MD5): one is missing, cut short "
            f"or another. {remedy} anew."
        ) from error
    if ten:
        return data.data, np.asarray(data.targets)
    sums = dict([*published.train_list, *published.test_list])
    return data.data, coarse_labels(folder / split, md5=sums[split])


def coarse_labels(file: Path, md5: str) -> np.ndarray:
    """CIFAR-100's own superclass numbers (N,), which its files carry beside the fine ones.

    Raises DatasetError where the file's MD5 is another one; the file is not unpickled then.
    """
    content = read_regular(file)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DatasetError(
            f"{file} has the MD5 {found}, the published file has {md5}. Download it anew."
        )
    return np.asarray(pickle.loads(content, encoding="latin1")["coarse_labels"])
