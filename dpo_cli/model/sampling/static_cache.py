"""The prefix cache with shapes that do not change from token to token, for CUDA graphs.

Buffers are allocated once; the number of filled columns is a tensor on the device and reaches the
attention as a mask, so that one captured step serves every token. Dropping finished rows halves the
shapes, so that few are captured.
Notation as in `prefix_cache`: P prompts of C columns, R rows, M samples per prompt, N own columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import proxy

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from dpo_cli.logprobs import promote, promoted
from dpo_cli.model.attention.kernels import Call
from dpo_cli.model.sampling.prefix_cache import Grid, soft_capped

MIN_ROWS = 16  # fewer rows are not faster: reading the weights dominates
INITIAL_TOKENS = 64  # own columns that the first steps read, doubled whenever they are full


@dataclass(frozen=True)
class Room:
    """The size of the buffers. columns: per prompt; tokens: per row, after its prompt."""

    prompts: int
    samples: int
    columns: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    def holds(self, other: Room) -> bool:
        return self.samples == other.samples and (
            self.prompts >= other.prompts
            and self.columns >= other.columns
            and self.tokens >= other.tokens
        )

    def grown(self, other: Room, longest: int) -> Room:
        """Room for both, with spare columns up to the longest prompt: later prompts are longer, and
        after each reallocation all steps are captured again."""
        return replace(
            other,
            prompts=max(self.prompts, other.prompts),
            columns=max(self.columns, min(next_power(other.columns), longest)),
            tokens=max(self.tokens, -(-other.tokens // 16) * 16),
        )


def next_power(count: int) -> int:
    """The smallest of 64, 128, 256, ... that is at least `count`."""
    return max(INITIAL_TOKENS, 1 << (count - 1).bit_length())


class _Layer(DynamicLayer):
    """Keys and values, each `prompt` (P, H_kv, C, d) and `own` (R, H_kv, N, d), at the size of
    `room`."""

    def __init__(self, like: DynamicLayer, room: Room, cache: StaticCache) -> None:
        super().__init__()
        keys, values = cast(Tensor, like.keys), cast(Tensor, like.values)
        wide = values.dtype if values.is_cuda else promoted(values.dtype)
        # Zeros, as masked values are still multiplied: NaN in uninitialized memory would spread.
        self.prompt, self.own = (
            tuple(
                x.new_zeros(rows, x.shape[1], columns, x.shape[3], dtype=wide)
                for x in (keys, values)
            )
            for rows, columns in ((room.prompts, room.columns), (room.rows, room.tokens))
        )
        self.cache = proxy(cache)  # a reference cycle would keep gigabytes until collected
        self.latest: Tensor | None = None

    def fill_prompts(self, first: int, prefilled: DynamicLayer) -> None:
        """Write prompts' keys and values, aligned to the right of their columns."""
        for buffer, new in zip(self.prompt, (prefilled.keys, prefilled.values), strict=True):
            new = cast(Tensor, new)
            buffer[first : first + len(new), :, buffer.shape[2] - new.shape[2] :] = new

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a token of each row, (R, H_kv, 1, d); returns the arguments unchanged."""
        self.latest, column = key_states, self.cache.column
        if self.cache.kernel:
            from dpo_cli.model.sampling import decode_kernel  # imports Triton

            decode_kernel.store(self.own, (key_states, value_states), column)
            return key_states, value_states
        for buffer, new in zip(self.own, (key_states, value_states), strict=True):
            buffer[: len(new)].index_copy_(2, column, new.to(buffer.dtype))
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.prompt[0].shape[2] + self.own[0].shape[2] - 1

    def attend(self, query: Tensor, call: Call) -> Tensor:
        """q (R, H, 1, d) -> (R, H, d)"""
        cache, (rows, heads) = self.cache, query.shape[:2]
        if cache.kernel:
            from dpo_cli.model.sampling import decode_kernel  # imports Triton

            return decode_kernel.attend(
                query, self.prompt, tuple(x[:rows] for x in self.own), cache.cells[:rows],
                None if cache.room.samples == 1 else cache.rows_of[: cache.prompts],
                cache.first, cache.column, call,
            )  # fmt: skip
        prompt_keys, prompt_values = (x[: cache.prompts] for x in self.prompt)
        own_keys, own_values = (x[:rows, :, : cache.own_columns] for x in self.own)
        scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        q = (query * scale).to(own_keys.dtype).reshape(rows, own_keys.shape[1], -1, query.shape[-1])
        grid, (prompt_mask, own_mask) = cache.grid, cache.masks(call.window)
        to_prompt = soft_capped(grid.spread(q) @ prompt_keys.transpose(-1, -2), call.softcap)
        to_own = soft_capped(q @ own_keys.transpose(-1, -2), call.softcap)
        to_prompt = to_prompt.masked_fill(prompt_mask, float("-inf"))
        to_own = to_own.masked_fill(own_mask, float("-inf"))
        scores = promote(torch.cat([grid.gather(to_prompt), to_own], -1))
        weights = scores.softmax(-1).to(q.dtype)  # one over both parts
        to_prompt, to_own = weights.tensor_split([prompt_keys.shape[2]], -1)
        out = grid.gather(grid.spread(to_prompt) @ prompt_values) + to_own @ own_values
        return out.reshape(rows, heads, -1)

    def move(self, prompts: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], used: int) -> None:
        """Copy prompts and rows from the second indices of each pair to the first."""
        for x in self.prompt:
            x[prompts[0]] = x[prompts[1]]
        for x in self.own:
            x[rows[0], :, :used] = x[rows[1], :, :used]


class StaticCache(Cache):
    """Keys and values in buffers of size `room`, of which `prompts` and `rows` are in use.

    column: (1,) the own column of the next token. first: (P,) each prompt's first column.
    """

    def __init__(self, like: DynamicCache, room: Room, kernel: bool = False) -> None:
        layers = [_Layer(cast(DynamicLayer, x), room, self) for x in like.layers]
        super().__init__(layers=list(layers))
        self.static, self.room, self.kernel = layers, room, kernel
        self.device = layers[0].prompt[0].device
        self.column = torch.zeros(1, dtype=torch.long, device=self.device)
        self.first = torch.zeros(room.prompts, dtype=torch.long, device=self.device)
        self.cells = torch.zeros(room.rows, dtype=torch.long, device=self.device)
        self.rows_of = torch.zeros(
            room.prompts, room.samples, dtype=torch.int32, device=self.device
        )
        self.one = torch.ones(1, 1, dtype=torch.long, device=self.device)
        self.prompts = self.rows = 0
        self.own_columns = min(INITIAL_TOKENS, room.tokens)
        self.current: _Layer | None = None
        self._masks: dict[int | None, tuple[Tensor, Tensor]] = {}

    def begin(self, lengths: Sequence[int]) -> None:
        """Start a batch of prompts of these lengths; `fill_prompts` then writes their keys."""
        self.prompts, samples = len(lengths), self.room.samples
        self.rows = self.prompts * samples
        self.prompt_of = np.repeat(np.arange(self.prompts), samples)
        self.sample_of = np.tile(np.arange(samples), self.prompts)
        first = self.room.columns - torch.tensor(lengths)
        self.first[: self.prompts] = first.to(self.device)
        self._place(np.arange(self.rows))
        self.column.zero_()
        self.own_columns = min(INITIAL_TOKENS, self.room.tokens)

    def fill_prompts(self, first: int, prefilled: DynamicCache) -> None:
        for layer, new in zip(self.static, prefilled.layers, strict=True):
            layer.fill_prompts(first, cast(DynamicLayer, new))

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward. The mask's values are not read: see `SharedRows`."""
        mask = self.one.expand(self.rows, self.get_seq_length() + 1)
        return {"past_key_values": self, "prefix_cache": self, "attention_mask": mask}

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape for which a step is captured."""
        return self.prompts, self.rows, 0 if self.kernel else self.own_columns

    @property
    def grid(self) -> Grid:
        samples = self.room.samples
        return Grid(self.prompts, samples, None if samples == 1 else self.cells[: self.rows])

    def see(self, tokens: int) -> None:
        """From now on, steps read at least this many own columns."""
        self.own_columns = min(next_power(tokens), self.room.tokens)

    def begin_step(self) -> None:
        self._masks = {}

    def masks(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Columns hidden from a new token: (P, 1, 1, C) of the prompts, (N,) of its row's own."""
        if window not in self._masks:
            columns = torch.arange(self.room.columns, device=self.device)
            own = torch.arange(self.own_columns, device=self.device)
            hidden, later = columns < self.first[: self.prompts, None], own > self.column
            if window is not None:
                oldest = self.column - window + 1  # of its own columns
                hidden = hidden | (columns - self.room.columns < oldest)
                later = later | (own < oldest)
            self._masks[window] = hidden[:, None, None], later
        return self._masks[window]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.current = self.static[layer_idx]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attend(self, query: Tensor, key: Tensor, call: Call) -> Tensor:
        layer = self.current
        assert layer is not None and key is layer.latest, "it transforms keys after caching them"
        with torch.autocast(query.device.type, enabled=False):
            return layer.attend(query, call)

    def rows_for(self, unfinished: np.ndarray) -> int:
        """The number of rows after halving as often as the `unfinished` (R,) ones still fit."""
        return halved(self.rows, max(int(unfinished.sum()), MIN_ROWS))

    def keep(self, unfinished: np.ndarray, used: int) -> np.ndarray:
        """Halve the rows as often as the `unfinished` (R,) ones still fit; finished ones fill up.

        used: number of own columns with tokens. Returns the former index of the row that is now at
        each index.
        """
        rows = self.rows_for(unfinished)
        order, holes, movers = _compacted(unfinished, rows)
        prompt_of, self.sample_of = self.prompt_of[order], self.sample_of[order]
        if self.room.samples == 1:  # row r remains the row of prompt r
            self.prompts, self.prompt_of = rows, np.arange(rows)
            prompt_holes, prompt_movers = holes, movers
        else:
            needed = np.zeros(self.prompts, bool)
            needed[prompt_of] = True
            prompts = halved(self.prompts, int(needed.sum()))
            kept_prompts, prompt_holes, prompt_movers = _compacted(needed, prompts)
            place = np.empty(self.prompts, np.int64)
            place[kept_prompts] = np.arange(prompts)
            self.prompts, self.prompt_of = prompts, place[prompt_of]
        self.rows = rows
        to = [
            torch.from_numpy(x).to(self.device)
            for x in (prompt_holes, prompt_movers, holes, movers)
        ]
        self.first[to[0]] = self.first[to[1]]
        for layer in self.static:
            layer.move((to[0], to[1]), (to[2], to[3]), used)
        self._place(self.prompt_of * self.room.samples + self.sample_of)
        return order

    def _place(self, cells: np.ndarray) -> None:
        """cells: (R,) prompt * M + sample of each row."""
        self.cells[: self.rows] = torch.from_numpy(cells).to(self.device)
        rows_of = np.full(self.rows_of.shape, -1, np.int32)
        rows_of.reshape(-1)[cells] = np.arange(self.rows)
        self.rows_of.copy_(torch.from_numpy(rows_of))


def halved(count: int, least: int) -> int:
    while count // 2 >= least:
        count //= 2
    return count


def _compacted(needed: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Select `size` entries, including all that are needed, and move the last ones into gaps.

    Returns the former index of the entry now at each index, the gaps, and the former indices of the
    entries that fill them.
    """
    selected = needed.copy()
    selected[np.flatnonzero(~needed)[: size - int(needed.sum())]] = True
    holes, movers = np.flatnonzero(~selected[:size]), size + np.flatnonzero(selected[size:])
    order = np.arange(size)
    order[holes] = movers
    return order, holes, movers
