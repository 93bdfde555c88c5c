"""PyTorch's variable-length attention operator on a CPU, where it has no kernel.

The operator itself, with its shapes for the compiler and its formula of a gradient, stays
PyTorch's; what runs is written down here, one sequence at a time, and as strict as CUDA's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.attention.varlen as torch_varlen
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def _sequences(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Iterator[tuple[slice, slice]]:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    edges = [list(zip(cu.tolist(), cu.tolist()[1:], strict=False)) for cu in (cu_q, cu_k)]
    assert max_q == max(end - start for start, end in edges[0])
    assert max_k == max(end - start for start, end in edges[1])
    for (a, b), (c, d) in zip(*edges, strict=True):
        yield slice(a, b), slice(c, d)


def _probabilities(q: Tensor, k: Tensor, scale: float | None, window: Any) -> Tensor:
    """q (n, H, d), k (m, H, d) -> (H, n, m); aligned bottom right, `window` positions back."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows = torch.arange(len(q))[:, None] + len(k) - len(q)
    seen = torch.arange(len(k)) <= rows
    if window[0] >= 0:
        seen &= torch.arange(len(k)) >= rows - window[0]
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: Any) -> int:
    """The number of heads that share a key."""
    assert q.dtype in HALF
    assert k.dtype == v.dtype == q.dtype
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert q.shape[-1] % 8 == 0
    assert causal or window[1] == 0
    return q.shape[1] // k.shape[1]


def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, window_size: Any = None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    group = _check(query, key, value, is_causal, window_size)
    out = torch.empty(query.shape, dtype=query.dtype)
    for ours, theirs in _sequences(cu_q, cu_k, max_q, max_k):
        k, v = (x[theirs].float().repeat_interleave(group, 1) for x in (key, value))
        shares = _probabilities(query[ours].float(), k, scale, window_size)
        out[ours] = torch.einsum("hnm,mhd->nhd", shares, v).to(out.dtype)
    return out, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, is_causal: bool, rng_state: Tensor,
    scale: float | None = None, window_size: Any = None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    group = _check(query, key, value, is_causal, window_size)
    by = query.shape[-1] ** -0.5 if scale is None else scale
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    for ours, theirs in _sequences(cu_q, cu_k, max_q, max_k):
        q, upstream = query[ours].float(), grad_out[ours].float()
        k, v = (x[theirs].float().repeat_interleave(group, 1) for x in (key, value))
        shares = _probabilities(q, k, scale, window_size)
        above = torch.einsum("nhd,mhd->hnm", upstream, v)
        scores = shares * (above - (shares * above).sum(-1, keepdim=True)) * by
        found = (
            torch.einsum("hnm,mhd->nhd", scores, k),
            torch.einsum("hnm,nhd->mhd", scores, q).unflatten(1, (-1, group)).sum(2),
            torch.einsum("hnm,nhd->mhd", shares, upstream).unflatten(1, (-1, group)).sum(2),
        )
        for grad, part, values in zip(grads, (ours, theirs, theirs), found, strict=True):
            grad[part] = values.to(grad.dtype)
    return grads[0], grads[1], grads[2]


def register() -> None:
    """Give the operator its CPU kernels, in this process."""
    operators: Any = torch_varlen
    operators._varlen_attn.register_kernel("cpu", _forward)
    operators._varlen_attn_backward.register_kernel("cpu", _backward)
