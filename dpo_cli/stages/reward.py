"""stage=reward: a Bradley-Terry reward model on ranked responses (arXiv 2203.02155 section 3.5)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config import RewardConfig, RunConfig
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.errors import DataError
from dpo_cli.losses import reward_loss
from dpo_cli.model.reward import load_reward_model, rewards, without_padding
from dpo_cli.records import Batch, EncodedExample, LossOutput
from dpo_cli.rewards.normalization import normalize
from dpo_cli.session.balance import balanced
from dpo_cli.session.models import Loading, identity_of, load_policy_and_data, provenance_of
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
    over_rows,
    step_plan,
    with_interval,
)
from dpo_cli.session.session import Session
from dpo_cli.session.trained import trained_files
from dpo_cli.session.workload import Workload, training_workload
from dpo_cli.statistics import calibration_error, reliability
from dpo_cli.train.loop import fit
from dpo_cli.train.task import Totals, TrainTask


@dataclass
class Rows:
    """The examples of a split, their (rows,) margins with stage.margins, and the model's (rows, K)
    rewards at its latest evaluation."""

    examples: list[EncodedExample]
    margins: Tensor | None
    rewards: Tensor | None = None


def run(session: Session) -> dict[str, Any]:
    """Train on pairs or ranked lists; reported rewards do not have margins subtracted."""
    stage, device = cast(RewardConfig, session.config.stage), session.runtime.device
    loaded = load_policy_and_data(session, Loading(read=load_reward_model))
    branches = check_responses([*loaded.splits.train, *loaded.splits.eval], stage)
    train, held_out = (
        Rows(
            without_padding(rows, loaded.model), margins_of(rows, device) if stage.margins else None
        )
        for rows in (loaded.splits.train, loaded.splits.eval)
    )
    plan = step_plan(session, len(train.examples))
    begin_training(session, loaded.model, plan.steps)
    task = TrainTask(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        steps=plan.steps,
        batches=batches_of(session, train.examples, plan, keep_last=True),
        compute_loss=balanced(
            session.config,
            loaded.model,
            lambda batch: loss_output(rewards(loaded.model, batch), batch, train.margins, stage),
        ),
        evaluate=lambda: evaluate(session, loaded.model, held_out, stage),
        budget=session.budget,
        unit="pairs" if branches == 2 else "lists",
        provenance=provenance_of(
            session,
            loaded,
            base=session.config.model.path or session.config.model.hub_id,
        ),
        files=trained_files(session.config, loaded.splits),
        identity=identity_of(loaded, margins=digest(train.margins)),
    )
    fit(task, session)
    plot_held_out(session, loaded.model, held_out, stage)
    return normalize(session, loaded)


def plan(preview: Preview) -> Iterator[Row]:
    yield "stage", "reward"
    yield from trained_model_rows(preview)
    yield from data_rows(preview)
    yield from step_rows(preview.config, preview.splits.train)
    yield device_row(preview)


def workload(config: RunConfig, splits: EncodedSplits) -> Workload:
    return training_workload(config, splits.train)


def check_responses(examples: Sequence[EncodedExample], stage: RewardConfig) -> int:
    """The number of responses K >= 2 of all examples. DataError if it differs between them, or if
    an option needs pairs."""
    check_lengths(examples, 2, "reward")
    counts = {len(e.response_ids) for e in examples}
    if len(counts) > 1:
        raise DataError(f"ranked lists must have equal lengths, found {sorted(counts)}")
    branches = counts.pop()
    for key in ("label_smoothing", "margins"):
        if branches > 2 and getattr(stage, key):
            raise DataError(
                f"stage.{key}={getattr(stage, key)}: needs pairs, but the rows have {branches} "
                "responses: remove it"
            )
    return branches


def margins_of(examples: Sequence[EncodedExample], device: torch.device) -> Tensor:
    """(rows,) float32 score of the chosen minus the rejected response. Raises DataError."""
    for example in examples:
        if example.scores is None:
            raise DataError(
                f"stage.margins=true: row {example.row} has no scores: use data with scores "
                "(data=jsonl: set data.scores_field), or stage.margins=false"
            )
    scores = np.array([e.scores for e in examples], dtype=np.float64).reshape(-1, 2)
    margins = scores[:, 0] - scores[:, 1]
    for i in np.flatnonzero(margins < 0):
        raise DataError(
            f"stage.margins=true: row {examples[int(i)].row} has a higher score for its rejected "
            "response: fix the row or use stage.margins=false"
        )
    return torch.tensor(margins, dtype=torch.float32, device=device)


def digest(margins: Tensor | None) -> str:
    """sha256 of the margins, as the digest of the rows covers only token ids."""
    return (
        "none" if margins is None else hashlib.sha256(margins.cpu().numpy().tobytes()).hexdigest()
    )


def loss_output(
    values: Tensor, batch: Batch, margins: Tensor | None, stage: RewardConfig
) -> LossOutput:
    """(S,) rewards of a row's branches -> the summed loss of its examples, and their metrics.

    Chosen is the first response, rejected the last. A tie counts as half correct.
    """
    ranked = values.view(-1, batch.branches)
    losses = reward_loss(
        ranked,
        None if margins is None else margins[batch.example_ids],
        stage.label_smoothing,
        stage.center_coefficient,
    )
    chosen, rejected = ranked.detach()[:, 0], ranked.detach()[:, -1]
    figures = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": ((chosen - rejected).sign() + 1.0) / 2.0,
    }
    weight = float(len(losses))
    return LossOutput(losses.sum(), weight, {k: (v.sum(), weight) for k, v in figures.items()})


def evaluate(
    session: Session, model: PreTrainedModel, rows: Rows, stage: RewardConfig
) -> dict[str, float]:
    """The training metrics and the calibration error on the held-out rows; empty without rows."""
    if not rows.examples:
        return {}

    def measured(row: Batch) -> tuple[LossOutput, Tensor]:
        values = rewards(model, row)
        out = loss_output(values, row, rows.margins, stage).on_cpu()
        return out, values.view(-1, row.branches).cpu()

    totals = Totals()
    rows.rewards = torch.zeros(len(rows.examples), len(rows.examples[0].response_ids))
    for row, (out, values) in over_rows(session, rows.examples, measured, keep_last=True):
        totals.add(out)
        rows.rewards[row.example_ids] = values
    means = with_interval(totals.means(), "rewards/accuracies", rows.examples)
    return {**means, "ece": calibration_error(reliability(pair_margins(rows.rewards)))}


def pair_margins(values: Tensor) -> list[float]:
    """(rows, K) rewards -> r_w - r_l of each row."""
    margins: list[float] = (values[:, 0] - values[:, -1]).tolist()
    return margins


def plot_held_out(
    session: Session, model: PreTrainedModel, rows: Rows, stage: RewardConfig
) -> None:
    """Plot the held-out rewards of the final model in `plots/`."""
    if not (rows.examples and session.config.logger.plots):
        return
    if rows.rewards is None:  # resumed after the last step
        model.eval()
        with torch.no_grad(), session.runtime.autocast():
            evaluate(session, model, rows, stage)
    from dpo_cli.report.rewards import draw_rewards  # matplotlib is slow to import

    values = cast(Tensor, rows.rewards)
    bins = reliability(pair_margins(values))
    facts = [(b.confidence, b.accuracy, b.count) for b in bins]
    chosen, rejected = values[:, 0].tolist(), values[:, -1].tolist()
    draw_rewards(session.run_dir, chosen, rejected, facts, calibration_error(bins))
