"""Settings of contrastive training and evaluation; the defaults are what the published code does.

`train_dia.py` and `eval.py` have a flag for every field.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common import config_types as kind
from common.config_types import check_fields, require
from common.html_report import GALLERY_IMAGES
from diffusion_models.settings import DataConfig, DissolveRange, Weights

EncoderName = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet18_imagenet",
    "resnet50_imagenet",
    "resnet18_imagenet_simsiam",
    "resnet50_imagenet_simsiam",
]
Mode = Literal["simclr", "simclr_CSI", "simclr_DIA"]
ShiftName = Literal[
    "none",
    "rotation",
    "cutperm",
    "diffusion",
    "blurgaussian",
    "blurmedian",
    "blurnone",
    "diffusion_rotation",
    "blurgaussian_rotation",
    "blurmedian_rotation",
    "blurnone_rotation",
    "diffusion_cutperm",
    "blurgaussian_cutperm",
    "blurmedian_cutperm",
    "blurnone_cutperm",
]
"""The published names, and <third view>_rotation, the README's spelling of <third view>."""
LossMode = Literal["naive", "shifted_removed"]
DiffusionScheduler = Literal[
    "uniform", "beta_skewed", "beta_by_epoch", "beta_skewed_reversed", "beta_by_epoch_reversed"
]
LrScheduler = Literal["cosine", "step_decay"]
Seeding = Literal["per_image", "published"]
OodScore = Literal["CSI", "simclr", "clean_norm", "similar", "baseline", "baseline_marginalized"]
BANK_SCORES = ("CSI", "simclr")
Hundreds = Annotated[float, kind.AtLeast(0, 1000)]
"""A number of diffusion steps, in hundreds."""
IMAGENET_WIDTH = 64
"""Channels of the first stage of torchvision's ResNets, which are not built otherwise."""
PUBLISHED_WARMUP = 10
"""In a run of fewer epochs it is warned about, not refused."""


@dataclass(frozen=True)
class ContrastiveConfig:
    """`contrastive:` encoder, views, losses and their training."""

    model: EncoderName = "resnet18_imagenet"
    """Encoder; the small-image ones (resnet18, 34, 50) suit images of about 32²."""
    width: kind.Channels = IMAGENET_WIDTH
    """Channels of the first stage of a small-image encoder; the *_imagenet ones have 64."""
    mode: Mode = "simclr"
    """simclr, simclr_CSI (shifted views) or simclr_DIA (and dissolved negatives)."""
    simclr_dim: Annotated[int, kind.AtLeast(1, 2**16)] = 128
    """Width of the contrastive head."""
    shift_trans_type: ShiftName = "none"
    """Shift transform; see dia/shifts.py."""
    diffusion_model_path: kind.PathText | None = None
    """Checkpoint model-N.pt of the diffusion model, for the diffusion shift types."""
    dissolve_weights: Weights = "raw"
    """Its raw weights, as published, or the averaged ones, ema."""
    dissolve_range: DissolveRange = "unit"
    """Feed it images in [0, 1], as published (unit), or in [-1, 1] as it was trained (signed)."""
    loss_mode: LossMode = "shifted_removed"
    """Whether an image's own dissolved copies count among its negatives (naive)."""
    diffusion_scheduler: DiffusionScheduler = "uniform"
    """Distribution of the dissolving steps."""
    diff_resolution: Annotated[int, kind.AtLeast(1, 2**12)] = 32
    """Side in pixels at which images are dissolved."""
    diffusion_offset: Hundreds = 0.3
    """Least dissolving, in hundreds of steps."""
    diffusion_upper_offset: Hundreds = 1.0
    """Most dissolving, in hundreds of steps."""
    contamination_ratio: kind.Share = 0.0
    """Share of anomalies among the training images."""
    kernel_size: Annotated[int, kind.AtLeast(1, 1023)] = 7
    """Side of the blurs' kernel in pixels, odd."""
    resize_to_constant: bool = False
    """Blur at diff_resolution."""
    blur_all_views: bool = True
    """Blur the positive views too, as published; false blurs the negatives alone."""
    resize_factor: kind.PositiveShare = 0.08
    """Least area of the random crop, as a fraction of the image's."""
    resize_fix: bool = False
    """Crop to exactly resize_factor."""
    sim_lambda: kind.Weight = 1.0
    """Weight of the contrastive loss."""
    simsiam_lambda: kind.Weight = 1.0
    """Weight of the SimSiam loss of the *_simsiam models."""
    temperature: Annotated[float, kind.Range(1e-6, 1e6)] = 0.5
    """Temperature of the similarities."""
    epochs: kind.Steps = 1000
    """Passes over the training images."""
    max_batches: kind.Steps | None = 201
    """Batches of a pass at most; none = all of them."""
    batch_size: kind.BatchSize = 128
    """Images per batch and process; the published runs with 4 shifts use 32."""
    optimizer: Literal["lars", "sgd"] = "lars"
    """Both with momentum 0.9."""
    lr_scheduler: LrScheduler = "cosine"
    """Decay after the warm-up."""
    warmup: Annotated[int, kind.AtLeast(0, 10**9)] = 10
    """Epochs over which the rate climbs from lr_init to ten times that."""
    lr_init: kind.LearningRate = 0.1
    """Learning rate at the start."""
    weight_decay: Annotated[float, kind.Range(0, 1000)] = 1.0e-6
    """Weight decay of the encoder and of the linear probe."""
    select_by: Literal["test", "val", "last"] = "test"
    """What chooses best_*.model: test AUROC, as published, held-out training images, or nothing."""
    val_fraction: Annotated[float, kind.Range(0, 1, "()")] = 0.1
    """Share of the training images that select_by val holds out."""
    error_step: kind.Steps = 5
    """Kept for published commands and unused, as in the published code."""
    save_step: kind.Steps = 10
    """Epochs between checkpoints last.model."""
    eval_step: kind.Steps | None = None
    """Epochs between evaluations for select_by; none = save_step."""
    resume_path: kind.PathText | None = None
    """Run folder to go on with."""
    load_path: kind.PathText | None = None
    """Weights (*.model) to start from, or to evaluate."""
    no_strict: bool = False
    """Take what fits of load_path."""
    suffix: kind.NameText | None = None
    """Ending of the run folder's name."""
    local_rank: kind.Processes = 0
    """Kept for published commands and unused: torchrun says the rank."""
    run_dir: kind.PathText | None = None
    """Run folder; none = logs/<dataset>_<model>_…."""

    def __post_init__(self) -> None:
        check_fields(self, "contrastive")
        ok = self.mode == "simclr" or self.shift_trans_type != "none"
        expected = f"mode {self.mode} needs a shift transform"
        require(ok, "contrastive.shift_trans_type", self.shift_trans_type, expected)
        low, high = self.diffusion_offset, self.diffusion_upper_offset
        ok = low <= high or (low, high) == (0.3, 0.0)
        expected = f"must be <= contrastive.diffusion_upper_offset = {high}"
        require(ok, "contrastive.diffusion_offset", low, expected)
        odd = self.kernel_size % 2 == 1
        require(odd, "contrastive.kernel_size", self.kernel_size, "must be odd")
        ok = self.warmup <= max(self.epochs, PUBLISHED_WARMUP)
        expected = f"must not be more than contrastive.epochs = {self.epochs}"
        require(ok, "contrastive.warmup", self.warmup, expected)
        if self.load_path is None:  # the run of those weights may say what the encoder is
            self.require_width()

    def require_width(self) -> None:
        """Raises ConfigError where the encoder cannot have that width."""
        expected = (
            f"must be {IMAGENET_WIDTH} with contrastive.model = {self.model}, as torchvision has "
            "it; resnet18, resnet34 and resnet50 take others"
        )
        ok = "_" not in self.model or self.width == IMAGENET_WIDTH
        require(ok, "contrastive.width", self.width, expected)

    @property
    def crop_scale(self) -> tuple[float, float]:
        """Range of the crops' areas in training."""
        return (self.resize_factor, self.resize_factor if self.resize_fix else 1.0)


@dataclass(frozen=True)
class EvaluationConfig:
    """`evaluation:` scores, samples and what is written."""

    ood_dataset: tuple[kind.Text, ...] | None = None
    """Datasets to test against; none = every other class."""
    ood_score: tuple[OodScore, ...] = ("CSI",)
    """Scores: CSI or simclr for ood_pre, the others for ood."""
    ood_layer: tuple[Literal["simclr", "shift", "penultimate"], ...] = ("simclr", "shift")
    """Features: what clean_norm and similar use (the first), what ood_pre caches."""
    ood_samples: kind.Samples = 1
    """Augmented samples of each image and shift."""
    ood_batch_size: kind.BatchSize = 100
    """Kept for published commands and unused, as in the published code."""
    test_batch_size: kind.BatchSize = 100
    """Images per forward pass."""
    eval_resize_factor: kind.PositiveShare | None = None
    """Least area of the evaluation's crops; none = resize_factor."""
    eval_resize_fix: bool | None = None
    """Crop to exactly that; none = resize_fix."""
    seeding: Seeding = "per_image"
    """Augment by image (scores independent of batches), or by place in the batch (published)."""
    select_ood_samples: kind.Samples = 10
    """Samples of the evaluations during training; their crops take 0.54 of the area or more."""
    bootstrap_samples: Annotated[int, kind.AtLeast(0, 10**6)] = 1000
    """Draws of the bootstrap intervals."""
    cache_features: bool = True
    """Keep features beside the checkpoint and use them again while nothing has changed."""
    print_score: bool = False
    """Print the scores' deciles."""
    save_score: bool = False
    """Save scores as .npy, too."""
    results_dir: kind.PathText | None = None
    """Where results go; none = eval_<mode> beside the checkpoint."""
    heatmaps: bool = False
    """Write a heatmap of every test image, by occlusion; see dia/localisation.py (ours)."""
    heatmap_patch: kind.PositiveShare = 0.2
    """Side of the patch that is hidden, as a fraction of the image's side."""
    heatmap_step: kind.PositiveShare = 0.5
    """Between neighbouring patches, as a fraction of the patch's side."""
    report: bool = False
    """Write report.html, too: numbers, curves and images on one page (ours)."""
    report_images: Annotated[int, kind.AtLeast(1, 10**6)] = GALLERY_IMAGES
    """Images in it, those on which the scores are most wrong."""

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")
        for name in ("ood_score", "ood_layer", "ood_dataset"):
            chosen = getattr(self, name)
            distinct = chosen is None or 0 < len(chosen) == len(set(chosen))
            require(distinct, f"evaluation.{name}", chosen, "needs one or more, each once")


@dataclass(frozen=True)
class DiaConfig:
    """Everything train_dia.py and the DIA modes of eval.py need."""

    device: kind.DeviceText = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    seed: kind.Seed = 0
    """Seed of weights, order, views and augmentation."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """tf32 lets a GPU round products, as torch by itself does in convolutions; fp32 does not. bf16,
    fp16: trains in 16 bits (losses and weights stay fp32); all else then computes in fp32."""
    compile: bool = False
    """Compile the network for training: minutes at the start; CPUs need a C++ compiler."""
    peer_timeout: kind.PeerSeconds = kind.PEER_TIMEOUT
    """Seconds within which all processes of a training (torchrun) have to come."""
    data: DataConfig = field(default_factory=DataConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        check_fields(self)

    def warnings(self) -> list[str]:
        """What is allowed and probably not meant."""
        settings = self.contrastive
        if settings.load_path is not None:  # for an evaluation, or to go on from weights
            return []
        messages = []
        shifts = 1 if settings.shift_trans_type == "none" else 4
        published = 128 // shifts
        if settings.mode != "simclr" and settings.batch_size != published:
            messages.append(
                f"batch_size is {settings.batch_size}; the published runs with {shifts} shifts "
                f"use {published}"
            )
        if settings.warmup > settings.epochs:
            messages.append(
                f"warmup is {settings.warmup} epochs, epochs {settings.epochs}: the learning rate "
                "never reaches its peak. Lower warmup or raise epochs."
            )
        return messages

    @property
    def eval_crop_scale(self) -> tuple[float, float]:
        """Range of the crops' areas in evaluation."""
        contrastive, evaluation = self.contrastive, self.evaluation
        factor, fixed = evaluation.eval_resize_factor, evaluation.eval_resize_fix
        factor = contrastive.resize_factor if factor is None else factor
        fixed = contrastive.resize_fix if fixed is None else fixed
        return (factor, factor if fixed else 1.0)
