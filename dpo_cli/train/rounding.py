"""How many bfloat16 weights change in a step.

bfloat16 has 8 significant bits: a change below about 1/512 of a weight is rounded away, and at the
small learning rates of preference tuning that is nearly every change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_cli.distributed.fsdp import local_part

SAMPLED = 2**16  # values compared per weight: a copy of all would not fit
MIN_CHANGED = 0.5  # share of changed weights below which a note is printed


@dataclass(frozen=True)
class Watched:
    """Sampled values of a weight before a step, (n,), and which have a nonzero gradient, (n,)."""

    weight: Tensor
    values: Tensor
    has_grad: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Watched:
        assert weight.grad is not None
        return cls(weight, _sample(weight).clone(), _sample(weight.grad) != 0)

    def changed(self) -> Tensor:
        """(2,): the number of changed values, and of values with a gradient."""
        changed = (_sample(self.weight) != self.values) & self.has_grad
        return torch.stack([changed.sum(), self.has_grad.sum()])


def _sample(values: Tensor) -> Tensor:
    flat = local_part(values.detach()).flatten()
    return flat[:: 1 + len(flat) // SAMPLED]


def watch(weights: Iterable[Tensor]) -> list[Watched]:
    return [Watched.of(w) for w in weights if w.grad is not None and w.dtype == torch.bfloat16]


def changed_share(watched: list[Watched]) -> float:
    """Share of the values with a gradient that changed; 1 if there are none."""
    if not watched:
        return 1.0
    changed, total = torch.stack([w.changed() for w in watched]).sum(0).tolist()
    return changed / total if total else 1.0


def rounding_note(share: float, lr: float) -> str | None:
    """A note after the first step at the full learning rate, if most changes are rounded away."""
    if share >= MIN_CHANGED:
        return None
    return (
        f"hardware.weights=bf16: only {share:.0%} of the weights changed in a step at the learning "
        f"rate {lr:g}, the other updates were rounded away; use hardware.weights=fp32"
    )
