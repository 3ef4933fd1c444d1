"""Calibrated completion distance: how unlikely it is where normal tissue looks alike.

A completion is far from the truth wherever tissue is hard to predict, at bones, borders and texture
too, not only at lesions. So each window's log distance is compared with those of the windows of
normal images that have the most similar surroundings: z, its deviation from their mean in their
standard deviations. Scanners differ, so z is then compared within the image: a line is fitted to z
against the expected log distance, robustly, and taken off. The score is the surprise, -log10 of the
chance that a normal window is as far or farther: 3 = one in a thousand. The same is asked of each
cell of a hole, to say where in it the window surprises. Ours, not of the paper.

N windows of an image, B windows of normal images, F numbers that describe a window's surroundings,
D of them after the projection, k neighbours, C H W window, h w hole, c c cells of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
"""Key of the descriptions among a batch's values."""
N_NEIGHBOURS = 20
N_DIMENSIONS = 24
LEAST_DEVIATION = 0.05
"""Added to the neighbours' standard deviation of the log distance."""
LARGEST_Z = 8.0
"""Surprise 15.2: beyond it the normal distribution means nothing."""
FEWEST_WINDOWS = 20
"""Scored windows that an image needs for the comparison within it."""
PATCHES, EDGE_PATCHES = 8, 4
"""Patches along a window's side over which grey values, and edges, are averaged."""
WEAK_EDGE, SMALL_SPREAD = 0.01, 0.001
"""Added before taking logarithms; images are in [-1, 1]."""
PARTS = ("mean", "axes", "known", "cells")
"""Tensors of a saved calibration, beside the distances."""
SECTIONS = ("netG.", "netD.")
KEYS = (
    *(
        "white_value",
        "window",
        "flatten",
        "test.droprate",
        "test.heatmap_M_inpaint",
        "test.share_dropout_masks",
    ),
    *("test.patch_shape", "test.mask_shape", "test.tissue_threshold"),
)
"""Settings that a window's distance depends on, beside weights."""
REMEDY = (
    "Run predict_heatmap.py with --calibrate, which measures normal images and writes it, or set "
    "test.calibration: off."
)
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
    cells: Tensor
    """(B, c, c): mean squared difference from the mean completion, in each cell of the hole."""
    distances: Mapping[Metric, Tensor]
    """By metric, (B,)."""

    @classmethod
    def fit(
        cls, descriptions: Tensor, cells: Tensor, distances: Mapping[Metric, Tensor]
    ) -> "Calibration":
        """From windows of normal images.

        descriptions: (B, F); cells: (B, c, c) >= 0; distances: by metric, (B,) >= 0.
        """
        from sklearn.decomposition import PCA  # slow to import, and not needed for scoring

        X = descriptions.double().numpy()
        mean, deviation = X.mean(axis=0), X.std(axis=0) + 1e-6
        pca = PCA(min(N_DIMENSIONS, *X.shape), svd_solver="full").fit((X - mean) / deviation)
        axes = torch.from_numpy((pca.components_ / deviation).T.astype(np.float32))
        mean = torch.from_numpy(mean.astype(np.float32))
        return cls(mean, axes, (descriptions - mean) @ axes, cells, dict(distances))

    def neighbours(self, descriptions: Tensor) -> Tensor:
        """Indices of the normal windows with the most similar surroundings: (N, F) -> (N, k)."""
        projected = ((descriptions - self.mean) @ self.axes).split(CHUNK)
        return torch.cat([nearest(some, self.known) for some in projected])

    def surprise(self, distances: Mapping[Metric, Tensor], near: Tensor) -> dict[Metric, Tensor]:
        """-log10 of the chance that a normal window is so far or farther: by metric, (N,) >= 0.

        Larger = more anomalous; 0.3 is the middle of normal windows. All windows of one image that
        are scored. distances: by metric, (N,) >= 0; near: (N, k), their neighbours.
        """
        result = {}
        for metric, values in distances.items():
            bank = self.distances[metric]
            floor = bank.median().clamp(min=1e-6)  # so that distances near 0 are not far apart
            logs, bank = (values + floor).double().log(), (bank + floor).double().log()
            expected, deviation = bank[near].mean(dim=1), bank[near].std(dim=1)
            z = (logs - expected) / (deviation + LEAST_DEVIATION)
            if len(z) >= FEWEST_WINDOWS:
                z = z - robust_line(expected, z)
            result[metric] = surprise_of(z)
        return result

    def surprise_in_cells(self, cells: Tensor, near: Tensor) -> Tensor:
        """The same of each cell of a hole, relative to its mean in normal ones: (N, c, c) >= 0.

        1 is what normal windows have on average. All windows of one image that are scored. cells:
        (N, c, c) >= 0, as `self.cells`; near: (N, k), the windows' neighbours.
        """
        floor = 0.1 * self.cells.median().clamp(min=1e-12)
        logs, bank = ((values + floor).log() / 2 for values in (cells, self.cells))
        parts = []
        for some, neighbours in zip(logs.split(CHUNK), near.split(CHUNK), strict=True):
            normal = bank[neighbours]  # (CHUNK, k, c, c)
            parts.append((some - normal.mean(dim=1)) / (normal.std(dim=1) + LEAST_DEVIATION))
        z = torch.cat(parts)
        if len(z) >= FEWEST_WINDOWS:
            z = z - z.median()
        return surprise_of(z) * math.log(10)  # -ln of a chance has the mean 1


def surprise_of(z: Tensor) -> Tensor:
    """-log10 of the chance that a standard normal number is z or larger, in float32."""
    return (-torch.special.log_ndtr(-z.clamp(-LARGEST_Z, LARGEST_Z)) / math.log(10)).float()


def nearest(queries: Tensor, points: Tensor) -> Tensor:
    """Indices of the nearest points, (N, k). queries: (N, D); points: (P, D)."""
    # Not by matrix products, whose rounding depends on how many windows are asked for at once.
    far = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist")
    return far.topk(min(N_NEIGHBOURS, len(points)), largest=False).indices


def robust_line(x: Tensor, y: Tensor) -> Tensor:
    """The line through y (N,) at x (N,), which a few outliers do not bend (Huber's weights)."""
    X = torch.stack([torch.ones_like(x), x - x.mean()], dim=1)
    ridge = torch.diag(x.new_tensor([0.0, 1e-6 * len(x)]))
    weights = torch.ones_like(y)
    for _ in range(10):
        weighted = X * weights[:, None]
        line = X @ torch.linalg.solve(weighted.T @ X + ridge, weighted.T @ y)
        off = (y - line).abs()
        scale = 1.4826 * off.median() + 1e-6  # the standard deviation, of normal residuals
        weights = (scale / off.clamp(min=1e-9)).clamp(max=1)
    return line


Calibrations = dict[float, Calibration]
"""By scale, as in test.scales."""


def settings_of_windows(config: PicardConfig) -> dict[str, str]:
    """The settings that a window's distance depends on, by dotted key."""
    settings = flat(config_to_dict(config))
    if config.flatten is None:  # else it decides what is flattened
        settings.pop("test.tissue_threshold")
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
            f"test.calibration is {config.test.calibration}, but there is no {path}. {REMEDY}"
        )
    saved = require_mapping(load_tensors(path), str(path), ("weights", "settings", "scales"))
    hashes, settings, scales = (
        require_mapping(saved[entry], f"{path}: {entry}")
        for entry in ("weights", "settings", "scales")
    )
    there, now = feature_space_of(hashes), feature_space_of(weights)
    if there and now and there != now:
        raise CheckpointError(
            f"{path} was made in another test.feature_space: {there} there, {now} now. {REMEDY}"
        )
    foreign = [role for role in weights if role in hashes and hashes[role] != weights[role]]
    if foreign or "gen" not in hashes:
        raise CheckpointError(f"{path} was made for other weights than {path.parent} has. {REMEDY}")
    given = settings_of_windows(config)
    settings = settings_of_windows(PicardConfig()) | settings  # absent: older than the setting
    changed = [key for key in given if settings.get(key) != given[key]]
    if changed:
        lines = [f"{key} {settings.get(key)} there, {given[key]} now" for key in changed]
        raise CheckpointError(f"{path} was made with other settings: {'; '.join(lines)}. {REMEDY}")
    found = {}
    for scale in config.test.scales:
        if repr(scale) not in scales:
            there = ", ".join(map(str, scales))
            raise CheckpointError(f"{path} has no scale {scale}, only {there}. {REMEDY}")
        source = f"{path}: scale {scale}"
        found[scale] = _calibration(scales[repr(scale)], config.test.heatmap_metrics, source)
    return found


def feature_space_of(weights: Mapping[str, str]) -> str | None:
    """Where the `_feature` metrics measured: "critic", a file by its hash, None without such.

    weights: hashes by role.
    """
    return weights.get("feature_space") or ("critic" if "dis" in weights else None)


def _calibration(value: Any, metrics: tuple[Metric, ...], source: str) -> Calibration:
    """One scale's, whose tensors fit one another and are finite. Raises CheckpointError."""
    parts = require_mapping(value, source)
    if missing := [name for name in (*PARTS, "distances") if name not in parts]:
        raise CheckpointError(
            f"{source} has no {', '.join(missing)}: an older version wrote it. {REMEDY}"
        )
    by_metric = require_mapping(parts["distances"], f"{source}: distances")
    missing = [metric for metric in metrics if metric not in by_metric]
    if missing:
        raise CheckpointError(
            f"{source} has no {', '.join(missing)}, only {[*by_metric]}. {REMEDY}"
        )
    tensors = {name: parts[name] for name in PARTS}
    tensors |= {metric: by_metric[metric] for metric in metrics}
    plain = all(isinstance(t, Tensor) and t.dtype == torch.float32 for t in tensors.values())
    if plain:
        shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        F_, (B, D) = shapes[0], shapes[2] if len(shapes[2]) == 2 else (0, 0)
        cells = shapes[3][1:]
        plain = len(cells) == 2 and B > 0
        plain &= shapes == [F_, (*F_, D), (B, D), (B, *cells), *[(B,)] * len(metrics)]
    if not plain or non_finite(tensors):
        raise CheckpointError(f"{source} is damaged: its tensors do not fit one another. {REMEDY}")
    return Calibration(**{name: tensors[name] for name in PARTS},
                       distances={metric: by_metric[metric] for metric in metrics})  # fmt: skip
