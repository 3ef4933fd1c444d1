"""Completion distances: how far a hole is from its M completions. Larger = more anomalous.

N windows, M completions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.runtime import at_least_fp32
from inpainter.settings import Metric

REDUCTIONS = ("MCD", "MeanCD", "MedCD")


def l2_distance(truth: Tensor, completion: Tensor) -> Tensor:
    """Euclidean distance of each sample, over all other dimensions; (N, ...) twice -> (N,) >= 0."""
    return at_least_fp32((truth - completion).flatten(1)).norm(dim=1)


def reduce_distances(distances: Tensor, reduction: str) -> Tensor:
    """Smallest (MCD), mean (MeanCD) or lower median (MedCD) over the completions.

    distances: (N, M) -> (N,). MCD is equation 3 of the paper; the median of an even M is the lower
    one, as published (P23).
    """
    match reduction:
        case "MCD":
            return distances.amin(dim=1)
        case "MeanCD":
            return distances.mean(dim=1)
        case "MedCD":
            return distances.median(dim=1).values
    raise ValueError(f"reduction {reduction!r} is not one of {REDUCTIONS}")


def spaces_of(metrics: Sequence[Metric]) -> set[str]:
    """The spaces that the metrics measure in: "image", "feature", or "no_dropout" by itself."""
    return {metric.rsplit("_", 1)[-1] if "CD_" in metric else metric for metric in metrics}


def metric_values(metrics: Sequence[Metric], distances: dict[str, Tensor]) -> dict[Metric, Tensor]:
    """Every metric of N windows, (N,) each.

    distances: by space, (N, M) each; "no_dropout" is (N, 1).
    """
    values = {}
    for metric in metrics:
        reduction, _, space = metric.partition("_")
        if metric == "no_dropout":
            values[metric] = distances["no_dropout"][:, 0]
        else:
            values[metric] = reduce_distances(distances[space], reduction)
    return values


def distances_over(completions: Sequence[Tensor]) -> Tensor:
    """Stacks the (N,) distances of M completions into (N, M)."""
    return torch.stack(list(completions), dim=1)
