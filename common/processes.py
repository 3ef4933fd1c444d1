"""The processes that torchrun started: how they meet, average, and end together."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from common.config_types import PEER_TIMEOUT
from common.devices import RuntimeSetupError, environment_number
from common.peers import Peers, meet

PROCESS_GROUP_TIMEOUT = datetime.timedelta(hours=6)
"""How long processes wait for the main one, which evaluates alone; NCCL's default is 10 minutes."""


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
    rank, world_size, _ = (environment_number(name, os.environ[name]) for name in variables)
    environment_number("MASTER_PORT", os.environ["MASTER_PORT"])
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


def said_by_main(value: bool, processes: Processes) -> bool:
    """The main process's value, in all."""
    if processes.world_size == 1:
        return value
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def gathered_in_main(value: Any, processes: Processes) -> list[Any] | None:
    """Every process's value by rank, in the main one; None in the others. Tensors on the CPU."""
    found = [None] * processes.world_size if processes.is_main else None
    torch.distributed.gather_object(value, found, dst=0)
    return found


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
    rank, world_size = (environment_number(name, text) for name, text in given.items())
    if not rank < world_size:
        raise RuntimeSetupError(
            f"RANK is {rank} and WORLD_SIZE {world_size}; expected a rank below it. Start several "
            "processes with torchrun --nproc_per_node=K, or unset both."
        )
    return Processes(rank, world_size)
