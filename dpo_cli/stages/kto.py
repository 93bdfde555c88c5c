"""stage=kto: losses on single responses, labelled desirable or not (arXiv 2402.01306)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config import KtoConfig, RunConfig
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.errors import DataError
from dpo_cli.losses.kto import SINGLE_LOSSES, kl_estimate
from dpo_cli.model.forward import loss_and_logprobs
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
from dpo_cli.session.reference import policy_loading
from dpo_cli.session.rows import (
    batches_of,
    begin_training,
    distinct_responses,
    mean_figures,
    step_plan,
)
from dpo_cli.session.sampling import sample_writer
from dpo_cli.session.session import Session
from dpo_cli.session.trained import trained_files
from dpo_cli.session.workload import Workload, training_workload
from dpo_cli.stages.preference import ReferenceOf, references, sequence_sums
from dpo_cli.train.loop import fit
from dpo_cli.train.task import TrainTask

BALANCED = (0.75, 4 / 3)  # weighted desirable responses per undesirable one; arXiv 2402.01306, 4.2


@dataclass(frozen=True)
class Labelled:
    """Examples of one response each (and KTO's, of another prompt), and whether it is desirable."""

    examples: list[EncodedExample]
    desirable: np.ndarray  # (rows,) bool

    def __len__(self) -> int:
        return len(self.examples)

    def on(self, device: torch.device) -> Tensor:
        return torch.from_numpy(self.desirable).to(device)


def run(session: Session) -> dict[str, Any]:
    """Train on single responses; metrics have the names of those on pairs."""
    stage = cast(KtoConfig, session.config.stage)
    loaded = load_policy_and_data(session, policy_loading(session))
    splits = loaded.splits
    train, held_out = labelled(splits.train, splits, stage), labelled(splits.eval, splits, stage)
    for line in balance_lines(train, stage):
        session.note(line)
    named = reference.reference_path(session.config, loaded)
    rows = {"train": train.examples, "eval": held_out.examples}
    reference_of = references(session, loaded, named, rows, stage.reference_logprobs == "live")
    plan = step_plan(session, len(train))
    begin_training(session, loaded.model, plan.steps)
    task = TrainTask(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        steps=plan.steps,
        batches=batches_of(session, train.examples, plan),
        compute_loss=balanced(
            session.config,
            loaded.model,
            lambda batch: kto_output(loaded.model, batch, reference_of["train"], train, stage),
        ),
        evaluate=lambda: evaluate(session, loaded, held_out, reference_of.get("eval"), stage),
        budget=session.budget,
        live_references=int(stage.reference_logprobs == "live"),
        on_eval=sample_writer(session, loaded),
        provenance=provenance_of(
            session,
            loaded,
            loss=stage.loss,
            beta=stage.beta,
            reference=named or session.config.model.path or session.config.model.hub_id,
        ),
        files=trained_files(session.config, splits),
        identity=identity_of(
            loaded,
            labels=hashlib.sha256(train.desirable.tobytes()).hexdigest(),
            reference=getattr(reference_of["train"], "key", "live"),
        ),
    )
    fit(task, session)
    return {"samples": distinct_responses(train.examples), "gradient_steps": plan.steps}


def plan(preview: Preview) -> Iterator[Row]:
    stage = cast(KtoConfig, preview.config.stage)
    train = labelled(preview.splits.train, preview.splits, stage)
    yield "stage", f"kto, loss {stage.loss}, beta {stage.beta:g}"
    yield from trained_model_rows(preview)
    yield reference_row(stage.reference)
    yield from data_rows(preview)
    for line in balance_lines(train, stage):
        yield "", line
    yield from step_rows(preview.config, train.examples)
    yield device_row(preview)


def workload(config: RunConfig, splits: EncodedSplits) -> Workload:
    stage = cast(KtoConfig, config.stage)
    return training_workload(config, labelled(splits.train, splits, stage).examples)


def labelled(rows: Sequence[EncodedExample], splits: EncodedSplits, stage: KtoConfig) -> Labelled:
    """Each response as a separate example: of a pair or list the best is desirable and the others
    are not; a single response has its label as its score."""
    examples: list[EncodedExample] = []
    desirable: list[bool] = []
    for row in rows:
        if len(row.response_ids) == 1 and row.scores is None:
            raise DataError(
                f"stage=kto: row {row.row} has one response and no label: give pairs, or a column "
                "label (data.label_field) that is true or false"
            )
        for place, ids in enumerate(row.response_ids):
            examples.append(replace(row, response_ids=(ids,), scores=None))
            single = len(row.response_ids) == 1 and row.scores is not None
            desirable.append(row.scores[0] > 0 if single and row.scores else place == 0)
    if SINGLE_LOSSES[stage.loss].mismatched:
        examples = mismatched(examples, splits.limits.max_length)
    return Labelled(examples, np.array(desirable, dtype=bool))


def mismatched(examples: Sequence[EncodedExample], max_length: int) -> list[EncodedExample]:
    """Each example with the response to the next different prompt as its second one, for KTO's z_0,
    truncated to the space its new prompt leaves, at least one token."""
    prompts = [example.prompt_ids.tobytes() for example in examples]
    result = []
    for place, example in enumerate(examples):
        order = ((place + ahead) % len(examples) for ahead in range(1, len(examples)))
        other = next((i for i in order if prompts[i] != prompts[place]), place)
        room = max(1, max_length - len(example.prompt_ids))
        ids = examples[other].response_ids[0][:room]
        result.append(replace(example, response_ids=(example.response_ids[0], ids)))
    return result


def balance_lines(rows: Labelled, stage: KtoConfig) -> Iterator[str]:
    """The number of desirable responses, and which weight to set if they are out of balance."""
    good = int(rows.desirable.sum())
    bad = len(rows) - good
    yield f"{good:,} desirable and {bad:,} undesirable responses"
    weighted = stage.desirable_weight * good, stage.undesirable_weight * bad
    if not all(weighted):
        return
    ratio = weighted[0] / weighted[1]
    if ratio < BALANCED[0]:
        remedy = f"stage.desirable_weight={weighted[1] / good:.3g}"
    elif ratio > BALANCED[1]:
        remedy = f"stage.undesirable_weight={weighted[0] / bad:.3g}"
    else:
        return
    yield (
        f"desirable responses weigh {ratio:.2g} times the others; KTO's paper advises 1 to 1.33: "
        f"{remedy}"
    )


def kto_output(
    model: PreTrainedModel,
    batch: Batch,
    reference_of: ReferenceOf,
    rows: Labelled,
    stage: KtoConfig,
) -> LossOutput:
    """Sum of the weighted losses over the pack's responses, with figures."""
    against = reference_of(batch)
    assert against is not None
    loss, lengths = SINGLE_LOSSES[stage.loss], batch.sequence_lengths.view(-1, batch.branches)
    labels = rows.on(against.device)[batch.example_ids]
    weights = torch.where(labels, stage.desirable_weight, stage.undesirable_weight)

    def shift_of(logratios: Tensor) -> Tensor:
        if loss.mismatched:
            return kl_estimate(logratios[:, 1])
        return loss.shift(logratios[:, 0], labels, stage.beta)

    def loss_of(logprobs: Tensor, examples: slice) -> Tensor:
        logratios = sequence_sums(logprobs, lengths) - against
        losses = loss.compute(logratios[:, 0], labels, shift_of(logratios), stage.beta)
        return (weights * losses).sum()

    total, logprobs = loss_and_logprobs(model, batch, loss_of, together=True)
    logratios = sequence_sums(logprobs, lengths) - against
    rewards, right = stage.beta * logratios[:, 0], labels.float()
    count, good = float(len(labels)), float(rows.desirable[list(batch.places)].sum())
    metrics = {"shift": (shift_of(logratios) * count, count)}
    if good:
        metrics["rewards/chosen"] = ((rewards * right).sum(), good)
    if good < count:
        metrics["rewards/rejected"] = ((rewards * (1.0 - right)).sum(), count - good)
    return LossOutput(loss_sum=total, weight=count, metrics=metrics)


def evaluate(
    session: Session,
    loaded: Loaded,
    rows: Labelled,
    reference_of: ReferenceOf | None,
    stage: KtoConfig,
) -> dict[str, float]:
    """The training figures on the held-out rows; empty without rows."""
    if reference_of is None:
        return {}
    figures = mean_figures(
        session,
        rows.examples,
        lambda row: kto_output(loaded.model, row, reference_of, rows, stage),
    )
    if {"rewards/chosen", "rewards/rejected"} <= set(figures):
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
    return figures
