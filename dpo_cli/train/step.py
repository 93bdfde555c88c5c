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
        share = 0.0 if batch.filler else 1.0
        tokens += batch.input_ids.numel() * (not batch.filler)
        examples += len(batch.example_ids) * (not batch.filler)
        with runtime.autocast():
            out = task.compute_loss(batch.to(runtime.device))
        (out.loss_sum * share if batch.filler else out.loss_sum).backward()
        totals.add(out, share)
    return totals, tokens, examples
