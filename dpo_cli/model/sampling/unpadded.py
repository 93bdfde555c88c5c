"""Rows of equal length, decoded without padding: for models whose states padding would affect, and
for caches that cannot be indexed by row."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.model.attention.interface import cached_attention

CACHES = ("past_key_values", "cache_params", "state", "mems")  # names of what a forward returns


def supported_arguments(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the model's forward names: others it may reject or silently ignore."""
    names = inspect.signature(model.forward).parameters
    return {k: v for k, v in arguments.items() if k in names}


class SameLengthRows:
    """Rows of equal length with the model's own cache, whatever it holds: prompts are repeated
    before the prefill, and finished rows are never dropped."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.attention = cached_attention(model)
        self.cache: dict[str, Any] = {}
        position = torch.arange(ids.shape[1], device=ids.device)
        self.logits = self._forward(model, ids, position.expand(len(ids), -1))

    def _forward(self, model: PreTrainedModel, ids: Tensor, position: Tensor) -> Tensor:
        options = {"position_ids": position, "logits_to_keep": 1}
        # Without a mask: Mamba expects one for the new token only, others one for all tokens.
        options = supported_arguments(model, options)
        out = model(input_ids=ids, use_cache=True, **self.cache, **options)
        self.cache = {x: out[x] for x in CACHES if out.get(x) is not None}
        assert self.cache, "its forward returns no cache"
        return out.logits[:, -1]

    def advance(self, model: PreTrainedModel, tokens: Tensor, position: Tensor) -> Tensor:
        return self._forward(model, tokens[:, None], position[:, None])

    def keep(self, unfinished: np.ndarray) -> np.ndarray:
        return np.arange(len(unfinished))


class UncachedRows:
    """Rows of equal length without a cache: a forward of the (R, n) sequences for every token."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.attention, self.ids = cached_attention(model), ids
        self.logits = self._forward(model)

    def _forward(self, model: PreTrainedModel) -> Tensor:
        options = supported_arguments(model, {"logits_to_keep": 1})
        out = model(input_ids=self.ids, use_cache=False, **options)
        return out.logits[:, -1]

    def advance(self, model: PreTrainedModel, tokens: Tensor, position: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        return self._forward(model)

    def keep(self, unfinished: np.ndarray) -> np.ndarray:
        order = np.flatnonzero(unfinished)
        self.ids = self.ids[torch.from_numpy(order).to(self.ids.device)]
        return order


SAME_LENGTH_MODES: dict[str, type[SameLengthRows] | type[UncachedRows]] = {
    "same_length": SameLengthRows,
    "uncached": UncachedRows,
}
