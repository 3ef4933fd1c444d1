"""Golden checks of the transforms, the feature order and the scores."""

import ast
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.metrics import binary_score
from dia.augment import (
    Jitter,
    adjust_contrast,
    adjust_hsv,
    colour_jitter,
    crop,
    flip,
    hsv_to_rgb,
    published_crop_boxes,
    rgb_to_hsv,
    to_grey,
)
from dia.encoders import Heads
from dia.features import ViewDraws, image_features
from dia.scoring import (
    csi_score,
    feature_norm,
    fit_csi,
    marginal_logits,
    max_softmax,
    similarity_to_mean,
)
from dia.shifts import ShiftType, blur_and_shift, cut_and_permute, gaussian_kernel, rotate
from tests.golden.golden_dia_tools import Entry, check, loosened, tolerance_for
from tests.golden.golden_tools import Arrays, as_tensor, group

BASES = {"rotate": "rotation", "cutperm": "cutperm"}


def check_transforms(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """Shifts and blurs, crops and flips, colour operations."""
    x = as_tensor(arrays["x"])
    for name, function in (("rotation", rotate), ("cutperm", cut_and_permute)):
        for k, expected in group(arrays, name).items():
            check(function(x, int(k)), expected, 0.0, f"{name} {k}")
    check_blurs(entry, arrays)
    check_crops(entry, arrays)
    check_colours(entry, arrays)


def check_blurs(entry: Entry, arrays: Arrays) -> None:
    """Kernels, and blur plus shift at the images' size or at a constant one."""
    for key in arrays:
        if key.startswith("gaussian_kernel"):
            kernel = gaussian_kernel(int(key.removeprefix("gaussian_kernel")))
            tolerance = tolerance_for(entry, key, "gaussian_kernel7")
            check(kernel[None, None], arrays[key], tolerance, key)
    kernel_size = int(re.search(r"kernel (\d+)", entry["what"]).group(1))
    constant = int(re.search(r"resize to (\d+)", entry["what"]).group(1))
    x = as_tensor(arrays["x_square"])
    for key in (key for key in arrays if key.startswith("blur_")):
        kind, resized, method = re.match(r"blur_(\w+)_const(\d)_(\w+)\|", key).groups()
        got = blur_and_shift(
            x,
            int(key.partition("|")[2]),
            ShiftType(BASES[method], f"blur{kind}"),
            kernel_size=kernel_size,
            resolution=constant if resized == "1" else None,
        )
        check(got, arrays[key], tolerance_for(entry), key)


def check_crops(entry: Entry, arrays: Arrays) -> None:
    """Crops and flips with given parameters, and the published sampler of crops."""
    tolerance = tolerance_for(entry)
    cropped = crop(as_tensor(arrays["crop_x"]), as_tensor(arrays["crop_whbias"]))
    if cropped.shape != arrays["crop_out"].shape:
        cropped = F.adaptive_avg_pool2d(cropped, arrays["crop_out"].shape[-2:])
    check(cropped, arrays["crop_out"], tolerance, "crop")
    x = as_tensor(arrays["flip_x"])
    flipped = flip(x, as_tensor(arrays["flip_sign"]))
    check(flipped, arrays["flip_out"], tolerance_for(entry, "flip_out"), "flip")
    sign, bias = as_tensor(arrays["flipcrop_sign"]), as_tensor(arrays["flipcrop_bias"])
    boxes = torch.stack((sign, torch.ones_like(sign), bias[:, 0], bias[:, 1]), dim=1)
    check(crop(x, boxes), arrays["flipcrop_out"], tolerance, "flip and crop")

    note = entry["settings"]["notes"]["crop_sampled_whbias_seeded"]
    seed, n, side, scale = re.search(
        r"seed\((\d+)\); (\d+) samples .* for (\d+)x\d+, scale (\([^)]*\))", note
    ).groups()
    rng = np.random.RandomState(int(seed))
    sampled = published_crop_boxes(int(n), int(side), ast.literal_eval(scale), rng)
    check(sampled, arrays["crop_sampled_whbias_seeded"], 0.0, "sampled crops")


def check_colours(entry: Entry, arrays: Arrays) -> None:
    """HSV there and back, the jitter in both orders, grey."""
    x = as_tensor(arrays["colour_x"])
    contrast, *hsv = (
        as_tensor(arrays[f"factor_{name}"]) for name in ("contrast", "hue", "saturation", "value")
    )
    on = torch.ones(x.shape[0], dtype=torch.bool)
    for name, got in {
        "hsv": rgb_to_hsv(x),
        "hsv_back": hsv_to_rgb(as_tensor(arrays["hsv"])),
        "rgb_from_hsv_in": hsv_to_rgb(as_tensor(arrays["hsv_in"])),
        "contrast_out": adjust_contrast(x, contrast),
        "hsv_adjust_out": adjust_hsv(x, *hsv),
        "contrast_then_hsv_out": colour_jitter(x, Jitter(on, on, contrast, *hsv)),
        "hsv_then_contrast_out": colour_jitter(x, Jitter(on, ~on, contrast, *hsv)),
        "gray_out": to_grey(x),
    }.items():
        check(got, arrays[name], tolerance_for(entry, name), name)


def check_csi_scores(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """Axes, weights, scores and AUROCs of both scores of the bank."""
    sets = [k.partition("|")[0] for k in arrays if k.endswith("|simclr") and k.startswith("one_")]
    assert sets
    for score, n_shifts in (("CSI", entry["settings"]["K_shift"]), ("simclr", 1)):
        views = {
            name: tuple(as_tensor(arrays[f"{name}|{layer}"]) for layer in ("simclr", "shift"))
            for name in ("train", "id", *sets)
        }
        reference = fit_csi(*views.pop("train"), n_shifts=n_shifts, score=score)
        weights = tolerance_for(entry, "weights")
        check(reference.weight_sim, arrays[f"{score}_weight_sim"], weights, "weight_sim")
        check(reference.weight_shift, arrays[f"{score}_weight_shi"], weights, "weight_shi")
        scores = tolerance_for(entry, "scores")
        check(reference.axes, arrays[f"{score}_axis"], scores, "axes")
        ours = {name: csi_score(reference, *features).numpy() for name, features in views.items()}
        check(ours["id"], arrays[f"{score}_scores_id"], scores, "normal scores")
        areas = []
        for name in sets:
            check(ours[name], arrays[f"{score}_scores|{name}"], scores, name)
            areas.append(auroc_of_normals(ours["id"], ours[name]))
            check_area(entry, areas[-1], arrays[f"{score}_auroc|{name}"], ours["id"], ours[name])
        tolerance = tolerance_for(entry, "auroc")
        check(np.mean(areas), arrays[f"{score}_one_class_mean"], tolerance, "mean AUROC")
        pooled = np.concatenate([ours[name] for name in sets])
        area = auroc_of_normals(ours["id"], pooled)
        check_area(entry, area, arrays[f"{score}_one_class_pooled"], ours["id"], pooled)


def auroc_of_normals(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """AUROC of scores that are larger for normal images."""
    labels = np.concatenate([np.zeros(len(normal)), np.ones(len(anomalous))])
    return binary_score(labels, -np.concatenate([normal, anomalous])).auroc


def check_area(
    entry: Entry, area: float, expected: np.ndarray, normal: np.ndarray, anomalous: np.ndarray
) -> None:
    """An AUROC within its tolerance; a pair of scores within 1e-6 may be counted either way."""
    tolerance = tolerance_for(entry, "auroc")
    ties = (np.abs(normal[:, None] - anomalous[None]) < 1e-6).mean()
    check(area, expected, loosened(tolerance, float(tolerance) + ties), "AUROC")


def check_feature_order(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """Order of forwards, rows and features; a new flip for each shift."""
    settings = entry["settings"]
    n_shifts, n_samples = settings["K_shift"], settings["ood_samples"]
    flips = iter(as_tensor(arrays["flip_signs_per_call"]))
    calls = iter(range(10**6))

    def encoder(rows: torch.Tensor, *_: str) -> Heads:
        call = torch.full((len(rows),), float(next(calls)))
        number = torch.arange(len(rows), dtype=torch.float32)
        seen = torch.stack((call, number, rows[:, 0, 0, 0], rows[:, 0, 0, -1]), dim=1)
        return Heads(linear=seen, penultimate=seen, simclr=seen, shift=seen)

    taken = []
    for number in range(len(settings["batches"])):
        images = as_tensor(arrays[f"x_batch{number}"])
        samples = [
            ViewDraws(torch.stack([next(flips)[: len(images)] for _ in range(n_shifts)]), None)
            for _ in range(n_samples)
        ]
        taken.append(image_features(encoder, images, settings["shift"], n_shifts, samples)[0])
    features = torch.cat(taken)
    expected = arrays["features"]
    check(features[..., :2], expected[..., :2], 0.0, "order")
    check(features[..., 2:], expected[..., 2:], tolerance_for(entry, "pixels"), "pixels")


def check_other_scores(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """clean_norm, similar, baseline, baseline_marginalized, and the AUROC's direction."""
    calls = [arrays[key] for key in sorted(arrays) if key.startswith("simclr_call")]
    simclr = as_tensor(np.stack(calls))
    joint = group(arrays, "joint")
    for name, got in {
        "clean_norm": feature_norm(simclr[0]),
        "clean_norm_penultimate": feature_norm(as_tensor(arrays["penultimate"])),
        "similar": similarity_to_mean(simclr),
        "baseline": max_softmax(as_tensor(arrays["outputs"])),
        "baseline_marginalized": max_softmax(
            marginal_logits(torch.stack([joint[f"rot{k}"] for k in range(len(joint))]))
        ),
    }.items():
        check(got, arrays[f"score|{name}"], tolerance_for(entry), name)
    area = auroc_of_normals(arrays["auroc_id"], arrays["auroc_ood"])
    check(area, arrays["auroc"], tolerance_for(entry), "AUROC")
