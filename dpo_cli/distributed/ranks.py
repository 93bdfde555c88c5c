"""The processes that compute one run together, and what they tell each other.

A run of one process has `Ranks()`, whose methods then cost nothing.
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


PATIENCE = timedelta(hours=4)
SHARE_GPUS = "DPO_RUN_SHARE_GPUS"


class _Patient:
    """Where ranks wait for what the first one does alone: gathering and hashing a large model, or
    asking a judge, may take longer than any exchange in a step."""

    group: dist.ProcessGroup | None = None  # None: the one of all exchanges


def share_gpus() -> bool:
    """Whether ranks may share a GPU, for tests on a machine with one: they then talk by Gloo
    through the host's memory, as NCCL refuses two ranks on a device."""
    return os.environ.get(SHARE_GPUS) == "1"


def start_patient_group() -> None:
    """Every rank calls it once."""
    _Patient.group = dist.new_group(backend="gloo", timeout=PATIENCE)


@dataclass(frozen=True)
class Ranks:
    """rank: this process among `size`; local: among those of its node."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """The one that writes files and talks to people."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over ranks, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found

    def any(self, flag: bool) -> bool:
        return self.total([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order. Tensors should be on the CPU."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, or the UserError that it raises, on every rank."""
        if self.size == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = make()
            except UserError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, group=_Patient.group)
        if answer[1] is not None:
            raise answer[1]
        made: T = answer[0]
        return made

    def spread(self, items: Sequence[Item], compute: Callable[[Item], T]) -> list[T]:
        """`compute` of every item, in order, on every rank; each works out its share.

        All ranks call it equally often, some of them to no end: models that are sharded wait
        for each other in every forward. Results travel, so their tensors should be on the CPU.
        """
        if self.size == 1:
            return [compute(item) for item in items]
        rounds = -(-len(items) // self.size)
        places = [turn * self.size + self.rank for turn in range(rounds)]
        made = [compute(items[min(place, len(items) - 1)]) for place in places]
        shares = self.gather(made)
        return [shares[i % self.size][i // self.size] for i in range(len(items))]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier(group=_Patient.group)


ALONE = Ranks()


def current() -> Ranks:
    """This process, as torch's launcher numbered it."""
    if not dist.is_initialized():
        return Ranks()
    size = dist.get_world_size()
    return Ranks(dist.get_rank(), size, dist.get_node_local_rank(0))
