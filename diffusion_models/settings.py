"""Settings of the diffusion program; the defaults are what the published program does.

`train_eval_ddpm.py` has a flag for every field.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common import config_types as kind
from common.config import resolve_path
from common.config_types import ConfigError, check_fields, require
from common.datasets import DatasetError, DatasetRow, Remedies, dataset_row
from common.grey_range import Window, check_window
from common.image_sets import ImageSet, load_set

Schedule = Literal["cosine", "linear"]
Weights = Literal["raw", "ema"]
"""A checkpoint's weights as trained, or their running average."""
DissolveRange = Literal["unit", "signed"]
DiffusionSteps = Annotated[int, kind.AtLeast(1, 10**5)]
DiffusionStep = Annotated[int, kind.AtLeast(0, 10**5)]

REMEDIES = Remedies(
    other_folder="pass another --data_root",
    check_folder="Check data.data_root",
    check_class="Check --one_class_idx",
    allow_grey="set data.grey_images: convert",
    skip_bad="set data.on_bad_image: skip",
)
"""What the messages on image sets advise, in the names of these settings and their flags."""


@dataclass(frozen=True)
class DataConfig:
    """`data:` which images; shared by the diffusion program, training and evaluation."""

    dataset: kind.Text = "folder"
    """A row of common/datasets/, in either program's spelling, or folder."""
    data_root: kind.PathText = "../data"
    """Folder that holds the datasets' folders; for `folder`, the images or their tree."""
    one_class_idx: kind.ClassNumber | None = None
    """Class number of the normal class; none = the dataset's own (multi-class in train_dia.py)."""
    resize_to: Annotated[int, kind.AtLeast(8, 2**14)] | None = None
    """Side in pixels to which train_dia.py and eval.py resize; none = the dataset's own."""
    num_workers: kind.Processes = 0
    """Processes that read images ahead."""
    grey_images: Literal["convert", "refuse"] = "convert"
    """What to do with a grey file: repeat it three times, as published, or stop."""
    white_value: kind.WhiteValue | None = None
    """Stored value that means white in files of more bits, e.g. 4095; none = the type's largest."""
    window: Window = "auto"
    """What grey images of more than 8 bits show black and white: as the file says, [level, width]
    in its values, or percentiles of it."""
    slices: kind.SliceRule = "all"
    """Slices used of files that hold several: all, middle or every_N."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """An image that cannot be read is left out, named and counted, or stops the run (ours)."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
        check_window(self.window, self.white_value, "data.")
        try:
            dataset_row(self.dataset)
        except DatasetError as error:
            hint = "Any folder of images works as --dataset folder --data_root FOLDER."
            raise ConfigError(f"data.dataset: {error} {hint}", key="data.dataset") from None

    @property
    def row(self) -> DatasetRow:
        """What common/datasets/ says of the dataset."""
        return dataset_row(self.dataset)

    @property
    def side(self) -> int:
        """Image side in pixels for train_dia.py and eval.py."""
        return self.resize_to or self.row.size

    def images(self, split: str, name: str | None = None, *, size: int | None = None) -> ImageSet:
        """The train or test split of the dataset, or of the one of another name; see load_set."""
        return load_set(
            name or self.dataset,
            resolve_path(self.data_root, "data.data_root"),
            split,
            size=size,
            refuse_grey=self.grey_images == "refuse",
            white_value=self.white_value,
            slices=self.slices,
            window=self.window,
            remedies=REMEDIES,
        )


@dataclass(frozen=True)
class DiffusionConfig:
    """`diffusion:` the network, its training and what is drawn with it."""

    on_label: kind.ClassNumber | None = None
    """Kept for published commands: one_class_idx by the name of their CIFAR flag; it wins."""
    image_size: Annotated[int, kind.AtLeast(1, 2**12)] | None = None
    """Side in pixels at which the model works; none = 32."""
    dilation: bool = False
    """Dilate every convolution by image_size // 32."""
    local_randn: bool = False
    """Draw the noise at 32² pixels and enlarge it."""
    ratio: kind.PositiveShare = 1.0
    """Fraction of the training images to use, in (0, 1]."""
    dim: Annotated[int, kind.AtLeast(8, 2**12)] = 64
    """Base width of the U-Net, a multiple of 8."""
    dim_mults: tuple[Annotated[int, kind.AtLeast(1, 64)], ...] = (1, 2, 4, 8)
    """Widths of its levels, in base widths."""
    timesteps: DiffusionSteps = 1000
    """Steps of the diffusion, T."""
    beta_schedule: Schedule = "cosine"
    """Noise schedule."""
    ddpm_batch_size: kind.BatchSize = 256
    """Images per backward pass, of each process."""
    gradient_accumulate_every: kind.Samples = 2
    """Backward passes per optimiser step."""
    train_num_steps: kind.Steps = 3125
    """Optimiser steps."""
    train_lr: kind.LearningRate = 8.0e-5
    """Adam's learning rate."""
    adam_betas: tuple[kind.Share, kind.Share] = (0.9, 0.99)
    """Adam's decays."""
    clip_norm: kind.GradientNorm = 1.0
    """Largest gradient norm."""
    ema_decay: kind.Share = 0.995
    """Decay of the averaged weights."""
    ema_update_every: kind.Steps = 10
    """Steps between updates of the averaged weights."""
    save_every: kind.Steps = 312
    """Steps between checkpoints model-1.pt, model-2.pt, … and pictures."""
    log_every: kind.Steps = 10
    """Steps between lines of log.jsonl."""
    sampling_timesteps: DiffusionSteps = 250
    """DDIM steps of a sample."""
    num_samples: kind.Samples = 25
    """Images in a picture of samples."""
    steps: DiffusionStep = 100
    """Step t at which --mode eval dissolves."""
    strip_steps: tuple[DiffusionStep, ...] = (0, 25, 50, 100, 200, 400)
    """Steps t of the dissolving strip."""
    state_dict_path: kind.PathText | None = None
    """Checkpoint: starting weights of --mode train, the model of eval and sample."""
    ddpm_weights: Weights = "raw"
    """Weights that eval and sample use: raw, as published, or ema."""
    strip_range: DissolveRange = "unit"
    """Range in which eval and the strip feed images: unit, as published, or signed."""
    output_dir: kind.PathText | None = None
    """Run folder; none = ddpm_models/<dataset>-<size>-<time>."""

    def __post_init__(self) -> None:
        check_fields(self, "diffusion")
        require(self.dim % 8 == 0, "diffusion.dim", self.dim, "must be a multiple of 8")
        levels = len(self.dim_mults)
        require(1 <= levels <= 8, "diffusion.dim_mults", self.dim_mults, "must be 1 to 8 levels")
        below = f"must be below diffusion.timesteps = {self.timesteps}"
        require(self.steps < self.timesteps, "diffusion.steps", self.steps, below)
        strip = self.strip_steps
        require(len(strip) > 0, "diffusion.strip_steps", strip, "needs one step or more")
        require(max(strip) < self.timesteps, "diffusion.strip_steps", strip, below)
        sampling = self.sampling_timesteps
        expected = f"must not be more than diffusion.timesteps = {self.timesteps}"
        require(sampling <= self.timesteps, "diffusion.sampling_timesteps", sampling, expected)
        ok = not self.dilation or self.side >= 32
        require(ok, "diffusion.dilation", self.dilation, "needs an image_size of 32 or more")
        multiple = (2 * self.dilation_factor) ** (len(self.dim_mults) - 1)
        what = f"must be a multiple of {multiple} pixels, which the U-Net halves its maps to"
        require(self.side % multiple == 0, "diffusion.image_size", self.side, what)

    @property
    def side(self) -> int:
        """Image side in pixels."""
        return self.image_size or 32

    @property
    def dilation_factor(self) -> int:
        """Dilation of the convolutions, 1 = none."""
        return self.side // 32 if self.dilation else 1


@dataclass(frozen=True)
class DdpmConfig:
    """Everything train_eval_ddpm.py needs."""

    device: kind.DeviceText = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    seed: kind.Seed = 0
    """Seed of weights, order, noise and steps."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """tf32 lets a GPU round products, as torch by itself does in convolutions; fp32 does not. bf16,
    fp16: trains in 16 bits (losses and weights stay fp32); all else then computes in fp32."""
    compile: bool = False
    """Compile the network for training: minutes at the start; CPUs need a C++ compiler."""
    peer_timeout: kind.PeerSeconds = kind.PEER_TIMEOUT
    """Seconds within which all processes of a training (torchrun) have to come."""
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        check_fields(self)

    def warnings(self) -> list[str]:
        """What is allowed and probably not meant."""
        label, index = self.diffusion.on_label, self.data.one_class_idx
        if None in (label, index) or label == index:
            return []
        return [f"on_label is {label} and one_class_idx {index}: class {label} is trained on"]

    @property
    def normal_class(self) -> int:
        """The class number that is trained on."""
        numbers = (self.diffusion.on_label, self.data.one_class_idx, self.data.row.normal)
        return next(number for number in numbers if number is not None)
