"""The image sets of a DIA run: training normals, held-out and test images by class."""

import itertools
import logging
from collections.abc import Mapping

import torch

from common.datasets import DatasetError
from common.image_folders import SHOWN
from common.image_sets import ImageSet, contaminate
from common.random_numbers import generator_for
from common.volumes import split_slice
from dia.results import NORMAL
from dia.settings import DiaConfig

LOG = logging.getLogger(__name__)


EvaluationSets = Mapping[str, ImageSet]
"""What is told apart: "normal", and anomalies as one_class_<number> or by their dataset's name."""


def load_split(config: DiaConfig, split: str, name: str | None = None) -> ImageSet:
    """A split of the configured dataset, or of another one at the same image size."""
    size = None if name is None else config.data.row.size
    return config.data.images(split, name, size=config.data.resize_to or size)


def training_sets(config: DiaConfig) -> tuple[ImageSet, EvaluationSets | None]:
    """The training images, and the sets that select_by test or val evaluates, if any.

    DatasetError, with the remedy, where select_by test finds nothing to test on.
    """
    chosen_by = config.contrastive.select_by
    if chosen_by == "val":
        return hold_out(config)
    images = normal_train_set(config)
    if chosen_by == "last":
        return images, None
    try:
        return images, evaluation_sets(config)
    except DatasetError as error:
        reason = str(error).rstrip(". ")
        remedy = "Without a test set, pass --select_by last: the last checkpoint is used."
        raise DatasetError(f"{reason}. {remedy}") from error


def normal_train_set(config: DiaConfig) -> ImageSet:
    """The training images: the normal class, or all of them where one_class_idx is none.

    Says so where those are several classes. With contamination_ratio some anomalies among them.
    DatasetError where fewer than two are left.
    """
    whole = load_split(config, "train")
    index = config.data.one_class_idx
    if index is None:
        warn_of_all_classes(config, whole)
    images = mixed(config, whole if index is None else whole.of_classes([index]), whole)
    if len(images) < 2:
        raise DatasetError(
            f"{len(images)} training image(s) of class {index} in {config.data.dataset}: at least "
            "2 are needed. Check --data_root and --one_class_idx."
        )
    return images


def mixed(config: DiaConfig, normals: ImageSet, whole: ImageSet) -> ImageSet:
    """Normals with so many anomalies of the training split as contamination_ratio says."""
    ratio, index = config.contrastive.contamination_ratio, config.data.one_class_idx
    if ratio == 0:
        return normals
    if index is None:
        raise DatasetError("contamination_ratio needs --one_class_idx")
    rest = [number for number in range(len(whole.classes)) if number != index]
    return contaminate(normals, whole.of_classes(rest), ratio)


def warn_of_all_classes(config: DiaConfig, whole: ImageSet) -> None:
    """Says which classes the training images are of, where there are several.

    Without one_class_idx the diffusion program takes the normal class; this one all, as published.
    """
    present = sorted(set(whole.labels.tolist()))
    if len(present) < 2:
        return
    normal = config.data.row.normal
    classes = ", ".join(f"{number} ({whole.classes[number]})" for number in present[:SHOWN])
    more = f" and {len(present) - SHOWN} more" if len(present) > SHOWN else ""
    LOG.warning(
        "data.one_class_idx is none: the training images are of all %d classes, %s%s, anomalies "
        "among them. For normal images alone pass --one_class_idx %d (%s).",
        len(present), classes, more, normal, whole.classes[normal],
    )  # fmt: skip


def evaluation_sets(config: DiaConfig) -> EvaluationSets:
    """Test normals and anomalies: the other classes, or the datasets that ood_dataset names."""
    whole = load_split(config, "test")
    index = config.data.one_class_idx
    normal = whole if index is None else whole.of_classes([index])
    named = config.evaluation.ood_dataset
    if named is None:
        if index is None:
            raise DatasetError(
                "without --one_class_idx there are no other classes to test against; name datasets "
                "with --ood_dataset"
            )
        return {NORMAL: normal, **other_classes(whole, index)}
    sets = {NORMAL: normal}
    for name in named:
        if name.isascii() and name.isdigit() and index is not None:
            if int(name) == index:
                raise DatasetError(
                    f"--ood_dataset {name} is the normal class itself (--one_class_idx); name "
                    "another class"
                )
            sets[f"one_class_{name}"] = whole.of_classes([int(name)])
        else:
            sets[name] = load_split(config, "test", name)
    return sets


def other_classes(whole: ImageSet, index: int) -> dict[str, ImageSet]:
    """Every class of a set but one, as one_class_<number>; classes without images are left out."""
    present = set(whole.labels.tolist())
    numbers = [n for n in range(len(whole.classes)) if n != index and n in present]
    if not numbers:
        raise DatasetError(
            f"only class {index} has test images; anomalies of another class are needed to test on"
        )
    return {f"one_class_{n}": whole.of_classes([n]) for n in numbers}


def hold_out(config: DiaConfig) -> tuple[ImageSet, EvaluationSets | None]:
    """Training images without the held-out normals, and the validation sets.

    Validation anomalies are the other classes of the training split, but for what of them
    contamination_ratio mixes in, and the other slices of its files. Where there are none, nothing
    is held out, and the training loss has to choose. DatasetError where fewer than two images are
    left to train on.
    """
    whole, index = load_split(config, "train"), config.data.one_class_idx
    if index is not None and set(whole.labels.tolist()) - {index}:
        kept, held_out = split_by_file(config, whole.of_classes([index]))
        images = mixed(config, kept, whole)
        used = {split_slice(name)[0] for name in images.names}
        left = [n for n, name in enumerate(whole.names) if split_slice(name)[0] not in used]
        unused = whole.subset(left)
        if set(unused.labels.tolist()) - {index}:
            return images, {NORMAL: held_out, **other_classes(unused, index)}
    LOG.warning("no labelled anomalies to validate on: the training loss chooses")
    return normal_train_set(config), None


def split_by_file(config: DiaConfig, images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Images to train on, and those of val_fraction of the files; slices of one stay together."""
    files: dict[str, list[int]] = {}
    for number, name in enumerate(images.names):
        files.setdefault(split_slice(name)[0], []).append(number)
    numbers, fraction = [*files.values()], config.contrastive.val_fraction
    n = max(1, int(len(files) * fraction))
    order = torch.randperm(len(files), generator=generator_for(config.seed, "val")).tolist()
    held_out, kept = (
        images.subset([*itertools.chain.from_iterable(numbers[i] for i in part)])
        for part in (order[:n], order[n:])
    )
    if len(kept) < 2:
        raise DatasetError(
            f"val_fraction {fraction} holds {len(held_out)} of {len(images)} training images out "
            f"({n} of {len(files)} files), which leaves {len(kept)}: at least 2 are needed. Lower "
            "contrastive.val_fraction, or add images."
        )
    return kept, held_out
