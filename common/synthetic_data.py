"""Writes phantoms as the folders that the commands read: images, boxes.csv, masks."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import from_numpy

from common.checkpoint import save_text_atomic
from common.images import write_image
from common.synthetic import LesionKind, Phantom, PhantomStyle, draw_phantom

SEEDS_PER_DATA_SET = 1_000_000
"""Phantoms of different data sets, and of training and test, never share a seed."""
DEFAULT_TEST: Mapping[LesionKind, int] = {"mass": 12, "distortion": 4, "calcifications": 4}


@dataclass(frozen=True)
class PhantomData:
    """Phantoms by file name."""

    train: dict[str, Phantom]
    """Normal ones."""
    test: dict[str, Phantom]
    """Each with lesions of one kind."""


def write_phantoms(
    folder: Path,
    seed: int,
    *,
    n_train: int = 200,
    n_test: Mapping[LesionKind, int] = DEFAULT_TEST,
    lesions_per_image: int = 2,
    style: PhantomStyle | None = None,
) -> PhantomData:
    """Draws a data set and writes it below `folder`.

    train/*.png and test/*.png are 8-bit images, masks/*.png (0 or 255) and boxes.csv (image, top,
    left, height, width, label) say where the test images' lesions are, bodies/*.png (0 or 255)
    which pixels are inside the body. The phantoms returned are not rounded to 8 bits.
    n_test: images by kind of lesion. Raises ValueError as `draw_phantom` does.
    """
    first = seed * SEEDS_PER_DATA_SET
    train = {f"normal_{i:03d}.png": draw_phantom(first + i, style=style) for i in range(n_train)}
    test = {}
    for kind, n in n_test.items():
        for i in range(n):
            number = first + SEEDS_PER_DATA_SET // 2 + len(test)
            kinds = (kind,) * lesions_per_image
            test[f"{kind}_{i:03d}.png"] = draw_phantom(number, lesions=kinds, style=style)
    for part in ("train", "test", "masks", "bodies"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, phantom in train.items():
        write_image(folder / "train" / name, from_numpy(phantom.image))
    for name, phantom in test.items():
        write_image(folder / "test" / name, from_numpy(phantom.image))
        write_image(folder / "masks" / name, from_numpy(phantom.lesion_mask).float())
        write_image(folder / "bodies" / name, from_numpy(phantom.body).float())
    save_text_atomic(_boxes_csv(test), folder / "boxes.csv")
    return PhantomData(train, test)


def _boxes_csv(phantoms: Mapping[str, Phantom]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("image", "top", "left", "height", "width", "label"))
    for name, phantom in phantoms.items():
        for lesion in phantom.lesions:
            table.writerow(
                (name, lesion.top, lesion.left, lesion.height, lesion.width, lesion.kind)
            )
    return text.getvalue()
