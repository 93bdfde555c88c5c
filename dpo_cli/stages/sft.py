"""stage=sft: supervised fine-tuning on the best response (the paper's Preferred-FT)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
from transformers import PreTrainedModel

from dpo_cli.config import RunConfig, SftConfig
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.model.forward import loss_and_logprobs
from dpo_cli.records import Batch, EncodedExample, LossOutput
from dpo_cli.session.balance import balanced
from dpo_cli.session.models import Loaded, identity_of, load_policy_and_data, provenance_of
from dpo_cli.session.preview import (
    Preview,
    Row,
    data_rows,
    device_row,
    step_rows,
    trained_model_rows,
)
from dpo_cli.session.rows import (
    batches_of,
    begin_training,
    check_lengths,
    distinct_responses,
    keep_responses,
    mean_figures,
    step_plan,
)
from dpo_cli.session.sampling import sample_writer
from dpo_cli.session.session import Session
from dpo_cli.session.trained import trained_files
from dpo_cli.session.workload import Workload, training_workload
from dpo_cli.train.loop import fit
from dpo_cli.train.task import TrainTask


def run(session: Session) -> dict[str, Any]:
    """Train on the first response of each row; losses are in nats."""
    stage = cast(SftConfig, session.config.stage)
    loaded = load_policy_and_data(session)
    check_lengths([*loaded.splits.train, *loaded.splits.eval], 1, "sft")
    train = targets_of(loaded.splits.train, stage.train_on_prompt)
    held_out = targets_of(loaded.splits.eval, stage.train_on_prompt)
    plan = step_plan(session, len(train))
    begin_training(session, loaded.model, plan.steps)
    task = TrainTask(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        steps=plan.steps,
        batches=batches_of(session, train, plan),
        compute_loss=balanced(
            session.config, loaded.model, lambda row: sft_loss(loaded.model, row, stage.reduction)
        ),
        evaluate=lambda: evaluate(session, loaded, held_out, stage.reduction),
        budget=session.budget,
        on_eval=sample_writer(session, loaded),
        provenance=provenance_of(session, loaded),
        files=trained_files(session.config, loaded.splits),
        identity=identity_of(loaded),
    )
    fit(task, session)
    return {"samples": distinct_responses(train), "gradient_steps": plan.steps}


def plan(preview: Preview) -> Iterator[Row]:
    stage = cast(SftConfig, preview.config.stage)
    yield "stage", "sft"
    yield from trained_model_rows(preview)
    yield from data_rows(preview)
    yield from step_rows(preview.config, targets_of(preview.splits.train, stage.train_on_prompt))
    yield device_row(preview)


def workload(config: RunConfig, splits: EncodedSplits) -> Workload:
    stage = cast(SftConfig, config.stage)
    return training_workload(config, targets_of(splits.train, stage.train_on_prompt))


def targets_of(examples: list[EncodedExample], train_on_prompt: bool) -> list[EncodedExample]:
    """The first response of each example. train_on_prompt: all but the prompt's first token also
    become targets."""
    single = keep_responses(examples, 1)
    if not train_on_prompt:
        return single
    return [
        replace(
            e,
            prompt_ids=e.prompt_ids[:1],
            response_ids=(np.concatenate([e.prompt_ids[1:], e.response_ids[0]]),),
        )
        for e in single
    ]


def sft_loss(model: PreTrainedModel, batch: Batch, reduction: str) -> LossOutput:
    """Negative log-likelihood; `mean` weights by tokens, `sum` by examples."""
    loss, logprobs = loss_and_logprobs(model, batch, lambda values, _: -values.sum())
    tokens, examples = float(len(logprobs)), float(len(batch.example_ids))
    return LossOutput(
        loss_sum=loss,
        weight=tokens if reduction == "mean" else examples,
        metrics={"nll_per_token": (-logprobs.sum(), tokens)},
    )


def evaluate(
    session: Session, loaded: Loaded, examples: list[EncodedExample], reduction: str
) -> dict[str, float]:
    """Loss and perplexity of the held-out rows; empty without rows."""
    values = mean_figures(session, examples, lambda row: sft_loss(loaded.model, row, reduction))
    if not values:
        return {}
    return {**values, "perplexity": math.exp(min(values["nll_per_token"], 50.0))}
