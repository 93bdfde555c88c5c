"""The ranks of a run and their collectives.

A single-process run has `Ranks()`, whose methods are no-ops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dpo_cli.errors import UserError

Item = TypeVar("Item")
T = TypeVar("T")


SLOW_TIMEOUT = timedelta(hours=4)
SHARE_GPUS = "DPO_RUN_SHARE_GPUS"


class _Slow:
    """Process group for waiting on work that only rank 0 does (hashing a large model, calling a
    judge), which may take longer than the timeout of a step's collectives."""

    group: dist.ProcessGroup | None = None  # None: the default group


def share_gpus() -> bool:
    """Whether ranks may share a GPU, for tests on one GPU: they then use Gloo, as NCCL does not
    support two ranks per device."""
    return os.environ.get(SHARE_GPUS) == "1"


def start_slow_group() -> None:
    """Create the group with the long timeout; a collective, called once."""
    _Slow.group = dist.new_group(backend="gloo", timeout=SLOW_TIMEOUT)


@dataclass(frozen=True)
class Ranks:
    """rank: of this process, of `size` (world size); local: its rank on this node."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        totals: list[float] = sums.tolist()
        return totals

    def any(self, flag: bool) -> bool:
        return self.total([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """All-gather a picklable value: one per rank, in order. Tensors should be on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """`make()` run by rank 0 and broadcast; its UserError is raised on every rank."""
        if self.size == 1:
            return make()
        result: list[Any] = [None, None]  # value, error
        if self.first:
            try:
                result[0] = make()
            except UserError as error:
                result[1] = error
        dist.broadcast_object_list(result, group=_Slow.group)
        if result[1] is not None:
            raise result[1]
        value: T = result[0]
        return value

    def spread(self, items: Sequence[Item], compute: Callable[[Item], T]) -> list[T]:
        """`compute` of every item, in order, on every rank; the items are divided among ranks.

        All ranks call `compute` equally often (the last item is repeated): the forward of a
        sharded model is a collective. Results are gathered, so tensors should be on the CPU.
        """
        if self.size == 1:
            return [compute(item) for item in items]
        rounds = -(-len(items) // self.size)
        indices = [turn * self.size + self.rank for turn in range(rounds)]
        results = [compute(items[min(index, len(items) - 1)]) for index in indices]
        shares = self.gather(results)
        return [shares[i % self.size][i // self.size] for i in range(len(items))]

    def wait(self) -> None:
        """Barrier over all ranks."""
        if self.size > 1:
            dist.barrier(group=_Slow.group)


ALONE = Ranks()


def current() -> Ranks:
    """This process's `Ranks` in the initialized process group."""
    if not dist.is_initialized():
        return Ranks()
    size = dist.get_world_size()
    return Ranks(dist.get_rank(), size, dist.get_node_local_rank(0))
