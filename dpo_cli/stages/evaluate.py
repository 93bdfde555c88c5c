"""stage=evaluate: ground-truth reward, sequence KL to the reference, preference accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from dpo_cli.model.generate import Completion, SamplingOptions, sample
from dpo_cli.model.load import context_length, load_tokenizer
from dpo_cli.packing import pack_sorted
from dpo_cli.records import Batch, EncodedExample
from dpo_cli.stages.sample import as_text, distinct_prompts, source_prompts, write_rows
from dpo_cli.stages.session import (
    Session,
    base_provenance,
    check_lengths,
    load,
    load_data,
    load_named,
    text_of,
)


@dataclass
class Models:
    """reference: None where nothing says what the policy should be measured against."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerFast


def run(session: Session) -> dict[str, Any]:
    """Sample from the policy on held-out prompts and measure against the reference."""
    stage = cast(EvaluateConfig, session.config.stage)
    models = load_models(session, stage)
    splits = load_data(session, context_length(models.policy), models.tokenizer)
    split = "eval" if splits.eval else "train"
    if split == "train":
        session.note("no rows are held out (data.eval_rows): these are training prompts")
    chosen = distinct_prompts(splits.eval or splits.train)[: stage.prompts]
    samples = draw(session, models, [e.prompt_ids for e in chosen], stage)
    sources = source_prompts(session)[split]
    texts = [as_text(sources[e.row]) for e in chosen]
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
    if models.reference is not None and stage.temperature == 1.0:
        figures |= divergence(session, models.policy, models.reference, chosen, samples)
    if stage.pairs is not None:
        figures |= preference_accuracy(session, models, stage.pairs)
    return figures


def load_models(session: Session, stage: EvaluateConfig) -> Models:
    """Policy and reference; the reference is the one named, else the one it was trained against.

    The same object where both are the same folder.
    """
    source = session.config.model
    tokenizer = load_tokenizer(source)
    policy = load(session, source, tokenizer)
    policy.to(session.runtime.device).eval()  # type: ignore[arg-type]
    named = stage.reference or base_provenance(source).get("reference")
    if named is None:
        session.note("no stage.reference: the KL is not measured")
        return Models(policy, None, tokenizer)
    if source.path is not None and Path(named).resolve() == Path(source.path).resolve():
        return Models(policy, policy, tokenizer)
    reference = load_named(session, named, tokenizer)
    reference.to(session.runtime.device).eval()  # type: ignore[arg-type]
    return Models(policy, reference, tokenizer)


def draw(
    session: Session, models: Models, prompts: Sequence[np.ndarray], stage: EvaluateConfig
) -> list[list[Completion]]:
    options = SamplingOptions(
        completions=stage.completions,
        temperature=stage.temperature,
        max_new_tokens=stage.max_new_tokens,
        seed=session.config.seed,
        batch_size=stage.batch_size,
    )
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
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: Sequence[EncodedExample],
    samples: list[list[Completion]],
) -> dict[str, float]:
    """Sequence KL(policy || reference) in nats, of samples drawn at temperature 1.

    `kl`: per-token KL over the vocabulary, summed along each sampled sequence (the paper's).
    `kl_sampled`: log pi - log pi_ref of the sampled tokens, same mean, larger error.
    """
    examples = [
        EncodedExample(e.prompt_ids, tuple(c.ids for c in row), e.row)
        for e, row in zip(prompts, samples, strict=True)
    ]
    exact: list[float] = []
    sampled: list[float] = []
    with session.progress.phase("KL", len(examples)) as tick:
        for batch in pack_sorted(examples, session.token_budget):
            row = batch.to(session.runtime.device)
            with session.runtime.autocast():
                heads = head_of(policy), head_of(reference)
                hidden = hidden_states(policy, row)[row.source_index]
                other = hidden_states(reference, row)[row.source_index]
                kl = token_kl(hidden, heads[0], other, heads[1])
                ratio = target_logprobs(hidden, heads[0], row.targets) - target_logprobs(
                    other, heads[1], row.targets
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
    rows = load_encoded(
        data, models.tokenizer, context_length(models.policy), config.seed, Path(config.cache_dir)
    ).train
    check_lengths(rows, 2, "evaluate")
    margins: dict[str, list[float]] = {"likelihood_accuracy": [], "accuracy": []}
    with session.progress.phase("preference accuracy", len(rows)) as tick:
        for batch in pack_sorted(rows, session.token_budget):
            row = batch.to(session.runtime.device)
            with session.runtime.autocast():
                policy = sequence_logprobs(models.policy, row).view(-1, row.branches)
                margins["likelihood_accuracy"] += margin(policy)
                if models.reference is not None:
                    reference = sequence_logprobs(models.reference, row).view(-1, row.branches)
                    margins["accuracy"] += margin(policy - reference)
            tick(len(batch.example_ids))
    figures: dict[str, float] = {"pairs": len(rows)}
    for name, values in margins.items():
        if values:
            right = [(np.sign(m) + 1.0) / 2.0 for m in values]
            figures[name], figures[f"{name}_se"] = mean_and_error(right)
    return figures


def margin(values: torch.Tensor) -> list[float]:
    """(E, K) -> first minus last of each example."""
    found: list[float] = (values[:, 0] - values[:, -1]).tolist()
    return found
