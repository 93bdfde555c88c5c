"""Sampling: a prompt's samples share its keys and values; finished rows drop out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.errors import ConfigError, NonFiniteError
from dpo_cli.logprobs import promote
from dpo_cli.model.attention import attention_as
from dpo_cli.model.decoding import advance, shares_prompts, start
from dpo_cli.model.draw import draw

LOOK_EVERY = {"cpu": 1, "cuda": 4}  # steps; a look for finished rows makes the host wait


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
    share: tuple[int, int] = (0, 1),
) -> list[list[Completion]]:
    """`options.completions` samples for each prompt, in the order of the prompts.

    share: (rank, ranks); only each ranks-th batch is sampled then, the other prompts get none.
    Where a prompt leaves less than max_new_tokens of the context, its completions end there,
    whichever prompts are decoded beside it.
    """
    results: list[list[Completion]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, options.batch_size // options.completions)
    was_training = model.training
    model.eval()
    rooms = [room_for(model, prompts[i], options.max_new_tokens) for i in order]
    for first, last in islice(_batches(rooms, per_batch), share[0], None, share[1]):
        chosen = order[first:last]
        generator = torch.Generator(model.device).manual_seed(options.seed * 1_000_003 + first)
        batch, steps = [prompts[i] for i in chosen], rooms[first]
        rows = _decode(model, batch, options, steps, eos_id, pad_id, generator)
        for place, i in enumerate(chosen):
            n = options.completions
            results[i] = rows[place * n : (place + 1) * n]
        tick(len(chosen))
    model.train(was_training)
    return results


def _batches(rooms: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of at most `size` neighbours that have the same room."""
    first = 0
    while first < len(rooms):
        near = rooms[first : first + size]
        last = first + next((n for n, room in enumerate(near) if room != near[0]), len(near))
        yield first, last
        first = last


def room_for(model: PreTrainedModel, prompt: np.ndarray, wanted: int) -> int:
    """New tokens that fit behind a prompt, at most `wanted`."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 2**20)
    if len(prompt) >= context:
        raise ConfigError(
            f"a prompt of {len(prompt)} tokens fills the model's context of {context}: lower "
            "data.max_length and data.max_prompt_length"
        )
    return min(wanted, context - len(prompt))


class _Sampled:
    """Tokens sampled so far, for all rows of a batch; what follows an EOS counts for nothing."""

    def __init__(self, rows: int, steps: int, pad_id: int, like: Tensor) -> None:
        self.tokens = torch.full((rows, steps), pad_id, device=like.device)
        self.logprobs = torch.zeros(rows, steps, dtype=like.dtype, device=like.device)

    def add(self, step: int, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        self.tokens[rows, step], self.logprobs[rows, step] = tokens, logprobs

    def completions(self, eos_id: int) -> list[Completion]:
        tokens, logprobs = self.tokens.cpu().numpy(), self.logprobs.cpu().numpy()
        rows = []
        for ids, logp in zip(tokens, logprobs, strict=True):
            ends = np.flatnonzero(ids == eos_id)
            length = int(ends[0]) + 1 if len(ends) else len(ids)
            if not np.isfinite(logp[:length]).all():
                raise NonFiniteError("sampling: the model's logits are not finite")
            kept = ids[:length].astype(np.int32), logp[:length].copy()
            rows.append(Completion(*kept, finished=len(ends) > 0))
        return rows


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    options: SamplingOptions,
    steps: int,
    eos_id: int,
    pad_id: int,
    generator: torch.Generator,
) -> list[Completion]:
    """Decode one batch of prompts; returns prompts x completions rows, prompt-major."""
    rows, position, logits = start(
        model, prompts, options.completions, pad_id, shares_prompts(model)
    )
    sampled = _Sampled(len(position), steps, pad_id, promote(logits))
    alive = torch.arange(len(position), device=model.device)  # original row of each live row
    ended = torch.zeros_like(alive, dtype=torch.bool)
    with attention_as(model, rows.attention):
        for step in range(steps):
            chosen, logp = draw(logits, options.temperature, options.top_p, generator)
            sampled.add(step, alive, chosen, logp)
            ended |= chosen == eos_id
            if step + 1 == steps:
                break
            if (step + 1) % LOOK_EVERY[model.device.type] == 0:
                going = ~ended.cpu().numpy()
                if not going.any():
                    break
                if not going.all():
                    order = torch.from_numpy(rows.keep(going)).to(model.device)
                    alive, ended, position, chosen = (
                        x[order] for x in (alive, ended, position, chosen)
                    )
            position = position + 1
            logits = advance(model, rows, chosen, position)
    return sampled.completions(eos_id)
