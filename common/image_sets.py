"""Sets of labelled images from disk, and the identity by which a resumed run knows its images.

N images, C = 3 channels, H W pixels; images are float32 in [0, 1].
"""

import copy
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.datasets import (
    NO_REMEDIES,
    RECORD,
    DatasetError,
    DatasetRow,
    Remedies,
    dataset_folder,
    dataset_row,
    read_cifar,
    read_medmnist,
)
from common.datasets.archives import is_unsorted
from common.files import open_regular
from common.grey_range import Window
from common.image_files import IMAGE_SUFFIXES, ImageError
from common.image_folders import ImageFolder, find_images, subfolder_names, with_slices
from common.image_names import composed
from common.images import read_image
from common.volumes import split_slice

LOG = logging.getLogger(__name__)
SAMPLE = 4096
"""Bytes read at the start, in the middle and at the end of each file."""


class Sample(NamedTuple):
    """One labelled image."""

    image: Tensor
    """(3, H, W)."""
    label: int
    """Class number."""
    name: str
    """File relative to the dataset's folder, or a number: the same on every disk.

    "/" between folders; bytes that are not UTF-8 are written as escapes (caf\\xe9.png)."""


@dataclass(eq=False)
class ImageSet(Dataset[Sample]):
    """Images by number, each a file or an array that is turned into a tensor when asked for."""

    items: Sequence[Path] | np.ndarray | Tensor
    """Files, or (N, H, W[, 3]) uint8, or a tensor (N, 1 or 3, H, W) in [0, 1]."""
    labels: Sequence[int] | np.ndarray
    names: Sequence[str]
    _: KW_ONLY
    classes: Sequence[str]
    size: int | None
    """Side in pixels; None keeps each image's own."""
    refuse_grey: bool = False
    white_value: int | None = None
    """The stored value that means white in files, as read_image takes it."""
    window: Window = "auto"
    """What files show black and white, as read_image takes it."""
    remedies: Remedies = NO_REMEDIES

    def __post_init__(self) -> None:
        self.labels, self.classes = np.asarray(self.labels), tuple(self.classes)
        # with escapes for bytes that are not UTF-8, so that names can be written anywhere
        as_bytes = (name.encode("utf-8", "surrogateescape") for name in self.names)
        self.names = [name.decode("utf-8", "backslashreplace") for name in as_bytes]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Reads one image. Raises ImageError, naming the file, where it cannot be read."""
        image = self._load(self.items[index])
        if self.size is not None and image.shape[1:] != (self.size, self.size):
            from torchvision.transforms.v2.functional import resize  # slow to import

            image = resize(image, [self.size, self.size], antialias=True).clamp(0, 1)
        return Sample(image, int(self.labels[index]), self.names[index])

    def _load(self, item: Path | np.ndarray | Tensor) -> Tensor:
        if isinstance(item, Tensor):
            return item.expand(3, -1, -1)
        if isinstance(item, np.ndarray):
            pixels = item if item.ndim == 3 else np.repeat(item[:, :, None], 3, axis=2)
            return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255
        image = read_image(item, white_value=self.white_value, window=self.window)
        if image.shape[0] == 3:
            return image
        if self.refuse_grey:
            raise DatasetError(
                f"{item} is grey, but the set is declared RGB. Convert or remove it, or "
                f"{self.remedies.allow_grey}."
            )
        return image.expand(3, -1, -1).contiguous()

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """The images with these numbers, in this order."""
        indices, items = np.asarray(indices, dtype=np.int64), self.items
        part = copy.copy(self)
        part.items = (
            items[indices] if isinstance(items, np.ndarray) else [items[i] for i in indices]
        )
        part.labels, part.names = self.labels[indices], [self.names[i] for i in indices]
        return part

    def of_classes(self, wanted: Iterable[int]) -> "ImageSet":
        """The images of these classes; DatasetError where there are none."""
        wanted = sorted(set(wanted))
        indices = np.flatnonzero(np.isin(self.labels, wanted))
        if not len(indices):
            counts = {name: int((self.labels == i).sum()) for i, name in enumerate(self.classes)}
            raise DatasetError(
                f"no image of class {', '.join(map(str, wanted))}; the set has {counts}. "
                f"{self.remedies.check_class} and the class folders."
            )
        return self.subset(indices)


def load_set(
    name: str,
    data_root: Path,
    split: str,
    *,
    size: int | None = None,
    refuse_grey: bool = False,
    white_value: int | None = None,
    slices: str = "all",
    window: Window = "auto",
    remedies: Remedies = NO_REMEDIES,
) -> ImageSet:
    """A split, "train" or "test", of a dataset below data_root.

    size: side in pixels; None = the table's. white_value, window: of files, as read_image takes
    them. slices: which of files that have several, as list_images takes it.
    Raises DatasetError where files or class folders are missing, saying what to download and what
    tree is expected.
    """
    row, data_root = dataset_row(name), Path(data_root)
    if row.source == "folders":
        root = dataset_folder(row, data_root)
        for raw in () if (root / "train").is_dir() else (data_root, root):
            if is_unsorted(row.name, raw):
                raise DatasetError(
                    f"{raw} holds {row.name} as downloaded, which is not sorted into train/<class> "
                    "and test/<class>. Sort it once, by links: python -m common.datasets prepare "
                    f"{row.name} {raw} FOLDER. Then {remedies.other_folder}, FOLDER."
                )
        items, labels, classes = _find_files(row, root, split, remedies)
        items, labels = _slices_of(items, labels, slices)
        names = [file.relative_to(root).as_posix() for file in items]
        size = size or row.size
    else:
        read = read_cifar if row.source == "cifar" else read_medmnist
        items, labels = read(row, data_root, split, remedies)
        classes, names = row.classes or (), [f"{split}/{i}" for i in range(len(labels))]
    return ImageSet(
        items,
        labels,
        names,
        classes=classes,
        size=size,
        refuse_grey=refuse_grey,
        white_value=white_value,
        window=window,
        remedies=remedies,
    )


def contaminate(normals: ImageSet, anomalies: ImageSet, ratio: float) -> ImageSet:
    """Normals with anomalies mixed in, so that they are `ratio`, in [0, 1), of the result.

    n = ratio·x / (1 - ratio) of the anomalies are drawn by RandomState(12345), as published.
    """
    n = int(ratio * len(normals) / (1 - ratio))
    if n > len(anomalies):
        raise DatasetError(
            f"contamination_ratio {ratio} needs {n} anomalies beside {len(normals)} normals, but "
            f"there are {len(anomalies)}; lower it"
        )
    if n == 0 and ratio > 0:
        LOG.warning(
            "contamination_ratio %g of %d normals is less than one image: none is mixed in",
            ratio, len(normals),
        )  # fmt: skip
    drawn = anomalies.subset(np.random.RandomState(12345).permutation(len(anomalies))[:n])
    items, arrays = (normals.items, drawn.items), isinstance(normals.items, np.ndarray)
    return replace(
        normals,
        items=np.concatenate(items) if arrays else [*itertools.chain(*items)],
        labels=np.concatenate([normals.labels, drawn.labels]),
        names=[*normals.names, *drawn.names],
    )


def _find_files(
    row: DatasetRow, root: Path, split: str, remedies: Remedies
) -> tuple[list[Path], list[int], Sequence[str]]:
    """The image files of a split, their class numbers, and the classes' names.

    In a prepared folder, and where the row names no classes, train/ may lack some that test/ has.
    """
    folder = root / split
    classes = "|".join(row.classes) if row.classes else "<class>"
    expected = (
        f"Expected {root}/{{train,test}}/{{{classes}}}/<images: {', '.join(IMAGE_SUFFIXES[:4])}…>. "
        f"Get it from {row.obtain}, unpack it there, or {remedies.other_folder}."
    )
    if row.name == "folder" and not folder.is_dir():
        if split == "test":
            raise DatasetError(f"{root} has no test/ folder. {expected}")
        return _find_flat_files(root, expected)
    if not folder.is_dir():
        raise DatasetError(f"{folder} does not exist. {expected}")
    # Test folders may lack a class; classes that only the test set has come after the others.
    folders = row.classes or _class_folders(root, folder)
    paths = _folders_by_class(folder)
    missing = [name for name in folders if name not in paths]
    lacking = missing
    if (not row.classes or (root / RECORD).is_file()) and (root / "test").is_dir():
        lacking = [name for name in missing if name not in _folders_by_class(root / "test")]
    if not folders or (lacking and (split == "train" or len(missing) == len(folders))):
        what = f"lacks the class folder {', '.join(lacking)}" if folders else "has no class folders"
        raise DatasetError(f"{folder} {what}. {expected}")
    found = {n: find_images(paths[n], recursive=True) for n in folders if n in paths}
    _report(folder, found)
    files: list[Path] = []
    labels: list[int] = []
    for name, images in found.items():
        if not images.files:
            raise DatasetError(
                f"the class folder {paths[name]} holds no image. Put some there, or remove the "
                f"folder. {images.summary()}".rstrip()
            )
        number = folders.index(name)
        files += images.files
        labels += [int(number != row.normal) if row.binary else number] * len(images.files)
    return files, labels, ("normal", "anomalous") if row.binary else folders


def _slices_of(
    files: Sequence[Path], labels: Sequence[int], which: str
) -> tuple[list[Path], list[int]]:
    """The images that files hold, each with its file's label."""
    images = [with_slices([file], which) for file in files]
    counts = [len(found) for found in images]
    return [*itertools.chain(*images)], np.repeat(labels, counts).tolist()


def _find_flat_files(root: Path, expected: str) -> tuple[list[Path], list[int], Sequence[str]]:
    """Those of a folder of normals without class folders: a train set, with nothing to test on."""
    try:
        found = find_images(root, recursive=False)
    except ImageError as error:
        raise DatasetError(f"{error} {expected}") from error
    if not found.files:
        raise DatasetError(f"No image in {root}. {expected} {found.summary()}".rstrip())
    found.report()
    return found.files, [0] * len(found.files), ("normal",)


def _report(folder: Path, classes: dict[str, ImageFolder]) -> None:
    """Logs what lies in a split's folder and is in no class, or in a class and is no image."""
    whole = ImageFolder(folder)
    beside = find_images(folder, recursive=False)
    for kind, paths in beside.passed_over.items():
        others = [path for path in paths if composed(path.name) not in classes]
        whole.pass_over("folder of no class" if kind == "subfolder not searched" else kind, others)
    whole.pass_over("beside the class folders", beside.files)
    for found in classes.values():
        for kind, paths in found.passed_over.items():
            whole.pass_over(kind, paths)
    whole.report()


def _class_folders(root: Path, folder: Path) -> tuple[str, ...]:
    """Names of the train split's classes, sorted, then of those of the test split alone.

    Raises DatasetError for two names that differ in letter case alone.
    """
    names: dict[str, str] = {}
    for split in (root / "train", root / "test", folder):
        for name in _folders_by_class(split) if split.is_dir() else ():
            other = names.setdefault(name.casefold(), name)
            if other != name:
                raise DatasetError(
                    f"{root} has the class folders {other} and {name}, which differ in letter case "
                    "alone. Give one class one name, or two classes different ones."
                )
    return tuple(names.values())


def _folders_by_class(folder: Path) -> dict[str, Path]:
    """Class -> its folder in a split; names are compared in one Unicode composition.

    Raises DatasetError for two folders of one class.
    """
    found: dict[str, Path] = {}
    for name in subfolder_names(folder):
        other = found.setdefault(composed(name), folder / name)
        if other.name != name:
            raise DatasetError(
                f"{folder} has two folders of the class {composed(name)}, {other.name!a} and "
                f"{name!a}, which differ in Unicode composition alone. Rename one."
            )
    return found


def set_identity(images: ImageSet, *, whole: bool = False) -> dict[str, object]:
    """Number of images, and a SHA-256 over their names, labels and contents.

    whole: all bytes of each file are read, else its size and three places. The same after a copy
    to another folder or machine.
    """
    read = functools.lru_cache(maxsize=1)(_file_identity)  # once for all slices of a file
    digest = hashlib.sha256(np.ascontiguousarray(images.labels, dtype=np.int64).tobytes())
    for name in images.names:
        digest.update(os.fsencode(name) + b"\0")
    if isinstance(images.items, np.ndarray):
        digest.update(np.ascontiguousarray(images.items).tobytes())
    else:
        for path in images.items:
            digest.update(read(split_slice(path)[0], whole) + b"\0")
    return {"images": len(images), "sha256": digest.hexdigest()}


def data_identity(paths: Sequence[Path], root: Path) -> dict[str, Any]:
    """Number of images, and a SHA-256 over their names below root, sizes and sampled bytes.

    The same after a copy to another folder or machine. Files of up to 12 KiB are read whole; of a
    larger one three places, so that ten thousand files take seconds.
    """
    digest = hashlib.sha256()
    read = functools.lru_cache(maxsize=1)(_file_identity)  # once for all slices of a file
    for path in paths:
        name = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        digest.update(bytes(name) + b"\0" + read(split_slice(path)[0]))
    return {"images": len(paths), "sha256": digest.hexdigest()}


def _file_identity(path: Path, whole: bool = False) -> bytes:
    """Size and three pieces of a file, or its SHA-256; nothing of one that cannot be read."""
    try:
        with open_regular(path) as file:
            if whole:
                return hashlib.sha256(file.read()).digest()
            size = os.fstat(file.fileno()).st_size
            pieces = [b"%d" % size]
            for place in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
                file.seek(place)
                pieces.append(file.read(SAMPLE))
            return b"".join(pieces)
    except OSError:
        return b""


def data_changes(saved: object, found: Mapping[str, Any]) -> str | None:
    """In words, how the files differ from those of an earlier run; None where they are the same.

    saved: what data_identity returned then; anything else, as of older runs, counts as the same.
    """
    if not isinstance(saved, Mapping) or saved.get("sha256") in (None, found["sha256"]):
        return None
    if saved.get("images") != found["images"]:
        return f"{saved.get('images')} training images when it was saved, {found['images']} now"
    return f"of the {found['images']} training images some have other contents or names now"
