"""The forwards and backwards of one step: micro-batches into summed gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dpo_cli.records import Batch
from dpo_cli.train.memory import Note, RandomStates, free_memory
from dpo_cli.train.runtime import Runtime
from dpo_cli.train.task import Totals, TrainTask


@dataclass
class StepSums:
    """Of the micro-batches of a step; the gradients are in the weights."""

    totals: Totals = field(default_factory=Totals)
    batches: list[Batch] = field(default_factory=list)  # as they were packed, on the host

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
    """Sum the loss's gradients over the micro-batches of a step.

    Where memory runs out, what was summed is dropped, the task's token budget halves, and the
    step is done again on `batches()` packed anew: the same gradients but for the order of
    summation.
    """
    before = RandomStates.of(runtime.device)
    task.budget.at_work = True
    while True:
        sums, failed = StepSums(), None
        for batch in batches():
            try:
                sums.add(task, batch, runtime)
            except RuntimeError as error:
                if not task.budget.mends(error):
                    task.budget.refuse_single(error, batch)
                    raise
                failed = batch
            if failed is not None:
                break
        if failed is None:
            task.budget.at_work = False
            return sums
        for weight in task.trained.parameters():
            weight.grad = None
        del sums
        free_memory(runtime.device)
        task.budget.lower(failed, note)
        before.restore(runtime.device)
