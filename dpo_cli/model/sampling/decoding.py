"""Rows of a batch that are decoded together, one token per step.

Prompts of any length are prefilled once, padded on the left. A model whose states are affected by
padding, or whose cache cannot be indexed by row, gets prompts of equal length instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dpo_cli.errors import NonFiniteError
from dpo_cli.model.attention.interface import attention_as, cached_attention
from dpo_cli.model.sampling import prefix_cache
from dpo_cli.model.sampling.prefix_cache import PrefixCache
from dpo_cli.model.sampling.unpadded import SAME_LENGTH_MODES

PREFILL_TOKENS = 32768  # prompt tokens per prefill


class Past(Protocol):
    def inputs(self) -> dict[str, Any]:
        """The model's cache arguments for the next token."""


class Rows(Protocol):
    """The unfinished rows of a batch, and the attention to decode them with."""

    attention: str

    def advance(self, model: PreTrainedModel, tokens: Tensor, position: Tensor) -> Tensor:
        """The next logits (R, V), given each row's new token (R,) and its position (R,)."""

    def keep(self, unfinished: np.ndarray) -> np.ndarray:
        """Keep rows where `unfinished` (R,) is true; others may be dropped. Returns the former
        index of the row that is now at each index."""


class SharedRows:
    """Samples share their prompt's keys and values."""

    attention = prefix_cache.NAME

    def __init__(self, prefilled: DynamicCache, mask: Tensor, samples: int) -> None:
        assert prefix_cache.can_share(prefilled), "its cache holds more than keys and values"
        self.cache = PrefixCache(prefilled, mask, samples)
        self.one = mask.new_ones(1, 1)

    def inputs(self) -> dict[str, Any]:
        # Without a mask some families search the tokens for padding, which synchronizes with the
        # device. Nothing else reads it: transformers builds no mask for a registered attention.
        mask = self.one.expand(len(self.cache.prompt_of), self.cache.get_seq_length() + 1)
        return {
            "past_key_values": self.cache, "prefix_cache": self.cache, "attention_mask": mask
        }  # fmt: skip

    def advance(self, model: PreTrainedModel, tokens: Tensor, position: Tensor) -> Tensor:
        return advance(model, self, tokens, position)

    def keep(self, unfinished: np.ndarray) -> np.ndarray:
        return self.cache.keep(unfinished)


class RepeatedRows:
    """Each sample has a copy of its prompt's cache: keys and values, recurrent states."""

    def __init__(self, prefilled: DynamicCache, mask: Tensor, samples: int, attention: str) -> None:
        self.attention, self.cache, self.mask = attention, prefilled, mask
        self._take(torch.arange(len(mask), device=mask.device).repeat_interleave(samples))

    def _take(self, rows: Tensor) -> None:
        # Linear-attention layers support only reorder_cache, not repeating or selecting rows.
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        self.mask = self.mask[rows]

    def inputs(self) -> dict[str, Any]:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return {"past_key_values": self.cache, "attention_mask": self.mask}

    def advance(self, model: PreTrainedModel, tokens: Tensor, position: Tensor) -> Tensor:
        return advance(model, self, tokens, position)

    def keep(self, unfinished: np.ndarray) -> np.ndarray:
        order = np.flatnonzero(unfinished)
        self._take(torch.from_numpy(order).to(self.mask.device))
        return order


def prefill(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], pad_id: int,
    most_tokens: int = PREFILL_TOKENS,
) -> Iterator[tuple[int, DynamicCache, Tensor, Tensor]]:  # fmt: skip
    """Yield (first, cache, mask, logits) per group of P prompts, starting at index `first`: keys
    and values, the (P, C) mask (0 at the padding on the left), and the next logits (P, V)."""
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
    model: PreTrainedModel, prompts: Sequence[np.ndarray], samples: int, pad_id: int, mode: str
) -> tuple[Rows, Tensor, Tensor]:
    """Prefill; returns the rows, the position of each one's last token (R,), and its next logits
    (R, V).

    mode: "shared_prefix", "repeated", or one of `SAME_LENGTH_MODES`, which need prompts of equal
    length.
    """
    rows: Rows
    if mode in SAME_LENGTH_MODES:
        ids, mask = left_pad(prompts, pad_id, model.device)
        assert bool(mask.all())
        with attention_as(model, cached_attention(model)):
            same_length_rows = SAME_LENGTH_MODES[mode](model, ids.repeat_interleave(samples, 0))
        refuse_non_finite(same_length_rows.logits)
        return (
            same_length_rows,
            (mask.sum(1) - 1).repeat_interleave(samples),
            same_length_rows.logits,
        )
    ((_, cache, mask, logits),) = prefill(model, prompts, pad_id, sys.maxsize)
    refuse_non_finite(logits)
    if mode == "shared_prefix":
        rows = SharedRows(cache, mask, samples)
    else:
        rows = RepeatedRows(cache, mask, samples, cached_attention(model))
    position, logits = (x.repeat_interleave(samples, 0) for x in (mask.sum(1) - 1, logits))
    return rows, position, logits


def advance(model: PreTrainedModel, rows: Past, tokens: Tensor, position: Tensor) -> Tensor:
    """The next logits (R, V), given each row's new token (R,) and its position (R,)."""
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
