"""The interface between a stage and the loop: `TrainTask`, `TrainingSession`, and metric totals."""

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
    """What the loop needs of a run: its settings, and where metrics go (sinks and console)."""

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
    """What a stage passes to the loop.

    batches(step): the micro-batches of a 0-based step, a function of the step alone (and of
    before_step's results, which may leave nothing to learn: without any, no step is taken).
    evaluate(): metrics of the held-out rows. on_eval(step): samples.
    before_step(step): runs before the step is timed, such as rollouts; its metrics are logged
    with every step until it returns new ones.
    live_references: reference models of the same shape whose forward compute_loss runs.
    save_multiple: checkpoints are only saved after multiples of this many steps.
    carried(): JSON that a checkpoint keeps for the stage; carried_tensors(): the same of tensors,
    in a run of a single process, which the stage reads back itself.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    steps: int
    batches: Callable[[int], Sequence[Batch]]
    compute_loss: Callable[[Batch], LossOutput]
    evaluate: Callable[[], dict[str, float]]
    budget: TokenBudget  # respected by batches and evaluate
    on_eval: Callable[[int], None] = lambda step: None
    unit: str = "examples"  # what `<unit>_per_second` counts
    provenance: dict[str, Any] = field(default_factory=dict)  # written beside saved weights
    files: Mapping[str, bytes] = field(default_factory=dict)  # further files to write, by name
    identity: dict[str, str] = field(default_factory=dict)  # digests that must match on resume
    heads: torch.nn.Module | None = None  # trained with the model but not part of it
    heads_lr_scale: float = 1.0  # their factor on the learning rate
    before_step: Callable[[int], dict[str, float]] | None = None
    live_references: int = 0
    save_multiple: int = 1
    carried: Callable[[], dict[str, Any]] = dict
    carried_tensors: Callable[[], dict[str, torch.Tensor]] = dict

    @property
    def trained(self) -> torch.nn.Module:
        """The model and its heads."""
        return self.model if self.heads is None else torch.nn.ModuleList([self.model, self.heads])


class Totals:
    """Metric sums over the micro-batches of a step, on the device until the step's end."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, out: LossOutput, share: float = 1.0) -> None:
        """share: 0 for a filler row, which counts for nothing but has the same metric names."""
        parts = {"loss": (out.loss_sum.detach(), out.weight), **out.metrics}
        for name, (metric_sum, weight) in parts.items():
            value = metric_sum if share == 1.0 else metric_sum * share
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.weights[name] = self.weights.get(name, 0.0) + weight * share

    def means(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """The means over all ranks, in one transfer; `weights` become those of the whole step."""
        values = torch.stack([v.float() for v in self.sums.values()]).tolist()
        names = list(self.sums)
        if ranks.size > 1:
            totals = ranks.total([*values, *(self.weights[name] for name in names)])
            values, weights = totals[: len(names)], totals[len(names) :]
            self.weights = dict(zip(names, weights, strict=True))
        return {name: v / self.weights[name] for name, v in zip(names, values, strict=True)}
