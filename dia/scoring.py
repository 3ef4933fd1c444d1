"""Scores from features. Pure functions; every score here is larger for normal images.

N images, M images in the train bank, K shifts, T = K·S views of an image
(shift-major: all S samples of shift 0, then shift 1, …), d features.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from dia.encoders import normalise

BankScore = Literal["CSI", "simclr"]
BLOCK = (256, 4096)
"""Test and train images whose similarities are held at once: 4 MiB of float32, near the caches."""


class ScoreError(UserError):
    """Scores cannot be had from these weights or features, which are not finite."""


@dataclass(frozen=True)
class CsiReference:
    """What the train features contribute to the CSI score (Tack et al. 2020, section 2.3)."""

    axes: Tensor
    """(K, M, d): normalised mean features of each train image and shift."""
    weight_sim: Tensor
    """(K,) float64: one over the mean norm of the train features."""
    weight_shift: Tensor
    """(K,) float64: one over the mean logit of the right shift."""
    n_shifts: int
    """K of the features; the "simclr" score uses the first shift alone, so its axes are fewer."""


def mean_over_samples(features: Tensor, n_shifts: int) -> Tensor:
    """Averages the samples of each shift: (N, K·S, d) → (N, K, d).

    Raises ValueError where the views cannot be split into K shifts.
    """
    if features.ndim != 3 or features.shape[1] % n_shifts:
        raise ValueError(
            f"expected features (N, {n_shifts}·samples, d), got {tuple(features.shape)}"
        )
    return features.unflatten(1, (n_shifts, -1)).mean(dim=2)


def fit_csi(
    simclr: Tensor, shift_logits: Tensor, *, n_shifts: int, score: BankScore = "CSI"
) -> CsiReference:
    """Builds the reference from the train set: simclr (M, T, d), shift_logits (M, T, K).

    score: "CSI" uses all shifts; "simclr" the unshifted view alone, without weights. A mean shift
    logit of 0 gives an infinite weight, a negative one turns its term's sign, as published; see
    `check_reference`.
    """
    means = mean_over_samples(simclr, n_shifts).transpose(0, 1)  # (K, M, d)
    axes = torch.stack([normalise(axis) for axis in means])
    if score == "simclr":
        # The published code fails here unless K is 1; the first shift is the image itself.
        one = torch.ones(1, dtype=torch.float64, device=simclr.device)
        return CsiReference(axes[:1], one, torch.zeros_like(one), n_shifts)
    logits = mean_over_samples(shift_logits, n_shifts)  # (M, K, K)
    right = logits.diagonal(dim1=1, dim2=2).mean(dim=0).double()  # (K,)
    return CsiReference(axes, 1 / means.norm(dim=2).mean(dim=1).double(), 1 / right, n_shifts)


def check_reference(reference: CsiReference) -> list[str]:
    """What is odd about a reference, as sentences: shift weights that point the wrong way.

    Raises ScoreError where a weight or an axis is not finite.
    """
    parts = (reference.axes, reference.weight_sim, reference.weight_shift)
    if not all(bool(part.isfinite().all()) for part in parts):
        raise ScoreError(
            "the train features give CSI weights that are not finite "
            f"(similarity {reference.weight_sim.tolist()}, "
            f"shift {reference.weight_shift.tolist()}): a mean norm or mean shift logit is 0, or a "
            "feature is not finite. Train longer, or use --ood_score simclr."
        )
    wrong = [k for k, weight in enumerate(reference.weight_shift.tolist()) if weight < 0]
    if not wrong:
        return []
    return [
        f"the mean train logit of shift {', '.join(map(str, wrong))} is negative, so its term "
        "counts with the opposite sign: the shift head has not learnt that shift"
    ]


def csi_score(reference: CsiReference, simclr: Tensor, shift_logits: Tensor) -> Tensor:
    """CSI score of each image, larger = more normal: (N,) float32.

    simclr: (N, T, d), not normalised   shift_logits: (N, T, K), on the reference's device. The
    product with the bank is taken in blocks, so memory does not grow with N·M.
    """
    used = len(reference.axes)
    features = mean_over_samples(simclr, reference.n_shifts)  # (N, K, d)
    logits = mean_over_samples(shift_logits, reference.n_shifts)  # (N, K, K)
    right = logits.diagonal(dim1=1, dim2=2)[:, :used]  # (N, used)
    nearest = torch.stack(
        [largest_products(features[:, k], axes) for k, axes in enumerate(reference.axes)], dim=1
    )  # (N, used)
    total = nearest.double() * reference.weight_sim + right.double() * reference.weight_shift
    return total.mean(dim=1).float()


def largest_products(features: Tensor, axes: Tensor) -> Tensor:
    """Largest inner product of each row with any axis: (N, d), (M, d) → (N,)."""
    rows, columns = BLOCK
    blocks = axes.split(columns)
    parts = []
    for part in features.split(rows):
        best = (part @ blocks[0].T).amax(dim=1)
        for block in blocks[1:]:
            best = torch.maximum(best, (part @ block.T).amax(dim=1))
        parts.append(best)
    return torch.cat(parts)


def feature_norm(features: Tensor) -> Tensor:
    """`clean_norm`: the norm of each row of (N, d), larger = more normal."""
    return features.norm(dim=1)


def similarity_to_mean(samples: Tensor) -> Tensor:
    """`similar`: mean cosine of S augmented samples to their average, (S, N, d) → (N,)."""
    return F.cosine_similarity(samples, samples.mean(dim=0, keepdim=True), dim=2).mean(dim=0)


def max_softmax(logits: Tensor) -> Tensor:
    """`baseline`: the largest class probability, (N, classes) → (N,) (Hendrycks & Gimpel 2016)."""
    return logits.softmax(dim=1).amax(dim=1)


def marginal_logits(joint: Tensor) -> Tensor:
    """Class logits marginalised over the shifts: (K, N, K·classes) → (N, classes).

    joint[k] are the joint head's logits of the images shifted by k, of which the k-th block is
    meant; the blocks' mean is returned.
    """
    n_shifts, _, width = joint.shape
    if width % n_shifts:
        raise ValueError(
            f"expected joint logits (K, N, K·classes), got {tuple(joint.shape)}: {width} is no "
            f"multiple of {n_shifts}"
        )
    blocks = joint.unflatten(2, (n_shifts, -1))  # (K, N, K, classes)
    return torch.stack([blocks[k, :, k] for k in range(n_shifts)]).mean(dim=0)


def top1_error(logits: Tensor, labels: Tensor) -> float:
    """Percentage of images whose most probable class is not their label."""
    return 100.0 * (logits.argmax(dim=1) != labels).double().mean().item()


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in percent (Guo et al. 2017): 15 equal bins of confidence."""
    bins = 15
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    correct = (predicted == labels).double()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are open on the left
    gap = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    gap.index_add_(0, bin_of, confidence.double() - correct)
    return 100.0 * (gap.abs().sum() / labels.numel()).item()
