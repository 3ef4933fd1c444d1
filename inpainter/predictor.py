"""The Python API: heatmaps of single images from a trained checkpoint.

predictor = load_predictor("checkpoints/my_scans", step="best", config="configs/default.yaml")
heatmaps = predictor("scan.dcm")  # {"MCD_image": (H, W) tensor, ...}
"""

import argparse
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import (
    CheckpointError,
    checkpoint_path,
    content_hash,
    require_finite_weights,
    stream_hash,
)
from common.cli import as_yaml
from common.config import load_config, resolve_path
from common.config_types import ConfigError
from common.devices import resolve_device, supports_bf16
from common.files import escaped
from common.images import read_image
from common.notices import notice
from inpainter.calibration import Calibrations, load_calibrations
from inpainter.completion import WindowScorer, dropout_of, spaces_of
from inpainter.fast.scorer import FastScorer
from inpainter.heatmap import Heatmaps, ScaledHeatmaps, Workers, one_worker, score_at_scales
from inpainter.networks.critic import Critic
from inpainter.networks.dropout import ImageDropout
from inpainter.networks.loading import load_generator, load_local_critic
from inpainter.networks.pretrained import PretrainedFeatures, load_pretrained
from inpainter.settings import Metric, PicardConfig, TestConfig
from inpainter.snapshots import OpenFiles, operating_point_path, use_step
from inpainter.windows import check_stride

LOG = logging.getLogger(__name__)
PIXEL_KEYS = {"flatten", "white_value", "window"}
"""Settings that say which pixels a file becomes."""


@dataclass(frozen=True)
class Predictor:
    """Networks of one checkpoint on a device, and the settings of their heatmaps."""

    config: PicardConfig
    """With what test.calibration: auto comes to."""
    scorer: WindowScorer | FastScorer
    device: torch.device
    source: str
    """Folder and step of the weights, in words."""
    weights: dict[str, str]
    """SHA-256 of the checkpoint's files, by role; feature_space is that of the setting's."""
    calibrations: Calibrations = field(default_factory=dict)
    """By scale; none where scores are distances."""
    operating_point: Path | None = None
    """Where the step's operating point is, if there is one."""
    step: int | None = None
    """Of the checkpoint; None where the networks are from none."""

    def __call__(
        self, image: str | Path | np.ndarray | Tensor, *, name: str | None = None
    ) -> dict[Metric, Tensor]:
        """Heatmaps by metric: (H, W) float32 on the CPU, larger = more anomalous.

        image: a file, a slice of one (scan.dcm#017), or floats in [0, 1], (H, W) or (C, H, W).
        name: what the dropout is drawn for. predict_heatmap.py names an image by its path below the
        folder of images; None = the file's name, and "" for an array. Raises ImageError for a file
        that cannot be read, ValueError for an array of another shape, type or range, WindowError
        where no window fits.
        """
        if name is None:
            name = Path(image).name if isinstance(image, str | Path) else ""
        *_, last = self.score_image(self.pixels_of(image), name)
        return last.heatmaps

    def score_image(
        self, pixels: Tensor, name: str, workers: Workers = one_worker
    ) -> Iterator[Heatmaps | ScaledHeatmaps]:
        """Yields what is known after each batch of windows, and at last the whole.

        pixels: (C, H, W) in [0, 1]. See `inpainter.heatmap.score_image`.
        """
        (h, w), (H, W) = pixels.shape[1:], self.config.test.patch_shape[:2]
        if (h < H or w < W) and self.config.test.heatmap_alignment == "centred":
            message = f"{escaped(name)}: {h} x {w} pixels are less than the window's {H} x {W}, "
            message += "the rest of which is their mirror image"
            notice("image smaller than the window mirrored", message)
        parts = (self.scorer, self.config.seen_test(), self.dropout(name), self.device)
        return score_at_scales(pixels, *parts, self.calibrations, workers)

    def dropout(self, name: str) -> ImageDropout | None:
        """What drops while completing the windows of an image of this name."""
        config = self.config
        # Random numbers depend on the name, which need not be UTF-8.
        parts = (config.netG, config.test, config.seed, escaped(name))
        return dropout_of(self.scorer.generator, *parts)

    def pixels_of(self, image: str | Path | np.ndarray | Tensor) -> Tensor:
        """An image as the networks take it: (C, H, W) float32 in [0, 1] on the CPU, flattened."""
        read = self._read(image)
        flattening = self.config.flattening()
        return read if flattening is None else flattening(read)

    def _read(self, image: str | Path | np.ndarray | Tensor) -> Tensor:
        """Pixels of a file, or an array that is checked."""
        channels = self.config.netG.input_dim
        if isinstance(image, str | Path):
            shown = {"white_value": self.config.white_value, "window": self.config.window}
            return read_image(Path(image), channels, **shown)
        if isinstance(image, np.ndarray):
            image = np.ascontiguousarray(image)  # torch takes no reversed axes
        given = torch.as_tensor(image)
        pixels = given[None] if given.ndim == 2 else given
        if pixels.ndim != 3 or pixels.shape[0] != channels or pixels.numel() == 0:
            expected = "(H, W) or (1, H, W)" if channels == 1 else f"({channels}, H, W)"
            raise ValueError(f"image: expected {expected} pixels, got {tuple(given.shape)}")
        if not pixels.is_floating_point():
            raise ValueError(
                f"image: expected floats in [0, 1], got {pixels.dtype}; divide by the value that "
                "means white"
            )
        pixels = pixels.detach().cpu().float()
        low, high = (bound.item() for bound in pixels.aminmax())
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"image: expected values in [0, 1], got {low:.4g} to {high:.4g}")
        return pixels

    def require_finite_weights(self) -> None:
        """Raises CheckpointError where weights are NaN or infinite: every score would be."""
        for network in (self.scorer.generator, self.scorer.feature_network):
            if network is not None:
                require_finite_weights(network.state_dict(), self.source)


def load_predictor(
    checkpoint_dir: str | Path,
    step: int | str = "latest",
    config: PicardConfig | str | Path | None = None,
    device: str | None = None,
) -> Predictor:
    """The networks of a checkpoint, ready to make heatmaps.

    checkpoint_dir: folder with gen_%08d.pt and dis_%08d.pt. step: a number, `latest` or `best`.
    config: settings or their YAML file; None = the config.yaml that training wrote there. device:
    auto, cpu, cuda, cuda:1 or mps; None = as the settings say.
    Raises CheckpointError, ConfigError, RuntimeSetupError and WindowError, all with their remedy.
    """
    folder = Path(checkpoint_dir)
    if not isinstance(config, PicardConfig):
        config = load_config(PicardConfig, Path(config or folder / "config.yaml"))
    if device is not None:
        config = dataclasses.replace(config, device=device)
    predictor = open_checkpoint(config, folder, step)
    predictor.require_finite_weights()
    return predictor


def settings_beside_checkpoint(arguments: argparse.Namespace) -> None:
    """Makes --config the config.yaml that training wrote to --checkpoint_dir, if none is given."""
    if arguments.config is None and arguments.checkpoint_dir is not None:
        arguments.config = arguments.checkpoint_dir / "config.yaml"


def open_checkpoint(
    config: PicardConfig, folder: Path, wanted: int | str, *, option: str | None = None
) -> Predictor:
    """The predictor of a step, whose weights are not yet checked; option: the flag for `wanted`.

    A step that a training beside deletes is looked up again, and `latest` passes over a damaged
    one; see `inpainter.snapshots.use_step`.
    """
    check_stride(config.test)
    say_other_pixels(config, folder)
    device = resolve_device(config.device, allow_gpu=config.cuda, gpu=config.gpu_ids[0])
    roles = ("gen", "dis") if feature_space(config.test) == "critic" else ("gen",)
    opened = partial(_predictor_of, config, folder, device)
    predictor = use_step(folder, wanted, roles, opened, option=option)
    path = checkpoint_path(folder, "calibration", predictor.step)
    config = with_calibration_that_is_there(config, path)
    predictor = dataclasses.replace(predictor, config=config)
    if config.test.calibration == "off":
        return predictor
    calibrations = load_calibrations(path, config, predictor.weights)
    weights = predictor.weights | {"calibration": content_hash(path)}
    return dataclasses.replace(predictor, calibrations=calibrations, weights=weights)


def with_calibration_that_is_there(config: PicardConfig, path: Path) -> PicardConfig:
    """The settings with knn or off instead of test.calibration: auto, which is said.

    path: where the step's calibration is, if there is one.
    """
    if config.test.calibration != "auto":
        return config
    if path.is_file():
        calibration = "knn"
        LOG.info("Scores are calibrated: %s.", path)
    else:
        calibration = "off"
        LOG.info(
            "Scores are distances, for there is no %s. predict_heatmap.py --calibrate measures "
            "normal images for it, which finds more.",
            path,
        )
    test = dataclasses.replace(config.test, calibration=calibration)
    return dataclasses.replace(config, test=test)


def say_other_pixels(config: PicardConfig, folder: Path) -> None:
    """Warns where files become other pixels than in the training that wrote to this folder."""
    trained = settings_in(folder)
    for key in sorted(PIXEL_KEYS) if trained is not None else ():
        here, there = getattr(config, key), getattr(trained, key)
        if here != there:
            LOG.warning(
                "%s: %s here, and %s where the networks were trained, %s: they know no such "
                "images. Set %s=%s, unless these come from another scanner that needs it.",
                *(key, as_yaml(here), as_yaml(there), folder / "config.yaml", key, as_yaml(there)),
            )


def settings_in(folder: Path) -> PicardConfig | None:
    """What a training, or a prediction, wrote to its folder; None where nothing can be read."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        return load_config(PicardConfig, path)
    except ConfigError as error:
        LOG.warning("Not known which settings were used: %s", error)
        return None


def _predictor_of(
    config: PicardConfig, folder: Path, device: torch.device, step: int, files: OpenFiles
) -> Predictor:
    """The predictor of a step, from its open files."""
    space = feature_space(config.test)

    def hashes() -> dict[str, str]:
        found = {role: stream_hash(file) for role, file in files.items()}
        return found | ({"feature_space": content_hash(space)} if isinstance(space, Path) else {})

    weights = hashes()
    scorer = build_scorer(config, folder, step, device, files)
    if weights != hashes():
        path = checkpoint_path(folder, "gen", step)
        raise CheckpointError(f"{path} keeps changing. Wait until it is whole, and run again.")
    source = f"{folder.resolve()} step {step}"
    point = operating_point_path(folder, step)
    return Predictor(config, scorer, device, source, weights, operating_point=point, step=step)


def feature_space(test: TestConfig) -> Literal["critic"] | Path | None:
    """Where the `_feature` metrics measure; None without such metrics. Raises ConfigError.

    A file is that of a pretrained network's weights; see `inpainter.networks.pretrained`.
    """
    if "feature" not in spaces_of(test.heatmap_metrics):
        return None
    if test.feature_space == "critic":
        return "critic"
    path = resolve_path(test.feature_space, "test.feature_space")
    if not path.is_file():
        raise ConfigError(
            f"test.feature_space: there is no file {path}. Give the weights of a pretrained "
            "network, which are never downloaded, or critic.",
            key="test.feature_space",
        )
    return path


def build_scorer(
    config: PicardConfig, folder: Path, step: int, device: torch.device, files: OpenFiles
) -> WindowScorer | FastScorer:
    """The networks of a step, from its open files, on the device, in the settings' engine."""
    test = config.test
    generator = load_generator(folder, step, config.netG, files["gen"])
    generator = generator.to(device, memory_format=torch.channels_last)
    features: Critic | PretrainedFeatures | None = None
    space = feature_space(test)
    if space is not None:
        critic = space == "critic"
        features = (
            load_local_critic(folder, step, config, files["dis"])
            if critic
            else load_pretrained(space)
        )
        features = features.to(device, memory_format=torch.channels_last)
    parts = (generator, features, test.heatmap_metrics, test.mask_shape)
    if test.engine == "plain":
        return WindowScorer(*parts)
    if test.precision == "bf16" and not supports_bf16(device):
        LOG.warning(
            "test.precision: bf16: %s has no such products and emulates them, which is slower and "
            "less exact than fp32. Use test.precision: fp32 here.",
            "this processor" if device.type == "cpu" else device,
        )
    return FastScorer(*parts, precision=test.precision, compiled=test.compile)
