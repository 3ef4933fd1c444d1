"""Where and how a program runs: device, precision, random numbers, processes, stop requests."""

import contextlib
import datetime
import hashlib
import operator
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from common.checkpoint import CheckpointError
from common.config_types import PEER_TIMEOUT
from common.errors import UserError
from common.peers import Peers, meet

PROCESS_GROUP_TIMEOUT = datetime.timedelta(hours=6)
"""How long processes wait for the main one, which evaluates alone; NCCL's default is 10 minutes."""
SECOND_SIGNAL_DELAY_SECONDS = 1.0
"""Signals that follow one sooner are taken for the same request."""


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
    index = int(number) if number else _whole("LOCAL_RANK", os.environ.get("LOCAL_RANK", str(gpu)))
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
def eval_mode(module: nn.Module) -> Iterator[nn.Module]:
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


def generator_for(*parts: int | str) -> torch.Generator:
    """A random generator that depends on the parts alone (1 and "1" are different parts).

    What is drawn for ("crop", step 7) is the same in whatever order steps are taken, in whichever
    process, and after a resume.
    """
    return torch.Generator().manual_seed(seed_from(*parts))


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and PyTorch's generators, in types that load_tensors reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore_random_state(state: Any, source: str) -> None:
    """Puts back what random_state returned; GPUs only where their number is the same.

    Raises CheckpointError, naming the source, where it is something else.
    """
    try:
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state(  # noqa: NPY002
            (kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss)
        )
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: the state of the random generators is not one ({type(error).__name__}). "
            "Go on from another step."
        ) from error


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    """Number of this process, from 0."""
    world_size: int = 1
    """How many there are."""
    peers: Peers | None = field(default=None, compare=False)
    """The watch over the others; None alone."""

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files."""
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """This process's rows of what is drawn for a batch that is dealt out row by row."""
        return slice(self.rank, None, self.world_size)


def start_processes(device: torch.device, peer_timeout: float = PEER_TIMEOUT) -> Processes:
    """Joins the other processes that torchrun started; alone, does nothing.

    Reads torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK). Uses NCCL between GPUs and Gloo
    between CPUs. End with stop_processes. peer_timeout: seconds within which all have to come.
    Raises RuntimeSetupError where the environment is incomplete or the device cannot be shared by
    processes, PeerError where one does not come.
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
    rank, world_size, _ = (_whole(name, os.environ[name]) for name in variables)
    _whole("MASTER_PORT", os.environ["MASTER_PORT"])
    if not rank < world_size:
        raise RuntimeSetupError(
            f"RANK is {rank} and WORLD_SIZE {world_size}; expected a rank below it. Start several "
            "processes with torchrun --nproc_per_node=K, or unset both."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, peers = meet(rank, world_size, peer_timeout)
    processes = Processes(rank, world_size, peers)
    with naming_peers(processes):
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=PROCESS_GROUP_TIMEOUT,
        )
    return processes


def _whole(name: str, text: str) -> int:
    """A variable of the environment that is a whole number >= 0."""
    if re.fullmatch("[0-9]{1,9}", text) is None:
        raise RuntimeSetupError(
            f"The environment variable {name} is '{text[:40]}', expected a whole number. torchrun "
            "sets it; else unset it."
        )
    return int(text)


def stop_processes(processes: Processes) -> None:
    """Leaves the process group, if this process is in one."""
    if processes.peers is not None:
        torch.distributed.destroy_process_group()
        processes.peers.leave(in_order=True)


@contextlib.contextmanager
def joined_processes(
    device: torch.device, peer_timeout: float = PEER_TIMEOUT
) -> Iterator[Processes]:
    """The processes that torchrun started, left at the end; where one fails, all end.

    peer_timeout: see start_processes. Raises PeerError where another one has failed or is gone.
    """
    processes = start_processes(device, peer_timeout)
    with naming_peers(processes):
        yield processes
    stop_processes(processes)


@contextlib.contextmanager
def naming_peers(processes: Processes) -> Iterator[None]:
    """Turns errors that another process has caused, or has said before, into a PeerError.

    An error of this process alone is told to the others, and raised as it is.
    """
    if processes.peers is None:
        yield
        return
    try:
        yield
    except BaseException as error:
        caused = _is_of_communication(error) and processes.peers.error()
        if not caused and not processes.peers.may_speak() and isinstance(error, Exception):
            caused = processes.peers.error()
        processes.peers.leave(in_order=False)
        if caused:
            raise caused from error
        raise


def _is_of_communication(error: BaseException) -> bool:
    """Whether torch could not reach another process."""
    text = str(error).lower()
    known = isinstance(error, torch.distributed.DistError) or "gloo" in text or "nccl" in text
    return isinstance(error, RuntimeError) and known


def broadcast_weights(module: nn.Module, processes: Processes) -> None:
    """Gives every process the first one's weights, which other processors may have drawn otherwise.

    All processes have to call it: it is also where they wait for each other.
    """
    if processes.world_size > 1:
        with torch.no_grad():
            for tensor in module.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)


def average_gradients(parameters: list[Tensor], processes: Processes) -> None:
    """Replaces every gradient by its mean over the processes; alone, does nothing.

    DistributedDataParallel expects one forward per backward; GAN critics have three and a double
    backward, and contrastive losses are gathered first, so gradients are averaged here.
    """
    if processes.world_size == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat)
    flat /= processes.world_size
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def average_values(values: Tensor, processes: Processes) -> Tensor:
    """The mean of numbers such as losses over the processes, the same in each; alone, as given."""
    if processes.world_size == 1:
        return values
    averaged = values.detach().clone()
    torch.distributed.all_reduce(averaged)
    return averaged / processes.world_size


def launched() -> Processes:
    """This process among those that torchrun started, for programs in which each works by itself.

    No process group is joined, so nobody waits for anybody. Raises RuntimeSetupError where RANK and
    WORLD_SIZE are not a rank and a number of processes.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if len(given) < 2:  # one alone means something else: some schedulers set such names
        return Processes()
    rank, world_size = (_whole(name, text) for name, text in given.items())
    if not rank < world_size:
        raise RuntimeSetupError(
            f"RANK is {rank} and WORLD_SIZE {world_size}; expected a rank below it. Start several "
            "processes with torchrun --nproc_per_node=K, or unset both."
        )
    return Processes(rank, world_size)


class _GivenUp(BaseException):
    """Work was given up because a stop was asked for."""


class StopRequest:
    """While active, SIGINT or SIGTERM only sets `requested`; a later Ctrl-C interrupts.

    with StopRequest() as stop: loop, and leave it where stop.requested. `signal_number` is the
    signal that came first, 0 if none did. Signals within a second of it are taken for the same
    request: torchrun sends its processes one more than the terminal does. Works in the main thread
    only, as Python's signals do.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._asked_at = 0.0
        self._interrupts = False
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells report it; 0 if none came."""
        return 128 + self.signal_number if self.requested else 0

    def unless_asked(self, work: Callable[[], object]) -> None:
        """Calls `work`, which is given up at once when a stop is asked for, or not begun.

        For what takes long and is done again by a run that goes on.
        """
        try:
            self._interrupts = True
            if not self.requested:
                work()
            self._interrupts = False
        except _GivenUp:
            pass
        finally:
            self._interrupts = False

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.signal_number, self._asked_at = number, now
            if self._interrupts:
                raise _GivenUp
        elif number == signal.SIGINT and now - self._asked_at > SECOND_SIGNAL_DELAY_SECONDS:
            raise KeyboardInterrupt


def any_asked_to_stop(stop: StopRequest, processes: Processes, device: torch.device) -> bool:
    """Whether any of the processes was asked to; all get the same answer, so they stop together.

    Every process has to call it equally often.
    """
    if processes.world_size == 1:
        return stop.requested
    asked = torch.tensor(int(stop.requested), device=device)
    torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
    return bool(asked.item())


def leave_signals_to_main(_: int = 0) -> None:
    """In a DataLoader's worker: the main process alone answers Ctrl-C and SIGTERM.

    Both reach the whole process group. A worker ends with the main process, by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started meanwhile never hear Ctrl-C or SIGTERM, from their first moment on.

    For reading processes, whose start takes seconds under spawn: leave_signals_to_main comes too
    late for those. A signal to this process is answered at the end. Does nothing on Windows, which
    cannot hold signals back.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
