"""Where and how a program runs: device, random numbers, processes and evaluation mode."""

import contextlib
import datetime
import hashlib
import operator
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed
from torch import nn

from common.errors import UserError

PATIENCE = datetime.timedelta(hours=6)
"""How long processes wait for the main one, which evaluates alone; NCCL's default is 10 minutes."""


class RuntimeSetupError(UserError):
    """The wanted device or process group cannot be had on this machine."""


def resolve_device(name: str, allow_gpu: bool = True) -> torch.device:
    """Turns a device setting into a device that this machine has.

    name: auto, cpu, cuda, cuda:<number> or mps. auto is CUDA where there is one and allow_gpu,
    else the CPU; mps only where it is asked for. Under torchrun auto and cuda are the GPU of this
    process's local rank. allow_gpu restrains auto alone: a device that is named is taken.
    Raises RuntimeSetupError where the name is unknown or the device is not there.
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (
        number and (kind != "cuda" or not number.isdigit())
    ):
        raise RuntimeSetupError(
            f"Unknown device '{name}'. Expected auto, cpu, cuda, cuda:<number> or mps."
        )
    has_cuda = torch.cuda.is_available()
    if kind == "cpu" or (kind == "auto" and not (allow_gpu and has_cuda)):
        return torch.device("cpu")
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise RuntimeSetupError(
                "Device 'mps' was asked for, but this PyTorch sees no Apple GPU. Use auto or cpu."
            )
        return torch.device("mps")
    if not has_cuda:
        raise RuntimeSetupError(
            f"Device '{name}' was asked for, but this PyTorch ({torch.__version__}) sees no GPU. "
            "Use auto or cpu, or install a PyTorch built for CUDA and its driver."
        )
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    there = torch.cuda.device_count()
    if index >= there:
        raise RuntimeSetupError(
            f"GPU {index} was asked for (device '{name}'), but this machine has {there}: "
            f"cuda:0 to cuda:{there - 1}."
        )
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """The model name of a GPU, or the device's type elsewhere."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device's hardware has bfloat16 products; emulated ones are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        found = torch.cpu.get_capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return False


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """x as float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators (the last on every device).

    Code of this project draws from generators of its own (see generator_for); this is for what
    other libraries draw and for weights and dropout, which take PyTorch's global one.
    """
    random.seed(seed)
    # The one place: other libraries draw from NumPy's global generator.
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def seed_from(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part: from the first 8 bytes of a SHA-256.

    Raises TypeError for a part that is neither an integer nor a string.
    """
    text = "\0".join(
        f"s{part}" if isinstance(part, str) else f"i{operator.index(part)}" for part in parts
    )
    # names of files need not be UTF-8
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator that depends on the parts alone: counter-based randomness.

    What is drawn for ("crop", step 7) is the same in whatever order steps are taken, in whichever
    process, and after a resume. The integer 1 and the string "1" are different parts.
    """
    generator = torch.Generator(device)
    generator.manual_seed(seed_from(*parts))
    return generator


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    """Number of this process, from 0."""
    world_size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Number of this process on its machine."""

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files."""
        return self.rank == 0


def start_processes(device: torch.device) -> Processes:
    """Joins the other processes that torchrun started; alone, does nothing.

    Reads torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK). Uses NCCL between GPUs and Gloo
    between CPUs. End with stop_processes. Raises RuntimeSetupError where the environment is
    incomplete or the device cannot be shared by processes.
    """
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in variables if name in os.environ]
    if not given or os.environ.get("WORLD_SIZE") == "1":
        return Processes()
    needed = (*variables, "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise RuntimeSetupError(
            f"{', '.join(given)} set but not {', '.join(missing)}: start several processes with "
            "torchrun --nproc_per_node=K, or unset them."
        )
    if device.type not in ("cpu", "cuda"):
        raise RuntimeSetupError(f"Several processes need device cpu or cuda, got '{device}'.")
    rank, world_size, local_rank = (int(os.environ[name]) for name in variables)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(
            backend, rank=rank, world_size=world_size, timeout=PATIENCE
        )
    return Processes(rank, world_size, local_rank)


def stop_processes() -> None:
    """Leaves the process group, if this process is in one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Puts a module into evaluation mode and restores every submodule's flag on the way out."""
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for submodule, training in flags:
            submodule.training = training


@contextlib.contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Lets convolutions and matrix products on CUDA round their inputs to TF32, or forbids it.

    torch allows it for convolutions if nobody says otherwise; the setting before is restored.
    """
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
