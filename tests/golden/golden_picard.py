"""One check for each kind of recorded PICARD answer; sizes and settings come from the entry."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.annotations import boxes_to_labels
from common.images import to_signed
from common.metrics import score_heatmap
from inpainter.completion import WindowScorer
from inpainter.fast.scorer import FastScorer
from inpainter.heatmap import score_image, stitch
from inpainter.masks import crop_boxes, discount_weights
from inpainter.networks import Networks, build_networks
from inpainter.networks.attention import Attention, contextual_attention
from inpainter.networks.critic import Critic
from inpainter.networks.dropout import ChannelDropout, ChannelMasks, active_dropout_layers
from inpainter.networks.generator import Completion, Generator
from inpainter.settings import (
    CriticConfig,
    GeneratorConfig,
    PicardConfig,
    TestConfig,
    TrainConfig,
)
from inpainter.step import (
    Optimisers,
    StepInputs,
    StepLosses,
    add_gradients,
    build_optimisers,
    step_losses,
    take_step,
)
from inpainter.windows import cut_windows, window_grid
from tests.golden.golden_tools import Arrays, as_tensor, assert_close, assert_mostly_equal, group
from tests.golden.golden_weights import weights_by_rule

Entry = dict[str, Any]


def generator_config(settings: dict[str, Any]) -> GeneratorConfig:
    """netG as the entry words it: custom lists by name of the published file, or given."""
    options: dict[str, Any] = {"input_dim": settings["input_dim"], "ngf": settings["ngf"]}
    options["dropout_which"] = settings.get("dropout_which") or "CUSTOM"
    for stage in ("coarse", "fine"):
        names = custom_list(settings, stage)
        if names is not None:
            options[f"custom_drop_layers_{stage}"] = tuple(names)
    return GeneratorConfig(**options)


def custom_list(settings: dict[str, Any], stage: str) -> list[str] | None:
    """The custom drop list of a stage, wherever the entry keeps it; none = the published file's."""
    lists = settings.get("custom_drop_layers")
    if isinstance(lists, dict):
        return next((v for k, v in lists.items() if stage in k), [])
    return settings.get(f"custom_drop_layers_{stage}")


def stored_weights(folder: Path, entry: Entry, arrays: Arrays, name: str) -> dict[str, Tensor]:
    """State dict `name` of the entry: stored, in another file of the folder, or by rule."""
    state = group(arrays, name)
    if state:
        return state
    rule = entry["settings"]["weights"]
    for other in sorted(folder.glob("*.npz")):
        if other.name in rule or other.stem in rule:
            with np.load(other, allow_pickle=False) as stored:
                return group(dict(stored), name) or group(dict(stored), "sd")
    return {}


def load(module: torch.nn.Module, folder: Path, entry: Entry, arrays: Arrays, name: str) -> None:
    """Loads the entry's weights strictly; those by rule are checked against sd_sum and sd_l2."""
    state = stored_weights(folder, entry, arrays, name)
    if not state:
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        state = weights_by_rule(entry["settings"]["weights"], shapes)
        check_rule(state, arrays)
    module.load_state_dict(state)
    module.eval()


def check_rule(state: dict[str, Tensor], arrays: Arrays) -> None:
    names = [str(name) for name in arrays["sd_names"]] if "sd_names" in arrays else list(state)
    values = [state[name].double() for name in names]
    assert_close([v.sum() for v in values], arrays["sd_sum"], "rtol 1e-6, atol 1e-6", "sd_sum")
    assert_close([v.norm() for v in values], arrays["sd_l2"], "rtol 1e-6, atol 1e-6", "sd_l2")


def keep_masks(arrays: Arrays) -> dict[str, Tensor]:
    """Layer -> (rows, C) bool, under our names: without the module prefix and `.dropout`."""
    masks = group(arrays, "keep")
    return {k.removeprefix("netG.").removesuffix(".dropout"): v.bool() for k, v in masks.items()}


def check_generator(folder: Path, entry: Entry, arrays: Arrays) -> None:
    generator = Generator(generator_config(entry["settings"]))
    load(generator, folder, entry, arrays, "sd")
    with torch.inference_mode():
        completion = generator(as_tensor(arrays["x"]), as_tensor(arrays["mask"]))
    check_stages(completion, entry, arrays)


def check_stages(completion: Completion, entry: Entry, arrays: Arrays) -> None:
    tolerance = entry["tolerance"]
    assert_close(completion.coarse, arrays["x_stage1"], tolerance["x_stage1"], "x_stage1")
    assert_close(completion.fine, arrays["x_stage2"], tolerance["x_stage2"], "x_stage2")


def check_dropout(folder: Path, entry: Entry, arrays: Arrays) -> None:
    config = generator_config(entry["settings"])
    generator = Generator(config)
    load(generator, folder, entry, arrays, "sd")
    droppable = list(generator.droppable_layers())
    active = [f"{name}.dropout" for name in active_dropout_layers(config, droppable)]
    assert sorted(active) == sorted(str(name) for name in arrays["active_modules"])
    if "modules_with_dropout_layer" in arrays:
        recorded = {str(name) for name in arrays["modules_with_dropout_layer"]}
        assert {f"{name}.dropout" for name in droppable} == recorded
    masks = keep_masks(arrays)
    rows = len(arrays["x_stage1"])
    x = as_tensor(arrays["x"]).expand(rows, -1, -1, -1)
    mask = as_tensor(arrays["mask"]).expand(rows, -1, -1, -1)
    with torch.inference_mode():
        completion = generator(x, mask, ChannelDropout(masks, float(arrays["p"])))
    check_stages(completion, entry, arrays)
    composite = completion.fine * mask + x * (1 - mask)
    assert_close(composite, arrays["composite"], entry["tolerance"]["composite"], "composite")


def check_critic(folder: Path, entry: Entry, arrays: Arrays) -> None:
    settings = entry["settings"]
    x = as_tensor(arrays["x"])
    critic = Critic(settings["input_dim"], settings["ndf"], tuple(x.shape[2:]))
    load(critic, folder, entry, arrays, "sd")
    with torch.inference_mode():
        score, features = critic(x), critic.features(x)
    assert_close(score, arrays["y"], entry["tolerance"]["y"], "y")
    assert_close(features, arrays["featuremap"], entry["tolerance"]["featuremap"], "featuremap")


def check_attention(folder: Path, entry: Entry, arrays: Arrays) -> None:
    mask = as_tensor(arrays["mask"])[:1] if "mask" in arrays else None  # the first for all (P4)
    attention = contextual_attention(as_tensor(arrays["f"]), as_tensor(arrays["b"]), mask)
    tolerance = entry["tolerance"]
    assert_close(attention.output, arrays["y"], tolerance["y"], "y")
    if "offset_int_hw" in arrays:
        recorded = arrays["offset_int_hw"]
        offsets = match_offsets(attention)
        assert_mostly_equal(offsets, recorded, tolerance["offset_int_hw"], "offset_int_hw")


def match_offsets(attention: Attention) -> Tensor:
    """Where each query's best key lies, relative to the query.

    returns (N, h, w, 2) int64: row and column offset on the attention's grid.
    """
    h, w = (side // 2 for side in attention.output.shape[2:])
    best = attention.weights.argmax(dim=1).unflatten(1, (h, w))  # (N, h, w)
    rows = torch.arange(h, device=best.device)[:, None]
    cols = torch.arange(w, device=best.device)[None, :]
    return torch.stack([best // w - rows, best % w - cols], dim=-1)


def check_trainstep(folder: Path, entry: Entry, arrays: Arrays) -> None:
    settings, tolerance = entry["settings"], entry["tolerance"]
    config = trainstep_config(settings, arrays)
    networks = build_networks(config, torch.device("cpu"))
    for network, name in zip(networks, ("netG", "localD", "globalD"), strict=True):
        network.load_state_dict(
            {
                k.removeprefix(f"{name}."): v
                for k, v in group(arrays, "sd").items()
                if k.startswith(f"{name}.")
            }
        )
    optimisers = build_optimisers(networks, config.train)
    masks = keep_masks(arrays)
    gamma = config.train.spatial_discounting_gamma if config.train.discounted_mask else 1.0
    inputs = StepInputs(
        real=as_tensor(arrays["ground_truth"]),
        boxes=as_tensor(arrays["bboxes_tlhw"]),
        mask=as_tensor(arrays["mask"]).float(),
        discount=discount_weights(config.train.mask_shape, gamma),
        alpha_local=as_tensor(arrays["alpha_local"]),
        alpha_global=as_tensor(arrays["alpha_global"]),
        drop=ChannelDropout(masks, settings["droprate"]) if masks else None,
    )
    recorded_discount = arrays["spatial_discounting_mask"]
    assert_close(
        inputs.discount, recorded_discount, tolerance["spatial_discounting_mask"], "discount"
    )
    losses = step_losses(networks, inputs, config, with_generator=True)
    for name, value in group(arrays, "loss").items():
        assert_close(losses.named()[name].detach(), value, tolerance["losses"], f"loss {name}")
    step = arrays["x2_inpaint_crop"].shape[-1]
    crop = crop_boxes(losses.composite, inputs.boxes)
    every = crop.shape[-1] // step
    crop = crop[..., ::every, ::every].detach()
    assert_close(crop, arrays["x2_inpaint_crop"], tolerance["x2_inpaint_crop"], "x2_inpaint_crop")
    check_update(networks, optimisers, losses, config, tolerance, arrays)


def trainstep_config(settings: dict[str, Any], arrays: Arrays) -> PicardConfig:
    """The entry's settings as a config of its shapes; the dropout masks come with the entry."""
    n, channels, h, w = arrays["ground_truth"].shape
    box = tuple(int(side) for side in arrays["bboxes_tlhw"][0, 2:])
    train = TrainConfig(
        batch_size=n,
        image_shape=(h, w, channels),
        mask_shape=box,
        max_delta_shape=(0, 0),
        discounted_mask=settings["discounted_mask"],
        spatial_discounting_gamma=settings["gamma"],
        lr=settings["lr"],
        beta1=settings["betas"][0],
        beta2=settings["betas"][1],
    )
    weights = (
        "coarse_l1_alpha",
        "l1_loss_alpha",
        "ae_loss_alpha",
        "global_wgan_loss_alpha",
        "gan_loss_alpha",
        "wgan_gp_lambda",
    )
    return PicardConfig(
        train=train,
        test=TestConfig(patch_shape=(h, w, channels), mask_shape=box),
        netG=GeneratorConfig(input_dim=channels, ngf=settings["ngf"]),
        netD=CriticConfig(
            input_dim=settings.get("critic_input_dim", channels), ndf=settings["ndf"]
        ),
        **{name: float(settings[name]) for name in weights},
    )


def check_update(
    networks: Networks,
    optimisers: Optimisers,
    losses: StepLosses,
    config: PicardConfig,
    tolerance: dict[str, Any],
    arrays: Arrays,
) -> None:
    parameters = {
        f"{name}.{k}": p
        for name, network in zip(("netG", "localD", "globalD"), networks, strict=True)
        for k, p in network.named_parameters()
    }
    names_D = [str(name) for name in arrays["names_D"]]
    names_G = [str(name) for name in arrays["names_G"]]
    critic_parameters = [find(parameters, name, ("", "localD.", "globalD.")) for name in names_D]
    after_d = torch.autograd.grad(losses.d, critic_parameters, retain_graph=True)
    add_gradients(networks, losses, config)
    take_step(networks, optimisers, config.train, with_generator=True)
    used = [p.grad.double().norm() for p in critic_parameters]
    of_generator = [find(parameters, name, ("", "netG.")).grad.double().norm() for name in names_G]
    d_tolerance = tolerance["gradnorm_D_*"]
    norms = [grad.double().norm() for grad in after_d]
    assert_close(norms, arrays["gradnorm_D_after_d_backward"], d_tolerance, "D after d")
    assert_close(used, arrays["gradnorm_D_used_by_step"], d_tolerance, "D used")
    assert_close(of_generator, arrays["gradnorm_G"], tolerance["gradnorm_G"], "gradnorm_G")
    for name, recorded in group(arrays, "grad").items():
        grad = find(parameters, name, ("", "netG."))
        assert_close(grad.grad, recorded, tolerance["grad"], f"grad {name}")
    updated = [
        find(parameters, str(name), ("", "netG.")).detach().double()
        for name in arrays["updated_names"]
    ]
    mean_change = [
        (value.sum() - recorded) / value.numel()
        for value, recorded in zip(updated, arrays["updated_sum"], strict=True)
    ]
    allowed = float(re.search(r"<= ([0-9.e-]+)", tolerance["updated_sum"])[1])
    assert_close(mean_change, np.zeros(len(updated)), allowed, "updated_sum")
    norms = [value.norm() for value in updated]
    assert_close(norms, arrays["updated_l2"], tolerance["updated_l2"], "updated_l2")


def find(parameters: dict[str, Tensor], name: str, prefixes: tuple[str, ...]) -> Tensor:
    """The parameter of a recorded name, whichever prefix the record leaves out."""
    return next(parameters[prefix + name] for prefix in prefixes if prefix + name in parameters)


class RecordedDropout(NamedTuple):
    """The recorded masks in the place of `inpainter.networks.dropout.ImageDropout`."""

    keep: dict[str, torch.Tensor]
    p: float

    def masks(self, numbers: list[int]) -> ChannelMasks:
        return ChannelMasks({name: kept[numbers] for name, kept in self.keep.items()}, self.p)


def check_heatmap(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """The recorded scores and maps, by the plain and by the fast engine."""
    for engine in (WindowScorer, FastScorer):
        check_heatmap_by(engine, folder, entry, arrays)


def check_heatmap_by(engine: type, folder: Path, entry: Entry, arrays: Arrays) -> None:
    settings, tolerance = entry["settings"], entry["tolerance"]
    image = as_tensor(arrays["image01"])[0]
    grids = group(arrays, "grid")
    generator, critic, test = heatmap_parts(folder, entry, arrays, tuple(grids))
    scorer = engine(generator, critic, test.heatmap_metrics, test.mask_shape)
    keep = {k: v.unflatten(0, (-1, settings["M"])) for k, v in keep_masks(arrays).items()}
    dropout = RecordedDropout(keep, float(arrays["p"]))
    *_, result = score_image(image, scorer, test, dropout, torch.device("cpu"))
    for metric, recorded in grids.items():
        assert_close(result.grids[metric], recorded, tolerance["grid"], f"grid {metric}")
    for metric, recorded in group(arrays, "heatmap").items():
        assert_close(result.heatmaps[metric], recorded, tolerance["heatmap"], metric)
    averaged = dataclasses.replace(test, heatmap_type="averaged")
    grid = window_grid(image.shape[1:], test.patch_shape[:2], test.patch_stride, "stretched")
    for metric, recorded in group(arrays, "heatmap_averaged").items():
        heat = stitch(result.grids[metric], grid, averaged)
        assert_close(heat, recorded, tolerance["heatmap"], f"averaged {metric}")
    windows = to_signed(cut_windows(image, grid, [0]))
    with torch.inference_mode():
        completions = torch.cat(list(scorer.completions(windows, dropout.masks([0]))))
    recorded = arrays["completions_of_first_window"]
    assert_close(completions, recorded, tolerance["completions_of_first_window"], "completions")


def heatmap_parts(
    folder: Path, entry: Entry, arrays: Arrays, metrics: tuple[str, ...]
) -> tuple[Generator, Critic, TestConfig]:
    """Generator, local critic and the published heatmap settings of an entry."""
    settings = entry["settings"]
    hole = arrays["completions_of_first_window"].shape[-2:]
    window = tuple(settings.get("window_hw", (256, 256)))
    test = TestConfig(
        heatmap_metrics=metrics,
        heatmap_M_inpaint=settings["M"],
        parallel_batchsize=settings["window_batch"],
        patch_shape=(*window, settings["input_dim"]),
        mask_shape=hole,
        patch_stride=settings["stride"],
    )
    generator = Generator(GeneratorConfig(input_dim=settings["input_dim"], ngf=settings["ngf"]))
    load(generator, folder, entry, arrays, "sd_gen")
    critic = Critic(settings["critic_input_dim"], settings["ndf"], hole)
    load(critic, folder, entry, arrays, "sd_localD")
    return generator, critic, test


def check_score_heatmap(folder: Path, entry: Entry, arrays: Arrays) -> None:
    tolerance = entry["tolerance"]["all"]
    heatmap, ignore = arrays["heatmap"], arrays["ignore_mask"].astype(bool)
    segmentation = boxes_to_labels(arrays["boxes_tlhw"], heatmap.shape)
    assert (segmentation == arrays["segmentation"].astype(bool)).all()
    plain = score_heatmap(heatmap, segmentation)
    assert_close(plain.auroc, arrays["pixel_AUC"], tolerance, "pixel_AUC")
    assert_close(plain.ap, arrays["AP"], tolerance, "AP")
    masked = score_heatmap(heatmap, segmentation, ignore)
    intended = arrays["intended_pixel_AUC_with_ignore"]
    assert_close(masked.auroc, intended, tolerance, "pixel_AUC with ignore mask")
    assert_close(masked.ap, arrays["intended_AP_with_ignore"], tolerance, "AP with ignore mask")


CHECKS = {
    "picard_generator_": check_generator,
    "picard_dropout_": check_dropout,
    "picard_localdis_": check_critic,
    "picard_globaldis_": check_critic,
    "picard_attention_": check_attention,
    "picard_trainstep_": check_trainstep,
    "picard_heatmap_": check_heatmap,
    "picard_score_heatmap": check_score_heatmap,
}
