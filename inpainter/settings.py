"""PICARD's settings: one frozen dataclass per section of the YAML file.

The defaults are what the published code does when its file lacks the key; improvements are keys
that `configs/default.yaml` sets. Shapes are (height, width[, channels]) in pixels.
"""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.config import PathText, check_fields, require
from common.config_rules import (
    AtLeast,
    Channels,
    DeviceText,
    NameText,
    Processes,
    Seed,
    Share,
    Weight,
    WhiteValue,
)
from inpainter.run_settings import Metric, TestConfig, TrainConfig

__all__ = [
    "CriticConfig",
    "GeneratorConfig",
    "Metric",
    "PicardConfig",
    "TestConfig",
    "TrainConfig",
]

COARSE_TRUNK = (
    "conv2_downsample",
    "conv3",
    "conv4_downsample",
    "conv5",
    "conv6",
    "conv7_atrous",
    "conv8_atrous",
    "conv9_atrous",
    "conv10_atrous",
)
ATTENTION_BRANCH = (
    "pmconv1",
    "pmconv2_downsample",
    "pmconv3",
    "pmconv4_downsample",
    "pmconv5",
    "pmconv6",
    "pmconv9",
    "pmconv10",
)
JOINT_DECODER = tuple(f"allconv{i}" for i in range(11, 17))
COARSE_DROPPABLE = (*COARSE_TRUNK, *(f"conv{i}" for i in range(11, 17)))
FINE_DROPPABLE = (*COARSE_TRUNK, *ATTENTION_BRANCH, *JOINT_DECODER)
Dilation = Annotated[int, AtLeast(1, 1024)]


@dataclass(frozen=True)
class GeneratorConfig:
    """`netG:` the inpainting generator and where its channels drop."""

    input_dim: int = 1
    """Image channels: 1 (grey) or 3 (RGB)."""
    ngf: Annotated[int, AtLeast(2, 2**12)] = 32
    """Base width: channels of the first layer; an even number."""
    droprate: Share | None = None
    """Dropout while training, in [0, 1); none = no dropout."""
    dropout_type: Literal["2D", "1D"] = "2D"
    """2D drops whole channels, 1D single elements."""
    dropout_which: Literal["CUSTOM", "ALL", "COARSE", "FINE"] = "CUSTOM"
    """Layers that drop while completing: those of the custom lists, all, or one stage's."""
    custom_drop_layers_coarse: tuple[str, ...] = COARSE_TRUNK
    """Parts of names of coarse layers; a layer drops if its name contains one of them."""
    custom_drop_layers_fine: tuple[str, ...] = tuple(f"self.{name}" for name in FINE_DROPPABLE)
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
    """exact: torch's kernel; fast: exp instead of expm1, within 1e-7 and about twice as fast."""
    attention_mask: Literal["first", "per_sample"] = "first"
    """Hole that the attention avoids: the first sample's for all (P4), or each its own."""

    def __post_init__(self) -> None:
        check_fields(self, "netG")
        require(self.input_dim in (1, 3), "netG.input_dim", self.input_dim, "must be 1 or 3")
        require(self.ngf % 2 == 0, "netG.ngf", self.ngf, "must be even")

    def dead_entries(self) -> dict[str, list[str]]:
        """Entries of the custom lists that match no layer of this generator, by key."""
        stages = {"coarse": COARSE_DROPPABLE}
        if self.stages == "coarse_fine":
            stages["fine"] = FINE_DROPPABLE
        dead: dict[str, list[str]] = {}
        for stage, layers in stages.items():
            paths = [f"{stage}_generator.{layer}.dropout" for layer in layers]
            entries = getattr(self, f"custom_drop_layers_{stage}")
            for entry in entries if self.dropout_which == "CUSTOM" else ():
                part = entry.removeprefix("self.") if self.strip_self_prefix else entry
                if not any(part in path for path in paths):
                    dead.setdefault(f"netG.custom_drop_layers_{stage}", []).append(entry)
        return dead


@dataclass(frozen=True)
class CriticConfig:
    """`netD:` the local and the global critic."""

    input_dim: int = 1
    """Image channels; 1 with a colour generator means: completions are turned grey first."""
    ndf: Channels = 32
    """Base width: channels of the first layer."""

    def __post_init__(self) -> None:
        check_fields(self, "netD")
        require(self.input_dim in (1, 3), "netD.input_dim", self.input_dim, "must be 1 or 3")


@dataclass(frozen=True)
class PicardConfig:
    """A whole PICARD settings file."""

    dataset_name: NameText | None = None
    """Name used in output folders."""
    data_with_subfolder: bool = False
    """Also take images from the data folder's subfolders."""
    train_data_path: PathText | None = None
    """Folder of normal training images."""
    test_data_path: PathText | None = None
    """Folder of images to score."""
    white_value: WhiteValue | None = None
    """Stored value that means white in files of more bits, e.g. 4095; none = the type's largest."""
    expname: NameText = "PICARD-train"
    """Name of the experiment, used in output folders."""
    checkpoints_dir: PathText = "checkpoints"
    """Folder for run folders: <checkpoints_dir>/<dataset_name>/<mask_type>_<expname>/."""
    logs_dir: PathText = "logs"
    """Folder for TensorBoard events, one subfolder per run."""
    heatmaps_dir: PathText = "heatmaps"
    """Folder for heatmaps: <heatmaps_dir>/<dataset_name>/dropout/<time>/."""
    cuda: bool = True
    """Use a GPU if there is one (the published key; device decides where given)."""
    gpu_ids: tuple[Annotated[int, AtLeast(0, 999)], ...] = (0,)
    """Published key: the first is used; for several start with torchrun."""
    device: DeviceText = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    num_workers: Processes = 4
    """Processes that read training images; 0 = read in the training process."""
    seed: Seed = 1337
    """Seed of everything random."""
    coarse_l1_alpha: Weight = 1.2
    """Weight of the coarse stage within both L1 terms."""
    l1_loss_alpha: Weight = 1.2
    """Weight of the L1 inside the box."""
    ae_loss_alpha: Weight = 1.2
    """Weight of the L1 outside the hole."""
    global_wgan_loss_alpha: Weight = 1.0
    """Weight of the global critic beside the local one."""
    gan_loss_alpha: Weight = 0.001
    """Weight of the adversarial term in the generator's loss."""
    wgan_gp_lambda: Weight = 10.0
    """Weight of the gradient penalty in the critics' loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)
    netG: GeneratorConfig = field(default_factory=GeneratorConfig)
    netD: CriticConfig = field(default_factory=CriticConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        channels = self.netG.input_dim
        for key, shape in (
            ("train.image_shape", self.train.image_shape),
            ("test.patch_shape", self.test.patch_shape),
        ):
            expected = f"the channels must equal netG.input_dim = {channels}"
            require(shape[2] == channels, key, shape, expected)
        critic = self.netD.input_dim
        expected = f"must be 1 or netG.input_dim = {channels}"
        require(critic in (1, channels), "netD.input_dim", critic, expected)
        require(
            len(self.gpu_ids) > 0, "gpu_ids", self.gpu_ids, "needs one GPU; for none, cuda: false"
        )

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
