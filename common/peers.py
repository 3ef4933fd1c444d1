"""The processes of one training watch each other, so that none waits for one that has ended.

Every process holds a connection to that of rank 0, by which each says every second that it is
there. A process that is killed is noticed at once, since its connection ends; one that is stopped,
or whose machine is gone, after twenty seconds. Then all others end, too, each with one line that
names it: in order where they can, at the latest five seconds later.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch.distributed
from torch.distributed import Store

from common.errors import UserError

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 20.0
"""Without a word from a process for so long, it is taken for gone."""
GRACE_SECONDS = 5.0
"""How long a process has to end in order after another one is gone."""
CONTACT = "contact"
"""Key of the store under which rank 0 says where it listens."""
REMEDY = "All processes end; start all of them again, going on from the last checkpoint."

How = Literal["ended", "silent", "failed"]


class PeerError(UserError):
    """Another process of this training is missing, has ended or has met an error."""


@dataclass
class Link:
    """A connection to another process."""

    rank: int
    socket: socket.socket
    received: bytes = b""
    """Of a line whose end has not come yet."""
    heard: float = field(default_factory=time.monotonic)

    def send(self, **message: object) -> None:
        """Sends one line; nothing where the other end is gone, which reading tells, too."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def lines(self) -> Iterator[dict[str, Any]]:
        """What has come, waiting for it no longer than the socket does; EOFError at the end."""
        try:
            data = self.socket.recv(2**16)
        except TimeoutError:
            return
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        self.heard = time.monotonic()
        *lines, self.received = (self.received + data).split(b"\n")
        yield from map(json.loads, lines)

    def first(self, seconds: float) -> dict[str, Any]:
        """The first line, within so many seconds; EOFError if none comes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            for message in self.lines():
                return message
        raise EOFError


class Peers:
    """This process's watch over the others, and theirs over it, from `meet` to `leave`."""

    def __init__(self, rank: int, names: dict[int, str], links: list[Link]) -> None:
        """names: process and machine by rank. links: to all others in rank 0, else to rank 0."""
        self.rank, self._names = rank, names
        self._links = {link.rank: link for link in links}
        self._lock = threading.Lock()
        self._gone: tuple[int, How] | None = None
        self._known, self._left = threading.Event(), threading.Event()
        self._selector = selectors.DefaultSelector()
        for link in links:
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        threading.Thread(target=self._watch, name="watching peers", daemon=True).start()

    def may_speak(self) -> bool:
        """Says to all that this process has met an error; whether it is the first to.

        Of an error that all meet, one process then has the word. The others get a PeerError.
        """
        if self.rank == 0:
            self._set_gone(0, "failed")
        else:
            self._links[0].send(failed=self.rank)
        self._known.wait(GRACE_SECONDS)
        return self._gone is None or self._gone[0] == self.rank or self._gone[1] != "failed"

    def error(self, seconds: float = GRACE_SECONDS) -> PeerError | None:
        """Which other process is gone, and what to do; None if none is after so many seconds."""
        self._known.wait(seconds)
        if self._gone is None or self._gone[0] == self.rank:
            return None
        return PeerError(self._message())

    def leave(self, *, in_order: bool) -> None:
        """Ends the watch. in_order: says good-bye, else the others take this process for gone."""
        self._left.set()
        for link in list(self._links.values()):
            if in_order:
                link.send(bye=self.rank)
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)

    def _message(self) -> str:
        rank, how = self._gone
        return _described(rank, len(self._names), self._names.get(rank, ""), how)

    def _set_gone(self, rank: int, how: How) -> None:
        """Notes the first process that is gone; rank 0 tells it to all."""
        with self._lock:
            if self._gone is None:
                self._gone = (rank, how)
        if self.rank == 0:
            for link in list(self._links.values()):
                link.send(gone=self._gone)
        self._known.set()

    def _watch(self) -> None:
        """Until this process leaves: hears the others, speaks, and ends it where one is gone."""
        spoken, gone_since = 0.0, None
        while not self._left.is_set():
            for key, _ in self._selector.select(BEAT_SECONDS):
                self._hear(key.data)
            now = time.monotonic()
            if now - spoken >= BEAT_SECONDS:
                spoken = now
                for link in list(self._links.values()):
                    link.send()
                    if now - link.heard > SILENCE_SECONDS:
                        self._set_gone(link.rank, "silent")
            if self._known.is_set():
                gone_since = gone_since or now
                if now - gone_since > GRACE_SECONDS and self._gone[0] != self.rank:
                    self._end()
                time.sleep(BEAT_SECONDS / 10)

    def _hear(self, link: Link) -> None:
        """Takes in what a process says, or that its connection has ended."""
        try:
            for message in link.lines():
                if "gone" in message:
                    self._set_gone(*message["gone"])
                elif "failed" in message:
                    self._set_gone(link.rank, "failed")
                elif "bye" in message:
                    self._forget(link)
        except (EOFError, ValueError):
            if link.rank in self._links:
                self._forget(link)
                self._set_gone(link.rank, "ended")

    def _forget(self, link: Link) -> None:
        self._selector.unregister(link.socket)
        del self._links[link.rank]

    def _end(self) -> None:
        """Ends this process, which hangs in a computation or waits for the one that is gone."""
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {self._message()}\n")
        sys.stderr.flush()
        os._exit(1)


def meet(rank: int, world_size: int, seconds: float) -> tuple[Store, Peers]:
    """Finds the other processes, at MASTER_ADDR and MASTER_PORT as torchrun says.

    Returns the store by which a process group can be made, and the watch. Raises PeerError, which
    names the ranks that have not come within so many seconds.
    """
    deadline = time.monotonic() + seconds
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not hosts_store:
        # looked for first: torch complains of a place that does not answer, with a C++ stack
        _connected(place, deadline, _come_not([0], world_size, seconds)).close()
    try:
        tcp = torch.distributed.TCPStore(
            *place, None, hosts_store, timedelta(seconds=seconds), wait_for_workers=False
        )
    except RuntimeError as error:
        raise PeerError(
            f"{place[0]}:{place[1]} cannot be the place where the processes meet "
            f"({str(error).splitlines()[0]}). Choose a free --master_port."
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore(f"attempt {attempt}", tcp)
    if rank == 0:
        return store, _receive(store, place, world_size, deadline, seconds)
    return store, _join(store, rank, world_size, deadline, seconds)


def _receive(
    store: Store, place: tuple[str, int], world_size: int, deadline: float, seconds: float
) -> Peers:
    """In rank 0: waits for the other processes and tells all who is there."""
    token = secrets.token_hex(8)
    names, links = {0: _own_name()}, {}
    with socket.create_server(("", 0)) as server:
        contact = [_own_address(place), server.getsockname()[1], token]
        store.set(CONTACT, json.dumps(contact))
        while len(links) < world_size - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                link = Link(0, server.accept()[0])
                hello = link.first(GRACE_SECONDS)
                if hello["token"] == token:
                    link.rank = hello["rank"]
                    links[link.rank], names[link.rank] = link, hello["name"]
            except (EOFError, KeyError, ValueError):
                continue  # somebody else, or a process that has ended since
            except TimeoutError:
                missing = [rank for rank in range(world_size) if rank not in names]
                message = _come_not(missing, world_size, seconds)
                for link in links.values():
                    link.send(missing=message)
                raise PeerError(message) from None
    for link in links.values():
        link.send(names=names)
    return Peers(0, names, list(links.values()))


def _join(store: Store, rank: int, world_size: int, deadline: float, seconds: float) -> Peers:
    """In the other ranks: says to rank 0 that it is there, and hears who else is."""
    late = _come_not([0], world_size, seconds)
    while not store.check([CONTACT]):
        if time.monotonic() > deadline:
            raise PeerError(late)
        time.sleep(BEAT_SECONDS / 10)
    host, port, token = json.loads(store.get(CONTACT))
    link = Link(0, _connected((host, port), deadline, late))
    link.send(token=token, rank=rank, name=_own_name())
    try:
        answer = link.first(seconds + GRACE_SECONDS)  # rank 0 may have come much later
    except (EOFError, ValueError):
        raise PeerError(_described(0, world_size, "", "ended")) from None
    if "missing" in answer:
        raise PeerError(answer["missing"])
    return Peers(rank, {int(key): name for key, name in answer["names"].items()}, [link])


def _connected(place: tuple[str, int], deadline: float, otherwise: str) -> socket.socket:
    """A connection to a place, tried until the deadline; PeerError(otherwise) without one."""
    while True:
        try:
            return socket.create_connection(place, timeout=GRACE_SECONDS)
        except OSError:
            if time.monotonic() > deadline:
                raise PeerError(otherwise) from None
            time.sleep(BEAT_SECONDS / 10)


def _own_address(place: tuple[str, int]) -> str:
    """Where other machines reach this process: as seen from the place where all meet."""
    with socket.create_connection(place, timeout=GRACE_SECONDS) as probe:
        own, other = probe.getsockname()[0], probe.getpeername()[0]
    return place[0] if own == other else own


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _described(rank: int, world_size: int, name: str, how: How) -> str:
    """One line: which process is gone, how that is known, and the remedy."""
    who = f"Rank {rank} of {world_size}" + (f" ({name})" if name else "")
    what = {
        "ended": "has ended without a word: it was killed, perhaps for want of memory.",
        "silent": f"has not been heard of for {SILENCE_SECONDS:.0f} s: it was stopped, or its "
        "machine or the network is down.",
        "failed": "has met an error, which it says itself.",
    }
    return f"{who} {what[how]} {REMEDY}"


def _come_not(ranks: list[int], world_size: int, seconds: float) -> str:
    """One line: which processes have not come."""
    which = ", ".join(map(str, ranks))
    return (
        f"Rank {which} of {world_size} has not come within {seconds:g} s (peer_timeout). Start all "
        f"{world_size} processes, on machines that reach each other, or raise peer_timeout."
    )
