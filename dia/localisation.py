"""Where DIA's score comes from: heatmaps by occlusion, as a folder that eval.py evaluates.

A patch of the image is blurred and the image scored again. Where that makes the image more normal,
the patch was what made it anomalous. The heatmap of a pixel is the mean change of the score over
the patches that cover it, so larger = more anomalous, in units of the score; a negative value says
that the image looks less normal without what is there.

The published work has no such maps. B images, C channels, H W pixels, P patches.
"""

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import save_atomic, save_text_atomic
from common.config import config_to_yaml
from common.devices import eval_mode
from common.files import USUAL_LIMIT, escaped, file_stems, unescaped
from common.image_sets import ImageSet
from common.images import ImageError
from common.run_log import write_run_record
from dia.features import ViewSettings, draw_samples, image_features
from dia.predictor import SetFeatures, TrainedEncoder
from dia.results import NORMAL
from dia.scoring import CsiReference, csi_score, fit_csi

LOG = logging.getLogger(__name__)
HEATMAPS = "heatmaps"
"""Folder of the heatmaps, beside the evaluation's results."""
ENDING = "_occlusion"
"""Of a heatmap's metric, behind the score's name."""
ROOM_FOR_ENDING = 64
"""Bytes kept free behind a file's name for metric, suffix and temporary ending."""
Heatmaps = Mapping[tuple[str, str], tuple[str, Path]]
"""Set and name of an image -> metric and file of its heatmap."""


class Patch(NamedTuple):
    """A square of an image in pixels."""

    top: int
    left: int
    side: int


@dataclass(frozen=True)
class Occlusion:
    """Which patches are hidden, as fractions of the image's side."""

    patch: float
    """Side of a patch."""
    step: float
    """Between neighbouring patches, as a fraction of the patch's side."""

    def patches(self, height: int, width: int) -> list[Patch]:
        """The patches of an image of this size: every pixel is in one, and none leads out of it."""
        side = max(1, min(round(self.patch * min(height, width)), height, width))
        step = max(1, round(self.step * side))
        return [
            Patch(top, left, side)
            for top in places(height, side, step)
            for left in places(width, side, step)
        ]


def places(length: int, side: int, step: int) -> list[int]:
    """Where patches of a side begin along a length; the last ends with it."""
    return [*range(0, length - side, step), length - side]


def occluded(image: Tensor, patches: Sequence[Patch]) -> Tensor:
    """The image (C, H, W) with one patch blurred at a time: (P, C, H, W).

    The blur's deviation is half a patch's side: detail goes, brightness and colour stay.
    """
    side = patches[0].side
    blurred = blur(image, side / 2)
    copies = image.repeat(len(patches), 1, 1, 1)
    for copy, (top, left, _) in zip(copies, patches, strict=True):
        rows, columns = slice(top, top + side), slice(left, left + side)
        copy[:, rows, columns] = blurred[:, rows, columns]
    return copies


def blur(image: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of (C, H, W); the kernel ends where the image's reflection would."""
    from torchvision.transforms.v2.functional import gaussian_blur  # slow to import

    reach = max(1, min(round(2 * deviation), min(image.shape[1:]) - 1))
    return gaussian_blur(image, [2 * reach + 1] * 2, [max(deviation, 0.1)] * 2)


def spread_over(changes: Tensor, patches: Sequence[Patch], size: tuple[int, int]) -> Tensor:
    """Mean over the patches that cover each pixel of what they changed: (P,) → (H, W)."""
    total, count = changes.new_zeros(size), changes.new_zeros(size)
    for change, (top, left, side) in zip(changes, patches, strict=True):
        total[top : top + side, left : left + side] += change
        count[top : top + side, left : left + side] += 1
    return total / count


@torch.no_grad()
def occlusion_maps(
    encoder: TrainedEncoder,
    references: Mapping[str, CsiReference],
    image: Tensor,
    name: str,
    occlusion: Occlusion,
) -> dict[str, Tensor]:
    """Heatmaps (H, W) of an image (3, H, W) in [0, 1] by score, on the encoder's device.

    references: what `dia.scoring.fit_csi` made of the training images, by score. All copies are
    looked at in the same views, drawn by the image's name, so that nothing but the patch differs.
    """
    image = image.to(encoder.device)
    size = (image.shape[1], image.shape[2])
    patches = occlusion.patches(*size)
    copies = torch.cat([image[None], occluded(image, patches)])
    views = replace(encoder.views, seeding="per_image")
    with eval_mode(encoder.network):
        parts = [features_of(encoder, views, part, name) for part in copies.split(views.batch_size)]
    simclr, shift = (torch.cat(part) for part in zip(*parts, strict=True))
    maps = {}
    for score, reference in references.items():
        scores = csi_score(reference, simclr, shift)  # (1 + P,), larger = more normal
        maps[score] = spread_over(scores[1:] - scores[0], patches, size)
    return maps


def features_of(
    encoder: TrainedEncoder, views: ViewSettings, copies: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """Features of copies (B, C, H, W) of one image, all in the views of its name."""
    samples = draw_samples(views, [name] * len(copies), (copies.shape[2], copies.shape[3]))
    return image_features(encoder.network, copies, views.base, views.n_shifts, samples)


def write_heatmaps(
    encoder: TrainedEncoder,
    train: SetFeatures,
    sets: Mapping[str, ImageSet],
    scores: Sequence[str],
    folder: Path,
    command: Sequence[str],
) -> Heatmaps:
    """Writes a heatmap of every test image and score, of the image's own size.

    The folder is one that `eval.py --mode heatmap` evaluates: heatmaps.csv (image, metric, file),
    scores.csv, data/*.pt, and how they were made. Its metrics are CSI_occlusion and the like; its
    images have the names of `names_over_sets`. Images that cannot be read are passed over; the
    evaluation has named them. Returns the first score's heatmaps. Raises OSError where the folder
    cannot be written.
    """
    device, settings = encoder.device, encoder.config.evaluation
    occlusion = Occlusion(settings.heatmap_patch, settings.heatmap_step)
    references = {
        score: fit_csi(
            train.simclr.to(device),
            train.shift.to(device),
            n_shifts=encoder.views.n_shifts,
            score=score,
        )
        for score in scores
    }
    (folder / "heatmaps.csv").unlink(missing_ok=True)  # until the new ones are whole
    write_run_record(folder, config_yaml=config_to_yaml(encoder.config), command=command)
    save_text_atomic(run_text(encoder, occlusion), folder / "run.txt")
    names = names_over_sets(sets)
    stems = file_stems(names.values(), USUAL_LIMIT - ROOM_FOR_ENDING)
    first: dict[tuple[str, str], tuple[str, Path]] = {}
    rows: list[tuple[str, str, str]] = []
    numbers: list[tuple[str, str, str, str, str]] = []
    for own, image in tqdm(
        images_with_size(sets), total=len(names), desc="heatmaps", leave=False, disable=None
    ):
        name = names[own.set_name, own.name]
        for score, heat in occlusion_maps(encoder, references, image, own.name, occlusion).items():
            heatmap = enlarged(heat, own.size)
            metric = score + ENDING
            file = f"data/{stems[name]}_{metric}.pt"
            save_atomic(heatmap, folder / file)
            first.setdefault((own.set_name, own.name), (metric, folder / file))
            rows.append((escaped(name), metric, file))
            numbers.append((escaped(name), metric, *summary(heatmap)))
    save_text_atomic(as_csv(("image", "metric", "max", "mean", "p99"), numbers),
                     folder / "scores.csv")  # fmt: skip
    save_text_atomic(as_csv(("image", "metric", "file"), rows), folder / "heatmaps.csv")
    return first


def names_over_sets(sets: Mapping[str, ImageSet]) -> dict[tuple[str, str], str]:
    """Set and name of every image -> its name in the folder of heatmaps, which no other one has.

    That is its name below the dataset's folder. Of another dataset (--ood_dataset), it has the
    set's name before it where images share it: all of MedMNIST and CIFAR are test/0, test/1, ….
    """
    count = Counter(unescaped(name) for images in sets.values() for name in images.names)
    found = {}
    for set_name, images in sets.items():
        of_dataset = set_name == NORMAL or set_name.startswith("one_class_")
        for own in images.names:
            name = unescaped(own)
            shared = count[name] > 1 and not of_dataset
            found[set_name, own] = f"{set_name}/{name}" if shared else name
    return found


class Original(NamedTuple):
    """Set, name there, and size (H, W) of an image as it is stored."""

    set_name: str
    name: str
    size: tuple[int, int]


def images_with_size(sets: Mapping[str, ImageSet]) -> Iterator[tuple[Original, Tensor]]:
    """Every image (3, side, side) as the encoder sees it, with its own size."""
    for set_name, images in sets.items():
        stored = replace(images, size=None)
        for number, name in enumerate(images.names):
            try:
                size = stored[number].image.shape[1:]
                yield Original(set_name, name, (size[0], size[1])), images[number].image
            except ImageError as error:
                LOG.info("no heatmap: %s", error)


def enlarged(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """A heatmap at an image's own size (H, W), on the CPU."""
    whole = F.interpolate(heat[None, None].float(), size, mode="bilinear", align_corners=False)
    return whole[0, 0].cpu()


def summary(heatmap: Tensor) -> tuple[str, str, str]:
    """Largest value, mean and 99th percentile, as scores.csv has them."""
    values = heatmap.flatten().double()
    p99 = values.kthvalue(max(1, round(0.99 * values.numel()))).values
    high, mean, p99 = (f"{value.item():.7g}" for value in (values.max(), values.mean(), p99))
    return high, mean, p99


def run_text(encoder: TrainedEncoder, occlusion: Occlusion) -> str:
    """What the heatmaps depend on, a line each."""
    facts: dict[str, Any] = {
        "checkpoint": encoder.path,
        "encoder": encoder.sha256,
        "patch": occlusion.patch,
        "step": occlusion.step,
        "views": encoder.views,
    }
    return "".join(f"{name}: {value}\n" for name, value in facts.items())


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    return text.getvalue()
