"""Gaussian diffusion: schedules, the training loss, dissolving and sampling.

Ho et al. 2020 with the cosine schedule of Nichol & Dhariwal 2021; after lucidrains'
denoising-diffusion-pytorch 0.27.12 (MIT), in whose checkpoint layout the buffers and `model.*` are.
B images, C channels, H W pixels, T steps; images are in [-1, 1] unless a docstring says otherwise.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_models.settings import Schedule

LOCAL_NOISE_SIDE = 32


class Posterior(NamedTuple):
    """Mean and variance of x at step t - 1, given x at step t and x0."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


def cosine_betas(steps: int, s: float = 0.008) -> Tensor:
    """Cosine schedule (Nichol & Dhariwal 2021): (T,) float64 in (0, 0.999]."""
    progress = torch.arange(steps + 1, dtype=torch.float64) / steps
    kept = torch.cos((progress + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - kept[1:] / kept[:-1]).clamp(0, 0.999)


def linear_betas(steps: int) -> Tensor:
    """Linear schedule (Ho et al. 2020), scaled so that any T ends in the same noise: (T,)."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)


def schedule_buffers(schedule: Schedule, steps: int) -> dict[str, Tensor]:
    """The thirteen published buffers by their state-dict names, each (T,) float32.

    Computed in float64. `p2_loss_weight` is 1 throughout, as in the published settings.
    """
    if schedule not in ("cosine", "linear"):
        raise ValueError(f"beta schedule must be 'cosine' or 'linear', got {schedule!r}")
    betas = cosine_betas(steps) if schedule == "cosine" else linear_betas(steps)
    alphas = 1 - betas
    kept = torch.cumprod(alphas, dim=0)  # written ᾱ
    kept_before = F.pad(kept[:-1], (1, 0), value=1.0)
    variance = betas * (1 - kept_before) / (1 - kept)
    buffers = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": kept_before,
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - kept).log(),
        "sqrt_recip_alphas_cumprod": (1 / kept).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / kept - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * kept_before.sqrt() / (1 - kept),
        "posterior_mean_coef2": (1 - kept_before) * alphas.sqrt() / (1 - kept),
        "p2_loss_weight": torch.ones_like(betas),
    }
    return {name: values.float() for name, values in buffers.items()}


def gaussian_noise(
    shape: tuple[int, ...],
    *,
    device: torch.device,
    local: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Standard normal (B, C, H, W); `local` draws it at 32×32 and enlarges it bilinearly.

    The generator's own device is used for the draw, so that a CPU generator gives the same noise
    everywhere.
    """
    drawn_on = generator.device if generator is not None else device
    side = (LOCAL_NOISE_SIDE, LOCAL_NOISE_SIDE) if local else shape[2:]
    noise = torch.randn((*shape[:2], *side), generator=generator, device=drawn_on).to(device)
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

    def _at(self, name: str, t: Tensor) -> Tensor:
        return self.get_buffer(name)[t][:, None, None, None]  # (B, 1, 1, 1)

    def _check_steps(self, x: Tensor, t: Tensor) -> None:
        if t.shape != x.shape[:1] or t.dtype != torch.int64:
            raise ValueError(
                f"t must be int64 with one step for each of the {x.shape[0]} images, got "
                f"{t.dtype} {tuple(t.shape)}"
            )

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The noisy image at step t: sqrt(ᾱ)·x0 + sqrt(1 - ᾱ)·noise, all (B, C, H, W), t (B,)."""
        keep, add = self._at("sqrt_alphas_cumprod", t), self._at("sqrt_one_minus_alphas_cumprod", t)
        return keep * x0 + add * noise

    def estimate_x0(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The clean image that `noise` would have turned into x at step t; not clamped."""
        scale, shift = (
            self._at("sqrt_recip_alphas_cumprod", t),
            self._at("sqrt_recipm1_alphas_cumprod", t),
        )
        return scale * x - shift * noise

    def dissolve(self, x: Tensor, t: Tensor) -> Tensor:
        """The x0 estimate of one network call, taking x as the noisy image: no noise is added.

        x: (B, C, H, W)   t: (B,) int64 in 0 … T - 1, one step per image   returns the shape of x,
        clamped to [-1, 1]. Shi et al. 2023 (arXiv 2302.14696), section 3.1.
        """
        self._check_steps(x, t)
        return self.estimate_x0(x, t, self.model(x, t)).clamp(-1, 1)

    def posterior(self, x0: Tensor, x: Tensor, t: Tensor) -> Posterior:
        """Distribution of the image one step earlier, given x at step t and the clean image x0."""
        mean = self._at("posterior_mean_coef1", t) * x0 + self._at("posterior_mean_coef2", t) * x
        return Posterior(
            mean,
            self._at("posterior_variance", t),
            self._at("posterior_log_variance_clipped", t),
        )

    def loss(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """L1 between the noise added to x0 (in [-1, 1]) and the predicted one; a scalar."""
        self._check_steps(x0, t)
        predicted = self.model(self.add_noise(x0, t, noise), t)
        per_image = (predicted - noise).abs().flatten(1).mean(1)  # (B,)
        return (per_image * self.p2_loss_weight[t]).mean()

    def step_back(self, x: Tensor, t: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One ancestral step from t to t - 1: (image at t - 1, clamped x0 estimate).

        No noise is added at t = 0.
        """
        steps = torch.full((x.shape[0],), t, device=x.device)
        x0 = self.dissolve(x, steps)
        mean, _, log_variance = self.posterior(x0, x, steps)
        return (mean + (0.5 * log_variance).exp() * noise if t > 0 else mean), x0

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        *,
        sampling_steps: int = 250,
        eta: float = 1.0,
        local_noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """New images (B, C, H, W) in [0, 1] by DDIM (Song et al. 2020), from pure noise.

        sampling_steps: 1 … T network calls   eta: 1 adds the noise of DDPM, 0 none.
        """
        if not 1 <= sampling_steps <= self.steps:
            raise ValueError(f"sampling_steps must be 1 … {self.steps}, got {sampling_steps}")

        def noise() -> Tensor:
            return gaussian_noise(
                shape, device=self.betas.device, local=local_noise, generator=generator
            )

        # The reference starts from ordinary noise even where it trains on local noise.
        x = gaussian_noise(shape, device=self.betas.device, generator=generator)
        for t, t_next in _sampling_times(self.steps, sampling_steps):
            steps = torch.full(shape[:1], t, device=x.device)
            predicted = self.model(x, steps)
            x0 = self.estimate_x0(x, steps, predicted).clamp(-1, 1)
            if t_next < 0:
                return (x0 + 1) / 2
            kept, kept_next = self.alphas_cumprod[t], self.alphas_cumprod[t_next]
            sigma = eta * ((1 - kept / kept_next) * (1 - kept_next) / (1 - kept)).sqrt()
            direction = (1 - kept_next - sigma**2).clamp(min=0).sqrt()
            x = x0 * kept_next.sqrt() + direction * predicted + sigma * noise()
        raise AssertionError("the last pair of sampling times ends before step 0")


def _sampling_times(steps: int, sampling_steps: int) -> Iterator[tuple[int, int]]:
    """Pairs (t, next t), evenly spaced from T - 1 down to -1, which stands for the clean image."""
    times = torch.linspace(-1, steps - 1, sampling_steps + 1).int().tolist()[::-1]
    return itertools.pairwise(times)
