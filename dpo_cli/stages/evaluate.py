"""stage=evaluate: ground-truth reward, sequence KL to the reference, preference accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import EvaluateConfig, JsonlDataConfig
from dpo_cli.data.dataset import load_encoded
from dpo_cli.evaluation.scorers import SCORERS
from dpo_cli.evaluation.statistics import distinct_ngrams, mean_and_error
from dpo_cli.logprobs import sum_by_sequence, target_logprobs, token_kl
from dpo_cli.model.forward import head_of, hidden_states, sequence_logprobs
from dpo_cli.model.generate import Completion, sample
from dpo_cli.model.load import context_length, load_model, load_tokenizer, model_folder
from dpo_cli.packing import pack_sorted
from dpo_cli.records import Batch, EncodedExample
from dpo_cli.stages.sample import distinct_prompts, write_rows
from dpo_cli.stages.session import Session, load_data, sampling_options, text_of


@dataclass
class Models:
    policy: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def run(session: Session) -> dict[str, Any]:
    """Sample from the policy on held-out prompts and measure against the reference."""
    stage = cast(EvaluateConfig, session.config.stage)
    models = load_models(session, stage)
    splits = load_data(session, context_length(models.policy), models.tokenizer)
    prompts = distinct_prompts(splits.eval or splits.train)[: stage.prompts]
    samples = draw(session, models, prompts, stage)
    texts = [text_of(models.tokenizer, p) for p in prompts]
    completions = [[text_of(models.tokenizer, c.ids) for c in row] for row in samples]
    rewards = [
        SCORERS[stage.scorer]([text + c for c in row])
        for text, row in zip(texts, completions, strict=True)
    ]
    write_rows(session.run_dir / "samples.jsonl", [
        {"prompt": text, "completion": c, "reward": r}
        for text, row, scores in zip(texts, completions, rewards, strict=True)
        for c, r in zip(row, scores, strict=True)
    ])  # fmt: skip
    figures = reward_figures(completions, rewards, samples)
    figures |= divergence(session, models, prompts, samples)
    if stage.pairs is not None:
        figures |= preference_accuracy(session, models, stage.pairs)
    return figures


def load_models(session: Session, stage: EvaluateConfig) -> Models:
    """Policy and reference; the same object where they are the same weights."""
    source = session.config.model
    tokenizer = load_tokenizer(source)
    policy = load_model(source, tokenizer, session.config.seed)
    policy.to(session.runtime.device).eval()  # type: ignore[arg-type]
    if stage.reference is None:
        return Models(policy, policy, tokenizer)
    folder = model_folder(stage.reference) if Path(stage.reference).is_dir() else None
    other = replace(
        source, architecture=None, revision=None,
        path=str(folder) if folder else None, hub_id=None if folder else stage.reference,
    )  # fmt: skip
    reference = load_model(other, tokenizer, session.config.seed)
    reference.to(session.runtime.device).eval()  # type: ignore[arg-type]
    return Models(policy, reference, tokenizer)


def draw(
    session: Session, models: Models, prompts: Sequence[np.ndarray], stage: EvaluateConfig
) -> list[list[Completion]]:
    options = sampling_options(
        session, stage.completions, stage.temperature, 1.0, stage.max_new_tokens, stage.batch_size
    )
    longest = max(len(p) for p in prompts)
    room = context_length(models.policy) - longest
    options = replace(options, max_new_tokens=min(options.max_new_tokens, room))
    eos, pad = models.tokenizer.eos_token_id, models.tokenizer.pad_token_id
    assert eos is not None and pad is not None
    with session.runtime.autocast(), session.progress.phase("sampling", len(prompts)) as tick:
        return sample(models.policy, prompts, options, eos, pad, tick)


def reward_figures(
    completions: list[list[str]], rewards: list[list[float]], samples: list[list[Completion]]
) -> dict[str, float]:
    """Reward with its error over prompts (samples of one prompt are not independent)."""
    per_prompt = [sum(row) / len(row) for row in rewards]
    reward, error = mean_and_error(per_prompt)
    flat = [c for row in samples for c in row]
    texts = [c for row in completions for c in row]
    return {
        "reward": reward,
        "reward_se": error,
        "tokens": sum(len(c.ids) for c in flat) / len(flat),
        "finished": sum(c.finished for c in flat) / len(flat),
        "distinct_2": distinct_ngrams(texts, 2),
    }


@torch.no_grad()
def divergence(
    session: Session,
    models: Models,
    prompts: Sequence[np.ndarray],
    samples: list[list[Completion]],
) -> dict[str, float]:
    """Sequence KL(policy || reference) in nats, at temperature 1.

    `kl`: per-token KL over the vocabulary, summed along each sampled sequence (the paper's).
    `kl_sampled`: log pi - log pi_ref of the sampled tokens, same mean, larger error.
    """
    examples = [
        EncodedExample(prompt, tuple(c.ids for c in row), i)
        for i, (prompt, row) in enumerate(zip(prompts, samples, strict=True))
    ]
    exact: list[float] = []
    sampled: list[float] = []
    with session.progress.phase("KL", len(examples)) as tick:
        for batch in pack_sorted(examples, session.token_budget):
            row = batch.to(session.runtime.device)
            with session.runtime.autocast():
                heads = head_of(models.policy), head_of(models.reference)
                policy = hidden_states(models.policy, row)[row.source_index]
                reference = hidden_states(models.reference, row)[row.source_index]
                kl = token_kl(policy, heads[0], reference, heads[1])
                ratio = target_logprobs(policy, heads[0], row.targets) - target_logprobs(
                    reference, heads[1], row.targets
                )
            exact += per_prompt_means(kl, row)
            sampled += per_prompt_means(ratio, row)
            tick(len(batch.example_ids))
    figures: dict[str, float] = {}
    figures["kl"], figures["kl_se"] = mean_and_error(exact)
    figures["kl_sampled"], figures["kl_sampled_se"] = mean_and_error(sampled)
    return figures


def per_prompt_means(values: torch.Tensor, row: Batch) -> list[float]:
    """(N,) token values -> for each prompt, the mean over its samples of their sums."""
    sums = sum_by_sequence(values, row.sequence_index, len(row.sequence_lengths))
    means: list[float] = sums.view(-1, row.branches).mean(1).tolist()
    return means


@torch.no_grad()
def preference_accuracy(session: Session, models: Models, pairs: str) -> dict[str, float]:
    """Share of held-out pairs whose chosen response ranks first (a tie counts one half).

    `accuracy`: by the implicit reward log pi - log pi_ref; `likelihood_accuracy`: by log pi.
    """
    config = session.config
    data = JsonlDataConfig(path=pairs, eval_rows=0)
    splits = load_encoded(
        data, models.tokenizer, context_length(models.policy), config.seed, Path(config.cache_dir)
    )
    policy_margins: list[float] = []
    margins: list[float] = []
    with session.progress.phase("preference accuracy", len(splits.train)) as tick:
        for batch in pack_sorted(splits.train, session.token_budget):
            row = batch.to(session.runtime.device)
            with session.runtime.autocast():
                policy = sequence_logprobs(models.policy, row).view(-1, row.branches)
                reference = sequence_logprobs(models.reference, row).view(-1, row.branches)
            rho = policy - reference
            margins += (rho[:, 0] - rho[:, -1]).tolist()
            policy_margins += (policy[:, 0] - policy[:, -1]).tolist()
            tick(len(batch.example_ids))
    accuracy, error = mean_and_error([(np.sign(m) + 1.0) / 2.0 for m in margins])
    return {
        "accuracy": accuracy,
        "accuracy_se": error,
        "likelihood_accuracy": mean_and_error([(np.sign(m) + 1) / 2 for m in policy_margins])[0],
        "pairs": len(margins),
    }
