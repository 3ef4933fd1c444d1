"""Calibrated completion distance: how many times larger than where normal tissue looks alike.

A completion is far from the truth wherever tissue is hard to predict, at bones, borders and texture
too, not only at lesions. So every window's distance is divided by the one to expect there: what
windows of normal images with similar surroundings have, and what such windows elsewhere in the same
image have (which tells a scanner's noise from a lesion). Ours, not of the paper.

N windows of an image, B windows of normal images, F numbers that describe a window's surroundings,
D of them after the projection, C H W window, h w hole.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from common.checkpoint import (
    CheckpointError,
    load_tensors,
    non_finite,
    require_mapping,
    save_atomic,
)
from common.config import config_to_dict
from common.training import flat
from inpainter.settings import Metric, PicardConfig
from inpainter.windows import centre_crop

DESCRIPTION = "description"
"""Key of the descriptions among a batch's scores."""
N_NEIGHBOURS = 40
N_DIMENSIONS = 24
FEWEST_NEIGHBOURS = 8
"""Windows elsewhere in the image that it takes for these to be asked as well."""
MOST_OTHERS = 4096
"""Windows of the same image among which the similar ones are looked for, evenly spread."""
PATCHES, EDGE_PATCHES = 8, 4
"""Patches along a window's side over which grey values, and edges, are averaged."""
WEAK_EDGE, SMALL_SPREAD = 0.01, 0.001
"""Added before taking logarithms; images are in [-1, 1]."""
SECTIONS = ("netG.", "netD.")
KEYS = (
    *("white_value", "test.droprate", "test.heatmap_M_inpaint", "test.share_dropout_masks"),
    *("test.patch_shape", "test.mask_shape"),
)
"""Settings that a window's distance depends on, beside weights."""
MAKE = "Run predict_heatmap.py with --calibrate, which measures normal images and writes it"
CHUNK = 512
"""Windows whose neighbours are looked for at a time; bounds memory."""


def describe(windows: Tensor, completion: Tensor, spread: Tensor) -> Tensor:
    """What surrounds each window's hole, and how sure the completions of it are: (N, F).

    windows: (N, C, H, W) in [-1, 1]; completion: the mean one, (N, C, h, w), which stands in the
    hole's place, so that nothing here depends on what is in the hole; spread: (N,), standard
    deviation between the completions, averaged over pixels and channels.
    """
    seen = windows.float().clone()
    centre_crop(seen, (completion.shape[2], completion.shape[3])).copy_(completion)
    down = (seen[..., 1:, 1:] - seen[..., :-1, 1:]).abs()
    right = (seen[..., 1:, 1:] - seen[..., 1:, :-1]).abs()
    grey = F.adaptive_avg_pool2d(seen, PATCHES)
    edges = (F.adaptive_avg_pool2d(down + right, EDGE_PATCHES) + WEAK_EDGE).log()
    spread = (spread.float() + SMALL_SPREAD).log()
    return torch.cat([grey.flatten(1), edges.flatten(1), spread[:, None]], dim=1)


@dataclass(frozen=True)
class Calibration:
    """Windows of normal images: what surrounds them, and how far they are from their completions.

    All tensors float32 on the CPU.
    """

    mean: Tensor
    """(F,)"""
    axes: Tensor
    """(F, D): principal axes of the standardised descriptions, divided by their deviations."""
    known: Tensor
    """(B, D): the projected descriptions."""
    distances: Mapping[Metric, Tensor]
    """By metric, (B,)."""

    @classmethod
    def fit(cls, descriptions: Tensor, distances: Mapping[Metric, Tensor]) -> "Calibration":
        """From windows of normal images. descriptions: (B, F); distances: by metric, (B,) >= 0."""
        X = descriptions.double().numpy()
        mean, deviation = X.mean(axis=0), X.std(axis=0) + 1e-6
        pca = PCA(min(N_DIMENSIONS, *X.shape), svd_solver="full").fit((X - mean) / deviation)
        axes = torch.from_numpy((pca.components_ / deviation).T.astype(np.float32))
        mean = torch.from_numpy(mean.astype(np.float32))
        return cls(mean, axes, (descriptions - mean) @ axes, dict(distances))

    def ratios(
        self,
        distances: Mapping[Metric, Tensor],
        descriptions: Tensor,
        corners: Tensor,
        hole_hw: tuple[int, int],
    ) -> dict[Metric, Tensor]:
        """Distances of windows of one image over those to expect: by metric, (N,) >= 0.

        1 is as expected, larger = more anomalous. distances: by metric, (N,); descriptions: (N, F);
        corners: (N, 2), top and left in pixels, which tell windows whose holes overlap: those say
        nothing of one another. The expectation is the geometric mean of two: over the nearest
        windows of normal images, and (where there are enough) over the nearest of this image.
        """
        projected = (descriptions - self.mean) @ self.axes
        step = math.ceil(len(projected) / MOST_OTHERS)
        others, other_corners = projected[::step], corners[::step]
        near, elsewhere = [], []
        for some, theirs in zip(projected.split(CHUNK), corners.split(CHUNK), strict=True):
            near.append(nearest(some, self.known))
            elsewhere.append(nearest(some, others, apart(theirs, other_corners, hole_hw)))
        near, elsewhere = torch.cat(near), torch.cat(elsewhere)
        result = {}
        for metric, values in distances.items():
            bank = self.distances[metric]
            floor = bank.median()  # so that distances near 0 give no large ratios
            logs, bank = (values + floor).log(), (bank + floor).log()
            expected = bank[near].mean(dim=1)
            own = medians(logs[::step], elsewhere)
            expected = torch.where(own.isnan(), expected, (expected + own) / 2)
            result[metric] = (logs - expected).exp()
        return result


def nearest(queries: Tensor, points: Tensor, may: Tensor | None = None) -> Tensor:
    """Indices of the nearest points, (N, k): the nearest first, -1 where there are not so many.

    queries: (N, D); points: (P, D); may: (N, P), False for points that do not count.
    """
    # Not by matrix products, whose rounding depends on how many windows are asked for at once.
    far = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist")
    if may is not None:
        far[~may] = math.inf
    near = far.topk(min(N_NEIGHBOURS, len(points)), largest=False)
    return near.indices.where(near.values.isfinite(), -1)


def apart(corners: Tensor, others: Tensor, hole_hw: tuple[int, int]) -> Tensor:
    """Which holes do not overlap, (N, P) bool; corners of their windows: (N, 2) and (P, 2)."""
    return ((corners[:, None] - others).abs() >= torch.tensor(hole_hw)).any(dim=2)


def medians(values: Tensor, indices: Tensor) -> Tensor:
    """Median of values (P,) at indices (N, k), -1 for none: (N,), NaN where there are too few."""
    chosen = values[indices.clamp(min=0)].masked_fill(indices < 0, math.nan)
    enough = (indices >= 0).sum(dim=1) >= FEWEST_NEIGHBOURS
    return chosen.nanmedian(dim=1).values.where(enough, math.nan)


Calibrations = dict[float, Calibration]
"""By scale, as in test.scales."""


def settings_of_windows(config: PicardConfig) -> dict[str, str]:
    """The settings that a window's distance depends on, by dotted key."""
    settings = flat(config_to_dict(config))
    return {k: repr(v) for k, v in settings.items() if k in KEYS or k.startswith(SECTIONS)}


def save_calibrations(
    path: Path,
    calibrations: Mapping[float, Calibration],
    config: PicardConfig,
    weights: Mapping[str, str],
    normals: Mapping[str, Any],
) -> None:
    """Writes calibration_%08d.pt. weights: hashes by role; normals: what was measured, to read."""
    scales = {repr(scale): vars(each) for scale, each in calibrations.items()}
    made_for = {"weights": dict(weights), "settings": settings_of_windows(config)}
    save_atomic({**made_for, "normals": dict(normals), "scales": scales}, path)


def load_calibrations(path: Path, config: PicardConfig, weights: Mapping[str, str]) -> Calibrations:
    """The calibrations of config.test.scales from a file of save_calibrations.

    weights: hashes of the checkpoint's files by role. Raises CheckpointError where the file is
    missing, damaged, or made for other weights, settings, scales or metrics.
    """
    if not path.is_file():
        raise CheckpointError(
            f"test.calibration is {config.test.calibration}, but there is no {path}. {MAKE}, or "
            "set test.calibration: off."
        )
    saved = require_mapping(load_tensors(path), str(path), ("weights", "settings", "scales"))
    hashes, settings, scales = (
        require_mapping(saved[entry], f"{path}: {entry}")
        for entry in ("weights", "settings", "scales")
    )
    foreign = [role for role in weights if role in hashes and hashes[role] != weights[role]]
    if foreign or "gen" not in hashes:
        raise CheckpointError(f"{path} was made for other weights than {path.parent} has. {MAKE}.")
    given = settings_of_windows(config)
    changed = [key for key in given if settings.get(key) != given[key]]
    if changed:
        lines = [f"{key} {settings.get(key)} there, {given[key]} now" for key in changed]
        raise CheckpointError(f"{path} was made with other settings: {'; '.join(lines)}. {MAKE}.")
    found = {}
    for scale in config.test.scales:
        if repr(scale) not in scales:
            there = ", ".join(map(str, scales))
            raise CheckpointError(f"{path} has no scale {scale}, only {there}. {MAKE}.")
        source = f"{path}: scale {scale}"
        found[scale] = _calibration(scales[repr(scale)], config.test.heatmap_metrics, source)
    return found


def _calibration(value: Any, metrics: tuple[Metric, ...], source: str) -> Calibration:
    """One scale's, whose tensors fit one another and are finite. Raises CheckpointError."""
    parts = require_mapping(value, source, ("mean", "axes", "known", "distances"))
    by_metric = require_mapping(parts["distances"], f"{source}: distances")
    missing = [metric for metric in metrics if metric not in by_metric]
    if missing:
        raise CheckpointError(f"{source} has no {', '.join(missing)}, only {[*by_metric]}. {MAKE}.")
    tensors = {name: parts[name] for name in ("mean", "axes", "known")}
    tensors |= {metric: by_metric[metric] for metric in metrics}
    plain = all(isinstance(t, Tensor) and t.dtype == torch.float32 for t in tensors.values())
    if plain:
        shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        F_, (B, D) = shapes[0], shapes[2] if len(shapes[2]) == 2 else (0, 0)
        plain = B > 0 and shapes == [F_, (*F_, D), (B, D), *[(B,)] * len(metrics)]
    if not plain or non_finite(tensors):
        raise CheckpointError(f"{source} is damaged: its tensors do not fit one another. {MAKE}.")
    return Calibration(**{k: tensors[k] for k in ("mean", "axes", "known")},
                       distances={metric: by_metric[metric] for metric in metrics})  # fmt: skip
