"""The next step's micro-batches are packed by one thread while the device computes."""

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
    """`make(step)`, worked out ahead: asking for a step starts on the next one.

    The values and their order are those of `make`, which no two threads run at once. What it
    raises is raised by the call that asks for that step. Leave with `close`.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        steps: int,
        prepare: Callable[[], None] = lambda: None,
        version: Callable[[], int] = lambda: 0,
    ) -> None:
        """steps: none from there on is asked for. prepare: run first in the thread. version:
        what was made ahead is dropped when it changes."""
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
        """Wait for the thread: it finishes at most the step it is at."""
        self._thread.shutdown(wait=True, cancel_futures=True)


@contextmanager
def fed(
    batches: Callable[[int], Sequence[Batch]],
    steps: int,
    device: torch.device,
    budget: TokenBudget,
) -> Iterator[Callable[[int], Sequence[Batch]]]:
    """`batches` itself on a CPU, whose cores are busy; for CUDA ahead of time and pinned, so
    that copying them does not wait for the device. Packed anew when the budget changes."""
    if device.type != "cuda":
        yield batches
        return
    ahead = Prefetch(
        lambda step: [batch.pin_memory() for batch in batches(step)],
        steps,
        lambda: torch.cuda.set_device(device),  # else pinning would open the first one
        lambda: budget.tokens,
    )
    try:
        yield ahead
    finally:
        ahead.close()
