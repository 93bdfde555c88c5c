"""The attention operations, each over the shapes that its kernel expects.

`padded` runs anywhere; `flex` is PyTorch's FlexAttention, for CUDA. Variable-length FlashAttention
is in `varlen.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import repeat_kv

from dpo_cli.logprobs import promoted


@dataclass(frozen=True)
class Call:
    """Arguments of a layer's attention: softmax(cap(q k^T scaling)) v, cap(x) = c tanh(x/c).

    scaling: default 1/sqrt(d); window: a query sees the last `window` positions, including its
    own.
    """

    scaling: float | None = None
    softcap: float | None = None
    window: int | None = None
    dropout: float = 0.0


Padded = Callable[[Tensor, Tensor, Tensor, Tensor, Call], Tensor]


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, call: Call) -> Tensor:
    """q (E, H, L, d), k and v (E, H_kv, L, d), mask (E, 1, L, L) -> (E, H, L, d)"""
    if call.softcap is not None or (q.dtype == torch.bfloat16 and not q.is_cuda):
        return matmul(q, k, v, mask, call)
    if q.is_cuda:
        k, v = (repeat_kv(x, q.shape[1] // x.shape[1]) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=call.dropout, scale=call.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, call: Call) -> Tensor:
    """Attention by matmuls, with a float32 softmax: for soft-capping, which SDPA lacks, and bf16
    on a CPU, where SDPA is slower (half the speed at 300 tokens, a fifth at 60)."""
    k, v = (repeat_kv(x, q.shape[1] // x.shape[1]) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    scores = (q * scale) @ k.transpose(-1, -2)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=promoted(q.dtype))
    if call.dropout:
        weights = torch.nn.functional.dropout(weights, call.dropout)
    return weights.to(v.dtype) @ v


Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, q, k) -> bool


def block_mask(visible: Visible, row: Tensor) -> Any:
    """FlexAttention's block mask for a row with the length and device of `row`, (T,)."""
    return create_block_mask(visible, None, None, len(row), len(row), device=str(row.device))


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, call: Call) -> Tensor:
    """q (1, H, T, d), k and v (1, H_kv, T, d) -> (1, H, T, d). No gradient on a CPU."""
    if call.dropout:
        raise RuntimeError("FlexAttention has no dropout")
    cap = call.softcap

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cast(float, cap) * torch.tanh(score / cast(float, cap))

    function = compiled_flex() if q.is_cuda else cast(Any, flex_attention)
    return cast(Tensor, function(
        q, k, v, score_mod=None if cap is None else capped, block_mask=mask,
        scale=call.scaling, enable_gqa=q.shape[1] != k.shape[1],
    ))  # fmt: skip


@cache
def compiled_flex() -> Callable[..., Any]:
    """Compiled, as eager FlexAttention materializes (H, T, T) scores; dynamic in the length."""
    return torch.compile(flex_attention, dynamic=True)


def lacking(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this machine and precision cannot run a kernel, or None, whatever the model."""
    if kernel == "grouped" and device.type != "cpu":
        return "runs on a CPU only"
    if kernel not in ("varlen", "flex"):
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    if kernel == "flex":
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs half precision: set hardware.precision=bf16"
    if not any(map(find_spec, ("torch.nn.attention.varlen", "flash_attn", "flash_attn_interface"))):
        return "needs PyTorch 2.10 or the package flash-attn"
    return None
