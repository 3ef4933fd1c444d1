"""PICARD's settings: one frozen dataclass per section of the YAML file.

The defaults are what the published code does when its file lacks the key; improvements are keys
that `configs/default.yaml` sets. Shapes are (height, width[, channels]) in pixels.

Keys have their published names. What the published code calls patch, box and mask, the rest of this
code calls by one word each:
    crop     train.image_shape: the part of a training image that a step sees
    window   test.patch_shape: the part of an image that is scored at once
    hole     test.mask_shape, train.mask_shape: what is cut out of them and completed. While
             training, mask_shape is the box that the local critic sees, and the hole is that box
             less a random rim, train.max_delta_shape.
"""

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from common import config_types as kind
from common.config import REPOSITORY, resolve_path
from common.config_types import check_fields, require
from common.grey_range import Window, check_window
from common.shading import FLAT_TISSUE, Flattening

LOG = logging.getLogger(__name__)
COARSE_TRUNK = (
    *("conv2_downsample", "conv3", "conv4_downsample", "conv5", "conv6"),
    *("conv7_atrous", "conv8_atrous", "conv9_atrous", "conv10_atrous"),
)
ATTENTION_BRANCH = (
    *("pmconv1", "pmconv2_downsample", "pmconv3", "pmconv4_downsample", "pmconv5", "pmconv6"),
    *("pmconv9", "pmconv10"),
)
COARSE_DROPPABLE = (*COARSE_TRUNK, *(f"conv{i}" for i in range(11, 17)))
FINE_DROPPABLE = (*COARSE_TRUNK, *ATTENTION_BRANCH, *(f"allconv{i}" for i in range(11, 17)))
PUBLISHED_FINE = tuple(f"self.{name}" for name in FINE_DROPPABLE)
Dilation = Annotated[int, kind.AtLeast(1, 1024)]
Scale = Annotated[float, kind.Range(0.01, 1)]
Specificity = Annotated[float, kind.Range(0, 1, "()")]
Margin = Annotated[int, kind.AtLeast(0, 2**14)]
Metric = Literal[
    "MCD_image",
    "MCD_feature",
    "MeanCD_image",
    "MeanCD_feature",
    "MedCD_image",
    "MedCD_feature",
    "no_dropout",
]
SHIPPED_WARMUP = 500
"""Warm-up of configs/default.yaml: in a run of fewer steps it is warned about, not refused."""


def input_path(value: str | None, key: str, *, root: Path = REPOSITORY) -> Path:
    """Returns the absolute path of a folder to read; see `common.config.resolve_path`.

    The published files write paths relative to inpainter/: what exists only there is taken, with a
    warning.
    """
    path, published = resolve_path(value, key, root=root), root / "inpainter" / value
    if path.exists() or not published.exists():
        return path
    LOG.warning(
        "%s: %s is not in the repository's root but in inpainter/; that one is used. "
        "Write it relative to the root.",
        key,
        value,
    )
    return published.resolve()


def check_shapes(outer_key: str, outer: tuple[int, ...], hole: tuple[int, ...]) -> None:
    """Raises a ConfigError unless a crop or window and its hole suit the networks."""
    hole_key = f"{outer_key.partition('.')[0]}.mask_shape"
    for key, shape in ((outer_key, outer), (hole_key, hole)):
        halves = all(side % 16 == 0 for side in shape[:2])  # as often as the critic does
        require(halves, key, shape, "height and width must be multiples of 16 pixels")
    expected = "the third number is the channels, 1 (grey) or 3 (RGB)"
    require(outer[2] in (1, 3), outer_key, outer, expected)
    fits = hole[0] < outer[0] and hole[1] < outer[1]
    require(fits, hole_key, hole, f"must be smaller than {outer_key}, {list(outer[:2])}")


def check_scales(key: str, scales: tuple[float, ...]) -> None:
    """Raises a ConfigError unless there are scales, each once."""
    distinct = 0 < len(scales) == len(set(scales))
    require(distinct, key, scales, "needs one scale or more, each once")


@dataclass(frozen=True)
class TrainConfig:
    """`train:` the crops, the holes, the optimiser and what is written how often."""

    n_critic: kind.Steps = 5
    """The generator is updated every n_critic steps, the critics at every step."""
    n_epochs: kind.Steps = 10000
    """Passes over the training images; steps = n_epochs * images / batch_size."""
    n_steps: kind.Steps | None = None
    """Training steps; set, it replaces n_epochs."""
    subset_frac: kind.PositiveShare | None = None
    """Fraction of the training files to use, drawn at random from the seed, in (0, 1]."""
    resume: kind.PathText | None = None
    """Folder of checkpoints to go on from (its latest step); the flag --resume does the same."""
    batch_size: kind.BatchSize = 55
    """Crops per step, over all processes."""
    snapshot_save_iter: kind.Steps = 5000
    """Steps between checkpoints."""
    keep_snapshots: kind.Steps | None = None
    """Checkpoints to keep besides the best one (the newest); none keeps them all."""
    image_shape: tuple[kind.Pixels, kind.Pixels, int] = (256, 256, 1)
    """Training crop: height, width (pixels, multiples of 16), channels (1 grey or 3 RGB)."""
    mask_shape: tuple[kind.Pixels, kind.Pixels] = (128, 128)
    """Box that is cut out and completed: height, width in pixels, multiples of 16."""
    mask_batch_same: bool = True
    """One box position for the whole batch (the shrinking differs all the same)."""
    max_delta_shape: tuple[Margin, Margin] = (32, 32)
    """The hole is the box shrunk on each side by 0 … max_delta/2 pixels, per axis and sample."""
    margin: tuple[Margin, Margin] = (0, 0)
    """Pixels between the crop's border and the nearest allowed box."""
    discounted_mask: bool = True
    """Weight the hole's L1 by distance to its border (spatial discounting)."""
    spatial_discounting_gamma: kind.PositiveShare = 0.9
    """Base of the spatial discounting, in (0, 1]; 1 = no discounting."""
    random_crop: bool = True
    """Random crops; false resizes whole images to image_shape."""
    mask_type: Literal["hole", "mosaic"] = "hole"
    """Kept for published files: hole, or mosaic, which was never implemented and is refused."""
    mosaic_unit_size: kind.Pixels = 12
    """Kept for published files and unused: their mosaic was never implemented."""
    lr: kind.LearningRate = 1.0e-4
    """Adam's learning rate (the peak, where there is a schedule)."""
    beta1: kind.Share = 0.5
    """Adam's first moment decay."""
    beta2: kind.Share = 0.9
    """Adam's second moment decay."""
    print_iter: kind.Steps = 100
    """Steps between lines in log.jsonl and TensorBoard scalars."""
    viz_iter: kind.Steps = 10000
    """Steps between picture grids: input, hole, coarse, fine, truth."""
    viz_max_out: Annotated[int, kind.AtLeast(0, 4096)] = 16
    """Rows of a picture grid at most."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Cosine lowers the rate to 0 over the run."""
    warmup_steps: Annotated[int, kind.AtLeast(0, 10**9)] = 0
    """Steps over which the learning rate rises from 0."""
    critic: bool = True
    """Train the critics; false = L1 losses alone, and every step updates the generator."""
    init: Literal["default", "he"] = "default"
    """Initial weights: torch's own, or He's with a small last layer (no early saturation)."""
    grad_clip_norm: kind.GradientNorm | None = None
    """Clip the generator's gradient to this norm."""
    clean_critic_gradients: bool = False
    """The generator's adversarial gradient no longer leaks into the critics' step (P6)."""
    flip: bool = False
    """Mirror crops left to right with probability 1/2."""
    max_rotation: Annotated[float, kind.Range(0, 180)] = 0.0
    """Turn crops by up to this many degrees, either way: for few training images."""
    max_scale: Annotated[float, kind.Range(1, 100)] = 1.0
    """Show crops larger or smaller by up to this factor, >= 1."""
    scales: tuple[Scale, ...] = (1.0,)
    """Sizes at which images are shown to the networks, as factors of their own, in equal shares."""
    held_out: kind.Share = 0.0
    """Share of the images kept from training, for test.calibration to measure, in [0, 1)."""
    min_tissue_fraction: kind.Share = 0.0
    """Redraw crops with a smaller share of pixels brighter than tissue_threshold, in [0, 1)."""
    tissue_threshold: kind.Share = 0.005
    """Grey value in [0, 1] above which a pixel counts as tissue."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """An unreadable or all-black training image is skipped and counted, or stops the run."""
    cache_mb: Annotated[int, kind.AtLeast(0, 10**8)] = 0
    """Memory for decoded training images in MiB, in each worker, and half the machine's in all; 0
    reads files at each use."""
    select_crops: Annotated[int, kind.AtLeast(0, 2**16)] = 64
    """Fixed training crops on which every checkpoint's completion error is measured; 0 = none."""
    channels_last: bool = False
    """NHWC tensors, same numbers: for GPUs with tensor cores. A CPU takes no notice: there it is
    slower for the critics, and the generator chooses by itself."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "auto"] = "fp32"
    """fp32 rounds nothing; tf32 lets a GPU round products, as torch by itself does in convolutions;
    bf16, fp16: the generator's passes in 16 bits (critics, losses, gradient penalty and weights
    stay fp32; in fp16 the generator's gradients are scaled); auto: tf32 on a GPU, bf16 on a
    processor that multiplies it, else fp32."""
    accumulate: kind.Steps = 1
    """Parts in which a batch is worked through one by one: less memory, same gradients."""
    compile: bool = False
    """Compile the generator with torch.compile: minutes at the start; CPUs need a C++ compiler."""

    def __post_init__(self) -> None:
        check_fields(self, "train")
        check_shapes("train.image_shape", self.image_shape, self.mask_shape)
        check_scales("train.scales", self.scales)
        for axis in (0, 1):
            room = self.image_shape[axis] - 2 * self.margin[axis] - self.mask_shape[axis]
            expected = "must leave room for the box in the crop"
            require(room > 0, "train.margin", self.margin, expected)
            shrinks = self.max_delta_shape[axis] < self.mask_shape[axis]
            expected = f"must be below mask_shape, {list(self.mask_shape)}"
            require(shrinks, "train.max_delta_shape", self.max_delta_shape, expected)
        expected = "must be hole (the published code names mosaic but does not implement it)"
        require(self.mask_type == "hole", "train.mask_type", self.mask_type, expected)
        whole = self.batch_size % self.accumulate == 0
        expected = f"must divide train.batch_size, {self.batch_size}"
        require(whole, "train.accumulate", self.accumulate, expected)
        if self.n_steps is not None:
            fits = self.warmup_steps <= max(self.n_steps, SHIPPED_WARMUP)
            expected = f"must not be more than the run, train.n_steps = {self.n_steps}"
            require(fits, "train.warmup_steps", self.warmup_steps, expected)


@dataclass(frozen=True)
class TestConfig:
    """`test:` the sliding window, the completions and what is saved."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    droprate: kind.Share = 0.5
    """Probability that a channel is dropped while completing, in [0, 1)."""
    heatmap_metrics: tuple[Metric, ...] = ("MCD_image", "MCD_feature")
    """Distances between the hole and its completions; MCD = smallest, MeanCD, MedCD; no_dropout =
    image distance to the one completion without dropout. Larger = more anomalous."""
    heatmap_M_inpaint: kind.Samples = 10
    """M, completions per window."""
    parallel_batchsize: kind.BatchSize = 32
    """Windows per batch at most; bounds memory, does not change results."""
    patch_shape: tuple[kind.Pixels, kind.Pixels, int] = (256, 256, 1)
    """Window: height, width (pixels, multiples of 16), channels."""
    mask_shape: tuple[kind.Pixels, kind.Pixels] = (128, 128)
    """Hole in the window's centre: height, width in pixels, multiples of 16."""
    patch_stride: kind.Pixels = 32
    """Pixels between neighbouring windows."""
    save_heatmap_data: bool = True
    """Write the heatmaps as tensors (data/*.pt)."""
    save_heatmap_plots: bool = True
    """Write the heatmaps as pictures (plots/*.png)."""
    save_progressive_heatmap: bool = False
    """Rewrite the picture of a heatmap while it is being computed."""
    log_compute_times: bool = False
    """Write seconds per image and window to compute_times.csv."""
    only_check_nonblack_pixels: bool = False
    """Do not complete windows whose hole has too little tissue; they score 0."""
    min_tissue_fraction: kind.Share = 0.0
    """Share of the hole's pixels that must be tissue, in [0, 1); 0 = any pixel at all. What is
    mirrored at the image's border is none."""
    tissue_threshold: kind.Share = 0.005
    """Grey value in [0, 1] above which a pixel counts as tissue."""
    heatmap_type: Literal["nonaveraged", "averaged", "averaged_hole"] = "nonaveraged"
    """One score per grid point, upsampled; or each pixel the mean score of the windows, or of the
    holes, that cover it."""
    heatmap_localise: Annotated[float, kind.Range(0, 1)] = 0.0
    """Part of a window's score that goes where in its hole the completion is off, in proportion to
    the squared difference, in [0, 1]; the rest is the same all over the hole. Above 0, a
    calibration also weighs each part of the hole by how unlikely its difference is there."""
    heatmap_sign: Literal["both", "brighter", "darker"] = "both"
    """Count only what is brighter than its completion, or what is darker, as far as one knows of
    which kind lesions are."""
    heatmap_smooth: Annotated[float, kind.Range(0, 4)] = 0.0
    """Standard deviation of the Gaussian that smooths the heatmap at last, in sides of the hole."""
    heatmap_alignment: Literal["stretched", "centred"] = "stretched"
    """centred: scores sit at their window's centre, the image is padded by reflection so that
    windows reach its border. stretched: the grid of windows that fit, stretched over the image."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """An unreadable image is skipped and counted, or stops the run."""
    engine: Literal["fast", "plain"] = "fast"
    """plain runs the whole network for every completion; fast gives the same numbers sooner."""
    precision: Literal["fp32", "bf16", "tf32"] = "fp32"
    """bf16 rounds weights and activations (fast engine), and is slower where the processor has no
    products of it, which is said; tf32 lets a GPU round products."""
    share_dropout_masks: bool = False
    """Drop the same channels in all windows of an image: for GPUs, where it is faster."""
    compile: bool = False
    """Compile the attention with torch.compile: some seconds at the start."""
    calibration: Literal["off", "auto", "knn"] = "off"
    """knn: -log10 of the chance that a normal window with such surroundings is so far from its
    completions (training measures normal windows at its end, or --calibrate); off: the distance;
    auto: knn where the checkpoint has such windows (--calibrate measures them), else off."""
    calibration_windows: Annotated[int, kind.AtLeast(20, 10**6)] = 6000
    """Windows of normal images that are measured for it, at each scale."""
    specificity: Specificity | None = None
    """Share of normal images to be called normal, in (0, 1): training ends by measuring from which
    score on an image is abnormal, on images that it held out; none = it does not."""
    feature_space: Literal["critic"] | kind.PathText = "critic"
    """Where the `_feature` metrics measure: the local critic's last layer, or the middle layers of
    a pretrained network, whose weights are in this file (see docs/data.md)."""
    scales: tuple[Scale, ...] = (1.0,)
    """Sizes at which an image is scored, as factors of its own: the heatmap is their mean."""
    refine: Literal["off"] | Annotated[int, kind.AtLeast(2, 2**14)] = "off"
    """K: score every K-th window first, the rest only around the upper fifth; else interpolate."""

    def __post_init__(self) -> None:
        check_fields(self, "test")
        check_shapes("test.patch_shape", self.patch_shape, self.mask_shape)
        fits = self.engine == "fast" or self.precision != "bf16"
        require(fits, "test.precision", self.precision, "bf16 needs test.engine: fast")
        check_scales("test.scales", self.scales)
        stays = self.specificity is None or self.calibration != "auto"
        expected = "with it test.calibration is knn or off: auto would change the scores afterwards"
        require(stays, "test.specificity", self.specificity, expected)
        one = self.calibration == "knn" or len(self.scales) == 1
        expected = "distances at several scales compare only with test.calibration: knn"
        require(one, "test.scales", self.scales, expected)
        over_holes = self.heatmap_type == "averaged_hole"
        even = over_holes or self.heatmap_localise == 0
        expected = "above 0 needs test.heatmap_type: averaged_hole"
        require(even, "test.heatmap_localise", self.heatmap_localise, expected)
        both = over_holes or self.heatmap_sign == "both"
        expected = "needs test.heatmap_type: averaged_hole"
        require(both, "test.heatmap_sign", self.heatmap_sign, expected)
        metrics = self.heatmap_metrics
        distinct = 0 < len(metrics) == len(set(metrics))
        require(distinct, "test.heatmap_metrics", metrics, "needs one metric or more, each once")


@dataclass(frozen=True)
class GeneratorConfig:
    """`netG:` the inpainting generator and where its channels drop."""

    input_dim: int = 1
    """Image channels: 1 (grey) or 3 (RGB)."""
    ngf: Annotated[int, kind.AtLeast(2, 2**12)] = 32
    """Base width: channels of the first layer; an even number."""
    droprate: kind.Share | None = None
    """Dropout while training, in [0, 1); none = no dropout."""
    dropout_type: Literal["2D", "1D"] = "2D"
    """2D drops whole channels, 1D single elements."""
    dropout_which: Literal["CUSTOM", "ALL", "COARSE", "FINE"] = "CUSTOM"
    """Layers that drop while completing: those of the custom lists, all, or one stage's."""
    custom_drop_layers_coarse: tuple[kind.Text, ...] = COARSE_TRUNK
    """Parts of names of coarse layers; a layer drops if its name contains one of them."""
    custom_drop_layers_fine: tuple[kind.Text, ...] = PUBLISHED_FINE
    """The same for the fine stage. The published entries start with "self.", so match nothing."""
    strip_self_prefix: bool = False
    """Read "self.conv3" in the lists as conv3, which the published code does not (P2)."""
    train_drop_layers: Literal["all", "as_in_test"] = "all"
    """Layers that drop while training, if droprate is set: every one, or dropout_which's."""
    conv_type: Literal["plain", "gated"] = "plain"
    """gated: ELU(feature) * sigmoid(gate), Yu et al. 2019, arXiv 1806.03589."""
    stages: Literal["coarse_fine", "coarse"] = "coarse_fine"
    """coarse leaves the fine stage with its attention out: small models, small windows."""
    dilations: tuple[Dilation, Dilation, Dilation, Dilation] = (2, 4, 8, 16)
    """Dilations of conv7_atrous … conv10_atrous, in pixels at 1/4 resolution."""
    output_clamp: Literal["hard", "leaky"] = "hard"
    """hard: no gradient where the output leaves [-1, 1]; leaky: the one that leads back."""
    elu: Literal["exact", "fast"] = "exact"
    """exact: torch's kernel; fast: exp instead of expm1, within 1e-7 of it."""
    attention_mask: Literal["first", "per_sample"] = "first"
    """Hole that the attention avoids: the first sample's for all (P4), or each its own."""

    def __post_init__(self) -> None:
        check_fields(self, "netG")
        require(self.input_dim in (1, 3), "netG.input_dim", self.input_dim, "must be 1 or 3")
        require(self.ngf % 2 == 0, "netG.ngf", self.ngf, "must be even")

    def dead_entries(self) -> dict[str, list[str]]:
        """Entries of the custom lists that match no layer of this generator, by key."""
        if self.dropout_which != "CUSTOM":
            return {}
        dead: dict[str, list[str]] = {}
        layers_of = {"coarse": COARSE_DROPPABLE, "fine": FINE_DROPPABLE}
        for stage in self.stages.split("_"):
            paths = [f"{stage}_generator.{layer}.dropout" for layer in layers_of[stage]]
            for entry in getattr(self, f"custom_drop_layers_{stage}"):
                part = entry.removeprefix("self.") if self.strip_self_prefix else entry
                if not any(part in path for path in paths):
                    dead.setdefault(f"netG.custom_drop_layers_{stage}", []).append(entry)
        return dead


@dataclass(frozen=True)
class CriticConfig:
    """`netD:` the local and the global critic."""

    input_dim: int = 1
    """Image channels; 1 with a colour generator means: completions are turned grey first."""
    ndf: kind.Channels = 32
    """Base width: channels of the first layer."""

    def __post_init__(self) -> None:
        check_fields(self, "netD")
        require(self.input_dim in (1, 3), "netD.input_dim", self.input_dim, "must be 1 or 3")


@dataclass(frozen=True)
class PicardConfig:
    """A whole PICARD settings file."""

    dataset_name: kind.NameText | None = None
    """Name used in output folders."""
    data_with_subfolder: bool = False
    """Also take images from the data folder's subfolders."""
    train_data_path: kind.PathText | None = None
    """Folder of normal training images."""
    test_data_path: kind.PathText | None = None
    """Folder of images to score."""
    calibration_data_path: kind.PathText | None = None
    """Folder of normal images that test.calibration measures; none = those that train.held_out
    keeps from training, or else those of training."""
    white_value: kind.WhiteValue | None = None
    """Stored value that means white in files of more bits, e.g. 4095; none = the type's largest."""
    window: Window = "auto"
    """What grey images of more than 8 bits show black and white: as the file says, [level, width]
    in its values, or percentiles of it."""
    flatten: kind.PositiveShare | None = None
    """Take slow changes of brightness and colour off every image (`common.shading`): standard
    deviation of the blur that is taken off, as a share of the shorter side; none = do not. What is
    brighter than test.tissue_threshold before is tissue, afterwards, too."""
    slices: kind.SliceRule = "all"
    """Slices used of files that hold several: all, middle or every_N."""
    expname: kind.NameText = "PICARD-train"
    """Name of the experiment, used in output folders."""
    checkpoints_dir: kind.PathText = "checkpoints"
    """Folder for run folders: <checkpoints_dir>/<dataset_name>/<mask_type>_<expname>/."""
    logs_dir: kind.PathText = "logs"
    """Folder for TensorBoard events, one subfolder per run."""
    heatmaps_dir: kind.PathText = "heatmaps"
    """Folder for heatmaps: <heatmaps_dir>/<dataset_name>/dropout/<time>/."""
    cuda: bool = True
    """Kept for published files: use a GPU if there is one; device decides where it is not auto."""
    gpu_ids: tuple[Annotated[int, kind.AtLeast(0, 999)], ...] = (0,)
    """Kept for published files: the first is used (where device is auto); torchrun uses several."""
    device: kind.DeviceText = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    num_workers: kind.Processes = 4
    """Processes that read training images; 0 = read in the training process."""
    peer_timeout: kind.PeerSeconds = kind.PEER_TIMEOUT
    """Seconds within which all processes of a training (torchrun) have to come."""
    seed: kind.Seed = 1337
    """Seed of everything random."""
    coarse_l1_alpha: kind.Weight = 1.2
    """Weight of the coarse stage within both L1 terms."""
    l1_loss_alpha: kind.Weight = 1.2
    """Weight of the L1 inside the box."""
    ae_loss_alpha: kind.Weight = 1.2
    """Weight of the L1 outside the hole."""
    global_wgan_loss_alpha: kind.Weight = 1.0
    """Weight of the global critic beside the local one."""
    gan_loss_alpha: kind.Weight = 0.001
    """Weight of the adversarial term in the generator's loss."""
    wgan_gp_lambda: kind.Weight = 10.0
    """Weight of the gradient penalty in the critics' loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)
    netG: GeneratorConfig = field(default_factory=GeneratorConfig)
    netD: CriticConfig = field(default_factory=CriticConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_window(self.window, self.white_value)
        channels = self.netG.input_dim
        expected = f"the channels must equal netG.input_dim = {channels}"
        crop, window = self.train.image_shape, self.test.patch_shape
        require(crop[2] == channels, "train.image_shape", crop, expected)
        require(window[2] == channels, "test.patch_shape", window, expected)
        critic = self.netD.input_dim
        expected = f"must be 1 or netG.input_dim = {channels}"
        require(critic in (1, channels), "netD.input_dim", critic, expected)
        expected = "needs one GPU; for none, cuda: false"
        require(len(self.gpu_ids) > 0, "gpu_ids", self.gpu_ids, expected)

    def flattening(self) -> Flattening | None:
        """What is done to every image after reading; None where flatten is."""
        if self.flatten is None:
            return None
        return Flattening(self.flatten, self.test.tissue_threshold)

    def seen_tissue(self, threshold: float) -> float:
        """Grey value above which a pixel is tissue in images as the networks see them.

        threshold: the same in images as they are read.
        """
        return threshold if self.flatten is None else FLAT_TISSUE

    def seen_test(self) -> TestConfig:
        """`test`, with the tissue_threshold of images as the networks see them."""
        return replace(self.test, tissue_threshold=self.seen_tissue(self.test.tissue_threshold))

    def warnings(self) -> list[str]:
        """What these settings say without effect, one sentence each with the remedy."""
        messages = [
            f"{key}: {', '.join(entries)} match no layer, so these do not drop channels, as in the "
            f"published code. netG.strip_self_prefix: true makes them count."
            for key, entries in self.netG.dead_entries().items()
        ]
        if len(self.gpu_ids) > 1 and "LOCAL_RANK" not in os.environ:
            count, ids = len(self.gpu_ids), ",".join(map(str, self.gpu_ids))
            messages.append(
                f"gpu_ids: {list(self.gpu_ids)}: one process uses one GPU, the first. For {count}, "
                f"type: CUDA_VISIBLE_DEVICES={ids} torchrun --nproc_per_node={count} train.py ..."
            )
        return messages
