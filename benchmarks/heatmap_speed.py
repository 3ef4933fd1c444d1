"""`make bench`: the fast engine against the published algorithm, in one process, on the same masks.

The ratio is the median over pairs that run one after the other, so that a busy machine slows both.
Weights are random, or with --checkpoint_dir and --config trained ones, on windows of real images.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

import torch
import torch.nn.functional as F

from benchmarks.heatmap_memory import image_memory
from benchmarks.heatmap_stages import (
    completion_macs,
    prepared_macs,
    report_stages,
    stage_seconds,
)
from benchmarks.heatmap_subject import Subject, random_settings, random_subject, trained_subject
from benchmarks.published_heatmap import PublishedScorer
from common.checkpoint import save_text_atomic
from common.config import load_config
from common.devices import resolve_device, tf32_products
from inpainter.fast.scorer import FastScorer
from inpainter.settings import PicardConfig, input_path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--batch", type=int, default=2, metavar="N", help="windows per batch (default: 2)")
    add("--pairs", type=int, default=5, help="published and fast runs (default: %(default)s)")
    add("--precision", default="fp32,bf16", help="fp32, bf16, tf32, or several with commas")
    add("--device", default="cpu", help="cpu, cuda, … (default: %(default)s)")
    add("--image", type=int, nargs=2, default=(2000, 2500), metavar="PX",
        help="height and width of the image that the peak memory is measured with; 0 0 = leave "
             "that out (default: 2000 2500)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add = parser.add_argument_group("random weights").add_argument
    add("--window", type=int, default=256, metavar="PX", help="window, its half is the hole")
    add("--M", type=int, default=10, help="completions per window (default: %(default)s)")
    add("--ngf", type=int, default=32, help="base width (default: %(default)s)")
    add("--gain", type=float, default=0.95, help="of the random weights (default: %(default)s)")
    add = parser.add_argument_group("trained weights").add_argument
    add("--config", type=Path, metavar="FILE", help="their settings: window, M, layers that drop")
    add("--checkpoint_dir", type=Path, metavar="DIR", help="their folder")
    add("--checkpoint_iter", default="latest", metavar="N", help="a step, latest or best")
    add("--image_dir", type=Path, metavar="DIR",
        help="where windows are cut from (default: test_data_path of the settings)")  # fmt: skip
    arguments = parser.parse_args()
    if (arguments.config is None) != (arguments.checkpoint_dir is None):
        parser.error("--config and --checkpoint_dir belong together")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    if arguments.config is not None:
        config = load_config(PicardConfig, arguments.config)
    else:
        config = random_settings(arguments.window, arguments.M, arguments.ngf)
    memory = {"peak_memory_gib": None}
    if any(arguments.image):
        sizes = (tuple(arguments.image), arguments.batch, arguments.threads)
        memory = image_memory(config, *sizes, device)
    subject = subject_of(arguments, config, device)
    scorers = {"published": PublishedScorer(*subject.parts())}
    for name in arguments.precision.split(","):
        scorers[name] = FastScorer(*subject.parts(), precision=name)
        scorers[name](subject.batches[0], subject.masks(len(subject.batches[0]), 0))  # plans
    results = measure(scorers, subject)
    results |= summary(results, subject, scorers, convolution_peak(device)) | memory
    results["stages"] = {name: stage_seconds(subject, scorer) for name, scorer in scorers.items()}
    report(results, arguments.image)
    if arguments.json is not None:
        save_text_atomic(json.dumps(results, indent=2) + "\n", arguments.json)
    return 0


def subject_of(
    arguments: argparse.Namespace, config: PicardConfig, device: torch.device
) -> Subject:
    """Trained or random networks, and windows for every pair."""
    counts = (arguments.batch, arguments.batch * arguments.pairs)
    if arguments.config is None:
        return random_subject(config, arguments.gain, *counts, device)
    step = arguments.checkpoint_iter
    checkpoint = (arguments.checkpoint_dir, int(step) if step.isdigit() else step)
    folder = arguments.image_dir or input_path(config.test_data_path, "test_data_path")
    return trained_subject(config, checkpoint, folder, *counts, device)


def measure(scorers: dict, subject: Subject) -> dict:
    """Seconds per window of every scorer, batch after batch, and how their scores differ."""
    seconds = {name: [] for name in scorers}
    differences = {name: [] for name in scorers}
    for pair, windows in enumerate(subject.batches):
        scores = {}
        for name, scorer in scorers.items():
            started = time.perf_counter()
            with as_asked(name):
                found = scorer(windows, subject.masks(len(windows), pair))
            scores[name] = {metric: values.cpu() for metric, values in found.items()}
            seconds[name].append((time.perf_counter() - started) / len(windows))
        for name, values in scores.items():
            for metric, expected in scores["published"].items():
                differences[name] += ((values[metric] - expected).abs() / expected).tolist()
    return {
        "seconds": seconds,
        "largest_difference": {name: max(found) for name, found in differences.items()},
        "median_difference": {n: statistics.median(found) for n, found in differences.items()},
    }


def as_asked(name: str) -> contextlib.AbstractContextManager[None]:
    """Whether a GPU rounds products: in the published way torch decides, which rounds some."""
    return contextlib.nullcontext() if name == "published" else tf32_products(name == "tf32")


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


def summary(results: dict, subject: Subject, scorers: dict, peak: float) -> dict:
    """ratio_<precision>, max_rel_error, and how much of the convolution peak fp32 reaches."""
    seconds = results["seconds"]
    values = {}
    for name in seconds:
        if name != "published":
            pairs = zip(seconds["published"], seconds[name], strict=True)
            values[f"ratio_{name}"] = statistics.median(slow / fast for slow, fast in pairs)
    if "fp32" in seconds:
        scorer, windows = scorers["fp32"], subject.batches[0]
        M = subject.config.test.heatmap_M_inpaint
        macs = prepared_macs(scorer, windows) + M * completion_macs(scorer, windows)
        rate = macs / 1e9 / statistics.median(seconds["fp32"])
        values |= {
            "max_rel_error": results["largest_difference"]["fp32"],
            "gmac_per_s": rate,
            "conv_peak_gmac_per_s": peak,
            "conv_peak_share": rate / peak,
        }
    return values


def report(results: dict, image_hw: tuple[int, int]) -> None:
    print(
        f"{'':12}{'s per window':>13}{'ratio':>8}{'relative difference: largest':>30}{'median':>10}"
    )
    for name, seconds in results["seconds"].items():
        ratio = results.get(f"ratio_{name}", 1.0)
        largest, middle = (results[f"{k}_difference"][name] for k in ("largest", "median"))
        median = statistics.median(seconds)
        print(f"{name:12}{median:13.3f}{ratio:8.2f}{largest:30.1e}{middle:10.1e}")
    if "gmac_per_s" in results:
        rate, peak = results["gmac_per_s"], results["conv_peak_gmac_per_s"]
        print(f"fp32: {rate:.1f} GMAC/s of direct convolutions, {rate / peak:.0%} of the "
              f"fastest convolution's {peak:.1f}")  # fmt: skip
    if results["peak_memory_gib"] is not None:
        height, width = image_hw
        print(f"peak memory of a {height}x{width} image: {results['peak_memory_gib']:.2f} GiB, the "
              f"fast engine alone in its process ({results['completed']} of {results['windows']} "
              "windows completed: memory depends on the batch, not on their number)")  # fmt: skip
    report_stages(results["stages"])


if __name__ == "__main__":
    sys.exit(main())
