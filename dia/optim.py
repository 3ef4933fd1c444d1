"""LARS, and the learning rate's warm-up and decay."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dia.settings import LrScheduler


class Lars(Optimizer):
    """SGD with momentum whose step is scaled per tensor (You et al. 2017), as torchlars does it.

    Every tensor is adapted, batch norms and biases too. With weight decay wd the gradient becomes
    (g + wd·p) · trust·|p| / (|g| + wd·|p| + eps); where |p| or |g| is 0 the factor is 1, so such a
    tensor moves by the full learning rate. Tensors without a gradient are left alone.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, eps=eps)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Takes one step; with a closure, evaluates it first and returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads, decay = [p.grad for p in params], group["weight_decay"]
            weight_norms = torch.stack(torch._foreach_norm(params))
            grad_norms = torch.stack(torch._foreach_norm(grads))
            denominators = grad_norms + decay * weight_norms + group["eps"]
            factors = group["trust"] * weight_norms / denominators
            factors = torch.where((weight_norms > 0) & (grad_norms > 0), factors, 1.0)
            scaled = torch._foreach_add(grads, params, alpha=decay)
            torch._foreach_mul_(scaled, list(factors.unbind()))
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, scaled)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss


def learning_rate(
    epoch: float,
    *,
    initial: float,
    warmup: int,
    epochs: int,
    batches: int,
    multiplier: float = 10.0,
    schedule: LrScheduler = "cosine",
) -> float:
    """The rate after `epoch` (fractional) epochs of `batches` each: a linear climb, then a decay.

    Climbs from initial to multiplier·initial over `warmup` epochs, then decays as the scheduler of
    that age: a cosine of period 2·epochs, or a tenth at each of 50 % and 75 % of `epochs`. The
    decay starts after the warm-up but is as long as the whole training, so the cosine does not
    reach 0, as published.
    """
    if epoch <= warmup:
        return initial * ((multiplier - 1) * epoch / warmup + 1) if warmup else initial * multiplier
    peak, age = initial * multiplier, epoch - warmup
    # The first step past the warm-up keeps the rate, as in the authors' torch 1.11.
    if age <= 1.001 / batches:
        return peak
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * age / epochs)) / 2
    if schedule == "step_decay":
        n_decays = sum(age >= int(part * epochs) for part in (0.5, 0.75))
        return peak * 0.1**n_decays
    raise ValueError(f"lr_scheduler must be cosine or step_decay, got {schedule!r}")
