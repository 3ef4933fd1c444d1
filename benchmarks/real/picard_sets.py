"""The sets of real images that benchmarks/real/picard.py measures on."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nrrd
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from common.images import read_image, read_mask, write_image
from demos import picard_report as report
from demos.data.lung_ct import read_cases


@dataclass(frozen=True)
class Task:
    """A set of images, ready to train on and to score."""

    training: Path
    """Folder of normal images to train on."""
    held_out: Path
    """Folder of other normal images, for the calibration."""
    cases: list[report.Case]
    settings: tuple[str, ...]
    """What differs from configs/demo_ct.yaml."""
    scale: float
    """At which the baselines of patches see images."""
    blurs: tuple[float, ...]
    """Standard deviations that the chosen half picks the filters' from, in pixels."""
    channel: int = 0
    """The channel that the baselines see."""
    kinds: Callable[[report.Case], list[report.Case]] = lambda case: []
    """The case once more for each kind of lesion that it has, without the pixels of others."""


def link(names: Sequence[Path], folder: Path) -> Path:
    """A folder of links to these files, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for path in names:
        (folder / path.name).symlink_to(path.resolve())
    return folder


def mias(data: Path, output: Path) -> Task:
    """Mini-MIAS at 512 x 512; films 2k - 1 and 2k are one woman's, and stay together.

    Trained on are women without any lesion, a fifth of whom are held out. A pixel is of the breast
    where it is brighter than 8 of 255; a lesion is its circle. Masses and calcifications are
    brighter than what is around them, so nothing else counts.
    """
    rows = list(csv.DictReader((data / "lesions_full_1024.csv").open()))
    images = {Path(row["image"]).stem: data / "images" / row["image"] for row in rows}
    woman = {name: (int(name[3:6]) + 1) // 2 for name in images}
    ill = {woman[Path(row["image"]).stem] for row in rows if row["class"] != "NORM"}
    healthy = sorted({*woman.values()} - ill)
    order = np.random.default_rng(0).permutation(len(healthy))
    held = {healthy[i] for i in order[: len(healthy) // 5]}
    normal = [name for name in images if woman[name] not in ill]
    circles: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        if row["radius"]:
            numbers = tuple(float(row[key]) / 2 for key in ("y", "x", "radius"))
            circles.setdefault(Path(row["image"]).stem, []).append(numbers)
    down, right = np.mgrid[:512, :512]
    cases = []
    for name, found in sorted(circles.items()):
        image = read_image(images[name], 1)
        truth = np.zeros((512, 512), bool)
        for y, x, radius in found:
            truth |= (down - y) ** 2 + (right - x) ** 2 <= radius**2
        body = (image[0].numpy() > 8 / 255) | truth
        cases.append(report.Case(name, image, truth, body, "MIAS", f"woman {woman[name]}"))
    return Task(
        link([images[n] for n in normal if woman[n] not in held], output / "train"),
        link([images[n] for n in normal if woman[n] in held], output / "held_out"),
        cases,
        (
            *("train.scales=[0.25]", "test.scales=[0.25]"),
            *("test.heatmap_localise=0.25", "test.heatmap_sign=brighter"),
        ),
        scale=0.25,
        blurs=(4, 8, 16, 32),
    )


def idrid(data: Path, output: Path) -> Task:
    """IDRiD at 1072 x 712, in grey less its shading; a lesion is any of the four kinds.

    Most lesions are a few pixels large, some larger than the hole, so that the network sees the
    full size and half of it; one completion (no_dropout), for there are 12,000 windows in an image.
    Trained on are the 133 photographs of grade 0 of the official training part (118 is left out: it
    is in the test part as well, with grade 3); the 34 of its test part are held out.
    """
    cases = []
    for path in sorted((data / "lesion_images").glob("*.jpg")):
        image = read_image(path, 3)
        truth = read_mask(data / "masks_any" / f"{path.stem}.png")
        field = image.amax(dim=0).numpy() > 0.1
        cases.append(report.Case(path.stem, image, truth, field | truth, "IDRiD, any lesion"))
    bits = {"microaneurysms": 1, "haemorrhages": 2, "hard exudates": 4, "soft exudates": 8}

    def kinds(case: report.Case) -> list[report.Case]:
        path = data / "lesion_masks" / f"{case.name}.png"
        stored = (read_image(path, 1)[0].numpy() * 255).round().astype(int)  # a bit a kind
        marked = {kind: (stored & bit) > 0 for kind, bit in bits.items()}
        return [
            case._replace(truth=truth, body=case.body & (truth | ~case.truth), group=kind)
            for kind, truth in marked.items()
            if truth.any()
        ]

    training = [p for p in sorted((data / "normal_train").glob("*.jpg")) if "118" not in p.stem]
    return Task(
        link(training, output / "train"),
        link(sorted((data / "normal_test").glob("*.jpg")), output / "held_out"),
        cases,
        (
            *("flatten=0.085", "train.tissue_threshold=0.1", "test.tissue_threshold=0.1"),
            *("train.scales=[1.0, 0.5]", "test.scales=[1.0, 0.5]", "train.n_steps=10000"),
            *("test.heatmap_metrics=[no_dropout]", "test.patch_stride=8"),
            *("test.heatmap_localise=0.5", "test.heatmap_smooth=0.125"),
        ),
        scale=0.25,
        blurs=(1.5, 3, 6),
        channel=1,
        kinds=kinds,
    )


def lung(data: Path, output: Path, number: int = 1) -> Task:
    """Lung CT: trained on one patient's slices without tumour, scored on the other's with.

    No other normal images: the calibration measures those that were trained on, as the demo does.
    number: the patient trained on, 1 or 2.
    """
    normal = data / f"lung{number}" / "normal" / "images"
    cases = read_cases(data / f"lung{3 - number}" / "tumour", f"lung {number} -> {3 - number}")
    return Task(normal, normal, cases, ("test.patch_stride=4",), scale=1.0, blurs=(4,))


def brain(data: Path, output: Path, number: int = 2) -> Task:
    """Brain MR with contrast: trained on one patient's slices without tumour, scored on the other's
    with. Slices of 256 x 256 are halved; 1 is the volume's 99.8th percentile of what is not 0.

    number: the patient trained on, 1 or 2.
    """
    normal, _ = brain_slices(data, number, output / f"brain{number}")
    _, cases = brain_slices(data, 3 - number, output / f"brain{3 - number}")
    settings = ("test.patch_stride=4", "test.heatmap_localise=0.25")
    return Task(normal, normal, cases, settings, scale=1.0, blurs=(4,))


def brain_slices(data: Path, number: int, folder: Path) -> tuple[Path, list[report.Case]]:
    """One patient's slices: those without tumour written to the folder, those with it as cases."""
    volume, tumour = (
        nrrd.read(str(data / f"brain{number}_{part}.nrrd"))[0] for part in ("image", "label")
    )
    white = np.percentile(volume[volume > 0], 99.8)
    cases = []
    for k in range(volume.shape[2]):
        bright = (volume[..., k].T.astype(np.float32) / white).clip(0, 1)
        image, share = (
            F.avg_pool2d(torch.from_numpy(plane)[None], 2)
            for plane in (bright, (tumour[..., k].T > 0).astype(np.float32))
        )
        image, head = (image * 255).round() / 255, image[0].numpy() > 0.05
        if not tumour[..., k].any():
            if head.mean() >= 0.05:
                write_image(folder / f"{k:02d}.png", image)
            continue
        truth = share[0].numpy() >= 0.5
        body = ndimage.binary_fill_holes(ndimage.binary_opening(head, iterations=2)) | truth
        group = f"brain MR {3 - number} -> {number}"
        cases.append(report.Case(f"{k:02d}.png", image, truth, body, group))
    return folder, cases


TASKS = {
    "mias": mias,
    "idrid": idrid,
    "lung": lung,
    "lung_back": partial(lung, number=2),
    "brain": brain,
    "brain_back": partial(brain, number=1),
}
