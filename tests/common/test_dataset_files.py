"""Downloaded files of MedMNIST and CIFAR: what is not the published content is refused by name."""

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.datasets import DatasetError, coarse_labels
from common.image_sets import load_set

PIXELS = np.zeros((3, 28, 28), np.uint8)
LABELS = np.array([[0], [1], [1]])


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def split(pixels: np.ndarray = PIXELS, labels: np.ndarray = LABELS) -> bytes:
    return npz(test_images=pixels, test_labels=labels)


def test_medmnist_file_as_published_is_read(tmp_path: Path) -> None:
    (tmp_path / "breastmnist.npz").write_bytes(split(labels=LABELS.astype(np.uint8)))
    images = load_set("breast", tmp_path, "test")
    assert images.labels.tolist() == [0, 1, 1]
    assert images[0].image.shape == (3, 28, 28)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npz(), r"lacks the array test_images, test_labels; it holds none"),
        (npz(train_images=PIXELS, test_images=PIXELS), r"lacks the array test_labels; it holds"),
        (npy(PIXELS), r"is one array \(npy\), not an npz archive"),
        (split(labels=LABELS[:, 0]), r"test_labels must be whole numbers .* got int64 \(3,\)"),
        (split(labels=LABELS * 0.5), r"test_labels must be whole numbers .* got float64"),
        (split(labels=LABELS[:2]), r"3 images in test_images and 2 rows in test_labels"),
        (split(labels=LABELS + 1), r"test_labels must be 0 to 1, got 1 to 2"),
        (split(labels=LABELS - 1), r"test_labels must be 0 to 1, got -1 to 0"),
        (split(labels=np.repeat(LABELS, 14, 1) * 2), r"test_labels must be 0 to 1, got 0 to 2"),
        (split(pixels=PIXELS / 255), r"test_images must be uint8 .* got float64 \(3, 28, 28\)"),
        (split(pixels=PIXELS[:, :14]), r"shape \(N, 28, 28\) .* got uint8 \(3, 14, 28\)"),
        (split(pixels=PIXELS[0]), r"got uint8 \(28, 28\)"),
        (split(pixels=PIXELS[:0], labels=LABELS[:0]), r"0 images in test_images"),
        (split(labels=np.array([[None], [0], [1]])), r"cannot be read: Object arrays"),
        (split()[:300], r"cannot be read: "),
        (b"", r"cannot be read: "),
        (b"no archive", r"cannot be read: "),
    ],
)
def test_medmnist_file_of_other_content_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "breastmnist.npz").write_bytes(content)
    expected = rf"breastmnist\.npz:? .*{message}.*Download breastmnist\.npz from"
    with pytest.raises(DatasetError, match=expected):
        load_set("breast", tmp_path, "test")


class MakesFolder:
    """Unpickled, it makes a folder: stands for any code that a pickle may run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("cifar10", "cifar-10-batches-py", "data_batch_1"),
        ("cifar100", "cifar-100-python", "train"),
    ],
)
def test_cifar_files_other_than_the_published_ones_are_refused_and_not_unpickled(
    tmp_path: Path, name: str, folder: str, file: str
) -> None:
    (tmp_path / folder).mkdir()
    evil = pickle.dumps({"data": MakesFolder(tmp_path / "ran"), "labels": [0]})
    for entry in (file, "meta", "batches.meta", "test"):
        (tmp_path / folder / entry).write_bytes(evil)
    with pytest.raises(DatasetError, match=rf"{folder} does not hold the published files .*Downl"):
        load_set(name, tmp_path, "train")
    assert not (tmp_path / "ran").exists()


def test_coarse_labels_are_read_from_a_file_of_the_right_md5_alone(tmp_path: Path) -> None:
    good = pickle.dumps({"coarse_labels": [3, 19]})
    (tmp_path / "train").write_bytes(good)
    md5 = hashlib.md5(good, usedforsecurity=False).hexdigest()
    assert coarse_labels(tmp_path / "train", md5).tolist() == [3, 19]
    (tmp_path / "train").write_bytes(pickle.dumps(MakesFolder(tmp_path / "ran")))
    with pytest.raises(DatasetError, match=rf"train has the MD5 .*, the published file has {md5}"):
        coarse_labels(tmp_path / "train", md5)
    assert not (tmp_path / "ran").exists()
