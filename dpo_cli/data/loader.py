"""Which examples make which optimiser step: a pure function of seed and step.

The stream of examples is epoch after epoch, each in its own seeded order. Step s takes
the next `batch_size` of it, so resuming at s needs no state but s, and the order does
not depend on the number of devices or the micro-batch budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """rows: dataset size; total_examples: where the stream ends (None: never)."""

    rows: int
    batch_size: int
    steps: int
    total_examples: int | None
    shuffle: bool
    seed: int

    def indices(self, step: int) -> list[int]:
        """Examples of the 0-based step; `batch_size` of them, fewer only in the last step."""
        first = step * self.batch_size
        last = first + self.batch_size
        if self.total_examples is not None:
            last = min(last, self.total_examples)
        chosen: list[int] = []
        for epoch in range(first // self.rows, (last - 1) // self.rows + 1):
            order = self._order(epoch)
            low, high = first - epoch * self.rows, last - epoch * self.rows
            chosen += order[max(0, low) : max(0, min(high, self.rows))].tolist()
        return chosen

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.rows)
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows)


def plan_steps(
    rows: int, batch_size: int, epochs: float, max_steps: int | None, shuffle: bool, seed: int
) -> StepPlan:
    """`max_steps` wins over `epochs`; without it the stream ends exactly with the epochs."""
    if max_steps is not None:
        return StepPlan(rows, batch_size, max_steps, None, shuffle, seed)
    total = max(1, round(rows * epochs))
    return StepPlan(rows, batch_size, math.ceil(total / batch_size), total, shuffle, seed)
