"""Dissolving images with a trained diffusion model.

    from diffusion_models.dissolve import load_dissolver

    dissolver = load_dissolver("runs/ddpm")  # a run folder or a model-N.pt, ours or published
    dissolved = dissolver(images, step=100)  # (B, 3, H, W) in [0, 1]

B images, C channels, H W pixels, T steps.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    load_module,
    load_tensors,
    require_finite_weights,
    require_state_dict,
)
from common.config import ConfigError
from common.config_types import require
from common.datasets import Fit
from common.devices import resolve_device
from common.image_sets import ImageSet, Sample
from diffusion_models.diffusion import GaussianDiffusion
from diffusion_models.settings import DissolveRange, Weights
from diffusion_models.unet import Unet, WeightStandardizedConv2d

LOG = logging.getLogger(__name__)
IMAGE_CHANNELS = 3
LARGEST_SIDE = 2**16
EMA_PREFIX = "ema_model."
"""Of averaged weights in a checkpoint: the layout of the published Trainer's EMA wrapper."""


class Dissolver(nn.Module):
    """dissolver(images, step): a frozen diffusion model's x0 estimate, one network call, no noise.

    It takes the model over: the kernels are standardised once, here, so it cannot train any more.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        *,
        image_size: int | None = None,
        dissolve_range: DissolveRange = "unit",
        path: Path | None = None,
        trained_with: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.diffusion = diffusion.eval().requires_grad_(False)
        for layer in diffusion.modules():
            if isinstance(layer, WeightStandardizedConv2d):
                layer.freeze()
        self.image_size = image_size
        """Side in pixels of the images it was trained on; None where the checkpoint lacks it."""
        self.dissolve_range = dissolve_range
        self.path = path
        """The file it was loaded from."""
        self.trained_with = trained_with
        """Settings that trained it, by section; None where the checkpoint lacks them."""

    def require_fitting(self, source: object, side: int, key: str) -> None:
        """Raises where it cannot take colour images of side² pixels, as the setting `key` says.

        source: its checkpoint, for the message. CheckpointError or ConfigError.
        """
        unet = self.diffusion.model
        if unet.channels != IMAGE_CHANNELS:
            raise CheckpointError(
                f"{source}: a diffusion model of {unet.channels} channels; images here have "
                f"{IMAGE_CHANNELS}. Pass one of train_eval_ddpm.py."
            )
        what = f"must be a multiple of {unet.shrinks_by} pixels, which the U-Net halves its maps to"
        require(side % unet.shrinks_by == 0, key, side, what)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.diffusion.betas.device

    @torch.no_grad()
    def forward(self, images: Tensor, step: int | Tensor) -> Tensor:
        """Dissolves images (B, C, H, W) in [0, 1] at a step in 0 … T - 1; larger dissolves more.

        step: one for all images, or (B,) integers. The result has the images' shape and device.
        With the range "unit", as published, the network sees [0, 1] though it was trained on
        [-1, 1], and the result, clamped to [-1, 1], is taken as it is. "signed" maps both ways, so
        the result is in [0, 1].
        """
        last = self.diffusion.steps - 1
        if isinstance(step, int) and not 0 <= step <= last:
            raise ValueError(f"the dissolving step must be in 0 … {last}, got {step}")
        t = torch.as_tensor(step, device=self.device).long().expand(images.shape[0])
        x = self.to_model_range(images.to(self.device))
        return self.from_model_range(self.diffusion.dissolve(x, t)).to(images.device)

    def to_model_range(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model is given them."""
        return 2 * images - 1 if self.dissolve_range == "signed" else images

    def from_model_range(self, images: Tensor) -> Tensor:
        """What the model returns, as images."""
        return (images + 1) / 2 if self.dissolve_range == "signed" else images


def load_dissolver(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    weights: Weights = "raw",
    dissolve_range: DissolveRange = "unit",
    dilation: int | None = None,
    image_size: int | None = None,
) -> Dissolver:
    """Loads a `model-N.pt` (ours or published), or the newest whole one of a run folder.

    device: auto, cpu, cuda, cuda:1 or mps. weights: "raw" as published, or "ema", the averaged
    ones. dissolve_range: see Dissolver.forward. dilation and image_size: what the caller expects;
    published checkpoints store neither (their dilation is 1 unless given here), ours store both.
    Widths are read off the weights. Raises CheckpointError where the file is no such checkpoint,
    lacks what is asked for, or contradicts it.
    """
    path, expected = Path(path), {"dilation": dilation, "image_size": image_size}
    if path.is_dir():
        path, checkpoint = read_newest(path, **expected)
    else:
        checkpoint = read_checkpoint(path, **expected)
    state = checkpoint_weights(checkpoint, weights, str(path))
    dilation = checkpoint.get("dilation") or dilation or 1
    diffusion = build_from_state(state, dilation=dilation, source=str(path))
    image_size = checkpoint.get("image_size") or image_size
    trained_with = checkpoint.get("config")
    dissolver = Dissolver(
        diffusion,
        image_size=image_size,
        dissolve_range=dissolve_range,
        path=path,
        trained_with=trained_with if isinstance(trained_with, Mapping) else None,
    )
    return dissolver.to(resolve_device(device) if isinstance(device, str) else device)


def checkpoints(folder: Path) -> dict[int, Path]:
    """The files model-N.pt of a run folder by N."""
    return {
        int(match[1]): path
        for path in Path(folder).glob("model-*.pt")
        if (match := re.fullmatch(r"model-(\d+)\.pt", path.name))
    }


def read_newest(folder: Path, **expected: int | None) -> tuple[Path, Mapping[str, Any]]:
    """The whole model-N.pt of the highest N, and its entries.

    Damaged ones after it are passed over with a warning. expected: see read_checkpoint. Raises
    CheckpointError where there is none, or none is whole.
    """
    by_number = checkpoints(folder)
    if not by_number:
        raise CheckpointError(
            f"no model-N.pt in {folder}. Pass the run folder of a train_eval_ddpm.py --mode train."
        )
    while True:
        path = by_number.pop(max(by_number))
        try:
            return path, read_checkpoint(path, **expected)
        except DamagedCheckpointError as error:
            if not by_number:
                raise
            LOG.warning("%s Passed over: the one before it is used.", error)


def read_checkpoint(
    path: Path, *, dilation: int | None = None, image_size: int | None = None
) -> Mapping[str, Any]:
    """The entries of a model-N.pt: the weights "model", and others by who wrote it.

    Raises CheckpointError for another file, and where it was trained with another dilation or image
    size than expected; None expects nothing. Published checkpoints store neither.
    """
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, Mapping) or "model" not in checkpoint:
        raise CheckpointError(
            f'{path} is no diffusion checkpoint: expected a dict with an entry "model" (model-N.pt '
            "of train_eval_ddpm.py)."
        )
    for key, expected in (("dilation", dilation), ("image_size", image_size)):
        stored, name = checkpoint.get(key), key.replace("_", " ")
        if stored is None:
            continue
        if type(stored) is not int or not 1 <= stored <= LARGEST_SIDE:
            raise CheckpointError(
                f"{path}: {name} is {str(stored)[:40]!r}, expected a whole number of 1 … "
                f"{LARGEST_SIDE}. The file is damaged; copy it again."
            )
        if expected is not None and stored != expected:
            raise CheckpointError(
                f"{path} was trained with {name} {stored}, but {expected} is asked for. Use "
                f"{stored}, or a diffusion model trained at {expected} (train_eval_ddpm.py "
                "--image_size)."
            )
    return checkpoint


def checkpoint_weights(
    checkpoint: Mapping[str, Any], weights: Weights, source: str
) -> dict[str, Tensor]:
    """The raw or the averaged weights of a model-N.pt, by name; CheckpointError if not finite."""
    entry = "model" if weights == "raw" else "ema"
    state = checkpoint.get(entry)
    if weights == "ema":
        state = {
            name.removeprefix(EMA_PREFIX): tensor
            for name, tensor in (state.items() if isinstance(state, Mapping) else ())
            if isinstance(name, str) and name.startswith(EMA_PREFIX)
        }
        if not state:
            raise CheckpointError(f'{source} has no averaged weights ("ema"). Use the raw ones.')
    state = require_state_dict(state, f"{source}: {entry}")
    require_finite_weights(state, f"{source}: {entry}")
    return state


def build_from_state(
    state: Mapping[str, Tensor], *, dilation: int, source: str
) -> GaussianDiffusion:
    """A diffusion model of the widths, depth and number of steps that a state dict has."""
    try:
        dim, channels = state["model.init_conv.weight"].shape[:2]
        depth = len({name.split(".")[2] for name in state if name.startswith("model.downs.")})
        mults = [state[f"model.downs.{i}.3.weight"].shape[0] // dim for i in range(depth)]
        steps = state["betas"].shape[0]
        with torch.device("meta"):  # sizes first: what does not fit costs no memory
            unet = Unet(dim, mults, channels, dilation)
            diffusion = GaussianDiffusion(unet, steps=steps)
    except (IndexError, KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{source} does not hold the weights of the published U-Net "
            f"({str(error).splitlines()[0]}). Expected keys model.init_conv.weight, model.downs.…, "
            "betas."
        ) from error
    diffusion = diffusion.to_empty(device="cpu")
    load_module(diffusion, state, f"{source} (weights of the published U-Net)")
    return diffusion


def to_dissolving_size(images: Tensor, resolution: int, fit: Fit) -> Tensor:
    """Brings (B, C, H, W) to resolution²: by resizing, by a rim of zeros, or not at all.

    Resizing is bilinear without antialiasing; `none` demands that the images have that size.
    Raises ConfigError where they cannot be brought to it.
    """
    height, width = images.shape[-2:]
    if fit == "resize":
        return F.interpolate(images, (resolution, resolution), mode="bilinear")
    rims = (resolution - width, resolution - height)
    if fit == "none" and any(rims):
        raise ConfigError(
            f"these images are dissolved at their own size, {height}×{width}, but the diffusion "
            f"model works at {resolution} (image_size, diff_resolution); set it to {height}",
            key="contrastive.diff_resolution",
        )
    if any(rim < 0 or rim % 2 for rim in rims):
        raise ConfigError(
            f"cannot pad {height}×{width} images evenly to {resolution}²: the size at which the "
            "diffusion model works (image_size, diff_resolution) must be larger by an even number "
            "of pixels",
            key="contrastive.diff_resolution",
        )
    left, top = rims[0] // 2, rims[1] // 2
    return F.pad(images, (left, left, top, top))


class ImagesAtSide(ImageSet):
    """The images of a set at the size at which the model works."""

    def __init__(self, images: ImageSet, side: int, fit: Fit) -> None:
        """side: pixels; fit: how images are brought to it."""
        vars(self).update(vars(images))
        self.size = None  # the files' own size, resized once
        self.side, self.fit = side, fit

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return sample._replace(image=to_dissolving_size(sample.image[None], self.side, self.fit)[0])


def from_dissolving_size(images: Tensor, size: tuple[int, int], fit: Fit) -> Tensor:
    """Undoes to_dissolving_size: (B, C, resolution, resolution) → (B, C, *size)."""
    if fit == "resize":
        return F.interpolate(images, size, mode="bilinear")
    top, left = (images.shape[2] - size[0]) // 2, (images.shape[3] - size[1]) // 2
    return images[:, :, top : top + size[0], left : left + size[1]]
