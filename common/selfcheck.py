"""Whether this installation computes what it should, and how fast: one text for bug reports.

Takes about a minute. Exit status 0 if every check is passed, else 1. No data, no checkpoint and no
network are needed.
"""

import argparse
import importlib.metadata
import locale
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import load_tensors, save_atomic
from common.cli import COMMON_FLAGS, run_script
from common.devices import memory_of, resolve_device, supports_bf16, tf32_products
from common.errors import ExitStatus, UserError
from common.files import free_space, read_regular
from common.images import read_image, write_image16
from common.random_numbers import generator_for
from common.run_log import describe_environment
from dia.encoders import build_encoder
from dia.scoring import csi_score, fit_csi
from diffusion_models.diffusion import GaussianDiffusion
from diffusion_models.dissolve import Dissolver
from diffusion_models.unet import Unet
from inpainter.completion import WindowScorer, dropout_of
from inpainter.fast.scorer import FastScorer
from inpainter.networks.critic import Critic
from inpainter.networks.generator import Generator
from inpainter.settings import GeneratorConfig, TestConfig

METRICS = ("MCD_image", "MCD_feature", "no_dropout")
TOLERANCE = 1e-3
"""Relative; processors and PyTorch versions sum in other orders, which cost 1e-6 here."""
EXPECTED = {
    "random numbers": (0.4450398, 0.1932359, 0.5178921),
    "PICARD's scores": (35.89077, 4.983901, 36.3355),
    "dissolving": (0.5354265, 0.3620263),
    "DIA's scores": (1.607372, 2.402507),
}
"""The answers of a state of this project whose tests agreed with the published code's answers."""
TIMED_SECONDS = 30
"""For the measurement of speed, at least one round of it."""
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "LANG",
)
PACKAGE = "picard-dia"


@dataclass(frozen=True)
class Check:
    """One line of the text."""

    name: str
    passed: bool
    found: str
    """What was found, in words."""

    def __str__(self) -> str:
        return f"{'ok   ' if self.passed else 'FAILS'} {self.name}: {self.found}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m common.selfcheck", description=__doc__)
    parser.add_argument("--device", default="auto", metavar="VALUE", help=COMMON_FLAGS["device"])
    parser.add_argument("--quick", action="store_true", help="leave the measurement of speed out")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    device = resolve_device(arguments.device)
    print("\n".join(environment(device)), flush=True)
    failed = False
    with tf32_products(False):
        for name, check in CHECKS.items():
            result = outcome(name, check, device)
            print(result, flush=True)
            failed = failed or not result.passed
        if not arguments.quick:
            print(speed(device))
    print("Some checks fail." if failed else "Every check is passed.")
    return ExitStatus.NOTHING_DONE if failed else ExitStatus.DONE


def environment(device: torch.device) -> list[str]:
    """Machine, versions, processor and places, a line each."""
    facts = describe_environment() | {"processor": processor(), "device": str(device)}
    facts["features"] = ", ".join(
        [torch.backends.cpu.get_cpu_capability(), *(["bf16"] if supports_bf16(device) else [])]
    )
    facts["memory"] = f"{memory_of(device) / 2**30:.1f} GiB"
    for name, folder in (("here", Path.cwd()), ("temporary", Path(tempfile.gettempdir()))):
        free = free_space(folder)
        facts[f"disk, {name}"] = "unknown" if free is None else f"{free / 2**30:.1f} GiB free"
    facts["encodings"] = f"{sys.getfilesystemencoding()}, {locale.getpreferredencoding(False)}"
    facts["variables"] = " ".join(f"{n}={os.environ[n]}" for n in VARIABLES if n in os.environ)
    facts["packages"] = ", ".join(packages())
    return [f"{name}: {value}" for name, value in facts.items() if value not in (None, "", [])]


def processor() -> str:
    """The processor's name, as the system has it."""
    path = Path("/proc/cpuinfo")
    text = read_regular(path).decode(errors="replace") if path.exists() else ""
    names = re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def packages() -> list[str]:
    """Names and versions of what the project requires, as installed."""
    try:
        required = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return ["the project itself is not installed"]
    found = []
    for line in required:
        name = re.split(r"[^\w.-]", line)[0]
        if "extra ==" in line:  # the developers' tools
            continue
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} MISSING")
    return found or ["an old installation, which names none: install it again"]


def outcome(name: str, check: Callable[[torch.device], Check], device: torch.device) -> Check:
    """A check's result; one that breaks has failed, and the text says how."""
    try:
        return check(device)
    except (UserError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        return Check(name, False, f"{type(error).__name__}: {reason}")


def compared(name: str, values: Tensor) -> Check:
    """Whether some numbers are those of EXPECTED."""
    expected = torch.tensor(EXPECTED[name], dtype=torch.float64)
    found = values.double().cpu()
    error = ((found - expected).abs() / expected.abs()).max().item()
    numbers = ", ".join(f"{value:.7g}" for value in found.tolist())
    return Check(name, error <= TOLERANCE, f"{numbers}, off by {error:.1g} at most")


def with_weights(module: nn.Module, gain: float) -> nn.Module:
    """The network with weights by a formula, the same on every machine, in evaluation mode."""
    for name, tensor in module.state_dict().items():
        numbers = (
            torch.arange(tensor.numel(), dtype=torch.float64) + zlib.crc32(name.encode()) % 997
        )
        values = (0.37 * numbers * numbers).sin().view(tensor.shape)
        if tensor.ndim > 1:
            tensor.copy_(values * gain * (2 / tensor[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            tensor.copy_(0.03 + 0.003 * values)  # small: the image outweighs the biases
        elif name.endswith(("norm.weight", "bn.weight")):
            tensor.copy_(1 + 0.1 * values)
        elif name.endswith(("weight", "bias", "running_mean")):
            tensor.copy_(0.1 * values)
    return module.eval()


def waves(*shape: int) -> Tensor:
    """Numbers in [0, 1] by a formula: waves that become ever shorter."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((1e-5 * numbers * numbers).sin() / 2 + 0.5).view(shape).float()


def scorers(
    device: torch.device, side: int, width: int, completions: int
) -> tuple[WindowScorer, FastScorer, Callable[[int], object]]:
    """The plain and the fast engine, and what drops in so many windows of side² pixels."""
    config, hole = GeneratorConfig(ngf=width), (side // 2, side // 2)
    generator = with_weights(Generator(config), 1.4).to(device, memory_format=torch.channels_last)
    critic = with_weights(Critic(1, width, hole), 1.4).to(device)
    test = TestConfig(patch_shape=(side, side, 1), mask_shape=hole, heatmap_M_inpaint=completions)
    dropout = dropout_of(generator, config, test, 0, "selfcheck")
    parts = (generator, critic, METRICS, hole)
    return WindowScorer(*parts), FastScorer(*parts), lambda n: dropout.masks(range(n))


def check_random_numbers(device: torch.device) -> Check:
    """PyTorch's draws, which the dropout of every image follows from."""
    drawn = torch.rand(100, generator=generator_for(0, "selfcheck"))
    return compared("random numbers", torch.stack([drawn[0], drawn[99], drawn.mean()]))


def check_scores(device: torch.device) -> Check:
    """Completion distances of the plain engine."""
    plain, _, masks = scorers(device, 64, 8, 3)
    scores = plain(2 * waves(2, 1, 64, 64).to(device) - 1, masks(2))
    return compared("PICARD's scores", torch.stack([scores[name].mean() for name in METRICS]))


def check_fast_engine(device: torch.device) -> Check:
    """The fast engine against the plain one."""
    plain, fast, masks = scorers(device, 64, 8, 3)
    windows = 2 * waves(2, 1, 64, 64).to(device) - 1
    expected, found = plain(windows, masks(2)), fast(windows, masks(2))
    error = max(((found[n] - expected[n]).abs() / expected[n]).max().item() for n in METRICS)
    return Check("fast engine", error <= TOLERANCE, f"off the plain one by {error:.1g} at most")


def check_dissolving(device: torch.device) -> Check:
    """The diffusion model's estimate of two images."""
    dissolver = Dissolver(with_weights(GaussianDiffusion(Unet(8, (1, 2)), steps=100), 0.5))
    images = dissolver.to(device)(waves(2, 3, 32, 32), step=20)
    return compared("dissolving", torch.stack([images.mean(), images.std()]))


@torch.no_grad()
def check_encoder(device: torch.device) -> Check:
    """CSI scores of two images by an encoder's features, with two others for a reference."""
    encoder = with_weights(build_encoder("resnet18", n_classes=2, n_shifts=4, width=8), 1.4)
    heads = encoder.to(device)(waves(16, 3, 32, 32).to(device), "simclr", "shift")
    simclr, shift = heads.simclr.view(4, 4, -1).cpu(), heads.shift.view(4, 4, -1).cpu()
    scores = csi_score(fit_csi(simclr[:2], shift[:2], n_shifts=4), simclr[2:], shift[2:])
    return compared("DIA's scores", scores)


def check_files(device: torch.device) -> Check:
    """A checkpoint and an image, written and read."""
    with tempfile.TemporaryDirectory() as folder:
        weights, image = waves(1000, 1000), (waves(1, 50, 40) * 65535).round() / 65535
        started = time.perf_counter()
        save_atomic({"weights": weights}, Path(folder) / "weights.pt")
        seconds = time.perf_counter() - started
        write_image16(Path(folder) / "image.png", image)
        same = torch.equal(load_tensors(Path(folder) / "weights.pt")["weights"], weights)
        same = same and torch.allclose(read_image(Path(folder) / "image.png", 1), image, atol=1e-6)
    return Check("files", same, f"written and read; 4 MB on disk in {seconds:.2g} s")


CHECKS: dict[str, Callable[[torch.device], Check]] = {
    "random numbers": check_random_numbers,
    "PICARD's scores": check_scores,
    "fast engine": check_fast_engine,
    "dissolving": check_dissolving,
    "DIA's scores": check_encoder,
    "files": check_files,
}


def speed(device: torch.device) -> str:
    """Seconds of one completion by both engines, in turn, on a window of the published size."""
    plain, fast, masks = scorers(device, 256, 32, 2)
    windows, draws = 2 * waves(1, 1, 256, 256).to(device) - 1, masks(1)
    fast(windows, draws)  # plans
    seconds: dict[str, list[float]] = {"plain": [], "fast": []}
    started = time.perf_counter()
    while not seconds["fast"] or time.perf_counter() - started < TIMED_SECONDS:
        for name, scorer in (("plain", plain), ("fast", fast)):
            before = time.perf_counter()
            scorer(windows, draws)["MCD_image"].tolist()  # which waits for a GPU
            seconds[name].append((time.perf_counter() - before) / 3)
    both = {name: statistics.median(found) for name, found in seconds.items()}
    ratio = statistics.median(p / f for p, f in zip(*seconds.values(), strict=True))
    return (
        f"speed: a completion of 256² pixels takes {both['fast']:.3g} s by the fast engine and "
        f"{both['plain']:.3g} s by the plain one, {ratio:.1f} times as long "
        f"({torch.get_num_threads()} threads, {len(seconds['fast'])} rounds)"
    )


if __name__ == "__main__":
    run_script(main)
