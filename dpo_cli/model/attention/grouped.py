"""Attention of packed rows on a CPU: batches of examples of similar length, in blocks of queries.

Compared with one padded batch of all examples, this skips the padding and most of what is causally
masked, and saves little for the backward (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_cli.logprobs import promoted
from dpo_cli.model.attention import kernels
from dpo_cli.model.attention.kernels import Call
from dpo_cli.model.attention.layout import Layout, grid_of, visible
from dpo_cli.records import Segment

SIMILAR = 0.75  # minimum length of a group's examples relative to its longest
BLOCK = 128  # queries
SAVED_BYTES = 2048  # of probabilities per query and head; for longer rows they are recomputed


@dataclass
class Group:
    """E examples of similar length, padded to L.

    tokens: (E * L,); branch, positions: (E, L), as in `Grid`.
    places: the real ones among the tokens, None if all are; rows: their packed tokens.
    """

    tokens: Tensor
    places: Tensor | None
    rows: Tensor
    branch: Tensor
    positions: Tensor
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def visible(self, window: int | None) -> Tensor:
        """(E, 1, L, L) boolean mask."""
        return visible(self.branch, self.positions, window)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(E, 1, L, L) additive mask, 0 or -inf, cached for all layers."""
        key = (window, dtype)
        if key not in self.masks:
            allowed = self.visible(window)
            mask = torch.zeros(allowed.shape, dtype=dtype)
            self.masks[key] = mask.masked_fill_(~allowed, float("-inf"))
        return self.masks[key]

    def take(self, x: Tensor) -> Tensor:
        """(T, H, d) -> (E, H, L, d)"""
        taken = x.index_select(0, self.tokens)
        return taken.view(*self.branch.shape, *x.shape[1:]).transpose(1, 2)

    def put(self, out: Tensor, x: Tensor) -> None:
        """Write (E, H, L, d) to its rows of (T, H, d), without the padding."""
        flat = x.transpose(1, 2).flatten(0, 1)
        out.index_copy_(0, self.rows, flat if self.places is None else flat[self.places])

    def without_padding(self, x: Tensor) -> Tensor:
        """(E, H, L, d) with padding set to zero."""
        return x if self.places is None else x * (self.branch >= 0)[:, None, :, None]


@dataclass
class GroupedLayout(Layout):
    """The examples of a row, grouped by length."""

    groups: tuple[Group, ...]
    traced = False  # the number of groups differs from row to row

    @classmethod
    def build(cls, segments: Sequence[Segment]) -> GroupedLayout:
        return cls(tuple(_group(part) for part in _similar(segments)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        with torch.autocast("cpu", enabled=False):  # in the dtype of q, k and v
            return self._attend(q, k, v, call)[None]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if call.softcap is None and not call.dropout:
            out: Tensor = _Attention.apply(q, k, v, self.groups, call)
            return out
        out = q.new_empty(*q.shape[:2], v.shape[2])
        for group in self.groups:
            taken = group.take(q), group.take(k), group.take(v)
            group.put(out, kernels.matmul(*taken, group.visible(call.window), call))
        return out


def _similar(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    sizes = {s.start: s.prompt + sum(s.branches) for s in segments}
    group: list[Segment] = []
    for segment in sorted(segments, key=lambda s: (-sizes[s.start], s.start)):
        if group and sizes[segment.start] < SIMILAR * sizes[group[0].start]:
            yield group
            group = []
        group.append(segment)
    yield group


def _group(segments: Sequence[Segment]) -> Group:
    grid = grid_of(segments)
    return Group(
        torch.from_numpy(grid.tokens.ravel()),
        None if grid.real.all() else torch.from_numpy(np.flatnonzero(grid.real)),
        torch.from_numpy(grid.tokens[grid.real]),
        torch.from_numpy(grid.branch),
        torch.from_numpy(grid.positions),
    )


class _Attention(torch.autograd.Function):
    """softmax(q k^T scale + mask) v of every group; q (T, H, d), k and v (T, H_kv, d)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], call: Call
    ) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[2])
        saved: list[Tensor] = []
        keep = any(ctx.needs_input_grad)
        for group in groups:
            work = _Work(group, q, k, v, call)
            parts = []
            for queries in work.blocks():
                probabilities = work.probabilities(queries)
                parts.append(work.per_query(probabilities @ work.v[:, : queries.stop]))
                if keep and work.saves:
                    saved.append(probabilities)
            group.put(out, torch.cat(parts, dim=2))
        ctx.save_for_backward(q, k, v, *saved)
        ctx.groups, ctx.call = groups, call
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, *saved = ctx.saved_tensors
        probabilities = iter(saved)
        outs = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        for group in ctx.groups:
            work = _Work(group, q, k, v, ctx.call)
            grad = group.without_padding(group.take(grads[0]))
            dq = []
            dk, dv = work.sums_over_blocks()
            for queries in work.blocks():
                keys = slice(0, queries.stop)
                p = next(probabilities) if work.saves else work.probabilities(queries)
                g = work.per_key_head(grad[:, :, queries])
                dv[:, keys] += p.transpose(1, 2) @ g
                dp = g @ work.v[:, keys].transpose(1, 2)
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                dq.append(work.per_query(ds @ work.k[:, keys]) * work.scale)
                dk[:, keys] += ds.transpose(1, 2) @ work.scaled_queries(queries)
            gradients = torch.cat(dq, dim=2), work.by_example(dk), work.by_example(dv)
            for out, x in zip(outs, gradients, strict=True):
                group.put(out, x.to(out.dtype))
        return (*outs, None, None)


class _Work:
    """The matmuls of one group. Query heads that share a key head are stacked as more queries, so
    that every matmul is a batch of E * H_kv."""

    def __init__(self, group: Group, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        self.examples, self.length = group.branch.shape
        self.shared = q.shape[1] // k.shape[1]
        self.q = group.take(q)
        self.k, self.v = (group.take(x).flatten(0, 1) for x in (k, v))  # (E * H_kv, L, d)
        self.scale = q.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        self.mask = group.mask(call.window, q.dtype)
        self.saves = self.length * q.element_size() <= SAVED_BYTES

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.length, BLOCK):
            yield slice(start, min(start + BLOCK, self.length))

    def per_key_head(self, x: Tensor) -> Tensor:
        """(E, H, n, d) -> (E * H_kv, H / H_kv * n, d)"""
        return x.reshape(len(self.k), self.shared * x.shape[2], x.shape[3])

    def per_query(self, x: Tensor) -> Tensor:
        """(E * H_kv, H / H_kv * n, d) -> (E, H, n, d)"""
        return x.view(self.examples, -1, x.shape[1] // self.shared, x.shape[2])

    def sums_over_blocks(self) -> tuple[Tensor, Tensor]:
        """Zeros for the gradients of k and v, in float32 to accumulate over blocks."""
        dtype = promoted(self.k.dtype)
        return torch.zeros_like(self.k, dtype=dtype), torch.zeros_like(self.v, dtype=dtype)

    def by_example(self, x: Tensor) -> Tensor:
        return x.view(self.examples, -1, *x.shape[1:])

    def scaled_queries(self, queries: slice) -> Tensor:
        return self.per_key_head(self.q[:, :, queries] * self.scale)

    def probabilities(self, queries: slice) -> Tensor:
        """(E * H_kv, H / H_kv * n, keys) of a block of queries; later keys are all masked."""
        scores = self.scaled_queries(queries) @ self.k[:, : queries.stop].transpose(1, 2)
        self.per_query(scores).add_(self.mask[:, :, queries, : queries.stop])
        return scores.softmax(-1)
