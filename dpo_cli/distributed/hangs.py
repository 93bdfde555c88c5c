"""Hang detection: after a timeout, dump the stacks of all ranks of the node and end the run."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dpo_cli.errors import HangError, PeerLost

# Error texts of Gloo, the store and NCCL.
TIMEOUT = ("Timed out waiting", "timed out", "Timeout(ms)=", "wait timeout")
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process")
STACK_SECONDS = 2.0  # allowed for all stacks to be written


@dataclass(frozen=True)
class Peers:
    """The ranks of this node by process id, and the store shared by all ranks."""

    store: Any
    rank: int
    seconds: int
    pids: dict[int, int]  # rank -> process id


def find_peers(seconds: int) -> Peers:
    """Collect the process ids of this node's ranks (a collective; once, after the process group
    is initialized). seconds: the process group's timeout."""
    store = dist.distributed_c10d._get_default_store()  # there is no public accessor
    # NCCL's watchdog ends a process by SIGABRT on timeout: faulthandler prints its stacks.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    processes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(processes, (socket.gethostname(), os.getpid()))
    here = socket.gethostname()
    pids = {rank: pid for rank, (host, pid) in enumerate(processes) if host == here}
    return Peers(store, dist.get_rank(), seconds, pids)


@contextmanager
def as_hang_error(peers: Peers) -> Iterator[None]:
    """Turn a collective's timeout into a HangError, after killing the node's other ranks, and a
    lost connection into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if any(text in str(error) for text in LOST):
            raise PeerLost(
                f"rank {peers.rank}: lost the connection to a peer rank; its error has the cause"
            ) from error
        if not timed_out(error):
            raise
        print(f"rank {peers.rank} timed out here:", file=sys.stderr)
        traceback.print_exception(error)
        if peers.store.add(f"hang/{socket.gethostname()}", 1) == 1:
            _dump_stacks_and_kill(peers)
        else:  # another rank does it
            time.sleep(2 * STACK_SECONDS)
        raise HangError(
            f"rank {peers.rank} timed out after {peers.seconds} s in a collective "
            "(hardware.timeout_seconds): the stacks above show where each rank of this node was; "
            "if a checkpoint was saved, continue with resume=<run folder>"
        ) from error


def timed_out(error: RuntimeError) -> bool:
    return any(text in str(error) for text in TIMEOUT)


def _dump_stacks_and_kill(peers: Peers) -> None:
    """Have every rank of this node print its stacks, then kill the others: a hanging rank ignores
    SIGTERM, and the launcher would wait for it."""
    for rank, pid in peers.pids.items():
        print(f"stacks of rank {rank} (process {pid}):", file=sys.stderr, flush=True)
        _send(pid, signal.SIGUSR2)
        time.sleep(STACK_SECONDS / len(peers.pids))
    for rank, pid in peers.pids.items():
        if rank != peers.rank:
            _send(pid, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        print(f"process {pid} has ended", file=sys.stderr)
