"""Attention over packed rows: one function registered with transformers.

A branch sees its prompt and itself, never the other branches or examples. Each example
of the row becomes one entry of a small padded batch for the attention product alone;
every other layer works on the packed row. Models whose attention does not go through
transformers' interface get a dense mask over the whole row instead (`dense_mask`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from dpo_cli.records import Batch, Segment

NAME = "dpo_packed"


@dataclass
class PackedLayout:
    """Index maps between a packed row and its (E, L) padded examples, built once a row.

    gather: (E, L) row of the packed sequence (padding points at the example's first token);
    scatter: (T,) place of each packed token in the flattened (E, L).
    allowed: (E, 1, L, L) who may look at whom; positions: (E, L).
    """

    gather: Tensor
    scatter: Tensor
    allowed: Tensor
    positions: Tensor
    windowed: dict[int, Tensor] = field(default_factory=dict)
    calls: int = 0

    def mask(self, window: int | None) -> Tensor:
        if window is None:
            return self.allowed
        if window not in self.windowed:
            distance = self.positions[:, None, :, None] - self.positions[:, None, None, :]
            self.windowed[window] = self.allowed & (distance < window)
        return self.windowed[window]


def _branch_of_tokens(segment: Segment, length: int) -> Tensor:
    """(L,) 0 for the prompt, 1.. for its branches, -1 for padding."""
    sizes = torch.tensor([segment.prompt, *segment.branches])
    labels = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return torch.nn.functional.pad(labels, (0, length - len(labels)), value=-1)


def build_layout(batch: Batch) -> PackedLayout:
    """Index maps and mask of a packed row, on the row's device."""
    device = batch.input_ids.device
    sizes = [s.prompt + sum(s.branches) for s in batch.layout]
    length = max(sizes)
    columns = torch.arange(length)
    starts = torch.tensor([s.start for s in batch.layout])[:, None]
    real = columns[None, :] < torch.tensor(sizes)[:, None]
    gather = torch.where(real, starts + columns, starts)
    scatter = real.flatten().nonzero().squeeze(1)
    branch = torch.stack([_branch_of_tokens(s, length) for s in batch.layout])
    same = branch[:, :, None] == branch[:, None, :]
    earlier = columns[None, :, None] >= columns[None, None, :]
    allowed = earlier & (same | (branch[:, None, :] == 0))
    positions = batch.position_ids.cpu()[gather]
    return PackedLayout(
        gather.to(device), scatter.to(device), allowed[:, None].to(device), positions.to(device)
    )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q (1, H, T, d), k and v (1, H_kv, T, d)."""
    assert packed_layout is not None, "the model dropped `packed_layout`; use attention=dense"
    assert kwargs.get("s_aux") is None, "attention sinks are not supported; use attention=dense"
    packed_layout.calls += 1
    # Under autocast rotary embeddings leave q and k in float32.
    q, k, v = (_unpack(x.to(value.dtype), packed_layout) for x in (query, key, value))
    mask = packed_layout.mask(sliding_window)
    if q.shape[1] != k.shape[1] and (q.is_cuda or q.dtype == torch.bfloat16 or softcap is not None):
        k, v = (repeat_kv(x, q.shape[1] // x.shape[1]) for x in (k, v))
    if softcap is not None or (q.dtype == torch.bfloat16 and not q.is_cuda):
        out = _matmul_attention(q, k, v, mask, scaling, softcap)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    flat = out.transpose(1, 2).flatten(0, 1)  # (E*L, H, d)
    return flat.index_select(0, packed_layout.scatter)[None], None


def _unpack(x: Tensor, layout: PackedLayout) -> Tensor:
    """(1, H, T, d) -> (E, H, L, d)"""
    rows = x[0].transpose(0, 1).index_select(0, layout.gather.flatten())
    return rows.view(*layout.gather.shape, *rows.shape[1:]).transpose(1, 2)


def _matmul_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """With soft-capping, which SDPA lacks, and in bf16 on a CPU, where its kernel is slower
    than two matmuls (half the speed at 300 tokens, a fifth at 60). Softmax is in float32."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (q * scale) @ k.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=promoted(q.dtype))
    return weights.to(v.dtype) @ v


def promoted(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def dense_mask(batch: Batch, dtype: torch.dtype) -> Tensor:
    """(1, 1, T, T) additive mask of the same visibility, for models without the interface."""
    layout = build_layout(batch)
    rows = batch.input_ids.shape[0]
    allowed = torch.zeros(rows, rows, dtype=torch.bool, device=batch.input_ids.device)
    for segment, visible in zip(batch.layout, layout.allowed[:, 0], strict=True):
        size = segment.prompt + sum(segment.branches)
        span = slice(segment.start, segment.start + size)
        allowed[span, span] = visible[:size, :size]
    mask = torch.zeros(rows, rows, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]


@contextmanager
def attention_as(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the body with another attention implementation (sampling needs a cached one)."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(NAME, packed_attention)
