"""Golden checks of the diffusion model, its schedules and the dissolving transform."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from dia.shifts import shift
from dia.views import (
    STEP_SCALE,
    NegativeViewConfig,
    beta_by_epoch,
    dissolve_copies,
    timestep_from_uniform,
)
from diffusion_models.diffusion import GaussianDiffusion, schedule_buffers
from diffusion_models.dissolve import Dissolver
from diffusion_models.unet import Unet
from tests.golden.golden_dia_tools import Entry, check, loosened, read_entry, tolerance_for
from tests.golden.golden_tools import Arrays, as_tensor, group
from tests.golden.golden_weights import weights_by_rule


def build_diffusion(entry: Entry, arrays: Arrays) -> GaussianDiffusion:
    """The diffusion model of a dia_ddpm_ entry, with its recorded weights."""
    settings = entry["settings"]
    unet = Unet(
        settings["dim"],
        settings["dim_mults"],
        settings["channels"],
        settings["size"] // 32 if settings["dilation"] is True else settings["dilation"] or 1,
    )
    diffusion = GaussianDiffusion(
        unet, steps=settings["timesteps"], schedule=settings["beta_schedule"]
    )
    state = group(arrays, "sd")
    if not state:
        shapes = {name: p.shape for name, p in diffusion.named_parameters()}
        state = diffusion.state_dict() | weights_by_rule(settings["weights"], shapes)
    assert set(state) == set(diffusion.state_dict()), "the published state-dict layout"
    diffusion.load_state_dict(state)
    return diffusion


def referenced_diffusion(folder: Path, entry: Entry) -> tuple[GaussianDiffusion, Entry]:
    """The diffusion model of the dia_ddpm_ file that an entry names, and that file's entry."""
    texts = [entry["what"], *(str(value) for value in entry["settings"].values())]
    named = re.search(r"dia_ddpm_\w+\.npz", " ".join(texts))
    name = named.group(0) if named else next(iter(sorted(folder.glob("dia_ddpm_*.npz")))).name
    ddpm_entry, arrays = read_entry(folder, name)
    return build_diffusion(ddpm_entry, arrays), ddpm_entry


def check_ddpm(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """Buffers, dissolved images, predicted noise, posterior mean, loss and gradients."""
    diffusion = build_diffusion(entry, arrays)
    assert diffusion.steps == int(arrays["num_timesteps"])
    settings = entry["settings"]
    check_buffers(
        schedule_buffers(settings["beta_schedule"], settings["timesteps"]),
        {n: v for n, v in group(arrays, "sd").items() if not n.startswith("model.")},
        entry["tolerance"]["schedule_buffers"],
    )
    x = as_tensor(arrays["x01"])

    def at(name: str) -> torch.Tensor:
        return torch.full(x.shape[:1], int(name.removeprefix("t")))

    with torch.no_grad():
        for name, expected in group(arrays, "dissolved").items():
            got = diffusion.dissolve(x, at(name))
            check(got, expected, tolerance_for(entry, "dissolved"), f"dissolved {name}")
        for name, expected in group(arrays, "eps").items():
            got = diffusion.model(x, at(name))
            check(got, expected, tolerance_for(entry, "eps"), f"noise {name}")
        for name, expected in group(arrays, "posterior_mean").items():
            got = diffusion.q_posterior(diffusion.dissolve(x, at(name)), x, at(name)).mean
            check(got, expected, tolerance_for(entry, "posterior_mean"), f"posterior {name}")

    t, noise = as_tensor(arrays["loss_t"]), as_tensor(arrays["loss_noise"])
    noisy = diffusion.q_sample(2 * x - 1, t, noise)
    check(noisy, arrays["loss_x_t"], 1e-5, "noisy image")
    loss = diffusion.p_losses(2 * x - 1, t, noise)
    loss.backward()
    check(loss, arrays["loss_value"], tolerance_for(entry, "loss_value"), "loss")
    grads = {name: p.grad.double().norm().item() for name, p in diffusion.named_parameters()}
    names = [name if name in grads else f"model.{name}" for name in map(str, arrays["grad_names"])]
    assert sorted(names) == sorted(grads)
    largest = float(arrays["gradnorm"].max())
    tolerance = loosened(tolerance_for(entry, "gradnorm"), 1e-8 * largest)
    # Biases in front of a norm of one channel per group have gradient 0: rounding is what is left.
    check([grads[name] for name in names], arrays["gradnorm"], tolerance, "gradient norms")


def check_buffers(
    ours: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], wording: str
) -> None:
    """Compares schedule buffers; the wording may loosen the ends of those that cancel there."""
    assert set(ours) >= set(expected)
    ends = re.search(r"ends of the schedule: (rtol [0-9.e-]+)", wording)
    for name, values in expected.items():
        loose = ends and name.startswith(("log_one_minus", "sqrt_recip"))
        allowed = ends.group(1) if loose else wording
        allowed = loosened(allowed, 1e-12)  # variances of 1e-20 compare as 0
        check(ours[name], values, allowed, name)


def check_schedules(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """All buffers of every recorded schedule and length."""
    names = sorted({key.partition("|")[0] for key in arrays})
    assert names
    for name in names:
        kind, steps = re.fullmatch(r"([a-z]+)(\d+)", name).groups()
        ours = schedule_buffers(kind, int(steps))
        check_buffers(ours, group(arrays, name), entry["tolerance"]["all"])


def check_dissolve_transform(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """Resize, dissolve, resize back, shift; and the step that each u stands for."""
    diffusion, ddpm_entry = referenced_diffusion(folder, entry)
    settings, tolerance = entry["settings"], tolerance_for(entry, "out")
    assert settings["step_scale"] == STEP_SCALE
    negatives = NegativeViewConfig(
        dissolve=Dissolver(diffusion), resolution=ddpm_entry["settings"]["size"], fit="resize"
    )
    x = as_tensor(arrays["x01"])
    for case in settings["cases"]:
        i, k, base = case["i"], case["k"], case["transform"]
        step = timestep_from_uniform(torch.tensor([case["u"]]), case["offset"], case["upper"])
        assert step.item() == case["step_used"], f"step of case {i}"
        still = int(case["step_used_random_False"])
        for name, t in (("out", step), ("out_eval_random_False", torch.tensor([still]))):
            got = shift(dissolve_copies([x], t, negatives)[0], k, base)
            check(got, arrays[f"{name}|{i}"], tolerance, f"{name} {i}")
        got = shift(x, k, base)
        check(got, arrays[f"out_nodiffusion|{i}"], 0.0, f"shifted {i}")
    check_step_tables(arrays)


def check_step_tables(arrays: Arrays) -> None:
    """Steps of a table of u for each pair of offsets that the table's name lists."""
    u = as_tensor(arrays["u_table"])
    (key,) = (key for key in arrays if key.startswith("step_table"))
    pairs = [pair.split("_") for pair in key.split("off_up_")[1].split("_then_")]
    for (offset, upper), expected in zip(pairs, arrays[key], strict=True):
        steps = timestep_from_uniform(u, float(offset), float(upper)).numpy()
        exact = (u.double().numpy() * (float(upper) - float(offset)) + float(offset)) * STEP_SCALE
        on_the_edge = np.abs(exact - np.round(exact)) < 1e-5
        assert (np.abs(steps - expected) <= on_the_edge).all(), f"steps for {offset} … {upper}"


def check_beta_by_epoch(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """Beta parameters of every epoch, both ways."""
    for name, reverse in (("alpha_beta", False), ("alpha_beta_reversed", True)):
        tables = group(arrays, name)
        assert tables
        for key, expected in tables.items():
            period, mean = (
                int(float(n)) if float(n).is_integer() else float(n) for n in key.split("_")
            )
            ours = [
                beta_by_epoch(epoch, period=period, mean=mean, reverse=reverse)
                for epoch in range(len(expected))
            ]
            check(np.array(ours), expected, tolerance_for(entry), f"{name} {key}")
