"""The objective of preference losses on a pack: reference, losses, and the paper's metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config import PreferenceConfig
from dpo_cli.config.stages.dpo import losses_of
from dpo_cli.logprobs import sum_by_sequence
from dpo_cli.losses import LOSSES, ROW_ARGUMENTS, Comparisons, RankedLogprobs, preferences
from dpo_cli.losses.diagnostics import diagnostics, moments
from dpo_cli.model.adapters.active import is_adapted
from dpo_cli.model.forward import loss_and_logprobs, sequence_logprobs, token_logprobs
from dpo_cli.records import Batch, EncodedExample, LossOutput
from dpo_cli.session import reference
from dpo_cli.session.models import Loaded
from dpo_cli.session.reference import Reference, Sums, load_reference
from dpo_cli.session.session import Session

ReferenceOf = Callable[[Batch], Tensor | None]  # a pack -> (E, K) reference log-probabilities


@dataclass(frozen=True)
class RowTerms:
    """The rows' own numbers for their loss: name -> (rows,) values on the run's device."""

    values: Mapping[str, Tensor]

    @staticmethod
    def of(examples: Sequence[EncodedExample], names: Sequence[str], session: Session) -> RowTerms:
        columns = torch.tensor([e.terms for e in examples if names]).to(session.runtime.device)
        return RowTerms(dict(zip(names, columns.unbind(-1), strict=True)) if len(columns) else {})

    def __getitem__(self, ids: Tensor) -> dict[str, Tensor]:
        return {name: column[ids] for name, column in self.values.items()}


WITHOUT_TERMS = RowTerms({})


def without_reference(batch: Batch) -> None:
    """The `ReferenceOf` of losses without a reference."""


@dataclass(frozen=True)
class _Table:
    """Cached log-probabilities, (rows, K), looked up by the row's example ids."""

    values: Tensor
    key: str

    def __call__(self, batch: Batch) -> Tensor:
        return self.values[batch.example_ids]


def references(
    session: Session,
    loaded: Loaded,
    named: str | None,
    splits: Mapping[str, Sequence[EncodedExample]],
    live: bool,
    sums: Sums | None = None,
) -> dict[str, ReferenceOf]:
    """Reference log-probabilities of each split that has rows, as functions of a pack.

    live: computed in every step, instead of once and cached.
    """
    policy_is_reference = (
        named is None and session.snapshot is None and not live and not is_adapted(loaded.model)
    )
    against = (
        Reference(loaded.model) if policy_is_reference else load_reference(session, loaded, named)
    )
    if live:
        against.frozen(session.runtime.device)
        return {name: _live(against, sums) for name, rows in splits.items() if rows}
    tables: dict[str, ReferenceOf] = {}
    for name, rows in splits.items():
        if rows:
            title = f"reference log-probs ({name})"
            values, key = reference.cached(session, against, rows, title, sums)
            tables[name] = _Table(values.to(session.runtime.device), key)
    return tables


def _live(against: Reference, sums: Sums | None) -> ReferenceOf:
    compute = sums.compute if sums else sequence_logprobs

    def logprobs(batch: Batch) -> Tensor:
        with against.active() as model:
            return compute(model, batch).view(-1, batch.branches)

    return logprobs


def sums_of(stage: PreferenceConfig) -> Sums | None:
    """How the reference's token log-probabilities are summed: as the policy's (`sequence_sums`)."""
    alpha = stage.ld_alpha
    if alpha is None:
        return None

    def compute(model: PreTrainedModel, batch: Batch) -> Tensor:
        lengths = batch.sequence_lengths.view(-1, batch.branches)
        return sequence_sums(token_logprobs(model, batch), lengths, alpha)

    return Sums(compute, f" ld_alpha {alpha!r}")


def sequence_sums(logprobs: Tensor, lengths: Tensor, ld_alpha: float | None = None) -> Tensor:
    """(N,) token log-probabilities, in the order of the (E, K) responses -> (E, K) sums.

    ld_alpha: LD-DPO's weight of the tokens beyond the shortest response to the prompt
    (arXiv 2409.06411 eq. 9; of two responses, beyond the shorter one's length).
    """
    flat = lengths.reshape(-1)
    index = torch.repeat_interleave(flat, output_size=len(logprobs))
    if ld_alpha is not None:
        first = (flat.cumsum(0) - flat)[index]
        place = torch.arange(len(logprobs), device=logprobs.device) - first
        common = lengths.amin(1, keepdim=True).expand_as(lengths).reshape(-1)[index]
        logprobs = torch.where(place < common, logprobs, ld_alpha * logprobs)
    return sum_by_sequence(logprobs, index, len(flat)).view_as(lengths)


def dpo_loss(
    model: PreTrainedModel,
    batch: Batch,
    reference_of: ReferenceOf,
    stage: PreferenceConfig,
    held_out: bool = False,
    compared_in: Callable[[Sequence[int]], Comparisons | None] = lambda places: None,
    terms: RowTerms = WITHOUT_TERMS,
) -> LossOutput:
    """Sum of the configured loss over the pack's examples, with the paper's metrics.

    held_out: with the moments that `with_correlation` reads. compared_in: the pairs to compare of
    these examples; None: all.
    """
    against = reference_of(batch)
    lengths = batch.sequence_lengths.view(-1, batch.branches)

    def ranked(logprobs: Tensor, examples: slice) -> RankedLogprobs:
        """Token log-probabilities of some of the pack's examples -> those of their sequences."""
        sums = sequence_sums(logprobs, lengths[examples], stage.ld_alpha)
        reference = None if against is None else against[examples]
        compared = compared_in(batch.places[examples])
        return RankedLogprobs(sums, reference, lengths[examples].float(), compared)

    def loss_of(logprobs: Tensor, examples: slice) -> Tensor:
        own = terms[batch.example_ids[examples]]
        return objective(ranked(logprobs, examples), stage, own).sum()

    together = any(LOSSES[name].together for name in losses_of(stage))
    loss, logprobs = loss_and_logprobs(model, batch, loss_of, together)
    examples = len(batch.example_ids)
    every = ranked(logprobs, slice(0, examples))
    figures = [*preference_metrics(every, stage.beta), *diagnostics(every, stage.beta)]
    figures += moments(every) if held_out else ()
    return LossOutput(
        loss_sum=loss,
        weight=float(examples),
        metrics={name: (values.sum(), float(examples)) for name, values in figures},
    )


def objective(
    logprobs: RankedLogprobs, stage: PreferenceConfig, terms: Mapping[str, Tensor] | None = None
) -> Tensor:
    """(E,) the configured losses of each example, plus the NLL of the chosen response.

    terms: (E,) numbers of the rows (`Loss.terms`); a weight multiplies all of an example's loss.
    """
    terms = terms or {}
    total = None
    for name, weight in losses_of(stage).items():
        losses = weight * loss_of_lists(name, logprobs, stage, terms)
        total = losses if total is None else total + losses
    assert total is not None
    if stage.nll_weight:
        total = total - stage.nll_weight * logprobs.policy[:, 0] / logprobs.lengths[:, 0]
    return total * terms["weight"] if "weight" in terms else total


def loss_of_lists(
    name: str,
    logprobs: RankedLogprobs,
    stage: PreferenceConfig,
    terms: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """(E,) one loss per list: a pairwise loss is averaged over the compared pairs of the list."""
    loss = LOSSES[name]
    options = {key: getattr(stage, key) for key in loss.arguments}
    if loss.difference:
        logprobs = logprobs.under(stage.divergence, stage.divergence_alpha)
    if loss.lists:
        return loss.compute(logprobs, **options)
    pairs = logprobs.pairs()
    for term, argument in ROW_ARGUMENTS.items():
        if terms and term in terms:
            options[argument] = terms[term].repeat_interleave(len(pairs.policy) // len(terms[term]))
    return logprobs.mean_of_lists(loss.compute(pairs, **options))


@torch.no_grad()
def preference_metrics(logprobs: RankedLogprobs, beta: float) -> list[tuple[str, Tensor]]:
    """Per-example figures; chosen is the first response, rejected the last.

    An accuracy counts a tie within rounding as one half, so identical models score 0.5. Without a
    reference the reward is beta times the log-probability.
    """
    rho = logprobs.logratios.detach()
    chosen, rejected = rho[:, 0], rho[:, -1]
    margin = chosen - rejected
    size = logprobs.policy.detach().abs()
    if logprobs.reference is not None:
        size = size + logprobs.reference.abs()
    sizes = size[:, 0] + size[:, -1]  # indexing with a list would copy it to the device
    figures = [
        ("rewards/chosen", beta * chosen),
        ("rewards/rejected", beta * rejected),
        ("rewards/margins", beta * margin),
        ("rewards/accuracies", preferences(margin, sizes)),
        ("logps/chosen", logprobs.policy.detach()[:, 0]),
        ("logps/rejected", logprobs.policy.detach()[:, -1]),
    ]
    if logprobs.reference is not None:
        figures += [("logratios/chosen", chosen), ("logratios/rejected", rejected)]
    return figures
