"""Sampling: a prompt's samples share its keys and values; finished rows drop out."""

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
from dpo_cli.model.attention.registered import attention_as
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
from dpo_cli.model.sampling.trial import Note, way_of
from dpo_cli.model.sampling.unpadded import ONE_LENGTH

LOOK_EVERY = {"cpu": 1, "cuda": 4}  # steps; a look for finished rows makes the host wait
STATIC = {"cpu": False, "cuda": True}  # steps of static shape, which CUDA graphs can record
MOST_ROWS = 512  # decoded together on a GPU where nothing else is asked for
KEYS_SHARE = 0.3  # of a GPU's memory, for the keys and values of those rows
LOGITS_ALIVE = 6  # float32 copies of (R, V) while a token is drawn

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

    ends: the tokens that end a completion. share: (rank, ranks); only each ranks-th batch is
    sampled then, the other prompts get none.
    Where a prompt leaves less than max_new_tokens of the context, its completions end there,
    whichever prompts are decoded beside it. Where memory runs out, fewer are decoded together, and
    `limit` is lowered. note: is told of that, and of a model that must be decoded in a slower way.

    Raises ConfigError where memory runs out with a single prompt: not an error of memory, which
    would lower the token budget of the pass that samples.
    """
    results: list[list[Completion]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rooms = [room_for(model, prompts[i], options.max_new_tokens) for i in order]
    together = options.batch_size or rows_that_fit(model, prompts, options, share[1])
    per_batch = max(1, together // options.completions)
    was_training = model.training
    model.eval()
    with _casting_once(model):
        way = way_of(model, note)
        alone = way in ONE_LENGTH
        alike = [
            (room, len(prompts[i]) * alone, rope.way_through(model.config, len(prompts[i]), room))
            for room, i in zip(rooms, order, strict=True)
        ]
        longest = max((len(p) for p in prompts), default=1)
        decoder = _decoder(model, options, ends, pad_id, note, longest, way)
        decode = _WithinMemory(
            decoder, model.device, options.completions, limit or DecodingLimit(), note
        )
        for first, last in islice(_batches(alike, per_batch), share[0], None, share[1]):
            batch = [prompts[i] for i in order[first:last]]
            rows = decode(batch, rooms[first], options.seed * 1_000_003 + first)
            for place, i in enumerate(order[first:last]):
                n = options.completions
                results[i] = rows[place * n : (place + 1) * n]
            tick(last - first)
    model.train(was_training)
    return results


@contextmanager
def _casting_once(model: PreTrainedModel) -> Iterator[None]:
    """In autocast a frozen weight is cast in every forward: the cast is kept, until the outermost
    autocast ends, only of weights that want a gradient. So let them, where none is taken."""
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
    longest: int, way: str,
) -> Decode:  # fmt: skip
    """The fastest way of decoding that is right for the model; way: of those without graphs."""

    def plainly(prompts: Sequence[np.ndarray], steps: int, seed: int) -> list[Completion]:
        generator = torch.Generator(model.device).manual_seed(seed)
        return _decode(model, prompts, options, steps, ends, pad_id, way, generator)

    if way != "shared" or not STATIC[model.device.type] or not can_step(model, note):
        return plainly
    record, kernel = model.device.type == "cuda", has_kernel(model, note)
    stepper = Stepper(model, options, ends, pad_id, record, note, kernel, longest)

    def decode(prompts: Sequence[np.ndarray], steps: int, seed: int) -> list[Completion]:
        crosses = rope.way_through(model.config, len(prompts[0]), steps).crossing
        return (plainly if crosses else stepper.decode)(prompts, steps, seed)

    return decode


class _WithinMemory:
    """Decodes batches; where memory runs out, that one and later ones in smaller parts."""

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
        made: list[Completion] = []
        start = 0
        while start < len(prompts):
            most = max(1, self.limit.sequences // self.completions)
            part = prompts[start : start + most]
            try:
                made += self.decode(part, steps, seed + start)
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
        return made

    def too_large(self, prompt: np.ndarray) -> ConfigError:
        return ConfigError(
            f"out of memory while sampling from a single prompt of {len(prompt)} tokens "
            f"({self.completions} completions together): lower stage.completions, "
            "stage.max_new_tokens or data.max_prompt_length"
        )


def rows_that_fit(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], options: SamplingOptions, ranks: int
) -> int:
    """Sequences to decode together where the configuration names no number: a power of two
    whose keys, values and logits take a part of the GPU's whole memory, of what is free or
    not, so that a run draws the same each time; not more than a rank's share."""
    if model.device.type != "cuda":
        return SamplingOptions.batch_size or MOST_ROWS
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1  # Mamba, RWKV: none
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    half = torch.is_autocast_enabled("cuda") or model.dtype != torch.float32
    column = 2 * config.num_hidden_layers * kept * width * (2 if half else 4)
    longest = max((len(p) for p in prompts), default=1)
    row = column * (longest / options.completions + options.max_new_tokens)
    row += LOGITS_ALIVE * 4 * config.vocab_size
    room = KEYS_SHARE * torch.cuda.mem_get_info(model.device)[1]
    total = len(prompts) * options.completions
    rows = MOST_ROWS
    while rows > 1 and (rows * row > room or (ranks > 1 and rows // 2 * ranks >= total)):
        rows //= 2
    return rows


def _batches(kinds: Sequence[Any], size: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of at most `size` neighbors of the same kind."""
    first = 0
    while first < len(kinds):
        near = kinds[first : first + size]
        last = first + next((n for n, kind in enumerate(near) if kind != near[0]), len(near))
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


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    options: SamplingOptions,
    steps: int,
    ends: Ends,
    pad_id: int,
    way: str,
    generator: torch.Generator,
) -> list[Completion]:
    """Decode one batch of prompts; returns prompts x completions rows, prompt-major."""
    rows, position, logits = start(model, prompts, options.completions, pad_id, way)
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
            if (step + 1) % LOOK_EVERY[model.device.type] == 0:
                going = ~ended.cpu().numpy()
                if not going.any():
                    break
                if not going.all():
                    order = torch.from_numpy(rows.keep(going)).to(model.device)
                    alive, ended, position, chosen = (
                        x[order] for x in (alive, ended, position, chosen)
                    )
            if len(prompts[0]) + step in cuts:  # of all rows; no cache is right beyond it
                ids = sampled.tokens[alive, : step + 1]
                texts = _texts(prompts, options.completions, ids, alive)
                rows, position, logits = start(model, texts, 1, pad_id, way)
                continue
            position = position + 1
            logits = rows.advance(model, chosen, position)
    return sampled.completions(total, steps, ends)


def _texts(
    prompts: Sequence[np.ndarray], completions: int, tokens: torch.Tensor, rows: torch.Tensor
) -> list[np.ndarray]:
    """The prompts of some rows, (R,), with their tokens, (R, n), behind them."""
    return [
        np.concatenate([prompts[row // completions], ids])
        for row, ids in zip(rows.tolist(), tokens.cpu().numpy(), strict=True)
    ]
