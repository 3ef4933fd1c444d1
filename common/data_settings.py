"""Settings of the images, shared by the diffusion program, training and evaluation."""

from dataclasses import dataclass
from typing import Annotated, Literal

from common.config import ConfigError, PathText, check_fields
from common.config_rules import AtLeast, ClassNumber, Processes, WhiteValue
from common.datasets import DatasetError, dataset_row


@dataclass(frozen=True)
class DataConfig:
    """`data:` which images; shared by the diffusion program, training and evaluation."""

    dataset: str = "folder"
    """A row of common/datasets.py, in either program's spelling, or folder."""
    data_root: PathText = "../data"
    """Folder that holds the datasets' folders; for `folder`, the images or their tree."""
    one_class_idx: ClassNumber | None = None
    """Class number of the normal class; none = the dataset's own (multi-class in train_dia.py)."""
    resize_to: Annotated[int, AtLeast(8, 2**14)] | None = None
    """Side in pixels to which train_dia.py and eval.py resize; none = the dataset's own."""
    num_workers: Processes = 0
    """Processes that read images ahead."""
    grey_images: Literal["convert", "refuse"] = "convert"
    """What to do with a grey file: repeat it three times, as published, or stop."""
    white_value: WhiteValue | None = None
    """Stored value that means white in files of more bits, e.g. 4095; none = the type's largest."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """An image that cannot be read is left out, named and counted, or stops the run (ours)."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
        try:
            dataset_row(self.dataset)
        except DatasetError as error:
            raise ConfigError(f"data.dataset: {error}", key="data.dataset") from None
