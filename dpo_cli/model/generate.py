"""Sampling: each prompt's prefix is run once for its N samples; finished rows drop out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dpo_cli.errors import ConfigError, NonFiniteError
from dpo_cli.model.attention import attention_as


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy. seed: each prompt batch draws from its own stream."""

    completions: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 48
    seed: int = 0
    batch_size: int = 64  # sequences decoded together


@dataclass(frozen=True)
class Completion:
    """ids: sampled tokens, with the EOS if it came. logprobs: (len(ids),) of the sampling
    distribution. finished: ended by EOS, not by max_new_tokens."""

    ids: np.ndarray
    logprobs: np.ndarray
    finished: bool


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    options: SamplingOptions,
    eos_id: int,
    pad_id: int,
    tick: Callable[[int], None] = lambda prompts: None,
) -> list[list[Completion]]:
    """`options.completions` samples for each prompt, in the order of the prompts."""
    results: list[list[Completion]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, options.batch_size // options.completions)
    was_training = model.training
    model.eval()
    with attention_as(model, cached_attention(model)):
        for first in range(0, len(order), per_batch):
            chosen = order[first : first + per_batch]
            generator = torch.Generator(model.device).manual_seed(options.seed * 1_000_003 + first)
            rows = _decode(model, [prompts[i] for i in chosen], options, eos_id, pad_id, generator)
            for place, i in enumerate(chosen):
                n = options.completions
                results[i] = rows[place * n : (place + 1) * n]
            tick(len(chosen))
    model.train(was_training)
    return results


def cached_attention(model: PreTrainedModel) -> str:
    """What can decode with a cache: SDPA knows neither soft-capping nor attention sinks."""
    softcapped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if softcapped or not model._supports_sdpa else "sdpa"


def room_for(model: PreTrainedModel, prompts: Sequence[np.ndarray], wanted: int) -> int:
    """New tokens that fit behind the longest of these prompts, at most `wanted`."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 2**20)
    longest = max(len(p) for p in prompts)
    if longest >= context:
        raise ConfigError(
            f"a prompt of {longest} tokens fills the model's context of {context}: lower "
            "data.max_length and data.max_prompt_length"
        )
    return min(wanted, context - longest)


def _left_pad(
    prompts: Sequence[np.ndarray], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    longest = max(len(p) for p in prompts)
    ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


class _Rows:
    """Tokens sampled so far, for all rows of a batch, finished or not."""

    def __init__(self, rows: int, steps: int, pad_id: int, device: torch.device) -> None:
        self.tokens = torch.full((rows, steps), pad_id, device=device)
        self.logprobs = torch.zeros(rows, steps, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def add(self, step: int, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        self.tokens[rows, step], self.logprobs[rows, step] = tokens, logprobs
        self.lengths[rows] += 1


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    options: SamplingOptions,
    eos_id: int,
    pad_id: int,
    generator: torch.Generator,
) -> list[Completion]:
    """Decode one batch of prompts; returns prompts x completions rows, prompt-major."""
    steps = room_for(model, prompts, options.max_new_tokens)
    ids, mask = _left_pad(prompts, pad_id, model.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions,
        past_key_values=cache, use_cache=True, logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip
    if not torch.isfinite(logits).all():
        raise NonFiniteError("sampling: the model's logits are not finite")
    n = options.completions
    cache.batch_repeat_interleave(n)
    mask, position, logits = (x.repeat_interleave(n, 0) for x in (mask, positions[:, -1], logits))
    rows = _Rows(len(mask), steps, pad_id, model.device)
    alive = torch.arange(len(mask), device=model.device)  # original row of each live row
    for step in range(steps):
        chosen, logp = draw(logits.float(), options.temperature, options.top_p, generator)
        rows.add(step, alive, chosen, logp)
        going = (chosen != eos_id).nonzero().squeeze(1)
        if len(going) == 0 or step + 1 == steps:
            break
        if len(going) < len(alive):  # finished rows leave the batch and the cache
            alive, mask, position, chosen = (x[going] for x in (alive, mask, position, chosen))
            cache.batch_select_indices(going)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position + 1
        logits = model(
            input_ids=chosen[:, None], attention_mask=mask, position_ids=position[:, None],
            past_key_values=cache, use_cache=True,
        ).logits[:, -1]  # fmt: skip
    return _collect(rows.tokens.cpu(), rows.logprobs.cpu(), rows.lengths.tolist(), eos_id)


def _collect(tokens: Tensor, logprobs: Tensor, lengths: list[int], eos_id: int) -> list[Completion]:
    rows = []
    for ids, logp, length in zip(tokens.numpy(), logprobs.numpy(), lengths, strict=True):
        kept = ids[:length].astype(np.int32)
        rows.append(Completion(kept, logp[:length].copy(), bool(kept[-1] == eos_id)))
    return rows


def draw(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(B, V) logits -> (B,) tokens and (B,) their log-probabilities as sampled."""
    if temperature == 0.0:
        logp = logits.log_softmax(-1)
        chosen = logits.argmax(-1)
        return chosen, logp.gather(1, chosen[:, None]).squeeze(1)
    logp = (logits / temperature).log_softmax(-1)
    if top_p < 1.0:
        ordered, index = logp.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass ahead of each token
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))
        logp = torch.empty_like(logp).scatter_(1, index, ordered).log_softmax(-1)
    chosen = torch.multinomial(logp.exp(), 1, generator=generator)
    return chosen.squeeze(1), logp.gather(1, chosen).squeeze(1)
