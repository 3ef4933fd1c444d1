"""How much faster than the published loops: a contrastive step with dissolving, and CSI scores.

Both ways run in turn in this process on the same inputs; the fastest of each is compared, in
processor seconds, so other programs matter little. Also prints how far the results differ, and what
bounds our side: the share of convolutions in its step, and the bare matrix products of the scores.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.published_dia import loop_csi_scores, loop_views, with_loop_layers
from common.checkpoint import save_text_atomic
from dia.augment import Augmentation, augment, random_augmentation
from dia.encoders import build_encoder
from dia.losses import contrastive_losses
from dia.scoring import csi_score, fit_csi
from dia.settings import ContrastiveConfig
from dia.shifts import ShiftType
from dia.views import BetaParameters, NegativeViewConfig, draw_views, make_views, shift_labels
from diffusion_models.diffusion import GaussianDiffusion
from diffusion_models.dissolve import Dissolver
from diffusion_models.unet import Unet

CROP = (0.08, 1.0)
SIDES = {"loop_convolutions": "in the loop", "ours_convolutions": "here"}
CONVOLUTIONS = ("mkldnn_convolution", "slow_conv2d_forward", "convolution_backward")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--side", type=int, default=224, help="image side in pixels (default: %(default)s)")
    add("--batch", type=int, default=8, help="images of a step (default: %(default)s)")
    add("--dim", type=int, default=64, help="width of the U-Net (default: %(default)s)")
    add("--resolution", type=int, default=32, help="dissolving side (default: %(default)s)")
    add("--images", type=int, default=500, help="test images to score (default: %(default)s)")
    add("--bank", type=int, default=3000, help="train images (default: %(default)s)")
    add("--samples", type=int, default=10, help="samples of each (default: %(default)s)")
    add("--pairs", type=int, default=2, help="runs of each way (default: %(default)s)")
    add("--json", type=Path, help="write the numbers here, too")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.manual_seed(0)
    record = {"step": measure_step(arguments), "scores": measure_scores(arguments)}
    record |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in ("step", "scores"):
        found = record[name]
        print(
            f"{name:<8} loop {found['loop_s']:.3f} s, here {found['ours_s']:.4f} s: "
            f"{found['ratio']:.2f} times; largest difference {found['difference']:.1e}"
        )
    step, scores = record["step"], record["scores"]
    print(f"views alone: {step['views_ratio']:.2f} times")
    shares = ", ".join(f"{step[key]:.0%} {name}" for key, name in SIDES.items())
    print(f"convolutions, forward and backward, of the step: {shares}")
    print(f"bare matrix products of the scores: {scores['products_s']:.4f} s")
    if arguments.json is not None:
        save_text_atomic(json.dumps(record, indent=2) + "\n", arguments.json)
    return 0


def measure_step(arguments: argparse.Namespace) -> dict[str, float]:
    """A training step of the published ResNet-18 both ways: seconds, ratio, difference of views.

    The ways differ in how views are made; augmentation, encoder, losses and gradients are the same
    code.
    """
    images = torch.rand(arguments.batch, 3, arguments.side, arguments.side)
    generator = torch.Generator().manual_seed(0)
    uniform = BetaParameters(1.0, 1.0)
    draws = draw_views(len(images), 4, beta=uniform, offset=0.3, upper=1.0, generator=generator)
    size = (arguments.side, arguments.side)
    augmentation = random_augmentation(12 * len(images), size, CROP, generator)
    diffusion = GaussianDiffusion(Unet(arguments.dim))
    published = with_loop_layers(diffusion)
    encoder = build_encoder("resnet18_imagenet", n_classes=2, n_shifts=4)
    dissolver = Dissolver(diffusion)
    ours_encoder = deepcopy(encoder)
    negatives = NegativeViewConfig(dissolve=dissolver, resolution=arguments.resolution)

    def ours() -> Tensor:
        kind = ShiftType("rotation", "diffusion")
        return make_views(images, "simclr_DIA", kind, draws, negatives)

    def loop() -> Tensor:
        return loop_views(images, draws, published, arguments.resolution)

    difference = (ours() - loop()).abs().max().item()
    views = alternate(loop, ours, arguments.pairs)
    ways = {
        "loop": lambda: train_once(encoder, loop(), augmentation),
        "ours": lambda: train_once(ours_encoder, ours(), augmentation),
    }
    whole = alternate(ways["loop"], ways["ours"], arguments.pairs)
    shares = {f"{name}_convolutions": convolutions_in(run) for name, run in ways.items()}
    return {**whole, **shares, "difference": difference, "views_ratio": views["ratio"]}


def convolutions_in(run: Callable[[], object]) -> float:
    """Share of the processor time of `run` that is spent in convolutions and their gradients."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    seconds = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    found = sum(value for key, value in seconds.items() if key.endswith(CONVOLUTIONS))
    return found / sum(seconds.values())


def train_once(encoder: torch.nn.Module, views: Tensor, augmentation: Augmentation) -> None:
    """Augmentation, both losses and their gradients for the views of a batch."""
    encoder.zero_grad()
    heads = encoder(augment(views, augmentation), "simclr", "shift")
    truth = shift_labels(len(views) // 12, 4, 3, views.device)
    settings = ContrastiveConfig(mode="simclr_DIA", shift_trans_type="diffusion")
    contrastive_losses(heads, truth, settings).total.backward()


def measure_scores(arguments: argparse.Namespace) -> dict[str, float]:
    """CSI scores of random features both ways: seconds, ratio, difference of the scores."""

    def features(n: int) -> tuple[Tensor, Tensor]:
        views = 4 * arguments.samples
        return torch.randn(n, views, 128), 1 + torch.rand(n, views, 4)

    reference = fit_csi(*features(arguments.bank), n_shifts=4)
    tested = features(arguments.images)
    difference = (loop_csi_scores(reference, *tested) - csi_score(reference, *tested)).abs().max()
    found = alternate(
        lambda: loop_csi_scores(reference, *tested),
        lambda: csi_score(reference, *tested),
        arguments.pairs,
    )
    queries = torch.randn(4, arguments.images, 128)
    products = torch.empty(arguments.images, arguments.bank)

    def bare() -> None:
        for query, axes in zip(queries, reference.axes, strict=True):
            torch.mm(query, axes.T, out=products)

    bare_seconds = alternate(bare, bare, max(3, arguments.pairs))["ours_s"]
    return {**found, "difference": difference.item(), "products_s": bare_seconds}


def alternate(
    loop: Callable[[], object], ours: Callable[[], object], pairs: int
) -> dict[str, float]:
    """Least processor seconds of each way, run in turn."""
    seconds: dict[str, list[float]] = {"loop_s": [], "ours_s": []}
    for _ in range(pairs):
        for name, run in (("loop_s", loop), ("ours_s", ours)):
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    least = {name: min(values) for name, values in seconds.items()}
    return {**least, "ratio": least["loop_s"] / least["ours_s"]}


if __name__ == "__main__":
    sys.exit(main())
