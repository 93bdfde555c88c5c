"""Rows of a batch that are decoded together: prefilled once a prompt, then a token a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dpo_cli.errors import NonFiniteError
from dpo_cli.model import prefix_cache
from dpo_cli.model.attention import PACKED, attention_as, cached_attention, kernel_of
from dpo_cli.model.prefix_cache import PrefixCache

AGREES = "dpo_prefix_cache_agrees"  # the attribute of a model that holds what was found
AGREEMENT = 0.02  # of what another prompt changes in the logits
REFUSED = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Rows(Protocol):
    """Live rows of a batch, and the attention to decode them with."""

    attention: str

    def inputs(self) -> dict[str, Any]:
        """What the model is given of the past when the next token comes."""

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


def start(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], samples: int, pad_id: int,
    shared: bool,
) -> tuple[Rows, Tensor, Tensor]:  # fmt: skip
    """Prefill; returns the rows, each one's last position (R,) and its next logits (R, V)."""
    ids, mask = left_pad(prompts, pad_id, model.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    attention = cached_attention(model)
    with attention_as(model, attention):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
    if not torch.isfinite(logits).all():
        raise NonFiniteError("sampling: the model's logits are not finite")
    position, logits = (x.repeat_interleave(samples, 0) for x in (positions[:, -1], logits))
    if shared and prefix_cache.can_share(cache):
        return SharedRows(cache, mask, samples), position, logits
    return RepeatedRows(cache, mask, samples, attention), position, logits


def advance(model: PreTrainedModel, rows: Rows, tokens: Tensor, position: Tensor) -> Tensor:
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


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the prefix cache reproduces the model's own decoding, tried once a model."""
    if kernel_of(model) not in PACKED:
        return False
    if not hasattr(model, AGREES):
        setattr(model, AGREES, _agrees(model))
    return bool(getattr(model, AGREES))


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Two samples of three random prompts, one padded, decoded both ways with the same tokens.

    Against the difference that another prompt makes: of untrained weights it is tiny.
    """
    vocab = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, 10)
    prompts, tokens = (ids[:3], ids[3:6], ids[6:7]), ids[7:]
    with torch.autocast(model.device.type, enabled=False):
        plain = _teacher_forced(model, prompts, tokens, shared=False)
        try:
            found = _teacher_forced(model, prompts, tokens, shared=True)
        except REFUSED:
            return False
    effect = (plain[:, 0] - plain[:, 2]).norm()  # the first two prompts, of one length
    return bool((found - plain).norm() < AGREEMENT * effect)


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
