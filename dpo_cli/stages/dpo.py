"""stage=dpo: preference losses against a frozen reference (arXiv 2305.18290)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from dpo_cli.config import DpoConfig, PreferenceConfig, RunConfig
from dpo_cli.config.datasets import row_terms
from dpo_cli.config.stages.dpo import losses_of, reads_reference
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.errors import DataError
from dpo_cli.losses import LOSSES
from dpo_cli.losses.diagnostics import warning, with_correlation
from dpo_cli.records import EncodedExample
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
from dpo_cli.stages.preference import (
    ReferenceOf,
    RowTerms,
    dpo_loss,
    references,
    sums_of,
    without_reference,
)
from dpo_cli.train.loop import fit
from dpo_cli.train.task import TrainTask
from dpo_cli.user_code import user_function


def run(session: Session) -> dict[str, Any]:
    """Train on ranked responses; metrics as in the paper's reference code."""
    stage = cast(DpoConfig, session.config.stage)
    loaded = load_policy_and_data(session, policy_loading(session))
    train, held_out = loaded.splits.train, loaded.splits.eval
    check_branches([*train, *held_out], stage)
    splits = {"train": train, "eval": held_out}
    named, reference_of = compared_with(session, loaded, splits)
    names = list(row_terms(session.config.data))
    terms_of = {name: RowTerms.of(rows, names, session) for name, rows in splits.items()}
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
            lambda batch: dpo_loss(
                loaded.model, batch, reference_of["train"], stage, terms=terms_of["train"]
            ),
        ),
        evaluate=lambda: evaluate(
            session, loaded, held_out, reference_of.get("eval"), stage, terms_of["eval"]
        ),
        budget=session.budget,
        live_references=int(reads_reference(stage) and stage.reference_logprobs == "live"),
        on_eval=sample_writer(session, loaded),
        unit="pairs" if not LOSSES[stage.loss].lists else "lists",
        provenance=provenance_of(
            session,
            loaded,
            loss=stage.loss,
            beta=stage.beta,
            reference=named or session.config.model.path or session.config.model.hub_id,
        ),
        files=trained_files(session.config, loaded.splits),
        identity=identity_of(
            loaded, reference=getattr(reference_of["train"], "key", "live"), **own_loss(stage)
        ),
    )
    fit(task, session)
    return {"samples": distinct_responses(train), "gradient_steps": plan.steps}


def compared_with(
    session: Session, loaded: Loaded, splits: Mapping[str, Sequence[EncodedExample]]
) -> tuple[str | None, dict[str, ReferenceOf]]:
    """The reference's folder or hub id, None for the policy as loaded; and its log-probabilities
    for each split, or none for losses without a reference."""
    stage = cast(DpoConfig, session.config.stage)
    if not reads_reference(stage):
        return None, {name: without_reference for name, rows in splits.items() if rows}
    named = reference.reference_path(session.config, loaded)
    live = stage.reference_logprobs == "live"
    return named, references(session, loaded, named, splits, live, sums_of(stage))


def plan(preview: Preview) -> Iterator[Row]:
    stage = cast(DpoConfig, preview.config.stage)
    yield "stage", f"dpo, loss {loss_line(stage)}, beta {stage.beta:g}"
    yield from trained_model_rows(preview)
    yield reference_row(stage.reference) if reads_reference(stage) else (
        "reference", f"none: stage.loss={stage.loss} compares with none"
    )  # fmt: skip
    yield from data_rows(preview)
    yield from step_rows(preview.config, preview.splits.train)
    yield device_row(preview)


def own_loss(stage: PreferenceConfig) -> dict[str, str]:
    """The sha256 of the user's own loss, for the run's identity."""
    if stage.loss_file is None:
        return {}
    return {"loss_file": user_function("stage.loss_file", stage.loss_file, "loss").digest}


def loss_line(stage: PreferenceConfig) -> str:
    """`sigmoid + 0.2 bco`."""
    return " + ".join(
        name if weight == 1.0 else f"{weight:g} {name}" for name, weight in losses_of(stage).items()
    )


def workload(config: RunConfig, splits: EncodedSplits) -> Workload:
    return training_workload(config, splits.train)


def check_branches(examples: Sequence[EncodedExample], stage: DpoConfig) -> None:
    """One common K >= 2 of responses: pairs, or ranked lists, all pairs of which are compared."""
    check_lengths(examples, 2, "dpo")
    counts = {len(e.response_ids) for e in examples}
    if len(counts) > 1:
        raise DataError(f"ranked lists must have equal lengths, found {sorted(counts)}")


def evaluate(
    session: Session,
    loaded: Loaded,
    examples: Sequence[EncodedExample],
    reference_of: ReferenceOf | None,
    stage: DpoConfig,
    terms: RowTerms,
) -> dict[str, float]:
    """The training metrics on the held-out rows, and the length correlation; empty without rows."""
    if reference_of is None:
        return {}
    means = mean_figures(
        session,
        examples,
        lambda row: dpo_loss(loaded.model, row, reference_of, stage, True, terms=terms),
    )
    if line := warning(means):
        session.note(line)
    return with_interval(with_correlation(means), "rewards/accuracies", examples)
