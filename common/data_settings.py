"""Settings of the images, shared by the diffusion program, training and evaluation."""

from dataclasses import dataclass
from typing import Literal

from common.config import PathText, require_at_least
from common.datasets import dataset_row


@dataclass(frozen=True)
class DataConfig:
    """`data:` which images; shared by the diffusion program, training and evaluation."""

    dataset: str = "folder"
    """A row of common/datasets.py, in either program's spelling, or folder."""
    data_root: PathText = "../data"
    """Folder that holds the datasets' folders; for `folder`, the images or their tree."""
    one_class_idx: int | None = None
    """Class number of the normal class; none = the dataset's own (multi-class in train_dia.py)."""
    resize_to: int | None = None
    """Side in pixels to which train_dia.py and eval.py resize; none = the dataset's own."""
    num_workers: int = 0
    """Processes that read images ahead."""
    grey_images: Literal["convert", "refuse"] = "convert"
    """What to do with a grey file: repeat it three times, as published, or stop."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """An image that cannot be read is left out, named and counted, or stops the run (ours)."""

    def __post_init__(self) -> None:
        dataset_row(self.dataset)
        require_at_least(0, self, "data", ("one_class_idx", "num_workers"))
        require_at_least(8, self, "data", ("resize_to",))
