"""`make bench`: the fast engine against the published algorithm, in one process, on the same masks.

The ratio is the median over pairs that run one after the other, so that a busy machine slows both.
Random weights with a gain (He's deviation times --gain): torch's own would lose the signal.
"""

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.published_heatmap import PublishedScorer
from common.checkpoint import save_text_atomic
from common.runtime import resolve_device
from inpainter.completion import DrawDropout, channel_dropout_of
from inpainter.critic import Critic
from inpainter.dropout import live_layers
from inpainter.fast.costs import completion_macs, prepared_macs
from inpainter.fast.scorer import FastScorer
from inpainter.generator import Generator
from inpainter.settings import GeneratorConfig, TestConfig
from inpainter.windows import cut_windows, window_grid

METRICS = ("MCD_image", "MCD_feature")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--window", type=int, default=256, metavar="PX", help="window, its half is the hole")
    add("--M", type=int, default=10, help="completions per window (default: %(default)s)")
    add("--ngf", type=int, default=32, help="base width (default: %(default)s)")
    add("--batch", type=int, default=2, metavar="N", help="windows per batch (default: 2)")
    add("--pairs", type=int, default=5, help="published and fast runs (default: %(default)s)")
    add("--precision", default="fp32,bf16", help="fp32, bf16, tf32, or several with commas")
    add("--device", default="cpu", help="cpu, cuda, … (default: %(default)s)")
    add("--gain", type=float, default=0.95, help="of the random weights (default: %(default)s)")
    add("--image", type=int, nargs=2, default=(0, 0), metavar="PX",
        help="also score some windows of an image of this size, for the peak memory")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the results there")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    hole = (arguments.window // 2, arguments.window // 2)
    generator, critic = networks(arguments, hole, device)
    parts = (generator, critic, METRICS, arguments.M, hole)
    windows = textured(arguments.batch, arguments.window).to(device)
    masks = masks_of(generator, arguments.M)
    scorers = {"published": PublishedScorer(*parts)}
    scorers |= {name: FastScorer(*parts, precision=name) for name in arguments.precision.split(",")}
    for name, scorer in scorers.items():
        if name != "published":
            scorer(windows, list(range(len(windows))), masks(0))  # plans, buffers, kernels
    results = measure(scorers, windows, masks, arguments.pairs)
    peak = convolution_peak(device)
    macs = prepared_macs(scorers["fp32"], windows) + arguments.M * completion_macs(
        scorers["fp32"], windows
    ) if "fp32" in scorers else math.nan  # fmt: skip
    results |= summary(results, macs * arguments.batch, peak)
    results["peak_memory_gib"] = peak_memory(scorers, arguments, device)
    report(results)
    if arguments.json is not None:
        save_text_atomic(json.dumps(results, indent=2) + "\n", arguments.json)
    return 0


def networks(
    arguments: argparse.Namespace, hole: tuple[int, int], device: torch.device
) -> tuple[Generator, Critic]:
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(ngf=arguments.ngf))
    critic = Critic(1, arguments.ngf, hole)
    for parameter in [*generator.parameters(), *critic.parameters()]:
        std = arguments.gain * math.sqrt(2 / parameter[0].numel()) if parameter.ndim == 4 else 0.1
        torch.nn.init.normal_(parameter, std=std)
    return generator.to(device).eval(), critic.to(device).eval()


def textured(count: int, side: int) -> Tensor:
    """Smooth random windows (N, 1, side, side) in [-1, 1]."""
    noise = torch.randn(count, 1, side, side)
    return (3 * F.avg_pool2d(noise, 7, 1, 3)).clamp(-1, 1)


def masks_of(generator: Generator, M: int) -> Callable[[int], DrawDropout]:
    """Seed -> channel dropout of the published layers, drawn for each window."""
    channels = generator.droppable_layers()
    layers = {name: channels[name] for name in live_layers(GeneratorConfig(), list(channels))}
    return lambda seed: channel_dropout_of(layers, M, 0.5, seed, "benchmark")


def measure(scorers: dict, windows: Tensor, masks: Callable, pairs: int) -> dict:
    """Seconds per batch of every scorer and the largest relative difference of the scores."""
    seconds = {name: [] for name in scorers}
    errors = dict.fromkeys(scorers, 0.0)
    numbers = list(range(len(windows)))
    for pair in range(pairs):
        scores = {}
        for name, scorer in scorers.items():
            started = time.perf_counter()
            scores[name] = {k: v.cpu() for k, v in scorer(windows, numbers, masks(pair)).items()}
            seconds[name].append(time.perf_counter() - started)
        for name, values in scores.items():
            for metric, expected in scores["published"].items():
                error = ((values[metric] - expected).abs() / expected).max().item()
                errors[name] = max(errors[name], error)
    return {"seconds": seconds, "errors": errors}


def convolution_peak(device: torch.device) -> float:
    """GMAC/s of the fastest of some fp32 convolutions, channels_last."""
    best = 0.0
    for channels, side in ((128, 64), (128, 48), (64, 128)):
        x = torch.randn(1, channels, side, side, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=device)
        weight = weight.contiguous(memory_format=torch.channels_last)
        for _ in range(20):
            started = time.perf_counter()
            F.conv2d(x, weight, padding=1)[0, 0, 0, 0].item()
            rate = 9 * channels**2 * side**2 / (time.perf_counter() - started)
            best = max(best, rate / 1e9)
    return best


def summary(results: dict, macs: float, peak: float) -> dict:
    """ratio_<precision>, max_rel_error, and how much of the convolution peak fp32 reaches."""
    seconds = results["seconds"]
    values = {}
    for name in seconds:
        if name != "published":
            pairs = zip(seconds["published"], seconds[name], strict=True)
            values[f"ratio_{name}"] = statistics.median(slow / fast for slow, fast in pairs)
    if "fp32" in seconds:
        rate = macs / 1e9 / statistics.median(seconds["fp32"])
        values |= {
            "max_rel_error": results["errors"]["fp32"],
            "gmac_per_s": rate,
            "conv_peak_gmac_per_s": peak,
            "conv_peak_share": rate / peak,
        }
    return values


def peak_memory(scorers: dict, arguments: argparse.Namespace, device: torch.device) -> float:
    """GiB at most so far on the GPU, or of this process on a CPU; see --image."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if any(arguments.image):
        height, width = arguments.image
        image = torch.rand(1, height, width)
        side = arguments.window
        grid = window_grid((height, width), (side, side), TestConfig.patch_stride, "stretched")
        scorer, masks = scorers["fp32"], masks_of(scorers["fp32"].generator, arguments.M)
        for number in range(4):
            scorer(cut_windows(image, grid, [number]), [number], masks(0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report(results: dict) -> None:
    print(f"{'':12}{'s per batch':>12}{'ratio':>8}{'largest relative difference':>30}")
    for name, seconds in results["seconds"].items():
        ratio = results.get(f"ratio_{name}", 1.0)
        median = statistics.median(seconds)
        print(f"{name:12}{median:12.3f}{ratio:8.2f}{results['errors'][name]:30.1e}")
    if "gmac_per_s" in results:
        rate, peak = results["gmac_per_s"], results["conv_peak_gmac_per_s"]
        print(f"fp32: {rate:.1f} GMAC/s of direct convolutions, {rate / peak:.0%} of the "
              f"fastest convolution's {peak:.1f}")  # fmt: skip
    print(f"peak memory: {results['peak_memory_gib']:.2f} GiB")


if __name__ == "__main__":
    sys.exit(main())
