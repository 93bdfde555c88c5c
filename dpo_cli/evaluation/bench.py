"""Set up an evaluation: the prompts, pairs, scorer and reference shared by all policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import EvaluateConfig, NoRewardFn
from dpo_cli.config.run_data import data_line
from dpo_cli.data.dataset import EncodedSplits, load_encoded
from dpo_cli.errors import ConfigError
from dpo_cli.evaluation.measure import pairs_config
from dpo_cli.evaluation.policies import PolicyPoint, reference_of
from dpo_cli.model.load import configured_context, load_tokenizer
from dpo_cli.records import EncodedExample, Prompt
from dpo_cli.rewards.scorers import Scorer
from dpo_cli.rewards.scoring import load_scorer
from dpo_cli.session.lengths import new_tokens, with_new_tokens
from dpo_cli.session.models import load_named
from dpo_cli.session.prompts import distinct_prompts
from dpo_cli.session.rows import check_lengths
from dpo_cli.session.session import Session, load_data
from dpo_cli.session.trained import check_held_out, known_models, shared_rows

TRAINING = "training prompts"  # marks figures that are not on held-out prompts


@dataclass(frozen=True)
class Bench:
    """What the policies of an evaluation share.

    reference: None if the KL is not measured; reference_path: its folder or hub id. examples,
    prompts: the same as token ids and as in their source. score: None without a reward. stage: with
    max_new_tokens set. pairs: held-out rows with at least two responses; training: whether the
    prompts are training prompts, as far as known. models: label -> keys of its training prompts.
    """

    tokenizer: PreTrainedTokenizerFast
    reference: PreTrainedModel | None
    reference_path: str | None
    examples: list[EncodedExample]
    prompts: list[Prompt]
    score: Scorer | None
    stage: EvaluateConfig
    pairs: list[EncodedExample] = field(default_factory=list)
    training: bool = False
    models: dict[str, np.ndarray] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Facts on the prompts, for each policy's figures."""
        facts: dict[str, Any] = {"prompts": TRAINING} if self.training else {}
        return facts | {"max_new_tokens": new_tokens(self.stage)}


def set_up(session: Session, stage: EvaluateConfig, points: Sequence[PolicyPoint]) -> Bench:
    """Tokenizer, prompts, scorer and reference, loaded once for all policies.

    Raises DataError if a model was trained on held-out rows.
    """
    first = points[0].source
    tokenizer = load_tokenizer(first)
    path = choose_reference(session, stage, points)
    context = configured_context(first, tokenizer)
    if line := data_line(session.config):
        session.note(line)
    splits = load_data(session, context, tokenizer)
    models = known_models(session.config, {p.label: p.source.path for p in points})
    chosen = distinct_prompts(splits.eval or splits.train)[: stage.prompts]
    training = check_prompts(session, models, chosen, bool(splits.eval), len(points))
    pairs = pairs_of(session, stage, splits, tokenizer, context)
    if line := check_held_out(session.config, models, pairs, "held-out pairs"):
        session.note(line)
    reference = None
    if path is not None:
        reference = load_named(session, path, tokenizer)
        reference.to(session.runtime.device).eval()  # type: ignore[arg-type]
    prompts = [e.prompt for e in chosen]
    score = None if isinstance(session.config.reward_fn, NoRewardFn) else load_scorer(session)
    stage = with_new_tokens(stage, [*splits.train, *splits.eval], session.note)
    return Bench(
        tokenizer, reference, path, chosen, prompts, score, stage, pairs, training, models
    )  # fmt: skip


def choose_reference(
    session: Session, stage: EvaluateConfig, points: Sequence[PolicyPoint]
) -> str | None:
    path = reference_of(stage, points)
    if path is None:
        session.note("no stage.reference: the KL is not measured")
        if stage.reference_samples or stage.optimum:
            raise ConfigError(
                "stage.reference=null: the optimum needs a reference; set its folder or hub id "
                "(these policies do not name the one they were trained against)"
            )
    elif stage.temperature != 1.0:
        session.note(
            f"stage.temperature={stage.temperature:g}: the KL is not measured, as it is defined "
            "at temperature 1.0"
        )
    return path


def check_prompts(
    session: Session, models: dict[str, np.ndarray], chosen: Sequence[EncodedExample],
    held_out: bool, policies: int,
) -> bool:  # fmt: skip
    """Whether the prompts are training prompts, with a note. Without held-out rows they are assumed
    to be, unless the training prompts of every policy are known and include none of them."""
    if held_out:
        if line := check_held_out(session.config, models, chosen, "held-out prompts"):
            session.note(line)
        return False
    without_held_out = "no rows are held out (data.eval_rows)"
    counts = [int(shared_rows(chosen, keys).sum()) for keys in models.values()]
    if len(models) >= policies and not any(counts):
        session.note(f"{without_held_out}, and no policy was trained on any of these prompts")
        return False
    session.note(f"{without_held_out}: these are {TRAINING}")
    return True


def pairs_of(
    session: Session, stage: EvaluateConfig, splits: EncodedSplits,
    tokenizer: PreTrainedTokenizerFast, context: int,
) -> list[EncodedExample]:  # fmt: skip
    """Rows for preference accuracy: `stage.pairs`, otherwise the run's held-out pairs."""
    if stage.pairs is None:
        paired = all(len(e.response_ids) > 1 for e in splits.eval)
        return splits.eval if paired else []
    config = session.config
    encoded = load_encoded(
        pairs_config(stage.pairs, config.data), tokenizer, context, config.seed,
        Path(config.cache_dir),
    )  # fmt: skip
    for line in encoded.drops.summary_lines():
        session.note(f"stage.pairs: {line}")
    check_lengths(encoded.train, 2, "evaluate")
    return encoded.train
