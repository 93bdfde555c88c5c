"""Rows of a batch that are decoded together: prefilled once a prompt, then a token a step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dpo_cli.device_memory import ran_out
from dpo_cli.errors import NonFiniteError
from dpo_cli.model import prefix_cache
from dpo_cli.model.attention import PACKED, attention_as, cached_attention, kernel_of
from dpo_cli.model.prefix_cache import PrefixCache

Note = Callable[[str], None]
Trial = tuple[Sequence[np.ndarray], np.ndarray]  # prompts, and tokens behind each of them

SHARING = "dpo_shared_prompts"  # the attribute of a model that says why it cannot, or None
# Of what another prompt changes in the logits, by half precision: there a right cache is .03 to
# .06 away at 36 layers, a broken one .6 and more.
AGREEMENT = {False: 0.02, True: 0.25}
HALF = (torch.bfloat16, torch.float16)
PREFILL_TOKENS = 32768  # of prompts at once
REFUSED = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Past(Protocol):
    def inputs(self) -> dict[str, Any]:
        """What the model is given of the past when the next token comes."""


class Rows(Past, Protocol):
    """Live rows of a batch, and the attention to decode them with."""

    attention: str

    def keep(self, going: np.ndarray) -> np.ndarray:
        """Only rows where `going`, (R,), stay; returns which row is now at each place."""


class SharedRows:
    """Samples share their prompt's keys and values."""

    attention = prefix_cache.NAME

    def __init__(self, prefilled: DynamicCache, mask: Tensor, samples: int) -> None:
        self.cache = PrefixCache(prefilled, mask, samples)
        self.one = mask.new_ones(1, 1)

    def inputs(self) -> dict[str, Any]:
        # Without a mask some families look for padding among the tokens, which waits for the
        # device. Nothing else reads it: no mask is made for a registered attention.
        mask = self.one.expand(len(self.cache.prompt_of), self.cache.get_seq_length() + 1)
        return {
            "past_key_values": self.cache, "prefix_cache": self.cache, "attention_mask": mask
        }  # fmt: skip

    def keep(self, going: np.ndarray) -> np.ndarray:
        return self.cache.keep(going)


class RepeatedRows:
    """Each sample has a copy of its prompt's keys and values: any model that can decode."""

    def __init__(self, prefilled: DynamicCache, mask: Tensor, samples: int, attention: str) -> None:
        self.attention, self.cache = attention, prefilled
        prefilled.batch_repeat_interleave(samples)
        self.mask = mask.repeat_interleave(samples, 0)

    def inputs(self) -> dict[str, Any]:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return {"past_key_values": self.cache, "attention_mask": self.mask}

    def keep(self, going: np.ndarray) -> np.ndarray:
        order = np.flatnonzero(going)
        index = torch.from_numpy(order).to(self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        return order


def prefill(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], pad_id: int,
    most_tokens: int = PREFILL_TOKENS,
) -> Iterator[tuple[int, DynamicCache, Tensor, Tensor]]:  # fmt: skip
    """(first, cache, mask, logits) of P prompts at a time from the first-th on: their keys and
    values, the (P, C) mask with 0 at the padding on the left, and the next logits (P, V)."""
    size = max(1, most_tokens // max(len(p) for p in prompts))
    with attention_as(model, cached_attention(model)):
        for first in range(0, len(prompts), size):
            ids, mask = left_pad(prompts[first : first + size], pad_id, model.device)
            cache = DynamicCache(config=model.config)
            logits = model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True,
                position_ids=(mask.cumsum(1) - 1).clamp_min(0), logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
            yield first, cache, mask, logits


def refuse_non_finite(logits: Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise NonFiniteError("sampling: the model's logits are not finite")


def start(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], samples: int, pad_id: int,
    shared: bool,
) -> tuple[Rows, Tensor, Tensor]:  # fmt: skip
    """Prefill; returns the rows, each one's last position (R,) and its next logits (R, V)."""
    ((_, cache, mask, logits),) = prefill(model, prompts, pad_id, sys.maxsize)
    refuse_non_finite(logits)
    position, logits = (x.repeat_interleave(samples, 0) for x in (mask.sum(1) - 1, logits))
    if shared and prefix_cache.can_share(cache):
        return SharedRows(cache, mask, samples), position, logits
    return RepeatedRows(cache, mask, samples, cached_attention(model)), position, logits


def advance(model: PreTrainedModel, rows: Past, tokens: Tensor, position: Tensor) -> Tensor:
    """The next logits, (R, V), of rows whose new tokens, (R,), have these positions, (R,)."""
    out = model(
        input_ids=tokens[:, None], position_ids=position[:, None], use_cache=True, **rows.inputs()
    )
    logits: Tensor = out.logits[:, -1]
    return logits


def left_pad(
    prompts: Sequence[np.ndarray], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    longest = max(len(p) for p in prompts)
    ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def shares_prompts(model: PreTrainedModel, note: Note) -> bool:
    """Whether the prefix cache reproduces the model's own decoding, tried once per model."""
    return tried_once(model, SHARING, _why_not_shared, note, "the keys of a prompt are copied")


def tried_once(
    model: PreTrainedModel, name: str, why_not: Callable[[PreTrainedModel], str | None],
    note: Note, otherwise: str,
) -> bool:  # fmt: skip
    """Whether a way of decoding is right for a model: found once, and said if it is not."""
    if not hasattr(model, name):
        why = why_not(model)
        setattr(model, name, why)
        if why is not None:
            note(f"sampling from {type(model).__name__}: {otherwise}, which is slower ({why})")
    return getattr(model, name) is None


def _why_not_shared(model: PreTrainedModel) -> str | None:
    if kernel_of(model) not in PACKED:
        return f"its attention is {kernel_of(model)}"
    with torch.autocast(model.device.type, enabled=False):
        return why_not(model, lambda trial: _teacher_forced(model, *trial, shared=True))


@torch.no_grad()
def why_not(model: PreTrainedModel, decode: Callable[[Trial], Tensor]) -> str | None:
    """What sets a way of decoding apart from the model's own, in the caller's precision.

    Two samples of three random prompts, one padded, decoded both ways with the same tokens.
    Against the difference that another prompt makes: of untrained weights it is tiny.
    """
    vocab = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, 10)
    trial = (ids[:3], ids[3:6], ids[6:7]), ids[7:]
    plain = _teacher_forced(model, *trial, shared=False)
    try:
        found = decode(trial)
    except REFUSED as error:
        if isinstance(error, RuntimeError) and ran_out(error):
            raise
        return first_line(error)
    effect = (plain[:, 0] - plain[:, 2]).norm()  # the first two prompts, of one length
    away = float((found - plain).norm() / effect)
    if away < AGREEMENT[in_half(model)]:
        return None
    return f"its logits would be off by {away:.2g} of what another prompt changes"


def in_half(model: PreTrainedModel) -> bool:
    """Whether its products are computed in half precision, as the caller has set it."""
    return model.dtype in HALF or torch.is_autocast_enabled(model.device.type)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _teacher_forced(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], tokens: np.ndarray, shared: bool
) -> Tensor:
    """(len(tokens), R, V) logits behind each token, of two samples a prompt."""
    rows, position, _ = start(model, prompts, 2, 0, shared)
    logits = []
    with attention_as(model, rows.attention):
        for number, token in enumerate(tokens, start=1):
            same = torch.full_like(position, int(token))
            logits.append(advance(model, rows, same, position + number))
    return torch.stack(logits).double()
