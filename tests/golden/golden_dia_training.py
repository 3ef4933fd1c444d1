"""Golden checks of the encoders, losses, optimiser and two whole training steps."""

import itertools
import re
from pathlib import Path

import numpy as np
import torch

from common.processes import Processes
from dia.encoders import ENCODER_NAMES, Encoder, build_encoder
from dia.losses import (
    contrastive_losses,
    gathered_similarity,
    heads_for,
    nt_xent,
    nt_xent_with_negatives,
    own_entries,
    pair_losses,
    probe_loss,
)
from dia.optim import Lars, learning_rate
from dia.settings import ContrastiveConfig
from dia.shifts import ShiftType
from dia.training import optimise
from dia.views import Draws, NegativeViewConfig, make_views, shift_labels
from diffusion_models.dissolve import Dissolver
from tests.golden.golden_dia_diffusion import referenced_diffusion
from tests.golden.golden_dia_tools import Entry, check, loosened, tolerance_for
from tests.golden.golden_tools import Arrays, allowed_error, as_tensor, group
from tests.golden.golden_weights import check_sums, parse_shapes, weights_by_rule

HEADS = ("linear", "penultimate", "simclr", "shift", "joint")


def encoder_by_rule(entry: Entry, arrays: Arrays, sums: str, norms: str) -> Encoder:
    """The encoder of an entry, its weights by the entry's rule, checked by the recorded sums."""
    settings = entry["settings"]
    shapes = parse_shapes(arrays["sd_names"], arrays["sd_shapes"])
    weights = weights_by_rule(settings["weights"], shapes)
    check_sums(weights, arrays["sd_names"], arrays[sums], arrays[norms], rtol=1e-9)
    encoder = build_encoder(
        settings.get("model") or named_encoder(entry["what"]),
        n_classes=shapes["linear.weight"][0],
        n_shifts=shapes["shift_cls_layer.weight"][0],
        simclr_dim=shapes["simclr_layer.2.weight"][0],
    )
    assert {n: tuple(v.shape) for n, v in encoder.state_dict().items()} == shapes
    encoder.load_state_dict(weights)
    return encoder


def named_encoder(text: str) -> str:
    """The encoder's name that a description mentions."""
    return next(name for name in re.findall(r"resnet\w+", text) if name in ENCODER_NAMES)


def check_model(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """Every head in evaluation and training mode, feature maps, running statistics."""
    encoder = encoder_by_rule(entry, arrays, "sd_sum", "sd_l2").eval()
    x = as_tensor(arrays["x01"])
    with torch.no_grad():
        heads = encoder(x, "simclr", "shift", "joint")._asdict()
        maps = encoder.feature_maps(x)
        trained = encoder.train()(
            as_tensor(arrays["train_x01"]), "simclr", "shift", "joint"
        )._asdict()
    for name in HEADS:
        check(heads[name], arrays[name], tolerance_for(entry, "outputs"), name)
        tolerance = tolerance_for(entry, "train_outputs")
        check(trained[name], arrays[f"train_{name}"], tolerance, f"train {name}")
    for statistic in ("mean", "std"):
        ours = [getattr(values, statistic)().item() for values in maps]
        expected = arrays[f"feature_map_{statistic}s"]
        check(ours, expected, tolerance_for(entry, "outputs"), f"maps' {statistic}")
    state = encoder.state_dict()
    for name, expected in group(arrays, "train_after").items():
        check(state[name], expected, tolerance_for(entry, "running_stats"), name)


def check_contrastive(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """NT-Xent, both modes with negatives, and the supervised loss: values and gradients."""

    def check_loss(name: str, i: int, loss: torch.Tensor, **gradients: torch.Tensor) -> None:
        check(loss, arrays[f"{name}_loss|{i}"], tolerance_for(entry, "loss"), name)
        for suffix, source in gradients.items():
            expected = arrays[f"{name}_{suffix}|{i}"]
            check(source.grad, expected, tolerance_for(entry, "grad"), f"{name} {suffix}")

    for case in entry["settings"]["cases"]:
        i, temperature, n = case["i"], case["temperature"], case["B"]
        for mode in ("naive", "shifted_removed"):
            features = as_tensor(arrays[f"feat3|{i}"]).requires_grad_()
            similarity = gathered_similarity(features, 3)
            similarity.retain_grad()
            loss = nt_xent_with_negatives(similarity, temperature, mode)
            loss.backward()
            check_loss(f"neg_{mode}", i, loss, grad=features, grad_sim=similarity)
        for name in ("ntxent", "sup"):
            features = as_tensor(arrays[f"feat3|{i}"][: 2 * n]).requires_grad_()
            similarity = gathered_similarity(features, 2)
            check(similarity, arrays[f"sim2|{i}"], 1e-6, "similarities")
            if name == "ntxent":
                loss = nt_xent(similarity, temperature)
            else:
                loss = supervised_loss(similarity, torch.arange(n) % 3, temperature)
            loss.backward()
            check_loss(name, i, loss, grad=features)


def supervised_loss(
    similarity: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The loss of CSI's supervised mode, which is not part of DIA, from the losses of all pairs.

    similarity: (2P, 2P)   labels: (P,). A row's pair with itself counts as a positive, as in CSI.
    """
    losses = pair_losses(similarity, temperature, own_entries(similarity))
    same = (labels.repeat(2)[:, None] == labels.repeat(2)[None]).to(losses)
    return ((losses * same).sum(dim=1) / same.sum(dim=1)).mean()


def check_lars(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """The parameters after every step."""
    settings = entry["settings"]
    params = {n: torch.nn.Parameter(v) for n, v in group(arrays, "p0").items()}
    optimizer = Lars(
        params.values(),
        lr=1.0,
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
        trust=settings["trust_coef"],
        eps=settings["eps"],
    )
    for step in range(settings["steps"]):
        gradients = group(arrays, f"g{step}")
        for name, param in params.items():
            param.grad = gradients.get(name)
        optimizer.param_groups[0]["lr"] = float(arrays["lr_per_step"][step])
        optimizer.step()
        for name, expected in group(arrays, f"p{step + 1}").items():
            check(params[name], expected, tolerance_for(entry), f"{name} after {step}")


def check_lr_schedule(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """The learning rate of every step; either torch version at the step past the warm-up."""
    allowed = allowed_error(np.ones(()), tolerance_for(entry))
    for case in entry["settings"]["cases"]:
        rates = [case["lr_init"]]  # then the rate after each step, as training sets it
        for epoch, batch in itertools.product(range(case["epochs"]), range(case["batches"])):
            rates.append(
                learning_rate(
                    epoch + batch / case["batches"],
                    initial=case["lr_init"],
                    warmup=case["warmup"],
                    epochs=case["cosine_T_max"],
                    batches=case["batches"],
                    multiplier=case["multiplier"],
                )
            )
        versions = [arrays[f"lr_{name}|{case['i']}"] for name in ("torch_installed", "torch_1_11")]
        ours = np.array(rates)
        assert ours.shape == versions[0].shape
        errors = np.min([np.abs(ours / expected - 1) for expected in versions], axis=0)
        assert errors.max() <= allowed, f"case {case['i']}, step {errors.argmax()}"


def check_train_two_steps(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """Two steps of simclr_DIA: views, similarities, losses, gradients, rates, weights."""
    settings = entry["settings"]
    encoder = encoder_by_rule(entry, arrays, "sd_sum_before", "sd_l2_before").train()
    diffusion, ddpm_entry = referenced_diffusion(folder, entry)
    resolution = ddpm_entry["settings"]["size"]
    negatives = NegativeViewConfig(dissolve=Dissolver(diffusion), resolution=resolution)
    objective = ContrastiveConfig(
        mode="simclr_DIA",
        shift_trans_type="diffusion",
        loss_mode=settings["loss_mode"],
        temperature=settings["temperature"],
    )
    shift_type = ShiftType(settings["transform"], "diffusion")
    optimizer = Lars(
        encoder.parameters(), settings["lr_init"], weight_decay=settings["weight_decay"]
    )
    probe = torch.optim.Adam(
        encoder.linear.parameters(), 1e-3, weight_decay=settings["weight_decay"]
    )
    batches = arrays["images"].shape[0]
    for step in range(batches):
        images = as_tensor(arrays["images"][step])
        n, k = images.shape[0], shift_type.count
        labels = torch.zeros(n, dtype=torch.int64)
        views = make_views(
            images, "simclr_DIA", shift_type, recorded_draws(arrays, step, k), negatives
        )
        check_views(entry, arrays, step, views)
        heads = encoder(views, *heads_for(objective, encoder.simsiam))
        similarity = gathered_similarity(heads.simclr, 3)
        expected = arrays[f"sim_matrix|step{step}"]
        check(similarity, expected, tolerance_for(entry, "sim_matrix"), "similarities")
        losses = contrastive_losses(heads, shift_labels(n, k, 3, images.device), objective)
        check(
            optimizer.param_groups[0]["lr"],
            arrays["lr_used"][step],
            tolerance_for(entry, "lr"),
            "lr",
        )
        optimise(losses.total, optimizer, Processes())
        check_gradients(entry, arrays, step, encoder)
        probed = probe_loss(encoder.linear, heads.penultimate, labels, k)
        optimise(probed, probe, Processes())
        for name, loss in (("sim", losses.sim), ("shift", losses.shift), ("linear", probed)):
            tolerance = tolerance_for(entry, f"loss_step{step}", "loss_step1")
            check(loss, arrays[f"loss_{name}"][step], tolerance, f"loss_{name} {step}")
        optimizer.param_groups[0]["lr"] = learning_rate(
            settings["epoch_number"] - 1 + step / batches,
            initial=settings["lr_init"],
            warmup=settings["warmup"],
            epochs=settings["T_max"],
            batches=batches,
            multiplier=settings["multiplier"],
        )
    lr_after = optimizer.param_groups[0]["lr"]
    check(lr_after, arrays["lr_after"], tolerance_for(entry, "lr"), "lr after")
    rtol = float(allowed_error(np.ones(()), tolerance_for(entry, "sd_l2_after")))
    state = encoder.state_dict()
    check_sums(state, arrays["sd_names"], arrays["sd_sum_after"], arrays["sd_l2_after"], rtol=rtol)


def recorded_draws(arrays: Arrays, step: int, n_shifts: int) -> Draws:
    """The recorded flips and diffusion steps of one batch."""
    signs = [as_tensor(arrays[f"signs|step{step}_draw{i}"]) for i in range(n_shifts + 1)]
    return Draws(signs[0], torch.stack(signs[1:]), as_tensor(arrays["t_used"][step]))


def check_views(entry: Entry, arrays: Arrays, step: int, views: torch.Tensor) -> None:
    """Sums of every view, and every third pixel where those are recorded."""
    tolerance = tolerance_for(entry, "views")
    pixels = arrays.get(f"views_step{step}_every3rd_pixel")
    if pixels is not None:
        check(views[:, :, ::3, ::3], pixels, tolerance, f"views {step}")
    sums = views.double().sum(dim=(1, 2, 3))
    of_a_sum = float(tolerance) * views[0].numel() ** 0.5
    check(sums, arrays[f"views_step{step}_sum_per_view"], of_a_sum, f"views' sums {step}")


def check_gradients(entry: Entry, arrays: Arrays, step: int, encoder: Encoder) -> None:
    """Gradient norms of all parameters; -1 stands for none."""
    tolerance = tolerance_for(entry, f"gradnorm_step{min(step, 1)}")
    params = dict(encoder.named_parameters())
    ours = []
    for name in map(str, arrays["param_names"]):
        grad = params[name].grad
        ours.append(-1.0 if grad is None else grad.double().norm().item())
    expected = arrays["gradnorm_per_step"][step]
    check(ours, expected, loosened(tolerance, 1e-7 * expected.max()), f"gradients {step}")
