"""A rank that hangs: the others wait for so long, tell the stacks of all, and end the run."""

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

SIGNS = ("Timed out waiting", "timed out", "Timeout(ms)=", "wait timeout")  # of Gloo, store, NCCL
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process")
TELLING_SECONDS = 2.0  # for stacks to be written


@dataclass(frozen=True)
class Peers:
    """The ranks of this node by process id, and what all ranks share."""

    store: Any
    rank: int
    seconds: int
    pids: dict[int, int]  # rank -> process id


def meet(seconds: int) -> Peers:
    """Every rank calls it once, when the process group is there. seconds: of its timeout."""
    store = dist.distributed_c10d._get_default_store()  # there is no public way to it
    # NCCL's watchdog ends a process that waited for too long by SIGABRT: this tells where it was.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), os.getpid()))
    pids = {rank: pid for rank, (host, pid) in enumerate(found) if host == socket.gethostname()}
    return Peers(store, dist.get_rank(), seconds, pids)


@contextmanager
def explained(peers: Peers) -> Iterator[None]:
    """HangError where a rank waited for the others for too long, and the end of the others;
    PeerLost where one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in LOST):
            raise PeerLost(f"rank {peers.rank}: another rank has ended") from error
        if not timed_out(error):
            raise
        print(f"rank {peers.rank} waited here:", file=sys.stderr)
        traceback.print_exception(error)
        if peers.store.add(f"hang/{socket.gethostname()}", 1) == 1:
            _end(peers)
        else:  # another one does
            time.sleep(2 * TELLING_SECONDS)
        raise HangError(
            f"rank {peers.rank} waited {peers.seconds} s for the others "
            "(hardware.timeout_seconds): the stacks above tell where each rank of this node was; "
            "where checkpoints were saved, resume=<run folder> goes on"
        ) from error


def timed_out(error: RuntimeError) -> bool:
    return any(sign in str(error) for sign in SIGNS)


def _end(peers: Peers) -> None:
    """Every rank of this node tells its stacks; then the others are killed, as one that hangs
    does not heed a SIGTERM, and the launcher would wait for it."""
    for rank, pid in peers.pids.items():
        print(f"stacks of rank {rank} (process {pid}):", file=sys.stderr, flush=True)
        _send(pid, signal.SIGUSR2)
        time.sleep(TELLING_SECONDS / len(peers.pids))
    for rank, pid in peers.pids.items():
        if rank != peers.rank:
            _send(pid, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        print(f"process {pid} has ended", file=sys.stderr)
