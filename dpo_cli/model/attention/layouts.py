"""Attention layouts: the ways in which the tokens of a packed row can attend to each other.

Four use the attention function registered with transformers (`interface.py`); the dense mask and
the plain forward are for models that do not call it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dpo_cli.model.attention import kernels, varlen
from dpo_cli.model.attention.grouped import GroupedLayout
from dpo_cli.model.attention.kernels import Call
from dpo_cli.model.attention.layout import (
    Layout,
    Span,
    grid_of,
    row_of,
    spans_of,
    token_maps,
    visible,
)
from dpo_cli.records import Batch, Segment

SIMILAR = 0.75  # PlainLayout: minimum length of a forward's sequences relative to its longest


@dataclass
class PaddedLayout(Layout):
    """Each example is one entry of a padded batch, for attention only.

    gather, branch, positions: (E, L) as in `Grid`; scatter: (T,) place of each packed token in
    the flattened (E, L).
    """

    gather: Tensor
    scatter: Tensor
    branch: Tensor
    positions: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def build(cls, segments: Sequence[Segment]) -> PaddedLayout:
        grid = grid_of(segments)
        parts = grid.tokens, np.flatnonzero(grid.real), grid.branch, grid.positions
        return cls(*map(torch.from_numpy, parts))

    def mask(self, window: int | None) -> Tensor:
        """(E, 1, L, L) boolean mask, cached per window."""
        if window not in self.masks:
            self.masks[window] = visible(self.branch, self.positions, window)
        return self.masks[window]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        return self.attend_by(kernels.padded, query, key, value, call)

    def attend_by(
        self, product: kernels.Padded, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> Tensor:
        q, k, v = (self._unpack(x) for x in (query, key, value))
        out = product(q, k, v, self.mask(call.window), call)
        flat = out.transpose(1, 2).flatten(0, 1)  # (E*L, H, d)
        return flat.index_select(0, self.scatter)[None]

    def _unpack(self, x: Tensor) -> Tensor:
        """(1, H, T, d) -> (E, H, L, d)"""
        rows = x.squeeze(0).transpose(0, 1).index_select(0, self.gather.flatten())
        return rows.view(*self.gather.shape, *rows.shape[1:]).transpose(1, 2)


@dataclass
class VarlenLayout(Layout):
    """One call of a variable-length kernel per layer, causal with bottom-right alignment.

    Queries are the row itself, split into [p+c1], [c2], ...; keys and values are gathered as
    [p, c1], [p, c2], ... so that each branch follows its prompt.

    keys: (T_k,) the packed token of each key; cu_q, cu_k: int32 (segments + 1,) offsets.
    first: (T,) a row of `keys` that holds each token; again: (tokens, rows of `keys`) of the
    second occurrence of a prompt, of the third, ...
    """

    keys: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    first: Tensor
    again: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def build(cls, segments: Sequence[Segment]) -> VarlenLayout:
        spans = list(spans_of(segments))
        keys = np.concatenate([span.tokens for span in spans])
        lengths_q = [span.asking for span in spans]
        lengths_k = [len(span.tokens) for span in spans]
        offsets = np.concatenate([[0], np.cumsum(lengths_k)])
        first = np.empty(sum(lengths_q), dtype=np.int64)
        again: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for span, offset, asking in zip(spans, offsets, lengths_q, strict=False):
            rows, shared = np.arange(len(span.tokens)) + offset, len(span.tokens) - asking
            first[span.tokens[shared:]] = rows[shared:]
            if shared:
                again.setdefault(span.number, []).append((span.tokens[:shared], rows[:shared]))
        return cls(
            torch.from_numpy(keys),
            _offsets(lengths_q),
            _offsets(lengths_k),
            max(lengths_q),
            max(lengths_k),
            torch.from_numpy(first),
            tuple(_joined(parts) for _, parts in sorted(again.items())),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        # Not x[0], whose gradient allocates a zeroed tensor; that of squeeze is a view.
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if self.again:  # else every token is one key, in the order of the row
            k, v = _Shared.apply(k, self), _Shared.apply(v, self)
            # A view of a joint qkv projection would keep keys and values alive as well.
            q = q.contiguous()
        cuts = varlen.Cuts(self.cu_q, self.cu_k, self.max_q, self.max_k)
        return varlen.attend(q, k, v, cuts, call)[None]


class _Shared(torch.autograd.Function):
    """Gather rows of `x` by `layout.keys`, repeating prompts, with a deterministic gradient.

    The gradient of index_select uses atomic adds on CUDA, whose order varies.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: VarlenLayout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), layout = grads, ctx.layout
        out = grad.index_select(0, layout.first)
        for tokens, rows in layout.again:  # no token twice within one of them
            out.index_add_(0, tokens, grad.index_select(0, rows))
        return out, None


def _joined(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    tokens, rows = (torch.from_numpy(np.concatenate(side)) for side in zip(*pairs, strict=True))
    return tokens, rows


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


@dataclass
class FlexLayout(Layout):
    """FlexAttention over the whole row, with a block mask that skips fully masked blocks.

    example, branch, position: int32 (T,) of each token; branch as in `Grid`.
    """

    example: Tensor
    branch: Tensor
    position: Tensor
    masks: dict[int | None, Any] = field(default_factory=dict, init=False)
    traced = False  # FlexAttention is compiled on its own

    @classmethod
    def build(cls, segments: Sequence[Segment]) -> FlexLayout:
        return cls(*(torch.from_numpy(m.astype(np.int32)) for m in token_maps(segments)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        if call.window not in self.masks:
            allowed = allowed_in(self.example, self.branch, self.position, call.window)
            self.masks[call.window] = kernels.block_mask(allowed, self.example)
        return kernels.flex(query, key, value, self.masks[call.window], call).transpose(1, 2)


def allowed_in(
    example: Tensor, branch: Tensor, position: Tensor, window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's mask_mod: whether query q attends to key k."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (example[q] == example[k]) & (k <= q)
        seen = seen & ((branch[k] == 0) | (branch[k] == branch[q]))
        return seen if window is None else seen & (position[q] - position[k] < window)

    return allowed


@dataclass
class DenseLayout(Layout):
    """A (T, T) mask over the whole row, for models that ignore the registered attention.

    group: int32 (2, T) example and branch of each token.
    """

    group: Tensor

    @classmethod
    def build(cls, segments: Sequence[Segment]) -> DenseLayout:
        example, branch, _ = token_maps(segments)
        return cls(torch.from_numpy(np.stack([example, branch]).astype(np.int32)))

    def mask(self, dtype: torch.dtype) -> Tensor:
        """(1, 1, T, T) additive."""
        example, branch = self.group
        rows = torch.arange(len(example), device=example.device)
        allowed = (example[:, None] == example) & (rows[:, None] >= rows)
        allowed &= (branch == 0) | (branch[:, None] == branch)
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]

    def states(self, base_model: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
        out = base_model(**row_of(batch), attention_mask=self.mask(dtype))
        return cast(Tensor, out.last_hidden_state[0])


@dataclass
class PlainLayout(Layout):
    """The model's plain forward over unpacked sequences, padded on the right.

    Correct for any causal model, whatever it does with positions and masks, but slower: prompts
    are computed once per branch. No mask is needed, as causal tokens do not see the padding.

    rows: for each forward, (S, L) packed tokens of sequences of similar length; scatter: (T,)
    place of each packed token in the concatenation of the flattened outputs; real: (n,) 0 for
    the padding among those, else 1.
    """

    rows: tuple[Tensor, ...]
    scatter: Tensor
    real: Tensor

    @classmethod
    def build(cls, segments: Sequence[Segment]) -> PlainLayout:
        spans = sorted(spans_of(segments), key=lambda span: -len(span.tokens))
        groups: list[list[Span]] = []
        for span in spans:
            if not groups or len(span.tokens) < SIMILAR * len(groups[-1][0].tokens):
                groups.append([])
            groups[-1].append(span)
        scatter = np.empty(sum(span.asking for span in spans), dtype=np.int64)
        rows, real, offset = [], [], 0
        for group in groups:
            length = len(group[0].tokens)
            padded = np.stack([
                np.pad(s.tokens, (0, length - len(s.tokens)), mode="edge") for s in group
            ])  # fmt: skip
            for span in group:
                places = np.arange(len(span.tokens)) + offset
                scatter[span.tokens[-span.asking :]] = places[-span.asking :]
                real.append(np.arange(length) < len(span.tokens))
                offset += length
            rows.append(torch.from_numpy(padded))
        mask = np.concatenate(real).astype(np.float32)
        return cls(tuple(rows), torch.from_numpy(scatter), torch.from_numpy(mask))

    def spread(self, weights: Tensor) -> Tensor:
        return self.real  # prompts are repeated already

    def states(self, base_model: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
        parts = [
            base_model(input_ids=batch.input_ids[rows], use_cache=False).last_hidden_state
            for rows in self.rows
        ]
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self.scatter)


LAYOUTS: dict[str, type[Layout]] = {
    "grouped": GroupedLayout,
    "varlen": VarlenLayout,
    "flex": FlexLayout,
    "sdpa": PaddedLayout,
    "dense": DenseLayout,
    "plain": PlainLayout,
}
