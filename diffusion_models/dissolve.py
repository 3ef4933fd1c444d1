"""Loading a diffusion checkpoint as a dissolver: the one thing of this package that `dia` imports.

B images, C channels, H W pixels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import (
    CheckpointError,
    load_module,
    load_tensors,
    require_finite_weights,
    require_state_dict,
)
from common.config import ConfigError
from common.datasets import Fit
from diffusion_models.blocks import StandardisedConv2d
from diffusion_models.diffusion import GaussianDiffusion
from diffusion_models.settings import DissolveRange, Weights
from diffusion_models.unet import Unet

LARGEST_SIDE = 2**16


class Dissolver(nn.Module):
    """dissolve(images, t): a frozen diffusion model's x0 estimate, one network call, no noise.

    It takes the model over: the kernels are standardised once, here, so it cannot train any more.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        *,
        image_size: int | None = None,
        dissolve_range: DissolveRange = "unit",
    ) -> None:
        super().__init__()
        self.diffusion = diffusion.eval().requires_grad_(False)
        for layer in diffusion.modules():
            if isinstance(layer, StandardisedConv2d):
                layer.freeze()
        self.image_size = image_size
        """Side in pixels of the images it was trained on; None where the checkpoint lacks it."""
        self.dissolve_range = dissolve_range

    @torch.no_grad()
    def forward(self, images: Tensor, t: int | Tensor) -> Tensor:
        """Dissolves images (B, C, H, W) in [0, 1] at step t (one for all, or (B,) integers).

        With the range "unit", as published, the network sees [0, 1] though it was trained on
        [-1, 1], and the result, clamped to [-1, 1], is taken as it is. "signed" maps both ways, so
        the result is in [0, 1].
        """
        steps = torch.as_tensor(t, device=images.device).long().expand(images.shape[0])
        last = self.diffusion.steps - 1
        if isinstance(t, int) and not 0 <= t <= last:
            raise ValueError(f"the dissolving step must be in 0 … {last}, got {t}")
        if self.dissolve_range == "unit":
            return self.diffusion.dissolve(images, steps)
        return (self.diffusion.dissolve(2 * images - 1, steps) + 1) / 2


def load_dissolver(
    path: Path,
    *,
    weights: Weights = "raw",
    dissolve_range: DissolveRange = "unit",
    dilation: int | None = None,
    image_size: int | None = None,
) -> Dissolver:
    """Loads `model-N.pt` (ours or published) as a dissolver on the CPU.

    weights: "raw" as published, or "ema", the averaged ones. dilation and image_size: what the
    caller expects; published checkpoints store neither (their dilation is 1 unless given here),
    ours store both. Widths are read off the weights. Raises CheckpointError where the file is no
    such checkpoint, lacks what is asked for, or contradicts it.
    """
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, Mapping) or "model" not in checkpoint:
        raise CheckpointError(
            f'{path} is no diffusion checkpoint: expected a dict with an entry "model" (model-N.pt '
            "of train_eval_ddpm.py)."
        )
    stored_dilation = checkpoint.get("dilation", dilation or 1)
    stored_size = checkpoint.get("image_size")
    for name, stored, wanted in (
        ("dilation", stored_dilation, dilation),
        ("image size", stored_size, image_size),
    ):
        if stored is not None and wanted is not None and stored != wanted:
            raise CheckpointError(
                f"{path} was trained with {name} {stored}, but {wanted} is asked for. Use "
                f"{stored}, or a diffusion model trained at {wanted} (train_eval_ddpm.py "
                "--image_size)."
            )
    for name, stored in (("dilation", stored_dilation), ("image size", stored_size)):
        if stored is not None and (type(stored) is not int or not 1 <= stored <= LARGEST_SIDE):
            raise CheckpointError(
                f"{path}: {name} is {str(stored)[:40]!r}, expected a whole number of 1 … "
                f"{LARGEST_SIDE}. The file is damaged; copy it again."
            )
    state = require_state_dict(_choose_weights(checkpoint, weights, path), f"{path}: {weights}")
    require_finite_weights(state, f"{path}: {weights}")
    diffusion = build_from_state(state, dilation=stored_dilation, source=str(path))
    return Dissolver(diffusion, image_size=stored_size or image_size, dissolve_range=dissolve_range)


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


def _choose_weights(
    checkpoint: Mapping[str, Any], weights: Weights, path: Path
) -> Mapping[str, Any]:
    if weights == "raw":
        return checkpoint["model"]
    prefix = "ema_model."  # the layout of the published Trainer's EMA wrapper
    ema = checkpoint.get("ema", {})
    ema = ema if isinstance(ema, Mapping) else {}
    averaged = {
        name.removeprefix(prefix): values
        for name, values in ema.items()
        if isinstance(name, str) and name.startswith(prefix)
    }
    if not averaged:
        raise CheckpointError(f'{path} has no averaged weights ("ema"). Use the raw ones.')
    return averaged


def to_dissolving_size(images: Tensor, resolution: int, fit: Fit) -> Tensor:
    """Brings (B, C, H, W) to resolution²: by resizing, by a rim of zeros, or not at all.

    Resizing is bilinear without antialiasing; `none` demands that the images have that size.
    Raises ConfigError where they cannot be brought to it.
    """
    height, width = images.shape[-2:]
    match fit:
        case "resize":
            return _resize(images, (resolution, resolution))
        case "pad":
            rims = [resolution - width, resolution - height]
            if any(rim < 0 or rim % 2 for rim in rims):
                raise ConfigError(
                    f"cannot pad {height}×{width} images evenly to {resolution}²: the size at "
                    "which the diffusion model works (image_size, diff_resolution) must be larger "
                    "by an even number of pixels",
                    key="contrastive.diff_resolution",
                )
            return F.pad(images, (rims[0] // 2, rims[0] // 2, rims[1] // 2, rims[1] // 2))
        case "none":
            if (height, width) != (resolution, resolution):
                raise ConfigError(
                    f"these images are dissolved at their own size, {height}×{width}, but "
                    f"the diffusion model works at {resolution} (image_size, diff_resolution); set "
                    f"it to {height}",
                    key="contrastive.diff_resolution",
                )
            return images
    raise ValueError(f"a fit is resize, pad or none, got {fit!r}")


def from_dissolving_size(images: Tensor, size: tuple[int, int], fit: Fit) -> Tensor:
    """Undoes to_dissolving_size: (B, C, resolution, resolution) → (B, C, *size)."""
    match fit:
        case "resize":
            return _resize(images, size)
        case "pad":
            top, left = (images.shape[2] - size[0]) // 2, (images.shape[3] - size[1]) // 2
            return images[:, :, top : top + size[0], left : left + size[1]]
    return images


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", align_corners=False)
