"""The images that a diffusion model is trained on."""

import torch

from common.config import resolve_path
from common.datasets import DatasetError, Fit, dataset_row
from common.image_sets import ImageSet, Sample, load_set
from common.runtime import generator_for
from diffusion_models.dissolve import to_dissolving_size
from diffusion_models.settings import DdpmConfig


class NormalImages(ImageSet):
    """The images of an image set at the size at which the model works."""

    def __init__(self, images: ImageSet, side: int, fit: Fit) -> None:
        super().__init__(
            images.items, images.labels, images.names, classes=images.classes, size=None
        )
        self.refuse_grey, self.side, self.fit = images.refuse_grey, side, fit
        self.white_value = images.white_value

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return sample._replace(image=to_dissolving_size(sample.image[None], self.side, self.fit)[0])


def training_images(config: DdpmConfig) -> NormalImages:
    """The normal training images; DatasetError where there are fewer than two."""
    row = dataset_row(config.data.dataset)
    images = load_set(
        config.data.dataset,
        resolve_path(config.data.data_root, "data.data_root"),
        "train",
        refuse_grey=config.data.grey_images == "refuse",
        white_value=config.data.white_value,
    )
    images.size = None  # the files' own size, resized once
    normal = images.of_classes([config.normal_class])
    if config.diffusion.ratio < 1:
        order = torch.randperm(len(normal), generator=generator_for(config.seed, "ratio"))
        normal = normal.subset(order[: int(len(normal) * config.diffusion.ratio)].numpy())
    if len(normal) < 2:
        raise DatasetError(
            f"{len(normal)} training image(s) of class {config.normal_class} in "
            f"{config.data.dataset}: at least 2 are needed. Check --data_root, --one_class_idx and "
            "--ratio."
        )
    return NormalImages(normal, config.diffusion.side, row.fit)
