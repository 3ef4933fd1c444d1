"""Settings of the diffusion program; the defaults are what the published program does.

`train_eval_ddpm.py` has a flag for every field.
"""

from dataclasses import dataclass, field
from typing import Literal

from common.config import PathText, require, require_at_least
from common.data_settings import DataConfig
from common.datasets import dataset_row
from diffusion_models.diffusion import Schedule
from diffusion_models.dissolve import DissolveRange, Weights


@dataclass(frozen=True)
class DiffusionConfig:
    """`diffusion:` the network, its training and what is drawn with it."""

    on_label: int | None = None
    """Class to train on, by number; the same as one_class_idx (CIFAR's published flag)."""
    image_size: int | None = None
    """Side in pixels at which the model works; none = 32."""
    dilation: bool = False
    """Dilate every convolution by image_size // 32."""
    local_randn: bool = False
    """Draw the noise at 32² pixels and enlarge it."""
    ratio: float = 1.0
    """Fraction of the training images to use, in (0, 1]."""
    dim: int = 64
    """Base width of the U-Net, a multiple of 8."""
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    """Widths of its levels, in base widths."""
    timesteps: int = 1000
    """Steps of the diffusion, T."""
    beta_schedule: Schedule = "cosine"
    """Noise schedule."""
    ddpm_batch_size: int = 256
    """Images per backward pass, of each process."""
    gradient_accumulate_every: int = 2
    """Backward passes per optimiser step."""
    train_num_steps: int = 3125
    """Optimiser steps."""
    train_lr: float = 8.0e-5
    """Adam's learning rate."""
    adam_betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decays."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    ema_decay: float = 0.995
    """Decay of the averaged weights."""
    ema_update_every: int = 10
    """Steps between updates of the averaged weights."""
    save_every: int = 312
    """Steps between checkpoints model-1.pt, model-2.pt, … and pictures."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    sampling_timesteps: int = 250
    """DDIM steps of a sample."""
    num_samples: int = 25
    """Images in a picture of samples."""
    steps: int = 100
    """Step t at which --mode eval dissolves."""
    strip_steps: tuple[int, ...] = (0, 25, 50, 100, 200, 400)
    """Steps t of the dissolving strip."""
    state_dict_path: PathText | None = None
    """Checkpoint: starting weights of --mode train, the model of eval and sample."""
    ddpm_weights: Weights = "raw"
    """Weights that eval and sample use: raw, as published, or ema."""
    strip_range: DissolveRange = "unit"
    """Range in which eval and the strip feed images: unit, as published, or signed."""
    output_dir: PathText | None = None
    """Run folder; none = ddpm_models/<dataset>-<size>-<time>."""

    def __post_init__(self) -> None:
        names = ("image_size", "timesteps", "ddpm_batch_size", "gradient_accumulate_every")
        names += ("save_every", "log_every", "sampling_timesteps", "num_samples", "train_num_steps")
        names += ("ema_update_every",)
        require_at_least(1, self, "diffusion", names)
        require_at_least(0, self, "diffusion", ("on_label", "steps"))
        require(0 < self.ratio <= 1, "diffusion.ratio", self.ratio, "must be in (0, 1]")
        require(0 <= self.ema_decay < 1, "diffusion.ema_decay", self.ema_decay, "must be in [0, 1)")
        steps = (self.steps, *self.strip_steps)
        ok = all(0 <= t < self.timesteps for t in steps)
        require(ok, "diffusion.strip_steps", steps, f"must be in 0 … {self.timesteps - 1}")
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

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    seed: int = 0
    """Seed of weights, order, noise and steps."""
    precision: Literal["fp32", "tf32"] = "fp32"
    """tf32 lets a GPU round products, as torch by itself does in convolutions; fp32 does not."""
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    @property
    def normal_class(self) -> int:
        """The class number that is trained on."""
        chosen = (self.diffusion.on_label, self.data.one_class_idx)
        given = next((number for number in chosen if number is not None), None)
        return dataset_row(self.data.dataset).normal if given is None else given
