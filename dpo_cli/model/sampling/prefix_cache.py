"""Attention of one new token per row, where all samples of a prompt share its keys and values.

The prompt's part is one matrix product with all samples of the prompt, so its keys are read once
per prompt rather than once per sample; each sample's own tokens are in buffers that are written in
place (Hydragen, https://arxiv.org/abs/2402.05099, but with one softmax).
Notation: P prompts of C columns, left-padded; R live rows, at most M per prompt; H query and H_kv
key heads, G = H / H_kv; t own tokens of each row, including the new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from dpo_cli.logprobs import promote, promoted
from dpo_cli.model.attention.kernels import Call

NAME = "dpo_decode"
INITIAL_TOKENS = 64  # initial capacity of the buffers for own tokens


@dataclass(frozen=True)
class Grid:
    """P prompts x M samples. cells: (R,) index prompt * M + sample of each row; None: row r has
    cell r."""

    prompts: int
    samples: int
    cells: Tensor | None = None

    @classmethod
    def of(cls, prompt_of: np.ndarray, device: torch.device) -> Self:
        """prompt_of: (R,) each row's prompt, 0 .. P-1, each at least once."""
        counts = np.bincount(prompt_of)
        by_prompt = np.argsort(prompt_of, kind="stable")
        rank = np.empty_like(prompt_of)
        rank[by_prompt] = np.arange(len(rank)) - np.repeat(counts.cumsum() - counts, counts)
        samples = int(counts.max())
        cells = prompt_of * samples + rank
        if np.array_equal(cells, np.arange(len(counts) * samples)):
            return cls(len(counts), samples)
        return cls(len(counts), samples, torch.from_numpy(cells).to(device))

    def spread(self, rows: Tensor) -> Tensor:
        """(R, H_kv, G, n) -> (P, H_kv, M G, n), zero in cells without a row."""
        if self.cells is not None:
            empty = rows.new_zeros(self.prompts * self.samples, *rows.shape[1:])
            rows = empty.index_copy_(0, self.cells, rows)
        return rows.unflatten(0, (self.prompts, self.samples)).transpose(1, 2).flatten(2, 3)

    def gather(self, cells: Tensor) -> Tensor:
        """(P, H_kv, M G, n) -> (R, H_kv, G, n)"""
        rows = cells.unflatten(2, (self.samples, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.cells is None else rows.index_select(0, self.cells)


class _Layer(DynamicLayer):
    """Keys and values: `prompt` (P, H_kv, <= C, d) once per prompt, `own` (>= R, H_kv, >= t, d)."""

    def __init__(self, prefilled: DynamicLayer, columns: int, rows: int) -> None:
        super().__init__()
        keys, values = prefilled.keys, prefilled.values
        assert keys is not None and values is not None
        # On a CPU, small products are faster in float32 than in bf16, and exact.
        wide = values.dtype if values.is_cuda else promoted(values.dtype)
        self.prompt = keys.to(wide), values.to(wide)
        self.columns = columns
        self.own = tuple(
            x.new_empty(rows, x.shape[1], INITIAL_TOKENS, x.shape[3]) for x in self.prompt
        )
        self.length = 0  # t
        self.latest: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a token of each live row, (R, H_kv, 1, d); returns the arguments unchanged."""
        rows = len(key_states)
        if self.length == self.own[0].shape[2]:
            self.own = tuple(torch.cat([x[:rows], torch.empty_like(x[:rows])], 2) for x in self.own)
        for buffer, new in zip(self.own, (key_states, value_states), strict=True):
            buffer[:rows, :, self.length] = new[:, :, 0]
        self.length += 1
        self.latest = key_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.columns + self.length

    def attend(self, query: Tensor, grid: Grid, bias: Tensor | None, call: Call) -> Tensor:
        """q (R, H, 1, d) -> (R, H, d). bias: (P, 1, 1, C) added to scores, None: no padding."""
        rows, heads = query.shape[:2]
        own_keys, own_values = self.own
        scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        q = (query * scale).to(own_keys.dtype).reshape(rows, own_keys.shape[1], -1, query.shape[-1])
        # Left padding puts all rows' new tokens into column C + t - 1: a window is a slice.
        reach = self.length if call.window is None else call.window
        first_own = max(0, self.length - reach)
        first = 0 if call.window is None else max(0, self.columns + self.length - reach)
        first_kept = first - (self.columns - self.prompt[0].shape[2])
        assert first_kept >= 0, "the prefill dropped keys inside a query's window"
        prompt_keys, prompt_values = (x[:, :, first_kept:] for x in self.prompt)
        own_keys, own_values = (x[:rows, :, first_own : self.length] for x in self.own)
        to_prompt = soft_capped(grid.spread(q) @ prompt_keys.transpose(-1, -2), call.softcap)
        if bias is not None:
            to_prompt = to_prompt + bias[..., first:]
        to_own = soft_capped(q @ own_keys.transpose(-1, -2), call.softcap)
        scores = promote(torch.cat([grid.gather(to_prompt), to_own], -1))
        weights = scores.softmax(-1).to(q.dtype)  # one over both parts
        to_prompt, to_own = weights.tensor_split([prompt_keys.shape[2]], -1)
        out = grid.gather(grid.spread(to_prompt) @ prompt_values) + to_own @ own_values
        return out.reshape(rows, heads, -1)

    def fill(self, holes: Tensor, movers: Tensor) -> None:
        for x in self.own:
            x[holes, :, : self.length] = x[movers, :, : self.length]

    def keep_prompts(self, indices: Tensor) -> None:
        keys, values = self.prompt
        self.prompt = keys.index_select(0, indices), values.index_select(0, indices)


def soft_capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(promote(scores) / softcap)


def can_share(prefilled: DynamicCache) -> bool:
    """Whether every layer holds plain keys and values (no recurrent states, nothing shared)."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(x) in plain and cast(DynamicLayer, x).is_initialized for x in prefilled.layers)


class PrefixCache(Cache):
    """The cache of P prefilled prompts, for `samples` rows of each, initially prompt-major.

    mask: (P, C), 0 at the padding on the left.
    """

    def __init__(self, prefilled: DynamicCache, mask: Tensor, samples: int) -> None:
        prompts, columns = mask.shape
        rows = prompts * samples
        self.shared = [_Layer(cast(DynamicLayer, x), columns, rows) for x in prefilled.layers]
        super().__init__(layers=list(self.shared))
        self.device = mask.device
        self.prompt_of = np.repeat(np.arange(prompts), samples)
        self.grid = Grid.of(self.prompt_of, self.device)
        self.bias: Tensor | None = None
        if not mask.all():
            dtype = self.shared[0].prompt[0].dtype
            bias = torch.zeros(mask.shape, dtype=dtype, device=self.device)
            self.bias = bias.masked_fill(mask == 0, float("-inf"))[:, None, None]
        self.current: _Layer | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.current = self.shared[layer_idx]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attend(self, query: Tensor, key: Tensor, call: Call) -> Tensor:
        layer = self.current
        assert layer is not None and key is layer.latest, "it transforms keys after caching them"
        with torch.autocast(query.device.type, enabled=False):
            return layer.attend(query, self.grid, self.bias, call)

    def keep(self, unfinished: np.ndarray) -> np.ndarray:
        """Drop all rows but those where `unfinished` (R,) is true. Returns the former index of the
        row that is now at each index.

        The last rows are moved into the gaps, so that the keys of the others stay in place.
        """
        left = int(unfinished.sum())
        holes, movers = np.flatnonzero(~unfinished[:left]), left + np.flatnonzero(unfinished[left:])
        order = np.arange(left)
        order[holes] = movers
        self._each_layer("fill", holes, movers)
        stay, self.prompt_of = np.unique(self.prompt_of[order], return_inverse=True)
        if len(stay) < self.grid.prompts:
            self._each_layer("keep_prompts", stay)
            if self.bias is not None:
                self.bias = self.bias[torch.from_numpy(stay).to(self.device)]
        self.grid = Grid.of(self.prompt_of, self.device)
        return order

    def _each_layer(self, method: str, *indices: np.ndarray) -> None:
        tensors = [torch.from_numpy(x).to(self.device) for x in indices]
        for layer in self.shared:
            getattr(layer, method)(*tensors)


def prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    prefix_cache: PrefixCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q (R, H, 1, d), k and v (R, H_kv, 1, d)."""
    assert prefix_cache is not None, "it does not pass keyword arguments on to its attention"
    assert attention_mask is None, "it builds its own attention mask"
    assert kwargs.get("s_aux") is None, "it has attention sinks"
    assert not dropout, "sampling runs in evaluation mode"
    out = prefix_cache.attend(query, key, Call(scaling, softcap, sliding_window))
    return out[:, None].to(query.dtype), None


AttentionInterface.register(NAME, prefix_attention)
