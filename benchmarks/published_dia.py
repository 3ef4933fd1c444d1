"""The published code's way of making views and scores, for the speed comparison and its check.

Written afresh from what it computes; the numbers are those of `views.py` and `scoring.py`.
B images, K shifts, N and M test and train images, S samples, T = K·S, d features.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from dia.scoring import CsiReference
from dia.shifts import rotate
from dia.views import Draws
from diffusion_models.diffusion import GaussianDiffusion
from diffusion_models.unet import (
    LayerNorm2d,
    LinearAttention,
    WeightStandardizedConv2d,
    split_heads,
)

EPSILON = 1e-5


class LoopConv2d(WeightStandardizedConv2d):
    """Mean and variance of the kernels taken one after the other, at every call."""

    def standardised_kernels(self) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = self.weight.var(dim=(1, 2, 3), correction=0, keepdim=True)
        return (self.weight - mean) * (variance + EPSILON).rsqrt()


class LoopLayerNorm2d(LayerNorm2d):
    """The norm spelt out."""

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var(dim=1, correction=0, keepdim=True)
        mean = x.mean(dim=1, keepdim=True)
        return (x - mean) * (variance + EPSILON).rsqrt() * self.g


class LoopLinearAttention(LinearAttention):
    """Queries and values scaled before they are multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        q, k, v = split_heads(self.to_qkv(x))
        q, k = q.softmax(dim=2) * q.shape[2] ** -0.5, k.softmax(dim=3)
        context = torch.einsum("bhdn,bhen->bhde", k, v / (height * width))
        out = torch.einsum("bhde,bhdn->bhen", context, q).flatten(1, 2)
        return self.to_out(out.unflatten(2, (height, width)))


LOOP_LAYERS = {
    WeightStandardizedConv2d: LoopConv2d,
    LayerNorm2d: LoopLayerNorm2d,
    LinearAttention: LoopLinearAttention,
}


def with_loop_layers(diffusion: GaussianDiffusion) -> GaussianDiffusion:
    """A copy that computes with the layers above; parameters and results are the same."""
    copy = deepcopy(diffusion).eval()
    for layer in copy.modules():
        layer.__class__ = LOOP_LAYERS.get(type(layer), type(layer))
    return copy


def flip_by_sampling(images: Tensor, signs: Tensor) -> Tensor:
    """Mirrors (B, C, H, W) where signs (B,) are negative, through an affine grid."""
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = signs, 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


@torch.no_grad()
def loop_views(
    images: Tensor, draws: Draws, diffusion: GaussianDiffusion, resolution: int
) -> Tensor:
    """Views of simclr_DIA with rotation, one dissolving call for each shift: (12·B, C, H, W).

    Every call standardises the network's kernels again, as in training.
    """
    side = images.shape[-1]
    views = []
    for flipped in flip_by_sampling(images.repeat(2, 1, 1, 1), draws.signs12).chunk(2):
        views += [rotate(flipped, k) for k in range(4)]
    for k in range(4):
        flipped = flip_by_sampling(images, draws.signs3[k])
        small = F.interpolate(flipped, (resolution, resolution), mode="bilinear")
        dissolved = diffusion.dissolve(small, draws.t[k].expand(len(small)))
        views.append(rotate(F.interpolate(dissolved, (side, side), mode="bilinear"), k))
    return torch.cat(views)


def loop_csi_scores(reference: CsiReference, simclr: Tensor, shift_logits: Tensor) -> Tensor:
    """CSI scores image by image and shift by shift: (N, T, d), (N, T, K) → (N,)."""
    scores = []
    for features, logits in zip(simclr, shift_logits, strict=True):
        by_shift = [part.mean(dim=0, keepdim=True) for part in features.chunk(reference.n_shifts)]
        logit_of = [part.mean(dim=0, keepdim=True) for part in logits.chunk(reference.n_shifts)]
        score = 0.0
        for k in range(reference.n_shifts):
            products = (by_shift[k] * reference.axes[k]).sum(dim=1)  # (M,)
            score += products.max().item() * reference.weight_sim[k].item()
            score += logit_of[k][:, k].item() * reference.weight_shift[k].item()
        scores.append(score / reference.n_shifts)
    return torch.tensor(scores)
