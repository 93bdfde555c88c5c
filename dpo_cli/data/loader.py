"""Which examples are in which optimizer step: a pure function of seed and step.

The stream of examples is one epoch after another, each in its own seeded order; step s takes the
s-th `batch_size` of them. Resuming at s needs no other state, and the order does not depend on the
number of devices or the micro-batch budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """rows: dataset size; batch_size: examples per step."""

    rows: int
    batch_size: int
    steps: int
    shuffle: bool
    seed: int

    def indices(self, step: int) -> list[int]:
        """The `batch_size` examples of the 0-based step."""
        first = step * self.batch_size
        last = first + self.batch_size
        chosen: list[int] = []
        for epoch in range(first // self.rows, (last - 1) // self.rows + 1):
            order = self._order(epoch)
            low, high = first - epoch * self.rows, last - epoch * self.rows
            chosen += order[max(0, low) : max(0, min(high, self.rows))].tolist()
        return chosen

    def left_out(self, epochs: float) -> str:
        """A note on rows left over by an incomplete last batch; empty if there are none."""
        rows = max(1, round(self.rows * epochs)) - self.steps * self.batch_size
        if not 0 < rows < self.batch_size:
            return ""
        return f"; {rows:,} of {round(self.rows * epochs):,} rows left over (incomplete batch)"

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.rows)
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows)


def plan_steps(
    rows: int, batch_size: int, epochs: float, max_steps: int | None, shuffle: bool, seed: int
) -> StepPlan:
    """As many full batches as the epochs have, or `max_steps`.

    An incomplete last batch is dropped: a step on one example would move the weights as far as
    one on 64. With fewer rows than `batch_size`, batches are smaller.
    """
    batch = min(batch_size, max(1, round(rows * epochs))) if max_steps is None else batch_size
    steps = max_steps or max(1, round(rows * epochs) // batch)
    return StepPlan(rows, batch, steps, shuffle, seed)
