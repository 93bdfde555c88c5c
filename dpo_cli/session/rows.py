"""Examples as packs: a step's micro-batches, and passes over all examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config import RunConfig
from dpo_cli.data.loader import StepPlan, plan_steps
from dpo_cli.errors import DataError
from dpo_cli.model.attention.interface import prepare_layout
from dpo_cli.model.rope import refuse_beyond_cuts
from dpo_cli.model.source import origin_of
from dpo_cli.packing import pack_all, pack_share, pack_sorted
from dpo_cli.records import Batch, EncodedExample, LossOutput
from dpo_cli.session.prompts import distinct_prompts
from dpo_cli.session.session import Session
from dpo_cli.statistics import share_interval
from dpo_cli.train.task import Totals

T = TypeVar("T")


def steps_of(config: RunConfig, rows: int) -> StepPlan:
    """The plan of steps over `rows` examples, as configured by `train`."""
    train = config.train
    return plan_steps(
        rows, train.batch_size, train.epochs, train.max_steps, train.shuffle, config.seed
    )


def step_plan(session: Session, rows: int) -> StepPlan:
    """`steps_of`, with a note on rows that are left over."""
    train, plan = session.config.train, steps_of(session.config, rows)
    if left := plan.left_out(train.epochs):
        session.note(f"{plan.steps:,} steps of {plan.batch_size}{left}")
    return plan


def begin_training(session: Session, model: PreTrainedModel, steps: int) -> None:
    """Start the progress bar, after a note on what is trained and on how many devices."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(_elements(p) for p in model.parameters() if not p.requires_grad)
    devices = f"; {session.ranks.size} devices" * (session.ranks.size > 1)
    session.note(f"trained: {trained_line(session.config, trained, frozen)}{devices}")
    session.begin(steps)


def trained_line(config: RunConfig, trained: int, frozen: int) -> str:
    """`1,179,648 weights (LoRA r 16), 124.4M frozen in nf4`; for full training only the count."""
    lora = config.lora
    if lora.name == "none":
        return f"{trained:,} weights"
    kind = f"{'DoRA' if lora.use_dora else 'LoRA'} r {lora.r}"
    adapter = "of its adapter" if origin_of(config.model).adapter else f"({kind})"
    stored = f" in {lora.quantization}" if lora.quantization else ""
    return f"{trained:,} weights {adapter}, {frozen / 1e6:,.1f}M frozen{stored}"


def _elements(weight: Tensor) -> int:
    """Elements of a weight; two 4-bit values share one entry of the packed tensor."""
    packed = getattr(weight, "quant_state", None)
    return weight.numel() if packed is None else math.prod(packed.shape)


def batches_of(
    session: Session, examples: Sequence[EncodedExample], plan: StepPlan, keep_last: bool = False
) -> Callable[[int], list[Batch]]:
    """step -> its micro-batches, each within the token budget, ready for the trained model.

    A router loss also needs the last tokens.
    """
    keep_last = keep_last or session.config.train.router_aux_loss_coef > 0
    return lambda step: packed_rows(session, examples, plan.indices(step), keep_last)


def packed_rows(
    session: Session,
    examples: Sequence[EncodedExample],
    indices: Sequence[int],
    keep_last: bool = False,
) -> list[Batch]:
    """This rank's micro-batches of the given examples, ready for the trained model."""
    budget, ranks, cuts = session.token_budget, session.ranks, session.cuts
    if ranks.size == 1:
        rows = pack_all(examples, indices, budget, keep_last, cuts)
    else:
        refuse_beyond_cuts([examples[i] for i in indices], cuts)
        rows = pack_share(examples, indices, budget, ranks.rank, ranks.size, keep_last, cuts)
    return [prepare_layout(row, session.kernel) for row in rows]


def over_rows(
    session: Session,
    examples: Sequence[EncodedExample],
    compute: Callable[[Batch], T],
    keep_last: bool = False,
    tick: Callable[[int], None] = lambda examples: None,
) -> Iterable[tuple[Batch, T]]:
    """Packs of all examples, each with the result of `compute` on the run's device.

    The ranks share the work; results are gathered on all of them, with tensors on the CPU.
    """

    left = len(examples)

    def computed(row: Batch) -> T:
        nonlocal left
        with session.runtime.autocast():
            result = compute(row.to(session.runtime.device))
        done = min(left, len(row.example_ids) * session.ranks.size)  # the other ranks did as many
        left -= done
        tick(done)
        return result

    rows = pack_sorted(examples, session.token_budget, keep_last, session.cuts)
    if session.ranks.size == 1:  # lazily, so that no pack stays in memory
        return ((row, computed(row)) for row in rows)
    refuse_beyond_cuts(examples, session.cuts)
    packs = list(rows)
    return zip(packs, session.ranks.spread(packs, computed), strict=True)


def mean_figures(
    session: Session,
    examples: Sequence[EncodedExample],
    compute: Callable[[Batch], LossOutput],
) -> dict[str, float]:
    """Mean loss and metrics over all examples; empty without examples."""
    totals, travels = Totals(), session.ranks.size > 1
    results = over_rows(session, examples, lambda r: compute(r).on_cpu() if travels else compute(r))
    for _, out in results:
        totals.add(out)
    return totals.means() if totals.sums else {}


def with_interval(
    figures: dict[str, float], name: str, examples: Sequence[EncodedExample]
) -> dict[str, float]:
    """Add the 95% interval (`_low`, `_high`) of the metric `name`, a fraction of the examples.

    Its width is that for one example per prompt, as examples of a prompt are not independent.
    """
    if name not in figures:
        return figures
    share = share_interval(figures[name], len(distinct_prompts(examples)))
    return {**figures, f"{name}_low": share.low, f"{name}_high": share.high}


def keep_responses(examples: Sequence[EncodedExample], count: int) -> list[EncodedExample]:
    """The best `count` responses of each example."""
    return [replace(e, response_ids=e.response_ids[:count]) for e in examples]


def distinct_responses(examples: Sequence[EncodedExample]) -> int:
    """Number of distinct (prompt, response): a response may be in several pairs."""
    return len({(e.prompt_ids.tobytes(), r.tobytes()) for e in examples for r in e.response_ids})


def check_lengths(examples: Sequence[EncodedExample], branches: int, stage: str) -> None:
    """DataError for an example with fewer than `branches` responses."""
    for example in examples:
        if len(example.response_ids) < branches:
            raise DataError(
                f"stage={stage}: row {example.row} has {len(example.response_ids)} response(s), "
                f"but {branches} are needed: set chosen and rejected (data.rejected_field=...)"
            )
