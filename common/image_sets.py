"""Sets of labelled images: named datasets and folder trees, read from disk without network.

N images, C = 3 channels, H W pixels; images are float32 in [0, 1].
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import resize

from common.datasets import DatasetError, DatasetRow, dataset_row
from common.images import IMAGE_SUFFIXES, list_images, read_image


class Sample(NamedTuple):
    """One labelled image."""

    image: Tensor
    """(3, H, W)."""
    label: int
    """Class number."""
    name: str
    """File relative to the dataset's folder, or a number: the same on every disk."""


class ImageSet(Dataset[Sample]):
    """Images by number, each a file or an array that is turned into a tensor when asked for."""

    def __init__(
        self,
        items: Sequence[Path] | np.ndarray,
        labels: Sequence[int],
        names: Sequence[str],
        *,
        classes: Sequence[str],
        size: int | None,
        refuse_grey: bool = False,
        white_value: int | None = None,
    ) -> None:
        """items: files, or (N, H, W[, 3]) uint8. size: side in pixels, None = as stored.

        white_value: the stored value that means white in files, as read_image takes it.
        """
        self.items, self.labels, self.names = items, np.asarray(labels), list(names)
        self.classes, self.size, self.refuse_grey = tuple(classes), size, refuse_grey
        self.white_value = white_value

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        image = self._load(self.items[index])
        if self.size is not None and image.shape[1:] != (self.size, self.size):
            image = resize(image, [self.size, self.size], antialias=True).clamp(0, 1)
        return Sample(image, int(self.labels[index]), self.names[index])

    def _load(self, item: Path | np.ndarray) -> Tensor:
        if isinstance(item, np.ndarray):
            pixels = item if item.ndim == 3 else np.repeat(item[:, :, None], 3, axis=2)
            return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255
        if self.refuse_grey and read_image(item).shape[0] == 1:
            raise DatasetError(
                f"{item} is grey, but the set is declared RGB (data.grey_images: refuse). Convert "
                "or remove it, or set data.grey_images: convert."
            )
        return read_image(item, channels=3, white_value=self.white_value)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """The images with these numbers, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        items = self.items
        chosen = items[indices] if isinstance(items, np.ndarray) else [items[i] for i in indices]
        return ImageSet(
            chosen,
            self.labels[indices],
            [self.names[i] for i in indices],
            classes=self.classes,
            size=self.size,
            refuse_grey=self.refuse_grey,
            white_value=self.white_value,
        )

    def of_classes(self, wanted: Iterable[int]) -> "ImageSet":
        """The images of these classes; DatasetError where there are none."""
        wanted = sorted(set(wanted))
        indices = np.flatnonzero(np.isin(self.labels, wanted))
        if not len(indices):
            counts = {name: int((self.labels == i).sum()) for i, name in enumerate(self.classes)}
            raise DatasetError(
                f"no image of class {', '.join(map(str, wanted))}; the set has {counts}. Check "
                "--one_class_idx and the class folders."
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
) -> ImageSet:
    """The train or test split of a dataset below data_root.

    size: side in pixels; None = the table's. white_value: of files, as read_image takes it.
    Raises DatasetError where files or class folders are missing, saying what to download and what
    tree is expected.
    """
    if split not in ("train", "test"):
        raise DatasetError(f"a split is train or test, got {split!r}")
    row = dataset_row(name)
    match row.source:
        case "folders":
            images = _from_folders(row, Path(data_root), split, size or row.size, refuse_grey)
            images.white_value = white_value
            return images
        case "cifar":
            pixels, labels = _read_cifar(row, Path(data_root), split)
        case "medmnist":
            pixels, labels = _read_medmnist(row, Path(data_root), split)
    names = [f"{split}/{i}" for i in range(len(labels))]
    return ImageSet(pixels, labels, names, classes=row.classes or (), size=size)


def contaminate(normals: ImageSet, anomalies: ImageSet, ratio: float) -> ImageSet:
    """Normals with anomalies mixed in, so that they are `ratio` of the result; files only.

    n = ratio·x / (1 - ratio) of the anomalies are drawn by RandomState(12345), as published.
    """
    if not 0 <= ratio < 1:
        raise DatasetError(f"contamination_ratio must be in [0, 1), got {ratio}")
    n = int(ratio * len(normals) / (1 - ratio))
    if n > len(anomalies):
        raise DatasetError(
            f"contamination_ratio {ratio} needs {n} anomalies beside {len(normals)} normals, but "
            f"there are {len(anomalies)}; lower it"
        )
    drawn = anomalies.subset(np.random.RandomState(12345).permutation(len(anomalies))[:n])
    arrays = isinstance(normals.items, np.ndarray)
    items = (
        np.concatenate([normals.items, drawn.items]) if arrays else [*normals.items, *drawn.items]
    )
    return ImageSet(
        items,
        np.concatenate([normals.labels, drawn.labels]),
        normals.names + drawn.names,
        classes=normals.classes,
        size=normals.size,
        refuse_grey=normals.refuse_grey,
        white_value=normals.white_value,
    )


def _from_folders(
    row: DatasetRow, data_root: Path, split: str, size: int, refuse_grey: bool
) -> ImageSet:
    root = data_root / row.folder
    folder = root / split
    flat = row.name == "folder" and not folder.is_dir()
    if flat:
        # A flat folder of normals: the train set; there is nothing to test on.
        files = list_images(root, recursive=False)
        if split == "test":
            raise DatasetError(f"{root} has no test/ folder. {_expected_tree(row, root)}")
        return ImageSet(
            files,
            np.zeros(len(files), dtype=np.int64),
            [file.name for file in files],
            classes=("normal",),
            size=size,
            refuse_grey=refuse_grey,
        )
    if not folder.is_dir():
        raise DatasetError(f"{folder} does not exist. {_expected_tree(row, root)}")
    # Test folders may lack a class; classes that only the test set has come after the others.
    folders = row.classes or _class_folders(root, folder)
    missing = [name for name in folders if not (folder / name).is_dir()]
    lacking = [name for name in missing if row.classes or not (root / "test" / name).is_dir()]
    if not folders or (lacking and (split == "train" or len(missing) == len(folders))):
        what = f"lacks the class folder {', '.join(lacking)}" if folders else "has no class folders"
        raise DatasetError(f"{folder} {what}. {_expected_tree(row, root)}")
    files, labels = [], []
    for number, name in enumerate(folders):
        if name in missing:
            continue
        found = list_images(folder / name, recursive=True)
        label = number if not row.binary else int(number != row.normal)
        files += found
        labels += [label] * len(found)
    classes = ("normal", "anomalous") if row.binary else folders
    names = [file.relative_to(root).as_posix() for file in files]
    return ImageSet(files, labels, names, classes=classes, size=size, refuse_grey=refuse_grey)


def _class_folders(root: Path, folder: Path) -> tuple[str, ...]:
    """Names of the train split's class folders, sorted, then of those of the test split alone."""
    names: list[str] = []
    for split in (root / "train", root / "test", folder):
        found = sorted(p.name for p in split.iterdir() if p.is_dir()) if split.is_dir() else []
        names += [name for name in found if name not in names]
    return tuple(names)


def _expected_tree(row: DatasetRow, root: Path) -> str:
    classes = "|".join(row.classes) if row.classes else "<class>"
    return (
        f"Expected {root}/{{train,test}}/{{{classes}}}/<images: {', '.join(IMAGE_SUFFIXES[:4])}…>. "
        f"Get it from {row.obtain}, unpack it there, or pass another --data_root."
    )


def _read_cifar(row: DatasetRow, data_root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    if not (data_root / row.folder).is_dir():
        raise DatasetError(
            f"{data_root / row.folder} does not exist. Download {row.obtain}, unpack it into "
            f"{data_root}, or pass another --data_root."
        )
    if row.name == "cifar10":
        data = torchvision.datasets.CIFAR10(str(data_root), train=split == "train")
        return data.data, np.asarray(data.targets)
    data = torchvision.datasets.CIFAR100(str(data_root), train=split == "train")
    return data.data, _coarse_labels(data_root / row.folder / split)


def _coarse_labels(file: Path) -> np.ndarray:
    """CIFAR-100's own superclass numbers, which its files carry beside the fine ones."""
    import pickle

    with file.open("rb") as stream:
        return np.asarray(pickle.load(stream, encoding="latin1")["coarse_labels"])


def _read_medmnist(row: DatasetRow, data_root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    file = data_root / f"{row.name}.npz"
    if not file.is_file():
        raise DatasetError(
            f"{file} does not exist. Download {row.name}.npz from {row.obtain} into {data_root}, "
            "or pass another --data_root."
        )
    with np.load(file, allow_pickle=False) as data:
        pixels, labels = data[f"{split}_images"], data[f"{split}_labels"]
    # chestmnist has 14 findings per image: any of them is an anomaly.
    labels = labels.any(axis=1).astype(np.int64) if labels.shape[1] > 1 else labels[:, 0]
    return pixels, labels.astype(np.int64)
