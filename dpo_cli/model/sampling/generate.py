"""Sampling: a prompt's samples share its keys and values; finished rows are dropped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cli.device_memory import free_memory, ran_out
from dpo_cli.errors import ConfigError
from dpo_cli.logprobs import promoted
from dpo_cli.model import rope
from dpo_cli.model.attention.interface import attention_as
from dpo_cli.model.sampling.decoding import start
from dpo_cli.model.sampling.draw import draw
from dpo_cli.model.sampling.sampled import (
    Completion,
    DecodingLimit,
    Ends,
    Sampled,
    SamplingOptions,
    ended_by,
)
from dpo_cli.model.sampling.stepper import Stepper, can_step, has_kernel
from dpo_cli.model.sampling.trial import Note, decoding_mode
from dpo_cli.model.sampling.unpadded import SAME_LENGTH_MODES

SYNC_EVERY = {"cpu": 1, "cuda": 4}  # steps between checks for finished rows, which block the host
STATIC = {"cpu": False, "cuda": True}  # steps of static shape, which CUDA graphs can capture
MAX_ROWS = 512  # decoded together on a GPU if no batch size is configured
KV_CACHE_SHARE = 0.3  # of a GPU's memory, for the keys and values of those rows
LIVE_LOGITS = 6  # float32 copies of (R, V) while a token is drawn

Decode = Callable[[Sequence[np.ndarray], int, int], list[Completion]]  # prompts, steps, seed


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    options: SamplingOptions,
    ends: Ends,
    pad_id: int,
    tick: Callable[[int], None] = lambda prompts: None,
    share: tuple[int, int] = (0, 1),
    note: Note = warnings.warn,
    limit: DecodingLimit | None = None,
) -> list[list[Completion]]:
    """`options.completions` samples for each prompt, in the order of the prompts.

    ends: the tokens that end a completion. share: (rank, ranks); this rank samples every ranks-th
    batch, and prompts of other batches get no completions.
    A completion ends at the model's context length, independent of the other prompts of its batch.
    If memory runs out, smaller batches are decoded and `limit` is lowered. note: receives a line
    about that, and about a model that can only be decoded in a slower mode.

    Raises ConfigError if memory runs out with a single prompt: an out-of-memory error would lower
    the token budget of the pass that samples.
    """
    results: list[list[Completion]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    token_limits = [max_new_tokens(model, prompts[i], options.max_new_tokens) for i in order]
    batch_size = options.batch_size or rows_that_fit(model, prompts, options, share[1])
    per_batch = max(1, batch_size // options.completions)
    was_training = model.training
    model.eval()
    with _casting_weights_once(model):
        mode = decoding_mode(model, note)
        groups = _groups(model, [len(prompts[i]) for i in order], token_limits, mode)
        longest = max((len(p) for p in prompts), default=1)
        decoder = _decoder(model, options, ends, pad_id, note, longest, mode)
        decode = _MemoryGuard(
            decoder, model.device, options.completions, limit or DecodingLimit(), note
        )
        for first, last in islice(_batches(groups, per_batch), share[0], None, share[1]):
            batch = [prompts[i] for i in order[first:last]]
            rows = decode(batch, token_limits[first], options.seed * 1_000_003 + first)
            for number, i in enumerate(order[first:last]):
                n = options.completions
                results[i] = rows[number * n : (number + 1) * n]
            tick(last - first)
    model.train(was_training)
    return results


def _groups(
    model: PreTrainedModel, lengths: Sequence[int], token_limits: Sequence[int], mode: str
) -> list[tuple[int, int, rope.CutCrossing]]:
    """What prompts of one batch must have in common: tokens to sample, length in modes without
    padding, side of the length that changes the positions' frequencies."""
    same_length = mode in SAME_LENGTH_MODES
    return [
        (steps, length * same_length, rope.cut_crossing(model.config, length, steps))
        for steps, length in zip(token_limits, lengths, strict=True)
    ]


@contextmanager
def _casting_weights_once(model: PreTrainedModel) -> Iterator[None]:
    """Cast frozen weights once instead of in every forward: autocast caches the cast only of
    weights that require a gradient, so they do in the body, where none is computed."""
    device = model.device.type
    frozen = [p for p in model.parameters() if p.dtype == torch.float32 and not p.requires_grad]
    frozen = frozen if torch.is_autocast_enabled(device) else []
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _decoder(
    model: PreTrainedModel, options: SamplingOptions, ends: Ends, pad_id: int, note: Note,
    longest: int, mode: str,
) -> Decode:  # fmt: skip
    """The fastest decoder that is right for the model. mode: for decoding without CUDA graphs."""

    def decode_dynamically(
        prompts: Sequence[np.ndarray], steps: int, seed: int
    ) -> list[Completion]:
        generator = torch.Generator(model.device).manual_seed(seed)
        return _decode(model, prompts, options, steps, ends, pad_id, mode, generator)

    if mode != "shared_prefix" or not STATIC[model.device.type] or not can_step(model, note):
        return decode_dynamically
    record, kernel = model.device.type == "cuda", has_kernel(model, note)
    stepper = Stepper(model, options, ends, pad_id, record, note, kernel, longest)

    def decode(prompts: Sequence[np.ndarray], steps: int, seed: int) -> list[Completion]:
        crosses = rope.cut_crossing(model.config, len(prompts[0]), steps).crossing
        return (decode_dynamically if crosses else stepper.decode)(prompts, steps, seed)

    return decode


class _MemoryGuard:
    """Decodes batches; if memory runs out, splits that batch and later ones."""

    def __init__(
        self,
        decode: Decode,
        device: torch.device,
        completions: int,
        limit: DecodingLimit,
        note: Note,
    ) -> None:
        self.decode, self.device, self.completions = decode, device, completions
        self.limit, self.note = limit, note

    def __call__(self, prompts: Sequence[np.ndarray], steps: int, seed: int) -> list[Completion]:
        completions: list[Completion] = []
        start = 0
        while start < len(prompts):
            max_prompts = max(1, self.limit.sequences // self.completions)
            part = prompts[start : start + max_prompts]
            try:
                completions += self.decode(part, steps, seed + start)
                start += len(part)
                continue
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                if len(part) == 1:
                    raise self.too_large(part[0]) from error
            free_memory(self.device)
            self.limit.sequences = len(part) // 2 * self.completions
            self.note(
                f"out of memory with {len(part)} prompts sampled together: from now on at most "
                f"{len(part) // 2} (stage.batch_size={self.limit.sequences})"
            )
        return completions

    def too_large(self, prompt: np.ndarray) -> ConfigError:
        return ConfigError(
            f"out of memory while sampling from a single prompt of {len(prompt)} tokens "
            f"({self.completions} completions together): lower stage.completions, "
            "stage.max_new_tokens or data.max_prompt_length"
        )


def rows_that_fit(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], options: SamplingOptions, ranks: int
) -> int:
    """Default number of sequences to decode together: a power of two whose keys, values and logits
    take a fixed share of the GPU's total memory (free or not, so that a repeated run draws the same
    samples), at most a rank's share of all sequences."""
    if model.device.type != "cuda":
        return SamplingOptions.batch_size or MAX_ROWS
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1  # Mamba, RWKV: none
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    half = torch.is_autocast_enabled("cuda") or model.dtype != torch.float32
    column = 2 * config.num_hidden_layers * kv_heads * width * (2 if half else 4)
    longest = max((len(p) for p in prompts), default=1)
    row = column * (longest / options.completions + options.max_new_tokens)
    row += LIVE_LOGITS * 4 * config.vocab_size
    room = KV_CACHE_SHARE * torch.cuda.mem_get_info(model.device)[1]
    total = len(prompts) * options.completions
    rows = MAX_ROWS
    while rows > 1 and (rows * row > room or (ranks > 1 and rows // 2 * ranks >= total)):
        rows //= 2
    return rows


def _batches(groups: Sequence[Any], size: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of at most `size` consecutive prompts of the same group."""
    first = 0
    while first < len(groups):
        neighbors = groups[first : first + size]
        last = first + next(
            (n for n, group in enumerate(neighbors) if group != neighbors[0]), len(neighbors)
        )
        yield first, last
        first = last


def max_new_tokens(model: PreTrainedModel, prompt: np.ndarray, limit: int) -> int:
    """Number of new tokens that fit into the context after a prompt, at most `limit`."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 2**20)
    if len(prompt) >= context:
        raise ConfigError(
            f"a prompt of {len(prompt)} tokens fills the model's context of {context}: lower "
            "data.max_length and data.max_prompt_length"
        )
    return min(limit, context - len(prompt))


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    options: SamplingOptions,
    steps: int,
    ends: Ends,
    pad_id: int,
    mode: str,
    generator: torch.Generator,
) -> list[Completion]:
    """Decode one batch of prompts; returns prompts x completions rows, prompt-major."""
    rows, position, logits = start(model, prompts, options.completions, pad_id, mode)
    total = len(position)
    sampled = Sampled(total, steps, promoted(logits.dtype), model.device)
    alive = torch.arange(len(position), device=model.device)  # original row of each live row
    ended = torch.zeros_like(alive, dtype=torch.bool)
    cuts = rope.cuts_of(model.config)
    with attention_as(model, rows.attention):
        for step in range(steps):
            chosen, logp = draw(logits, options.temperature, options.top_p, generator)
            sampled.add(step, alive, chosen, logp)
            ended |= ended_by(chosen, ends)
            if step + 1 == steps:
                break
            if (step + 1) % SYNC_EVERY[model.device.type] == 0:
                unfinished = ~ended.cpu().numpy()
                if not unfinished.any():
                    break
                if not unfinished.all():
                    order = torch.from_numpy(rows.keep(unfinished)).to(model.device)
                    alive, ended, position, chosen = (
                        x[order] for x in (alive, ended, position, chosen)
                    )
            if len(prompts[0]) + step in cuts:  # the same for all rows; the cache is now invalid
                ids = sampled.tokens[alive, : step + 1]
                texts = _texts(prompts, options.completions, ids, alive)
                rows, position, logits = start(model, texts, 1, pad_id, mode)
                continue
            position = position + 1
            logits = rows.advance(model, chosen, position)
    return sampled.completions(total, steps, ends)


def _texts(
    prompts: Sequence[np.ndarray], completions: int, tokens: torch.Tensor, rows: torch.Tensor
) -> list[np.ndarray]:
    """The prompts of some rows (R,), each followed by its tokens (R, n)."""
    return [
        np.concatenate([prompts[row // completions], ids])
        for row, ids in zip(rows.tolist(), tokens.cpu().numpy(), strict=True)
    ]
