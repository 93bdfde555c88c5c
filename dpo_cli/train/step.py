"""Gradient accumulation: the forwards and backwards of a step's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dpo_cli.records import Batch
from dpo_cli.train.memory import Note, RandomStates, free_memory
from dpo_cli.train.runtime import Runtime
from dpo_cli.train.task import Totals, TrainTask


@dataclass
class StepSums:
    """Sums over the micro-batches of a step; the gradients are in the weights' `.grad`."""

    totals: Totals = field(default_factory=Totals)
    batches: list[Batch] = field(default_factory=list)  # on the host

    @property
    def tokens(self) -> int:
        return sum(batch.input_ids.numel() for batch in self.batches)

    @property
    def examples(self) -> int:
        return sum(len(batch.example_ids) for batch in self.batches)

    def add(self, task: TrainTask, batch: Batch, runtime: Runtime) -> None:
        with runtime.autocast():
            out = task.compute_loss(batch.to(runtime.device))
        if batch.filler:
            (0.0 * out.loss_sum).backward()
            self.totals.add(out, share=0.0)
            return
        out.loss_sum.backward()
        self.totals.add(out)
        self.batches.append(batch)


def accumulate(
    task: TrainTask, batches: Callable[[], Sequence[Batch]], runtime: Runtime, note: Note
) -> StepSums:
    """Accumulate gradients over the micro-batches of a step.

    If memory runs out, the sums are dropped, the task's token budget is halved, and the step is
    retried on repacked `batches()`: the same gradients up to the order of summation.
    """
    before = RandomStates.of(runtime.device)
    task.budget.in_use = True
    while True:
        sums, failed = StepSums(), None
        for batch in batches():
            try:
                sums.add(task, batch, runtime)
            except RuntimeError as error:
                if not task.budget.can_retry(error):
                    task.budget.refuse_single(error, batch)
                    raise
                failed = batch
            if failed is not None:
                break
        if failed is None:
            task.budget.in_use = False
            return sums
        for weight in task.trained.parameters():
            weight.grad = None
        del sums
        free_memory(runtime.device)
        task.budget.lower(failed, note)
        before.restore(runtime.device)
