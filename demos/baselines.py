"""Baselines without a training loop: what a trained network has to beat.

PICARD's are functions `fit(images) -> score`, where `score(image)` is a heatmap of the image's
size. Images are (1, H, W) float tensors in [0, 1]; heatmaps are (H, W) float32, larger = more
anomalous, on no particular scale. `images` are training images; the filters, which come first, do
not look at them. DIA's, `score(train, test)`, rank whole images. Everything runs on the CPU, by
SciPy's filters and scikit-learn's estimators, and is deterministic.

Letters: N patches, P side of a patch in pixels, D = P * P, gh x gw grid of patches.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F

from inpainter.networks.pretrained import PretrainedFeatures

Scorer = Callable[[Tensor], Tensor]
Centring = Literal["none", "mean"]
Array = NDArray[np.floating]


def gaussian_blur(plane: Array, sigma: float) -> Array:
    """Gaussian blur of (H, W) with replicated borders, cut at three standard deviations."""
    return ndimage.gaussian_filter(plane, sigma, mode="nearest", truncate=3.0)


def fit_intensity(images: Sequence[Tensor], sigma: float = 4.0) -> Scorer:
    """Brightness after a Gaussian blur; needs no fit.

    sigma: standard deviation of the blur in pixels.
    returns: scorer (1, H, W) -> (H, W); brighter = more anomalous.
    """
    return lambda image: torch.from_numpy(gaussian_blur(plane_of(image), sigma))


def fit_local_std(images: Sequence[Tensor], sigma: float = 4.0) -> Scorer:
    """Standard deviation of the grey values under a Gaussian window; needs no fit.

    sigma: standard deviation of the window in pixels.
    returns: scorer (1, H, W) -> (H, W); more varied = more anomalous.
    """

    def score(image: Tensor) -> Tensor:
        plane = plane_of(image).astype(np.float64)  # a small difference of large numbers
        variance = gaussian_blur(plane**2, sigma) - gaussian_blur(plane, sigma) ** 2
        return torch.from_numpy(np.sqrt(variance.clip(min=0))).float()

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
        laplacian = ndimage.laplace(gaussian_blur(plane_of(image), fine_sigma), mode="nearest")
        return torch.from_numpy(np.sqrt(gaussian_blur(laplacian**2, pool_sigma).clip(min=0)))

    return score


def fit_difference_of_gaussians(
    images: Sequence[Tensor], inner_sigma: float = 4.0, outer_sigma: float = 12.0
) -> Scorer:
    """Absolute difference of two Gaussian blurs, a blob detector; needs no fit.

    inner_sigma, outer_sigma: blurs in pixels.
    returns: scorer (1, H, W) -> (H, W); more blob-like, dark or bright = more anomalous.
    """

    def score(image: Tensor) -> Tensor:
        plane = plane_of(image)
        blobs = gaussian_blur(plane, inner_sigma) - gaussian_blur(plane, outer_sigma)
        return torch.from_numpy(np.abs(blobs))

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
    pca = PCA(components, svd_solver="covariance_eigh").fit(
        patch_bank(images, patch, bank_size, seed)
    )

    def residual(patches: Array) -> Array:
        return np.linalg.norm(patches - pca.inverse_transform(pca.transform(patches)), axis=1)

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
    bank = patch_bank(images, window, bank_size, seed).astype(np.float64)
    low = (window - hole) // 2
    inside = np.zeros((window, window), dtype=bool)
    inside[low : low + hole, low : low + hole] = True
    inside = inside.ravel()
    penalty = ridge * len(bank) * bank[:, ~inside].var(axis=0).mean()
    model = Ridge(alpha=penalty, solver="cholesky").fit(bank[:, ~inside], bank[:, inside])

    def error(windows: Array) -> Array:
        return np.linalg.norm(windows[:, inside] - model.predict(windows[:, ~inside]), axis=1)

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

    def prepare(patches: Array) -> Array:
        return patches - patches.mean(1, keepdims=True) if centring == "mean" else patches

    search = NearestNeighbors(n_neighbors=neighbours, algorithm="brute")
    search.fit(prepare(patch_bank(images, patch, bank_size, seed)))

    def distance(patches: Array) -> Array:
        return search.kneighbors(prepare(patches))[0].mean(axis=1)

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


def fit_patchcore(
    images: Iterable[Tensor], network: PretrainedFeatures, bank_size: int = 6000, seed: int = 0
) -> Scorer:
    """PatchCore (Roth et al., arXiv 2106.08265) on a pretrained network, nearest neighbour alone.

    A place's feature is that of both stages, averaged over 3 x 3 places, the coarser one enlarged.
    Kept are bank_size of at most ten times as many, spread by the paper's greedy choice of the one
    that is farthest from those chosen. images: (C, H, W), C 1 or 3, in [0, 1], of any size.
    returns: scorer (C, H, W) -> (H, W), blurred by 4 pixels; farther = more anomalous.
    """
    generator = torch.Generator().manual_seed(seed)
    images = list(images)
    share = -(-10 * bank_size // len(images))
    drawn = []
    for image in images:
        found, _ = _patchcore_features(image, network)
        drawn.append(found[torch.randperm(len(found), generator=generator)[:share]])
    search = NearestNeighbors(n_neighbors=1, algorithm="brute")
    search.fit(farthest_points(torch.cat(drawn), bank_size, generator).numpy())

    def score(image: Tensor) -> Tensor:
        found, grid = _patchcore_features(image, network)
        distances = torch.from_numpy(search.kneighbors(found.numpy())[0][:, 0]).reshape(1, 1, *grid)
        size = image.shape[1:]
        full = F.interpolate(distances.float(), size, mode="bilinear", align_corners=False)
        return torch.from_numpy(gaussian_blur(full[0, 0].numpy(), 4.0))

    return score


def _patchcore_features(
    image: Tensor, network: PretrainedFeatures
) -> tuple[Tensor, tuple[int, int]]:
    """Features (places, D) of an image (C, H, W) in [0, 1], and places down and right."""
    with torch.inference_mode():
        maps = [F.avg_pool2d(stage, 3, 1, 1) for stage in network.stage_maps(image[None] * 2 - 1)]
        grid = maps[0].shape[2:]
        maps[1:] = [F.interpolate(m, grid, mode="bilinear", align_corners=False) for m in maps[1:]]
    return torch.cat(maps, dim=1)[0].flatten(1).T.clone(), tuple(grid)


def farthest_points(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the points (N, D), each the farthest from those before; all where N <= count."""
    if len(points) <= count:
        return points
    number = int(torch.randint(len(points), (1,), generator=generator))
    chosen, squares = [], points.square().sum(1)
    nearest = torch.full_like(squares, float("inf"))
    for _ in range(count):
        chosen.append(number)
        to_it = squares - 2 * (points @ points[number]) + squares[number]
        nearest = torch.minimum(nearest, to_it)
        number = int(nearest.argmax())
    return points[chosen]


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


def patch_bank(images: Sequence[Tensor], patch: int, size: int, seed: int) -> Array:
    """Patches drawn uniformly from the images' tissue.

    A patch counts as tissue when at least a quarter of its pixels are brighter than 0.02.
    images: (1, H, W) each   patch: side in pixels   size: patches wanted   seed: of the draw
    returns: (N, patch * patch), N <= size; raises ValueError where no image has tissue.
    """
    if not images:
        raise ValueError("no training images: a baseline needs at least one")
    generator = torch.Generator().manual_seed(seed)
    share = -(-size // len(images))
    kept = []
    for image in images:
        plane = torch.from_numpy(plane_of(image))
        if min(plane.shape) < patch:
            raise ValueError(f"image {tuple(plane.shape)} is smaller than the patch, {patch} px")
        windows = plane.unfold(0, patch, 1).unfold(1, patch, 1)  # (H-P+1, W-P+1, P, P), a view
        tissue = F.avg_pool2d((plane > 0.02).float()[None, None], patch, 1)[0, 0]
        rows, columns = torch.nonzero(tissue >= 0.25, as_tuple=True)
        pick = torch.randperm(len(rows), generator=generator)[:share]
        kept.append(windows[rows[pick], columns[pick]].flatten(1))
    bank = torch.cat(kept)[:size]
    if len(bank) == 0:
        raise ValueError(
            "no patch of the training images has tissue (a quarter brighter than 0.02)"
        )
    return bank.numpy()


def dense_heatmap(
    image: Tensor, patch: int, stride: int, score: Callable[[Array], Array]
) -> Tensor:
    """Scores patches on a regular grid and upsamples the scores to the image.

    The image is padded by reflection so that patches are centred in the stride x stride cells
    that they stand for, up to the border.
    image: (1, H, W)   patch, stride: pixels, patch - stride even   score: (N, D) -> (N,)
    returns: (H, W)
    """
    plane = torch.from_numpy(plane_of(image))
    H, W = plane.shape
    gh, gw = -(-H // stride), -(-W // stride)
    before = (patch - stride) // 2
    after = [(g - 1) * stride + patch - before - side for g, side in ((gw, W), (gh, H))]
    padded = F.pad(plane[None, None], (before, after[0], before, after[1]), mode="reflect")
    patches = F.unfold(padded, patch, stride=stride)[0].T.numpy()  # (gh * gw, D)
    grid = torch.from_numpy(score(patches)).float().reshape(1, 1, gh, gw)
    full = F.interpolate(grid, scale_factor=stride, mode="bicubic", align_corners=False)
    return full[0, 0, :H, :W]


def plane_of(image: Tensor) -> Array:
    """The (H, W) plane of a (1, H, W) float image; raises ValueError for other shapes."""
    if image.ndim != 3 or image.shape[0] != 1 or not image.is_floating_point():
        raise ValueError(
            f"image must be a float tensor of shape (1, H, W), got {image.dtype} "
            f"{tuple(image.shape)}; convert colour to grey first"
        )
    return image[0].float().numpy()


def nearest_neighbour(train: Array, test: Array) -> Array:
    """Distance of each test image to the nearest training image: (M, D), (N, D) -> (N,)."""
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(train)
    return search.kneighbors(test)[0][:, 0]


def pca_reconstruction(train: Array, test: Array, components: int = 32) -> Array:
    """Distance of each test image from the training images' principal subspace: -> (N,)."""
    pca = PCA(min(components, *train.shape), svd_solver="full").fit(train)
    return np.linalg.norm(test - pca.inverse_transform(pca.transform(test)), axis=1)


IMAGE_BASELINES = {
    "1-NN on pixels": nearest_neighbour,
    "PCA reconstruction": pca_reconstruction,
}
"""Name in tables -> score(train, test), each (N, D) flattened images."""
