"""What networks compute on and with: a device, its memory, its precision."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError


class RuntimeSetupError(UserError):
    """The wanted device or process group cannot be had on this machine."""


def resolve_device(name: str, allow_gpu: bool = True, *, gpu: int = 0) -> torch.device:
    """Turns a device setting into a device that this machine has.

    name: auto, cpu, cuda, cuda:<number> or mps. auto is CUDA where there is one and allow_gpu,
    else the CPU; mps only where it is asked for. auto and cuda are the GPU of the number `gpu`, and
    under torchrun that of this process's local rank. allow_gpu restrains auto alone: a device that
    is named is taken. Raises RuntimeSetupError where the name is unknown or the device not there.
    """
    kind, _, number = name.partition(":")
    if re.fullmatch("auto|cpu|cuda(:[0-9]{1,4})?|mps", name) is None:
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
    local_rank = os.environ.get("LOCAL_RANK", str(gpu))
    index = int(number) if number else environment_number("LOCAL_RANK", local_rank)
    there = torch.cuda.device_count()
    if index >= there:
        raise RuntimeSetupError(
            f"GPU {index} was asked for (device '{name}'), but this machine has {there}: "
            f"cuda:0 to cuda:{there - 1}."
        )
    return torch.device("cuda", index)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a process may have on a device: the GPU's, or the machine's.

    On a CPU limits of the container (cgroup 2) and of the process (ulimit -v) count, too.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    sizes = [2**62]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no POSIX system
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # no such file, or the word max
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with contextlib.suppress(ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        sizes.append(limit if limit != resource.RLIM_INFINITY else 2**62)
    return min(size for size in sizes if size > 0)


def require_memory(n_bytes: int, what: str, device: torch.device, remedy: str) -> None:
    """Raises RuntimeSetupError where so many bytes cannot be had on the device, whatever is free.

    n_bytes: a lower bound of the need, worked out before anything is allocated. what: what needs
    it. remedy: what to lower.
    """
    there = memory_of(device)
    if n_bytes > there:
        raise RuntimeSetupError(
            f"{what}: at least {n_bytes / 2**30:.3g} GiB of memory, and {device} has "
            f"{there / 2**30:.3g} GiB. {remedy}"
        )


def supports_bf16(device: torch.device) -> bool:
    """Whether the device's hardware has bfloat16 products; emulated ones are slower than fp32."""
    return supports_half(torch.bfloat16, device)


def supports_half(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device's hardware has products of bfloat16, or of float16."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if device.type == "cuda":
        return name == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        features = torch.cpu.get_capabilities()
        return bool(features.get(f"amx_{name}") or features.get(f"avx512_{name}"))
    return False


def upcast_to_fp32(x: Tensor) -> Tensor:
    """x as float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[nn.Module]:
    """Puts a module into evaluation mode and restores every submodule's flag on the way out."""
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for submodule, training in flags:
            submodule.training = training


def environment_number(name: str, text: str) -> int:
    """A variable of the environment that is a whole number >= 0."""
    if re.fullmatch("[0-9]{1,9}", text) is None:
        raise RuntimeSetupError(
            f"The environment variable {name} is '{text[:40]}', expected a whole number. torchrun "
            "sets it; else unset it."
        )
    return int(text)
