"""Whole-image baselines that need no training loop: what a trained encoder has to beat.

N images, D values of an image. Scores are larger for more anomalous images.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def nearest_neighbour(train: Array, test: Array) -> Array:
    """Distance of each test image to the nearest training image: (M, D), (N, D) → (N,)."""
    squared = (test**2).sum(1)[:, None] - 2 * test @ train.T + (train**2).sum(1)[None]
    return np.sqrt(squared.min(axis=1).clip(min=0))


def pca_reconstruction(train: Array, test: Array, components: int = 32) -> Array:
    """Distance of each test image from the training images' principal subspace: → (N,)."""
    mean = train.mean(axis=0)
    _, _, basis = np.linalg.svd(train - mean, full_matrices=False)
    basis = basis[:components]
    centred = test - mean
    return np.linalg.norm(centred - centred @ basis.T @ basis, axis=1)


BASELINES = {"1-NN on pixels": nearest_neighbour, "PCA reconstruction": pca_reconstruction}
"""Name in tables -> score(train, test)."""
