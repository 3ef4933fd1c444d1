"""Gaussian diffusion: schedules, the training loss, dissolving and sampling.

Ho et al. 2020 with the cosine schedule of Nichol & Dhariwal 2021; names and checkpoint layout are
those of lucidrains' denoising-diffusion-pytorch 0.27.12 (MIT).
B images, C channels, H W pixels, T steps; images are in [-1, 1] unless a docstring says otherwise.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_models.settings import Schedule

LOCAL_NOISE_SIDE = 32
ALL_ROWS = slice(None)


class Posterior(NamedTuple):
    """Distribution of x at step t - 1, given x at step t and x0."""

    mean: Tensor
    """(B, C, H, W)."""
    log_variance: Tensor
    """(B, 1, 1, 1), clipped."""


def cosine_betas(steps: int) -> Tensor:
    """Cosine schedule (Nichol & Dhariwal 2021): (T,) float64 in (0, 0.999]."""
    s = 0.008  # keeps the first steps from having almost no noise
    progress = torch.arange(steps + 1, dtype=torch.float64) / steps
    alphas_cumprod = torch.cos((progress + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999)


def linear_betas(steps: int) -> Tensor:
    """Linear schedule (Ho et al. 2020), scaled so that any T ends in the same noise: (T,)."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)


def schedule_buffers(schedule: Schedule, steps: int) -> dict[str, Tensor]:
    """The thirteen published buffers by their state-dict names, each (T,) float32.

    Computed in float64. `p2_loss_weight` is 1 throughout, as in the published settings.
    """
    betas = {"cosine": cosine_betas, "linear": linear_betas}[schedule](steps)
    alphas = 1 - betas
    alphas_cumprod = torch.cumprod(alphas, dim=0)
    alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas_cumprod).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": posterior_variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - alphas_cumprod_prev) * alphas.sqrt() / (1 - alphas_cumprod),
        "p2_loss_weight": torch.ones_like(betas),
    }
    return {name: values.float() for name, values in buffers.items()}


def gaussian_noise(
    shape: tuple[int, ...],
    *,
    device: torch.device,
    local: bool = False,
    generator: torch.Generator | None = None,
    rows: slice = ALL_ROWS,
) -> Tensor:
    """Standard normal (B, C, H, W); `local` draws it at 32×32 and enlarges it bilinearly.

    Drawn on the generator's own device, so that a CPU generator gives the same noise everywhere.
    rows: those of the shape to return, where other processes have the rest.
    """
    draw_device = generator.device if generator is not None else device
    side = (LOCAL_NOISE_SIDE, LOCAL_NOISE_SIDE) if local else shape[2:]
    noise = torch.randn((*shape[:2], *side), generator=generator, device=draw_device)[rows]
    noise = noise.to(device)
    if local:
        noise = F.interpolate(noise, shape[2:], mode="bilinear", align_corners=False)
    return noise


class GaussianDiffusion(nn.Module):
    """A noise predictor with its schedule."""

    def __init__(
        self, model: nn.Module, *, steps: int = 1000, schedule: Schedule = "cosine"
    ) -> None:
        super().__init__()
        self.model = model
        self.steps = steps
        for name, values in schedule_buffers(schedule, steps).items():
            self.register_buffer(name, values)

    def _extract(self, name: str, t: Tensor) -> Tensor:
        return self.get_buffer(name)[t][:, None, None, None]  # (B, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The noisy image at step t: sqrt(ᾱ)·x0 + sqrt(1 - ᾱ)·noise, all (B, C, H, W), t (B,)."""
        return (
            self._extract("sqrt_alphas_cumprod", t) * x0
            + self._extract("sqrt_one_minus_alphas_cumprod", t) * noise
        )

    def predict_start_from_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The clean image x0 that `noise` would have turned into x at step t; not clamped."""
        return (
            self._extract("sqrt_recip_alphas_cumprod", t) * x
            - self._extract("sqrt_recipm1_alphas_cumprod", t) * noise
        )

    def q_posterior(self, x0: Tensor, x: Tensor, t: Tensor) -> Posterior:
        """Distribution of the image one step earlier, given x at step t and the clean image x0."""
        return Posterior(
            self._extract("posterior_mean_coef1", t) * x0
            + self._extract("posterior_mean_coef2", t) * x,
            self._extract("posterior_log_variance_clipped", t),
        )

    def p_losses(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """L1 between the noise added to x0 (in [-1, 1]) and the predicted one; a scalar."""
        _check_steps(x0, t)
        predicted = self.model(self.q_sample(x0, t, noise), t)
        per_image = (predicted - noise).abs().flatten(1).mean(1)  # (B,)
        return (per_image * self.p2_loss_weight[t]).mean()

    def dissolve(self, x: Tensor, t: Tensor) -> Tensor:
        """The x0 estimate of one network call, taking x as the noisy image: no noise is added.

        x: (B, C, H, W)   t: (B,) int64 in 0 … T - 1, one step per image   returns the shape of x,
        clamped to [-1, 1]. Shi et al. 2023 (arXiv 2302.14696), section 3.1.
        """
        _check_steps(x, t)
        return self.predict_start_from_noise(x, t, self.model(x, t)).clamp(-1, 1)

    def p_sample(self, x: Tensor, t: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One ancestral step from t to t - 1: (image at t - 1, clamped x0 estimate).

        No noise is added at t = 0.
        """
        steps = torch.full((x.shape[0],), t, device=x.device)
        x0 = self.dissolve(x, steps)
        mean, log_variance = self.q_posterior(x0, x, steps)
        return (mean + (0.5 * log_variance).exp() * noise if t > 0 else mean), x0

    @torch.no_grad()
    def ddim_sample(
        self,
        shape: tuple[int, ...],
        *,
        sampling_steps: int = 250,
        local_noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """New images (B, C, H, W) in [0, 1] by DDIM (Song et al. 2020) with eta = 1.

        sampling_steps: 1 … T network calls.
        """
        if not 1 <= sampling_steps <= self.steps:
            raise ValueError(f"sampling_steps must be 1 … {self.steps}, got {sampling_steps}")
        device = self.betas.device
        # The reference starts from ordinary noise even where it trains on local noise.
        x = gaussian_noise(shape, device=device, generator=generator)
        # Evenly spaced from T - 1 down to -1, which stands for the clean image.
        times = torch.linspace(-1, self.steps - 1, sampling_steps + 1).int().tolist()[::-1]
        for time, time_next in itertools.pairwise(times):
            t = torch.full(shape[:1], time, device=device)
            predicted = self.model(x, t)
            x0 = self.predict_start_from_noise(x, t, predicted).clamp(-1, 1)
            if time_next < 0:
                break
            alpha, alpha_next = self.alphas_cumprod[time], self.alphas_cumprod[time_next]
            sigma = ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
            direction = (1 - alpha_next - sigma**2).clamp(min=0).sqrt()
            noise = gaussian_noise(shape, device=device, local=local_noise, generator=generator)
            x = x0 * alpha_next.sqrt() + direction * predicted + sigma * noise
        return (x0 + 1) / 2


def _check_steps(x: Tensor, t: Tensor) -> None:
    if t.shape != x.shape[:1] or t.dtype != torch.int64:
        raise ValueError(
            f"t must be int64 with one step for each of the {x.shape[0]} images, got "
            f"{t.dtype} {tuple(t.shape)}"
        )
