"""Metrics of one policy in an evaluation: reward, KL to the reference, preference accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import DataConfig, JsonlDataConfig
from dpo_cli.config.datasets import WRITING
from dpo_cli.data.sources import read_rows
from dpo_cli.errors import NonFiniteError
from dpo_cli.logprobs import sum_by_sequence, target_logprobs, token_kl
from dpo_cli.losses import preferences
from dpo_cli.model.forward import head_of, hidden_states, sequence_logprobs
from dpo_cli.model.sampling.generate import Completion
from dpo_cli.records import Batch, EncodedExample, Prompt
from dpo_cli.rewards.scorers import Completed, Scorer
from dpo_cli.session.lengths import finished_share
from dpo_cli.session.rows import over_rows
from dpo_cli.session.sampling import completion_text
from dpo_cli.session.session import Session
from dpo_cli.statistics import (
    clustered_mean,
    distinct_ngrams,
    mean_and_error,
    share_interval,
)

Tick = Callable[[int], None]


def texts_of(
    tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sequence[Completion]]
) -> list[list[str]]:
    return [[completion_text(tokenizer, c.ids) for c in row] for row in samples]


def scored(
    score: Scorer,
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    samples: Sequence[Sequence[Completion]],
) -> np.ndarray:
    """(prompts, completions) rewards of the texts, all scored in one call."""
    rewards = score([
        Completed(prompt, text, completion.finished)
        for prompt, row, completions in zip(prompts, texts, samples, strict=True)
        for text, completion in zip(row, completions, strict=True)
    ])  # fmt: skip
    return np.array(rewards, dtype=float).reshape(len(prompts), -1)


def reward_figures(rewards: np.ndarray | None) -> dict[str, float]:
    """Mean reward and its standard error over prompts (samples of a prompt are not independent)."""
    if rewards is None:
        return {}
    reward, error = mean_and_error(rewards.mean(1).tolist())
    return {"reward": reward, "reward_se": error}


def text_figures(
    texts: Sequence[Sequence[str]], samples: Sequence[Sequence[Completion]]
) -> dict[str, float]:
    flat = [c for row in samples for c in row]
    return {
        "tokens": sum(len(c.ids) for c in flat) / len(flat),
        **finished_share([c.finished for c in flat], len(samples)),
        "distinct_2": distinct_ngrams([text for row in texts for text in row], 2),
    }


@torch.no_grad()
def divergences(
    session: Session,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: Sequence[EncodedExample],
    samples: Sequence[Sequence[Completion]],
    tick: Tick,
) -> tuple[np.ndarray, np.ndarray]:
    """Sequence KL(policy || reference) in nats per prompt, (P,), by two estimators, from samples
    drawn at temperature 1.

    First: per-token KL over the vocabulary, summed along each sampled sequence (the paper's).
    Second: log pi - log pi_ref of the sampled tokens, with the same mean and a larger error.
    """
    examples = [
        EncodedExample(e.prompt_ids, tuple(c.ids for c in row), e.row)
        for e, row in zip(prompts, samples, strict=True)
    ]
    exact, sampled = np.zeros(len(examples)), np.zeros(len(examples))

    def both(row: Batch) -> tuple[list[float], list[float]]:
        hidden = hidden_states(policy, row)[row.source_index]
        other = hidden_states(reference, row)[row.source_index]
        heads = head_of(policy), head_of(reference)
        kl = _comparable(token_kl(hidden, heads[0], other, heads[1]))
        ratio = target_logprobs(hidden, heads[0], row.targets) - target_logprobs(
            other, heads[1], row.targets
        )
        return prompt_means(kl, row), prompt_means(_comparable(ratio), row)

    def measure() -> None:
        for row, means in over_rows(session, examples, both, tick=tick):
            indices = row.example_ids.numpy()
            exact[indices], sampled[indices] = means

    session.within_memory(measure)
    return exact, sampled


def _comparable(values: torch.Tensor) -> torch.Tensor:
    """The values; NonFiniteError if any is NaN, which would count as a wrong ranking."""
    if values.isnan().any():
        raise NonFiniteError("a log-probability is NaN: the model overflows or is damaged")
    return values


def prompt_means(values: torch.Tensor, row: Batch) -> list[float]:
    """(N,) token values -> per prompt, the mean over its samples of the sums over tokens."""
    sums = sum_by_sequence(values, row.sequence_index, len(row.sequence_lengths))
    means: list[float] = sums.view(-1, row.branches).mean(1).tolist()
    return means


def divergence_figures(exact: np.ndarray, sampled: np.ndarray) -> dict[str, float]:
    """`kl` and `kl_sampled` with their standard errors over prompts."""
    figures: dict[str, float] = {}
    for name, values in (("kl", exact), ("kl_sampled", sampled)):
        figures[name], figures[f"{name}_se"] = mean_and_error(values.tolist())
    return figures


@torch.no_grad()
def preference_accuracy(
    session: Session,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    rows: Sequence[EncodedExample],
) -> dict[str, float]:
    """Fraction of pairs with the chosen response ranked first (ties count one half), its standard
    error, and Wilson's 95% interval, `_low` and `_high`, both over prompts.

    `accuracy`: by the implicit reward log pi - log pi_ref; `likelihood_accuracy`: by log pi.
    """
    shares: dict[str, list[float]] = {"likelihood_accuracy": [], "accuracy": []}
    with session.progress.phase("preference accuracy", len(rows)) as tick:

        def both(row: Batch) -> tuple[list[float], list[float]]:
            logprobs = _comparable(sequence_logprobs(policy, row)).view(-1, row.branches)
            sizes = logprobs.abs()
            if reference is None:
                return ranked_right(logprobs, sizes), []
            other = _comparable(sequence_logprobs(reference, row)).view(-1, row.branches)
            implied = ranked_right(logprobs - other, sizes + other.abs())
            return ranked_right(logprobs, sizes), implied

        results = session.within_memory(
            lambda: [
                (row.example_ids.tolist(), result)
                for row, result in over_rows(session, rows, both, tick=tick)
            ]
        )
    groups: list[bytes] = []
    for places, (likelihood, implied) in results:
        groups += [rows[place].prompt_ids.tobytes() for place in places]
        shares["likelihood_accuracy"] += likelihood
        shares["accuracy"] += implied
    figures: dict[str, float] = {"pairs": len(rows)}
    for name, right in shares.items():
        if right:
            mean, error = clustered_mean(right, groups)
            share = share_interval(mean, len(set(groups)))
            figures |= {
                name: mean, f"{name}_se": error, f"{name}_low": share.low,
                f"{name}_high": share.high,
            }  # fmt: skip
    return figures


def pairs_config(path: str, of_run: DataConfig) -> JsonlDataConfig:
    """Data settings for a file of pairs: formatted and truncated like the run's rows, with
    `finished`, as written by stage=label, if the first row has it."""
    same = {name: getattr(of_run, name) for name in WRITING}
    data = JsonlDataConfig(path=path, eval_rows=0, **same)
    first: dict[str, Any] = next(iter(read_rows(data, "train").rows), {})
    known = isinstance(first.get("finished"), list)
    return replace(data, finished_field="finished" if known else None)


def ranked_right(values: torch.Tensor, sizes: torch.Tensor) -> list[float]:
    """(E, K) -> per example 1 if the first value is larger than the last, 1/2 if they are equal
    within rounding. sizes: (E, K) magnitude of the terms of each value, for the rounding."""
    margins, ends = values[:, 0] - values[:, -1], sizes[:, 0] + sizes[:, -1]
    correct: list[float] = preferences(margins, ends).tolist()
    return correct
