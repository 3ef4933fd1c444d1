"""Losses of SimCLR, CSI and DIA: of a whole batch, and of its matrix of similarities.

B images, K shifts, V views, P = K·B rows per view, d features; rows are view-major, as
`views.make_views` has them: row i of view v is v·P + i.
"""

from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from dia.encoders import EPSILON, Heads, normalise
from dia.settings import ContrastiveConfig, LossMode
from dia.views import views_in


class Losses(NamedTuple):
    """The terms of one step, scalars; their sum `total` is differentiated."""

    total: Tensor
    sim: Tensor
    shift: Tensor
    simsiam: Tensor


def heads_for(settings: ContrastiveConfig, simsiam: bool) -> tuple[str, ...]:
    """The heads that `contrastive_losses` needs from an encoder."""
    shift = () if settings.mode == "simclr" else ("shift",)
    return ("simclr", *shift, *(("projector", "predictor") if simsiam else ()))


def contrastive_losses(heads: Heads, shift_labels: Tensor, settings: ContrastiveConfig) -> Losses:
    """Losses of the views of one batch: contrastive, shift classification, SimSiam.

    heads: of V·P rows   shift_labels: (V·P,) int64. Under torchrun the similarities are those of
    all processes' rows together, with gradients.
    """
    n_views = views_in(settings.mode)
    similarity = gathered_similarity(heads.simclr, n_views)
    if n_views == 3:
        sim = nt_xent_with_negatives(similarity, settings.temperature, settings.loss_mode)
    else:
        sim = nt_xent(similarity, settings.temperature)
    sim = settings.sim_lambda * sim
    zero = torch.zeros_like(sim)
    shift = zero if heads.shift is None else F.cross_entropy(heads.shift, shift_labels)
    simsiam = zero
    if heads.predictor is not None:
        simsiam = settings.simsiam_lambda * simsiam_loss(heads.predictor, heads.projector, n_views)
    return Losses(sim + shift + simsiam, sim, shift, simsiam)


def gathered_similarity(features: Tensor, n_views: int) -> Tensor:
    """Cosine similarities of the rows of all processes: (V·P, d), raw → (V·W·P, V·W·P).

    W processes; view 1 of all of them comes first, then view 2, … A gathered row's gradient goes
    back to the process it came from.
    """
    unit = normalise(features)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.nn.functional import all_gather  # with gradients; not in all builds

        unit = torch.cat([rows for view in unit.chunk(n_views) for rows in all_gather(view)])
    return unit @ unit.T


def probe_loss(linear: nn.Module, penultimate: Tensor, labels: Tensor, n_shifts: int) -> Tensor:
    """Cross-entropy of the linear probe on the unshifted rows of views 1 and 2, detached.

    penultimate: (V·K·B, d)   labels: (B,) classes.
    """
    n = labels.shape[0]
    rows = torch.cat([penultimate[:n], penultimate[n_shifts * n : (n_shifts + 1) * n]])
    return F.cross_entropy(linear(rows.detach()), labels.repeat(2))


def pair_losses(similarity: Tensor, temperature: float, blocked: Tensor) -> Tensor:
    """-log of each entry's share of its row, blocked entries left out: (N, N)."""
    weights = torch.exp(similarity / temperature) * ~blocked
    shares = weights / (weights.sum(dim=1, keepdim=True) + EPSILON)
    return -torch.log(shares + EPSILON)


def own_entries(similarity: Tensor) -> Tensor:
    """(N, N) bool: the diagonal, each row's similarity with itself."""
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
    losses = pair_losses(similarity, temperature, own_entries(similarity))
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
    blocked = own_entries(similarity)
    if mode == "shifted_removed":
        image = torch.arange(3 * rows, device=similarity.device)
        same_image = (image[:, None] - image[None]) % rows == 0
        dissolved = image >= 2 * rows
        blocked = blocked | (same_image & (dissolved[:, None] != dissolved[None]))
    losses = pair_losses(similarity, temperature, blocked)
    return _positive_pairs(losses, rows) / (3 * rows)


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
