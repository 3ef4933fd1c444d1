"""Losses of SimCLR, CSI and DIA on similarity matrices. Pure functions.

V views, P rows per view, d features; rows are view-major: row i of view v is v·P + i.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossMode = Literal["naive", "shifted_removed"]
EPSILON = 1e-8


def normalise(features: Tensor) -> Tensor:
    """Rows of (N, d) divided by their norm + 1e-8."""
    return features / (features.norm(dim=1, keepdim=True) + EPSILON)


def similarity_matrix(features: Tensor) -> Tensor:
    """Cosine similarities of all pairs: features (N, d), raw → (N, N)."""
    unit = normalise(features)
    return unit @ unit.T


def _pair_losses(similarity: Tensor, temperature: float, blocked: Tensor) -> Tensor:
    """-log of each entry's share of its row, blocked entries left out: (N, N)."""
    weights = torch.exp(similarity / temperature) * ~blocked
    shares = weights / (weights.sum(dim=1, keepdim=True) + EPSILON)
    return -torch.log(shares + EPSILON)


def _eye(similarity: Tensor) -> Tensor:
    return torch.eye(similarity.shape[0], dtype=torch.bool, device=similarity.device)


def _check_rows(similarity: Tensor, views: int) -> int:
    rows = similarity.shape[0]
    if similarity.shape != (rows, rows) or rows % views:
        raise ValueError(
            f"expected a square similarity matrix of {views} views, got {tuple(similarity.shape)}"
        )
    return rows // views


def _positive_pairs(losses: Tensor, rows: int) -> Tensor:
    """Sum of the losses of the pairs between the first two views, both ways."""
    return losses.diagonal(rows)[:rows].sum() + losses.diagonal(-rows)[:rows].sum()


def nt_xent(similarity: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss of two views: similarity (2P, 2P) → the mean over the 2P positive pairs."""
    rows = _check_rows(similarity, 2)
    losses = _pair_losses(similarity, temperature, _eye(similarity))
    return _positive_pairs(losses, rows) / (2 * rows)


def nt_xent_with_negatives(
    similarity: Tensor, temperature: float = 0.5, mode: LossMode = "shifted_removed"
) -> Tensor:
    """DIA's loss: views 1 and 2 are positives, view 3 (dissolved) only negatives. Scalar.

    similarity: (3P, 3P). mode: "shifted_removed" takes the pairs of an image with its own dissolved
    copy out of the denominators, "naive" does not. The sum over 2P pairs is divided by 3P, as
    published (contrastive_loss.py:94).
    """
    if mode not in ("naive", "shifted_removed"):
        raise ValueError(f"loss_mode must be naive or shifted_removed, got {mode!r}")
    rows = _check_rows(similarity, 3)
    blocked = _eye(similarity)
    if mode == "shifted_removed":
        image = torch.arange(3 * rows, device=similarity.device)
        same_image = (image[:, None] - image[None]) % rows == 0
        dissolved = image >= 2 * rows
        blocked = blocked | (same_image & (dissolved[:, None] != dissolved[None]))
    losses = _pair_losses(similarity, temperature, blocked)
    return _positive_pairs(losses, rows) / (3 * rows)


def supervised_nt_xent(similarity: Tensor, labels: Tensor, temperature: float = 0.5) -> Tensor:
    """Supervised contrastive loss of two views: similarity (2P, 2P), labels (P,) → scalar.

    As inherited from CSI, the pairs of a row with itself count among the positives, each with the
    constant loss -log(1e-8).
    """
    rows = _check_rows(similarity, 2)
    both = labels.repeat(2)
    losses = _pair_losses(similarity, temperature, _eye(similarity))
    same = (both[:, None] == both[None]).to(losses)
    return ((losses * same).sum(dim=1) / same.sum(dim=1)).sum() / (2 * rows)


def simsiam_loss(predictor: Tensor, projector: Tensor, views: int = 3) -> Tensor:
    """Mean negative cosine over ordered pairs of views: (V·P, d) each → scalar in [-1, 1].

    The projector's side is detached (Chen & He 2020).
    """
    if predictor.shape != projector.shape or predictor.shape[0] % views:
        raise ValueError(
            f"expected two ({views}·P, d) tensors, got {tuple(predictor.shape)} and "
            f"{tuple(projector.shape)}"
        )
    p = F.normalize(predictor, dim=1).unflatten(0, (views, -1))  # (V, P, d)
    z = F.normalize(projector.detach(), dim=1).unflatten(0, (views, -1))
    cosines = torch.einsum("apd,bpd->abp", p, z).mean(dim=2)  # (V, V)
    off_diagonal = cosines.sum() - cosines.diagonal().sum()
    return -off_diagonal / (views * (views - 1))
