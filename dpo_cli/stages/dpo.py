"""stage=dpo: preference losses against a frozen reference (arXiv 2305.18290)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config import LOSS_FACTS, DpoConfig, RunConfig
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.errors import DataError
from dpo_cli.logprobs import sum_by_sequence
from dpo_cli.losses import LOSSES, RankedLogprobs, preferences
from dpo_cli.model.adapters.active import is_adapted
from dpo_cli.model.forward import loss_and_logprobs, sequence_logprobs
from dpo_cli.records import Batch, EncodedExample, LossOutput
from dpo_cli.session import reference
from dpo_cli.session.balance import balanced
from dpo_cli.session.models import Loaded, identity_of, load_policy_and_data, provenance_of
from dpo_cli.session.preview import (
    Preview,
    Row,
    data_rows,
    device_row,
    reference_row,
    step_rows,
    trained_model_rows,
)
from dpo_cli.session.reference import Reference, beside_its_start, load_reference
from dpo_cli.session.rows import (
    batches_of,
    begin_training,
    check_lengths,
    distinct_responses,
    mean_figures,
    step_plan,
    with_interval,
)
from dpo_cli.session.sampling import sample_writer
from dpo_cli.session.session import Session
from dpo_cli.session.trained import trained_files
from dpo_cli.session.workload import Workload, training_workload
from dpo_cli.train.loop import fit
from dpo_cli.train.task import TrainTask

ReferenceOf = Callable[[Batch], Tensor]  # a pack -> (E, K) reference log-probabilities


def run(session: Session) -> dict[str, Any]:
    """Train on ranked responses; metrics as in the paper's reference code."""
    stage = cast(DpoConfig, session.config.stage)
    loaded = load_policy_and_data(session, beside_its_start(session))
    train, held_out = loaded.splits.train, loaded.splits.eval
    check_branches([*train, *held_out], stage)
    named = reference.reference_path(session.config, loaded)
    reference_of = references(session, loaded, named)
    plan = step_plan(session, len(train))
    begin_training(session, loaded.model, plan.steps)
    task = TrainTask(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        steps=plan.steps,
        batches=batches_of(session, train, plan),
        compute_loss=balanced(
            session.config,
            loaded.model,
            lambda batch: dpo_loss(loaded.model, batch, reference_of["train"], stage),
        ),
        evaluate=lambda: evaluate(session, loaded, held_out, reference_of.get("eval"), stage),
        budget=session.budget,
        live_references=int(stage.reference_logprobs == "live"),
        on_eval=sample_writer(session, loaded),
        unit="pairs" if stage.loss != "plackett_luce" else "lists",
        provenance=provenance_of(
            session,
            loaded,
            loss=stage.loss,
            beta=stage.beta,
            reference=named or session.config.model.path or session.config.model.hub_id,
        ),
        files=trained_files(session.config, loaded.splits),
        identity=identity_of(loaded, reference=getattr(reference_of["train"], "key", "live")),
    )
    fit(task, session)
    return {"samples": distinct_responses(train), "gradient_steps": plan.steps}


def plan(preview: Preview) -> Iterator[Row]:
    stage = cast(DpoConfig, preview.config.stage)
    yield "stage", f"dpo, loss {stage.loss}, beta {stage.beta:g}"
    yield from trained_model_rows(preview)
    yield reference_row(stage.reference)
    yield from data_rows(preview)
    yield from step_rows(preview.config, preview.splits.train)
    yield device_row(preview)


def workload(config: RunConfig, splits: EncodedSplits) -> Workload:
    return training_workload(config, splits.train)


def check_branches(examples: Sequence[EncodedExample], stage: DpoConfig) -> None:
    """Two responses for the pairwise losses, one common K >= 2 for ranked lists."""
    check_lengths(examples, 2, "dpo")
    counts = {len(e.response_ids) for e in examples}
    if stage.loss != "plackett_luce" and counts != {2}:
        raise DataError(
            f"stage.loss={stage.loss} takes pairs, the rows have {sorted(counts)} responses: "
            "use stage.loss=plackett_luce"
        )
    if len(counts) > 1:
        raise DataError(f"ranked lists must have one length, found {sorted(counts)}")


def references(session: Session, loaded: Loaded, named: str | None) -> dict[str, ReferenceOf]:
    """Reference log-probabilities of both splits, as functions of a pack."""
    stage = cast(DpoConfig, session.config.stage)
    splits = {"train": loaded.splits.train, "eval": loaded.splits.eval}
    live = stage.reference_logprobs == "live"
    own = named is None and session.snapshot is None and not live and not is_adapted(loaded.model)
    against = Reference(loaded.model) if own else load_reference(session, loaded, named)
    if live:
        against.frozen(session.runtime.device)
        return {name: _live(against) for name, rows in splits.items() if rows}
    tables: dict[str, ReferenceOf] = {}
    for name, rows in splits.items():
        if rows:
            values, key = reference.cached(session, against, rows, f"reference log-probs ({name})")
            tables[name] = _Table(values.to(session.runtime.device), key)
    return tables


@dataclass(frozen=True)
class _Table:
    """Cached log-probabilities, (rows, K), looked up by the row's example ids."""

    values: Tensor
    key: str

    def __call__(self, batch: Batch) -> Tensor:
        return self.values[batch.example_ids]


def _live(against: Reference) -> ReferenceOf:
    def logprobs(batch: Batch) -> Tensor:
        with against.active() as model:
            return sequence_logprobs(model, batch).view(-1, batch.branches)

    return logprobs


def dpo_loss(
    model: PreTrainedModel, batch: Batch, reference_of: ReferenceOf, stage: DpoConfig
) -> LossOutput:
    """Sum of the configured loss over the pack's examples, with the paper's metrics."""
    reference = reference_of(batch)

    def ranked(logprobs: Tensor, examples: slice) -> RankedLogprobs:
        """Token log-probabilities of some of the pack's examples -> those of their sequences."""
        k = batch.branches
        lengths = batch.sequence_lengths[examples.start * k : examples.stop * k]
        index = torch.repeat_interleave(lengths, output_size=len(logprobs))
        sums = sum_by_sequence(logprobs, index, len(lengths)).view(-1, k)
        return RankedLogprobs(sums, reference[examples], lengths.view(-1, k).float())

    def loss_of(logprobs: Tensor, examples: slice) -> Tensor:
        return objective(ranked(logprobs, examples), stage).sum()

    loss, logprobs = loss_and_logprobs(model, batch, loss_of)
    examples = len(batch.example_ids)
    figures = preference_metrics(ranked(logprobs, slice(0, examples)), stage.beta)
    return LossOutput(
        loss_sum=loss,
        weight=float(examples),
        metrics={name: (values.sum(), float(examples)) for name, values in figures},
    )


def objective(logprobs: RankedLogprobs, stage: DpoConfig) -> Tensor:
    """(E,) the configured loss of each example, with the NLL of the chosen mixed in."""
    options = {k: getattr(stage, k) for k in LOSS_FACTS[stage.loss].options if k != "nll_weight"}
    losses = LOSSES[stage.loss](logprobs, **options)
    if stage.nll_weight:
        losses = losses - stage.nll_weight * logprobs.policy[:, 0] / logprobs.lengths[:, 0]
    return losses


@torch.no_grad()
def preference_metrics(logprobs: RankedLogprobs, beta: float) -> list[tuple[str, Tensor]]:
    """Per-example figures; chosen is the first response, rejected the last.

    An accuracy counts a tie within rounding as one half, so identical models score 0.5.
    """
    rho = logprobs.logratios.detach()
    chosen, rejected = rho[:, 0], rho[:, -1]
    margin = chosen - rejected
    size = logprobs.policy.detach().abs() + logprobs.reference.abs()
    sizes = size[:, 0] + size[:, -1]  # a list as an index would be copied to the device
    return [
        ("rewards/chosen", beta * chosen),
        ("rewards/rejected", beta * rejected),
        ("rewards/margins", beta * margin),
        ("rewards/accuracies", preferences(margin, sizes)),
        ("logps/chosen", logprobs.policy.detach()[:, 0]),
        ("logps/rejected", logprobs.policy.detach()[:, -1]),
        ("logratios/chosen", chosen),
        ("logratios/rejected", rejected),
    ]


def evaluate(
    session: Session,
    loaded: Loaded,
    examples: Sequence[EncodedExample],
    reference_of: ReferenceOf | None,
    stage: DpoConfig,
) -> dict[str, float]:
    """The training metrics on the held-out rows; empty without any."""
    if reference_of is None:
        return {}
    found = mean_figures(
        session, examples, lambda row: dpo_loss(loaded.model, row, reference_of, stage)
    )
    return with_interval(found, "rewards/accuracies", len(examples))
