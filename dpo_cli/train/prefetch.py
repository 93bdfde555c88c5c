"""Prefetching: a thread packs the next step's micro-batches while the device computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from dpo_cli.records import Batch
from dpo_cli.train.memory import TokenBudget

T = TypeVar("T")


class Prefetch(Generic[T]):
    """`make(step)`, computed ahead: asking for a step starts on the next one.

    Steps are asked for in order. An exception of `make` is raised by the call that asks for that
    step. End with `close`.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        steps: int,
        prepare: Callable[[], None] = lambda: None,
        version: Callable[[], int] = lambda: 0,
    ) -> None:
        """steps: number of steps. prepare: run first in the thread. version: prefetched values
        are dropped when it changes."""
        self._make, self._steps = make, steps
        self._thread = ThreadPoolExecutor(1, "prefetch", prepare)
        self._version = version
        self._ahead: dict[tuple[int, int], Future[T]] = {}  # by step and version

    def __call__(self, step: int) -> T:
        version = self._version()
        current = self._ahead.pop((step, version), None) or self._thread.submit(self._make, step)
        assert all(v != version for _, v in self._ahead), "steps are asked for in order"
        self._ahead.clear()
        if step + 1 < self._steps:
            self._ahead[step + 1, version] = self._thread.submit(self._make, step + 1)
        return current.result()

    def close(self) -> None:
        """Wait for the thread, which finishes at most its current step."""
        self._thread.shutdown(wait=True, cancel_futures=True)


@contextmanager
def prefetched(
    batches: Callable[[int], Sequence[Batch]],
    steps: int,
    device: torch.device,
    budget: TokenBudget,
) -> Iterator[Callable[[int], Sequence[Batch]]]:
    """`batches`, prefetched and pinned for CUDA so that copies do not block; repacked when the
    budget changes. On a CPU, whose cores are busy, `batches` itself."""
    if device.type != "cuda":
        yield batches
        return
    ahead = Prefetch(
        lambda step: [batch.pin_memory() for batch in batches(step)],
        steps,
        lambda: torch.cuda.set_device(device),  # or pinning would initialize device 0
        lambda: budget.tokens,
    )
    try:
        yield ahead
    finally:
        ahead.close()
