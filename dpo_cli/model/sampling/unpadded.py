"""Rows of one length, decoded without padding: for models in whose states it would leak, and for
caches that cannot be indexed by rows."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.model.attention.registered import cached_attention

CACHES = ("past_key_values", "cache_params", "state", "mems")  # names of what a forward returns


def known(model: PreTrainedModel, words: dict[str, Any]) -> dict[str, Any]:
    """Those that the model's forward names: others it may refuse, or drop without a word."""
    names = inspect.signature(model.forward).parameters
    return {k: v for k, v in words.items() if k in names}


class OwnCacheRows:
    """The cache that the model makes for rows of one length, whatever it holds: rows are repeated
    before the prefill, and finished ones stay."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.attention = cached_attention(model)
        self.cache: dict[str, Any] = {}
        position = torch.arange(ids.shape[1], device=ids.device)
        self.logits = self._forward(model, ids, position.expand(len(ids), -1))

    def _forward(self, model: PreTrainedModel, ids: Tensor, position: Tensor) -> Tensor:
        given = {"position_ids": position, "logits_to_keep": 1}
        # Without a mask: Mamba takes one of the new token alone, others one of all tokens.
        out = model(input_ids=ids, use_cache=True, **self.cache, **known(model, given))
        self.cache = {x: out[x] for x in CACHES if out.get(x) is not None}
        assert self.cache, "its forward returns no cache"
        return out.logits[:, -1]

    def advance(self, model: PreTrainedModel, tokens: Tensor, position: Tensor) -> Tensor:
        return self._forward(model, tokens[:, None], position[:, None])

    def keep(self, going: np.ndarray) -> np.ndarray:
        return np.arange(len(going))


class WholeRows:
    """No cache: a forward of the whole text, (R, n) of one length, for every token."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.attention, self.ids = cached_attention(model), ids
        self.logits = self._forward(model)

    def _forward(self, model: PreTrainedModel) -> Tensor:
        more = known(model, {"logits_to_keep": 1})
        out = model(input_ids=self.ids, use_cache=False, **more)
        return out.logits[:, -1]

    def advance(self, model: PreTrainedModel, tokens: Tensor, position: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        return self._forward(model)

    def keep(self, going: np.ndarray) -> np.ndarray:
        order = np.flatnonzero(going)
        self.ids = self.ids[torch.from_numpy(order).to(self.ids.device)]
        return order


# Ways that take prompts of one length.
ONE_LENGTH: dict[str, type[OwnCacheRows] | type[WholeRows]] = {
    "own": OwnCacheRows, "whole": WholeRows
}  # fmt: skip
