"""The forwards and backwards of one step: micro-batches into summed gradients."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cli.records import Batch
from dpo_cli.train.runtime import Runtime
from dpo_cli.train.task import Totals, TrainTask


def accumulate(
    task: TrainTask, batches: Sequence[Batch], runtime: Runtime
) -> tuple[Totals, int, int]:
    """Sum the loss's gradients over the micro-batches of a step: its totals, tokens, examples."""
    totals, tokens, examples = Totals(), 0, 0
    for batch in batches:
        tokens += batch.input_ids.numel()
        examples += len(batch.example_ids)
        with runtime.autocast():
            out = task.compute_loss(batch.to(runtime.device))
        out.loss_sum.backward()
        totals.add(out)
    return totals, tokens, examples
