"""The images of the DIA demo: clothes or tissue, normal ones and ones that are not.

Images are (H, W) float in [0, 1], written as files of a train/<class>, test/<class> tree; N images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from common.images import write_image
from common.local_changes import CHANGES, ChangeFunction
from common.tissue import TISSUE_CHANGES, draw_tissue

CLASSES = ("t_shirt", "trouser", "pullover", "dress", "coat",
           "sandal", "shirt", "sneaker", "bag", "ankle_boot")  # fmt: skip
TISSUE = "tissue"
OTHER_CLASSES = "other_classes"
GROUPS = (OTHER_CLASSES, *CHANGES, *TISSUE_CHANGES)
"""Groups of anomalies in tables; a demo has those of its own images."""
RIM = 2
"""Black pixels added around the 28² clothes, so that they halve well."""
SIDE = 32
"""Pixels of a side, with the rim."""

Images = Sequence[NDArray[np.float32]]


class Counts(NamedTuple):
    """How many images are written."""

    train: int = 400
    test: int = 120
    """Normal test images; the changed ones are made of the same ones."""
    per_other_class: int = 40


class DemoImages(NamedTuple):
    """What a demo is about."""

    normal: str
    """Name of the normal class."""
    train: Images
    test: Images
    others: Mapping[str, Images]
    """Test images of other classes."""
    changes: Mapping[str, ChangeFunction]
    """What is done to the normal test images, by the name of the anomaly."""


def clothes(archive: Path, normal: str, counts: Counts) -> DemoImages:
    """Fashion-MNIST from fashion_mnist.npz with one of CLASSES as the normal one."""
    with np.load(archive, allow_pickle=False) as arrays:
        data = {name: np.asarray(values) for name, values in arrays.items()}

    def of_class(split: str, name: str, count: int) -> NDArray[np.float32]:
        chosen = data[f"{split}_images"][data[f"{split}_labels"] == CLASSES.index(name)][:count]
        return np.pad(chosen, ((0, 0), (RIM, RIM), (RIM, RIM))).astype(np.float32) / 255

    return DemoImages(
        normal,
        of_class("train", normal, counts.train),
        of_class("test", normal, counts.test),
        {n: of_class("test", n, counts.per_other_class) for n in CLASSES if n != normal},
        CHANGES,
    )


def tissue(counts: Counts) -> DemoImages:
    """Generated tissue, which looks the same from every side."""
    random = np.random.default_rng(1)
    drawn = [draw_tissue(random, SIDE) for _ in range(counts.train + counts.test)]
    return DemoImages(TISSUE, drawn[: counts.train], drawn[counts.train :], {}, TISSUE_CHANGES)


def write_images(images: DemoImages, folder: Path) -> dict[str, int]:
    """Writes train/<normal>, test/<normal>, test/<other class>, test/<change>, masks/<change>.

    Images that offer no place for a change are left out of its folder, so a change may have none.
    Returns the number of test images by folder.
    """
    random = np.random.default_rng(0)
    written: dict[str, int] = {}

    def write(split: str, name: str, number: int, image: NDArray) -> None:
        write_image(folder / split / name / f"{number:03d}.png", torch.from_numpy(image))
        if split == "test":
            written[name] = written.get(name, 0) + 1

    for number, image in enumerate(images.train):
        write("train", images.normal, number, image)
    for name, chosen in {images.normal: images.test, **images.others}.items():
        for number, image in enumerate(chosen):
            write("test", name, number, image)
    for number, image in enumerate(images.test):
        for name, change in images.changes.items():
            changed = change(image, random)
            if changed is not None:
                write("test", name, number, changed[0])
                write("masks", name, number, changed[1].astype(np.float32))
    return written
