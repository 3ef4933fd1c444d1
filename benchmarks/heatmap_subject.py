"""What the heatmap benchmark measures: networks and windows, random or of a trained checkpoint.

N windows, C channels, h x w window, M completions.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import ConfigError
from common.image_folders import list_images
from common.images import ImageError, read_image, to_signed
from common.random_numbers import generator_for
from inpainter.completion import dropout_of
from inpainter.heatmap import windows_to_score
from inpainter.networks.critic import Critic
from inpainter.networks.dropout import ChannelMasks
from inpainter.networks.generator import Generator
from inpainter.networks.loading import load_generator, load_local_critic
from inpainter.settings import CriticConfig, GeneratorConfig, PicardConfig, TestConfig
from inpainter.snapshots import resolve_step
from inpainter.windows import cut_windows, pad_image, window_grid

METRICS = ("MCD_image", "MCD_feature")


@dataclass(frozen=True)
class Subject:
    """Networks on a device, their settings, and batches of windows (N, C, h, w) in [-1, 1]."""

    config: PicardConfig
    generator: Generator
    critic: Critic
    batches: tuple[Tensor, ...]

    def parts(self) -> tuple:
        """What every scorer is made of."""
        return self.generator, self.critic, METRICS, self.config.test.mask_shape

    def masks(self, n: int, seed: int) -> ChannelMasks:
        """Channel dropout of the settings' layers, drawn for each of n windows."""
        netG, test = self.config.netG, self.config.test
        return dropout_of(self.generator, netG, test, seed, "benchmark").masks(range(n))


def random_settings(window: int, M: int, ngf: int) -> PicardConfig:
    """The published settings for a window of other size and networks of other width."""
    shape, hole = (window, window, 1), (window // 2, window // 2)
    return PicardConfig(
        test=TestConfig(patch_shape=shape, mask_shape=hole, heatmap_M_inpaint=M),
        netG=GeneratorConfig(ngf=ngf),
        netD=CriticConfig(ndf=ngf),
    )


def random_networks(
    config: PicardConfig, gain: float, device: torch.device
) -> tuple[Generator, Critic]:
    """Networks with weights of He's deviation times `gain`: torch's own would lose the signal."""
    torch.manual_seed(0)
    generator = Generator(config.netG)
    critic = Critic(config.netD.input_dim, config.netD.ndf, config.test.mask_shape)
    for parameter in [*generator.parameters(), *critic.parameters()]:
        std = gain * math.sqrt(2 / parameter[0].numel()) if parameter.ndim == 4 else 0.1
        torch.nn.init.normal_(parameter, std=std)
    return generator.to(device).eval(), critic.to(device).eval()


def random_subject(
    config: PicardConfig, gain: float, batch: int, count: int, device: torch.device
) -> Subject:
    """Random networks and `count` smooth random windows."""
    networks = random_networks(config, gain, device)
    h, w, channels = config.test.patch_shape
    noise = torch.randn(count, channels, h, w)
    windows = (3 * F.avg_pool2d(noise, 7, 1, 3)).clamp(-1, 1)
    return Subject(config, *networks, windows.to(device).split(batch))


def trained_subject(
    config: PicardConfig,
    checkpoint: tuple[Path, int | str],
    image_dir: Path,
    batch: int,
    count: int,
    device: torch.device,
) -> Subject:
    """A checkpoint (folder, step) and `count` windows of images; ELU as published, torch's own.

    Raises ConfigError where completions do not differ, or not by channel dropout.
    """
    if config.test.droprate == 0 or config.netG.dropout_type == "1D":
        raise ConfigError("the benchmark needs test.droprate > 0 and netG.dropout_type: 2D")
    config = dataclasses.replace(config, netG=dataclasses.replace(config.netG, elu="exact"))
    step = resolve_step(*checkpoint, ("gen", "dis"))
    generator = load_generator(checkpoint[0], step, config.netG).to(device)
    critic = load_local_critic(checkpoint[0], step, config).to(device)
    windows = windows_of(config, image_dir, count)
    return Subject(config, generator, critic, windows.to(device).split(batch))


def windows_of(config: PicardConfig, image_dir: Path, count: int) -> Tensor:
    """Windows that the settings would score, evenly from the images: (count, C, h, w)."""
    paths = list_images(image_dir, recursive=config.data_with_subfolder)
    test, found = config.test, []
    for path in paths:
        image = read_image(path, config.netG.input_dim)
        hw = (image.shape[1], image.shape[2])
        grid = window_grid(hw, test.patch_shape[:2], test.patch_stride, test.heatmap_alignment)
        padded = pad_image(image, grid)
        numbers = windows_to_score(padded, grid, test)
        order = torch.randperm(len(numbers), generator=generator_for("benchmark", path.name))
        chosen = [numbers[i] for i in order[: math.ceil(count / len(paths))]]
        if chosen:
            found.append(cut_windows(padded, grid, chosen))
    total = sum(map(len, found))
    if total < count:
        raise ImageError(f"{image_dir}: {total} windows with tissue; lower --pairs or --batch")
    return to_signed(torch.cat(found)[:count])
