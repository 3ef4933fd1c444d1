"""The image sets of a DIA run: training normals, held-out and test images by class."""

import logging
from collections.abc import Mapping

import torch

from common.datasets import DatasetError
from common.image_folders import SHOWN
from common.image_sets import ImageSet, contaminate
from common.random_numbers import generator_for
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
    """The training images, and the sets that select_by test or val evaluates, if any."""
    images = normal_train_set(config)
    if config.contrastive.select_by == "last":
        return images, None
    if config.contrastive.select_by == "test":
        return images, evaluation_sets(config)
    images, sets = hold_out(config, images)
    if sets is None:
        LOG.warning("no labelled anomalies to validate on: the training loss chooses")
    return images, sets


def normal_train_set(config: DiaConfig) -> ImageSet:
    """The training images: the normal class, or all of them where one_class_idx is none.

    Says so where those are several classes. With contamination_ratio some anomalies among them.
    DatasetError where fewer than two are left.
    """
    whole = load_split(config, "train")
    index = config.data.one_class_idx
    images = whole if index is None else whole.of_classes([index])
    if index is None:
        warn_of_all_classes(config, whole)
    ratio = config.contrastive.contamination_ratio
    if ratio > 0:
        if index is None:
            raise DatasetError("contamination_ratio needs --one_class_idx")
        rest = [number for number in range(len(whole.classes)) if number != index]
        images = contaminate(images, whole.of_classes(rest), ratio)
    if len(images) < 2:
        raise DatasetError(
            f"{len(images)} training image(s) of class {index} in {config.data.dataset}: at least "
            "2 are needed. Check --data_root and --one_class_idx."
        )
    return images


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


def hold_out(config: DiaConfig, images: ImageSet) -> tuple[ImageSet, EvaluationSets | None]:
    """Training images without the held-out ones, and the validation sets.

    Validation anomalies are the other classes of the training split; where it has none, there are
    no validation sets, and the training loss has to choose. DatasetError where fewer than two
    images are left to train on.
    """
    n = max(1, int(len(images) * config.contrastive.val_fraction))
    if len(images) - n < 2:
        raise DatasetError(
            f"val_fraction {config.contrastive.val_fraction} holds {n} of {len(images)} training "
            f"images out, which leaves {len(images) - n}: at least 2 are needed. Lower "
            "contrastive.val_fraction, or add images."
        )
    order = torch.randperm(len(images), generator=generator_for(config.seed, "val")).numpy()
    train, held_out = images.subset(order[n:]), images.subset(order[:n])
    whole, index = load_split(config, "train"), config.data.one_class_idx
    if index is None or set(whole.labels.tolist()) <= {index}:
        return train, None
    return train, {NORMAL: held_out, **other_classes(whole, index)}
