"""The attention products themselves, each over the shapes its hardware path wants.

`padded` runs anywhere. `varlen` is FlashAttention over rows of unequal length (PyTorch's
own, or the flash-attn package), `flex` is PyTorch's FlexAttention; both want CUDA.
"""

from __future__ import annotations

import inspect
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
    """What a layer asks of its attention: softmax(cap(q k^T scaling)) v, cap(x) = c tanh(x/c).

    scaling: default 1/sqrt(d); window: a query sees the last `window` positions, its own
    among them.
    """

    scaling: float | None = None
    softcap: float | None = None
    window: int | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Cuts:
    """Where the sequences of a varlen call begin: int32 (n + 1,) offsets; longest lengths."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


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
    """With soft-capping, which SDPA lacks, and in bf16 on a CPU, where its kernel is slower
    than two matmuls (half the speed at 300 tokens, a fifth at 60). Softmax is in float32."""
    k, v = (repeat_kv(x, q.shape[1] // x.shape[1]) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    scores = (q * scale) @ k.transpose(-1, -2)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=promoted(q.dtype))
    if call.dropout:
        weights = torch.nn.functional.dropout(weights, call.dropout)
    return weights.to(v.dtype) @ v


def varlen(q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, call: Call) -> Tensor:
    """q (T, H, d), k and v (T_k, H_kv, d) -> (T, H, d), causal and aligned bottom right.

    Half precision on CUDA. Raises RuntimeError for what no installed kernel can do.
    """
    if call.dropout:
        raise RuntimeError("variable-length attention has no dropout")
    kernel = flash_kernel() if call.softcap is not None else torch_kernel() or flash_kernel()
    if kernel is None:
        raise RuntimeError("soft-capping needs the package flash-attn")
    return kernel(q, k, v, cuts, call)


Varlen = Callable[[Tensor, Tensor, Tensor, Cuts, Call], Tensor]


_FOUND: dict[str, Varlen | None] = {}  # not functools.cache, through which a compiler looks


def torch_kernel() -> Varlen | None:
    if "torch" not in _FOUND:
        _FOUND["torch"] = _torch_kernel()
    return _FOUND["torch"]


def _torch_kernel() -> Varlen | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return adapt_torch(varlen_attn)


def adapt_torch(function: Callable[..., Any]) -> Varlen:
    """PyTorch's `varlen_attn`, whose keywords have changed with every release so far.

    2.10 had `is_causal` alone; later ones `scale`, `window_size` and `enable_gqa`. A window
    of w positions is `window_size=(w - 1, 0)`: it counts those before the query.
    """
    known = frozenset(inspect.signature(function).parameters)

    def kernel(q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, call: Call) -> Tensor:
        options: dict[str, Any] = {}
        if "window_size" in known:
            options["window_size"] = (-1 if call.window is None else call.window - 1, 0)
        elif call.window is None:
            options["is_causal"] = True
        else:
            raise RuntimeError("this PyTorch's varlen_attn has no sliding window")
        if call.scaling is not None and "scale" in known:
            options["scale"] = call.scaling
        elif call.scaling is not None:
            q = q * (call.scaling * q.shape[-1] ** 0.5)
        if "enable_gqa" in known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        elif q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return cast(
            Tensor, function(q, k, v, cuts.cu_q, cuts.cu_k, cuts.max_q, cuts.max_k, **options)
        )

    return kernel


def flash_kernel() -> Varlen | None:
    if "flash-attn" not in _FOUND:
        _FOUND["flash-attn"] = _flash_kernel()
    return _FOUND["flash-attn"]


def _flash_kernel() -> Varlen | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return adapt_flash(flash_attn_varlen_func)


def adapt_flash(function: Callable[..., Any]) -> Varlen:
    """flash-attn 2's `flash_attn_varlen_func`; its causal mask is bottom right since 2.1."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, call: Call) -> Tensor:
        return cast(Tensor, function(
            q, k, v, cuts.cu_q, cuts.cu_k, cuts.max_q, cuts.max_k,
            softmax_scale=call.scaling, causal=True, softcap=call.softcap or 0.0,
            window_size=(-1, -1) if call.window is None else (call.window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        ))  # fmt: skip

    return kernel


Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, q, k) -> bool


def block_mask(visible: Visible, row: Tensor) -> Any:
    """FlexAttention's mask over a row of the length and device of `row`, (T,)."""
    return create_block_mask(visible, None, None, len(row), len(row), device=str(row.device))


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, call: Call) -> Tensor:
    """q (1, H, T, d), k and v (1, H_kv, T, d) -> (1, H, T, d). On a CPU no gradient exists."""
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
    """Uncompiled it would hold all (H, T, T) scores. dynamic: rows differ in length."""
    return torch.compile(flex_attention, dynamic=True)


def lacking(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this machine and precision cannot run a kernel, or None. Says nothing of the model."""
    if kernel == "grouped" and device.type != "cpu":
        return "computes on a CPU"
    if kernel not in ("varlen", "flex"):
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    if kernel == "flex":
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return "computes in half precision: set hardware.precision=bf16"
    if find_spec("torch.nn.attention.varlen") is None and find_spec("flash_attn") is None:
        return "needs PyTorch 2.10 or the package flash-attn"
    return None
