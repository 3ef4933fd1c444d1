"""The terms of the WGAN-GP objective: pure functions of images, masks and critics.

N samples, C channels; real and fake patches of one call have the same shape.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CriticFunction = Callable[[Tensor], Tensor]


def weighted_l1(estimate: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Mean of |estimate - truth| * weights; (N, C, h, w), weights broadcast -> scalar >= 0."""
    return ((estimate - truth).abs() * weights).mean()


def wasserstein_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean(D(fake) - D(real)); (N, 1) twice -> scalar, lower = the critic separates better."""
    return (fake_scores - real_scores).mean()


def interpolate_samples(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """alpha * real + (1 - alpha) * fake, one alpha in [0, 1] per sample; alpha: (N,)."""
    alpha = alpha.to(real.device, real.dtype).view(-1, *[1] * (real.ndim - 1))
    return alpha * real + (1 - alpha) * fake


def gradient_penalty(critic: CriticFunction, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """mean((|grad D(x)| - 1)^2) at x between real and fake (Gulrajani et al. 2017, equation 3).

    real, fake: (N, C, h, w), constants; alpha: (N,) in [0, 1]. Returns a scalar >= 0 that can be
    differentiated by the critic's weights.
    """
    x = interpolate_samples(real, fake, alpha).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()
