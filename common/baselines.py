"""Baselines without a training loop: what a trained network has to beat.

Each baseline is a function `fit(images) -> score`, where `score(image)` is a heatmap of the image's
size. Images are (1, H, W) float tensors in [0, 1]; heatmaps are (H, W) float32, larger = more
anomalous, on no particular scale. Everything runs on the images' device and is deterministic.
`images` are training images; the filters, which come first, do not look at them.

Letters: N patches, P side of a patch in pixels, D = P * P, gh x gw grid of patches.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common.patch_scores import check_image, dense_heatmap, patch_bank

Scorer = Callable[[Tensor], Tensor]
Centring = Literal["none", "mean"]


def fit_intensity(images: Sequence[Tensor], sigma: float = 4.0) -> Scorer:
    """Brightness after a Gaussian blur; needs no fit.

    sigma: standard deviation of the blur in pixels.
    returns: scorer (1, H, W) -> (H, W); brighter = more anomalous.
    """
    return lambda image: gaussian_blur(check_image(image), sigma)


def fit_local_std(images: Sequence[Tensor], sigma: float = 4.0) -> Scorer:
    """Standard deviation of the grey values under a Gaussian window; needs no fit.

    sigma: standard deviation of the window in pixels.
    returns: scorer (1, H, W) -> (H, W); more varied = more anomalous.
    """

    def score(image: Tensor) -> Tensor:
        plane = check_image(image).double()  # a small difference of large numbers
        variance = gaussian_blur(plane.square(), sigma) - gaussian_blur(plane, sigma).square()
        return variance.clamp_min(0).sqrt().float()

    return score


def fit_laplacian_energy(
    images: Sequence[Tensor], fine_sigma: float = 1.0, pool_sigma: float = 4.0
) -> Scorer:
    """Root of the locally averaged squared Laplacian of Gaussian; needs no fit.

    fine_sigma: blur before the Laplacian, in pixels.
    pool_sigma: Gaussian window over which the energy is averaged, in pixels.
    returns: scorer (1, H, W) -> (H, W); more fine structure = more anomalous.
    """

    def score(image: Tensor) -> Tensor:
        smooth = gaussian_blur(check_image(image), fine_sigma)
        padded = F.pad(smooth[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
        neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        return gaussian_blur((neighbours - 4 * smooth).square(), pool_sigma).clamp_min(0).sqrt()

    return score


def fit_difference_of_gaussians(
    images: Sequence[Tensor], inner_sigma: float = 4.0, outer_sigma: float = 12.0
) -> Scorer:
    """Absolute difference of two Gaussian blurs, a blob detector; needs no fit.

    inner_sigma, outer_sigma: blurs in pixels.
    returns: scorer (1, H, W) -> (H, W); more blob-like, dark or bright = more anomalous.
    """

    def score(image: Tensor) -> Tensor:
        plane = check_image(image)
        return (gaussian_blur(plane, inner_sigma) - gaussian_blur(plane, outer_sigma)).abs()

    return score


def fit_pca(
    images: Sequence[Tensor],
    patch: int = 16,
    components: int = 16,
    stride: int = 2,
    bank_size: int = 40000,
    seed: int = 0,
) -> Scorer:
    """Distance of a patch from the principal subspace of the training images' patches.

    patch: side in pixels.   components: dimension of the subspace.
    stride: pixels between scored patches.   bank_size: training patches used.   seed: their draw.
    returns: scorer (1, H, W) -> (H, W); worse reconstruction = more anomalous.
    """
    bank = patch_bank(images, patch, bank_size, seed)
    mean = bank.mean(0)
    covariance = (bank - mean).T @ (bank - mean) / len(bank)  # (D, D)
    _, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, -components:]  # (D, components): eigenvalues come in ascending order

    def residual(patches: Tensor) -> Tensor:
        centred = patches - mean
        return (centred - centred @ basis @ basis.T).norm(dim=1)

    return lambda image: dense_heatmap(image, patch, stride, residual)


def fit_linear_completion(
    images: Sequence[Tensor],
    window: int = 32,
    hole: int = 16,
    stride: int = 2,
    ridge: float = 0.01,
    bank_size: int = 20000,
    seed: int = 0,
) -> Scorer:
    """Error of the ridge regression that completes a window's hole from its surround.

    window, hole: sides in pixels, the hole in the window's centre.
    stride: pixels between scored windows.   ridge: penalty, as a share of the mean variance.
    bank_size: training windows used.   seed: their draw.
    returns: scorer (1, H, W) -> (H, W); L2 error inside the hole, larger = more anomalous.
    """
    bank = patch_bank(images, window, bank_size, seed)
    low = (window - hole) // 2
    inside = torch.zeros(window, window, dtype=torch.bool, device=bank.device)
    inside[low : low + hole, low : low + hole] = True
    inside = inside.flatten()
    mean = bank.mean(0)
    known, wanted = (bank - mean)[:, ~inside].double(), (bank - mean)[:, inside].double()
    gram = known.T @ known
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    weights = torch.linalg.solve(gram + penalty, known.T @ wanted).float()  # (surround, hole)

    def error(windows: Tensor) -> Tensor:
        centred = windows - mean
        return (centred[:, inside] - centred[:, ~inside] @ weights).norm(dim=1)

    return lambda image: dense_heatmap(image, window, stride, error)


def fit_knn(
    images: Sequence[Tensor],
    patch: int = 16,
    neighbours: int = 1,
    stride: int = 4,
    centring: Centring = "mean",
    bank_size: int = 60000,
    seed: int = 0,
) -> Scorer:
    """Mean L2 distance of a raw patch to its nearest patches of the training images.

    patch: side in pixels.   neighbours: how many distances to average.
    stride: pixels between scored patches.   centring: "mean" takes each patch's mean off first.
    bank_size: training patches kept.   seed: their draw.
    returns: scorer (1, H, W) -> (H, W); farther from anything seen = more anomalous.
    """

    def prepare(patches: Tensor) -> Tensor:
        return patches - patches.mean(1, keepdim=True) if centring == "mean" else patches

    bank = prepare(patch_bank(images, patch, bank_size, seed))
    squares = bank.square().sum(1)

    def distance(patches: Tensor) -> Tensor:
        patches = prepare(patches)
        rows = []
        for chunk in patches.split(1024):
            squared = torch.addmm(squares[None], chunk, bank.T, alpha=-2)  # (chunk, bank)
            nearest = squared.topk(neighbours, dim=1, largest=False).values
            nearest = nearest + chunk.square().sum(1, keepdim=True)
            rows.append(nearest.clamp_min(0).sqrt().mean(1))
        return torch.cat(rows)

    return lambda image: dense_heatmap(image, patch, stride, distance)


def fit_averaged_knn(images: Sequence[Tensor], patch: int = 16) -> Scorer:
    """k-NN distance, each pixel the mean over the patches that cover it.

    The rival of `test.heatmap_type: averaged_hole`, which smooths our scores in the same way.
    """
    plain = fit_knn(images, patch)

    def score(image: Tensor) -> Tensor:
        heat = F.pad(plain(image)[None, None], [patch // 2] * 4, mode="replicate")
        return F.avg_pool2d(heat, patch + 1, stride=1)[0, 0]

    return score


BASELINES: dict[str, Callable[[Sequence[Tensor]], Scorer]] = {
    "intensity": fit_intensity,
    "local_std": fit_local_std,
    "laplacian_energy": fit_laplacian_energy,
    "difference_of_gaussians": fit_difference_of_gaussians,
    "pca": fit_pca,
    "linear_completion": fit_linear_completion,
    "knn_16x16": fit_knn,
    "knn_16x16_averaged": fit_averaged_knn,
    "knn_24x24": partial(fit_knn, patch=24),
    "knn_8x8": partial(fit_knn, patch=8, stride=2),
}
"""Name in tables -> fit(images) with the settings that the demos report."""


def gaussian_blur(plane: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur with replicated borders.

    plane: (H, W)   sigma: standard deviation in pixels, > 0   returns: (H, W)
    """
    radius = int(3 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=plane.dtype, device=plane.device)
    kernel = torch.exp(-offsets.square() / (2 * sigma * sigma))
    kernel = kernel / kernel.sum()
    padded = F.pad(plane[None, None], (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[None, None, :, None])
    return F.conv2d(rows, kernel[None, None, None, :])[0, 0]
