"""How much of a step bfloat16 weights keep.

A weight has 8 significant bits there: a change below about 1/512 of its size is rounded away, and
with the small learning rates of preference tuning that is nearly every change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_cli.distributed.fsdp import local_part

SAMPLED = 2**16  # values of a weight that are looked at: a copy of all would not fit
FEW = 0.5  # share of changed weights below which the user is told


@dataclass(frozen=True)
class Watched:
    """Values of weights before a step, (n,) each, and which of them have a gradient."""

    weight: Tensor
    values: Tensor
    pulled: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Watched:
        assert weight.grad is not None
        return cls(weight, _sample(weight).clone(), _sample(weight.grad) != 0)

    def changed(self) -> Tensor:
        """(2,) how many have changed, and of how many."""
        moved = (_sample(self.weight) != self.values) & self.pulled
        return torch.stack([moved.sum(), self.pulled.sum()])


def _sample(values: Tensor) -> Tensor:
    flat = local_part(values.detach()).flatten()
    return flat[:: 1 + len(flat) // SAMPLED]


def watch(weights: Iterable[Tensor]) -> list[Watched]:
    return [Watched.of(w) for w in weights if w.grad is not None and w.dtype == torch.bfloat16]


def changed_share(watched: list[Watched]) -> float:
    """Of the weights that have a gradient; 1 of none."""
    if not watched:
        return 1.0
    moved, pulled = torch.stack([w.changed() for w in watched]).sum(0).tolist()
    return moved / pulled if pulled else 1.0


def rounding_note(share: float, lr: float) -> str | None:
    """What to tell the user after the first step at the full learning rate."""
    if share >= FEW:
        return None
    return (
        f"hardware.weights=bf16: {share:.0%} of the weights changed in a step at the learning rate "
        f"{lr:g}, the rest was rounded away; use hardware.weights=fp32"
    )
