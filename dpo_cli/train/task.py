"""What a stage hands to the loop, the session it runs in, and sums over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import RunConfig
from dpo_cli.distributed.ranks import ALONE, Ranks
from dpo_cli.records import Batch, LossOutput
from dpo_cli.train.memory import TokenBudget
from dpo_cli.train.runtime import Runtime

if TYPE_CHECKING:
    from dpo_cli.train.checkpoint import Snapshot


class TrainingSession(Protocol):
    """The run that the loop trains in: its settings, and where figures go (metric sinks and the
    console)."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def runtime(self) -> Runtime: ...
    @property
    def snapshot(self) -> Snapshot | None: ...
    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def advance(self, step: int, values: Mapping[str, float]) -> None: ...
    def note(self, line: str) -> None: ...


@dataclass
class TrainTask:
    """What a stage gives the loop.

    batches(step): the micro-batches of a 0-based step, a function of the step alone (and of what
    before_step has made). evaluate(): figures of the held-out rows. on_eval(step): samples.
    before_step(step): what comes before a step's clock starts, such as rollouts; its figures are
    logged with every step until it returns others.
    live_references: models of the same shape that compute_loss runs forward without gradient.
    save_multiple: a run is saved, and so resumed, after multiples of so many steps only.
    carried(): JSON that a checkpoint keeps for the stage.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    steps: int
    batches: Callable[[int], Sequence[Batch]]
    compute_loss: Callable[[Batch], LossOutput]
    evaluate: Callable[[], dict[str, float]]
    budget: TokenBudget  # which batches and evaluate keep to
    on_eval: Callable[[int], None] = lambda step: None
    unit: str = "examples"  # what `<unit>_per_second` counts
    provenance: dict[str, Any] = field(default_factory=dict)  # written beside saved weights
    files: Mapping[str, bytes] = field(default_factory=dict)  # so are these, by name
    identity: dict[str, str] = field(default_factory=dict)  # digests a resume must find again
    heads: torch.nn.Module | None = None  # trained with the model, no part of it ...
    heads_lr_scale: float = 1.0  # ... at so many times its rate
    before_step: Callable[[int], dict[str, float]] | None = None
    live_references: int = 0
    save_multiple: int = 1
    carried: Callable[[], dict[str, Any]] = dict

    @property
    def trained(self) -> torch.nn.Module:
        """The model, with its heads."""
        return self.model if self.heads is None else torch.nn.ModuleList([self.model, self.heads])


class Totals:
    """Sums over the micro-batches of a step, kept on the device until the step's end."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, out: LossOutput, share: float = 1.0) -> None:
        """share: 0 for a row that counts for nothing, whose names are wanted all the same."""
        parts = {"loss": (out.loss_sum.detach(), out.weight), **out.metrics}
        for name, (found, weight) in parts.items():
            value = found if share == 1.0 else found * share
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.weights[name] = self.weights.get(name, 0.0) + weight * share

    def means(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """One transfer for all of them; over all ranks, whose weights then become the step's."""
        values = torch.stack([v.float() for v in self.sums.values()]).tolist()
        names = list(self.sums)
        if ranks.size > 1:
            found = ranks.total([*values, *(self.weights[name] for name in names)])
            values, weights = found[: len(names)], found[len(names) :]
            self.weights = dict(zip(names, weights, strict=True))
        return {name: v / self.weights[name] for name, v in zip(names, values, strict=True)}
