"""A Triton kernel: log-probabilities of targets and their slopes, from rows of float32 logits.

One program per row reads it twice: for its maximum and sum of exponentials, then (from the GPU's
cache if the row is still there) for its slopes. This module imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns for which one row per multiprocessor fits into an H100's L2 cache of 50 MB.
CACHED_COLUMNS = 65_536


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    row, bias, at, scale, softcap, VOCAB, COLUMNS, HAS_BIAS, HAS_SOFTCAP
):
    """cap(scale * (logit + bias)) at some columns; undefined beyond the vocabulary.

    The load is bounded by COLUMNS, not VOCAB: a multiple of 16 is vectorized.
    """
    z = tl.load(row + at, mask=at < COLUMNS, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias + at, mask=at < VOCAB, other=0.0).to(tl.float32)
    z *= scale
    if HAS_SOFTCAP:
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (z / softcap)) + 1.0))  # c tanh(z / c)
    return z


@triton.jit
def _softmax_rows(  # type: ignore[no-untyped-def]
    logits, logits_stride, bias, targets, logprobs, slopes, slopes_stride,
    scale, softcap, VOCAB: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows * columns may exceed 2^31
    logits += row * logits_stride
    target = tl.load(targets + row)
    lanes = tl.arange(0, BLOCK)

    top = -3.4028234663852886e38  # not -inf: -inf - -inf is NaN
    total = 0.0
    for start in range(0, VOCAB, BLOCK):
        at = start + lanes
        z = _logits(logits, bias, at, scale, softcap, VOCAB, COLUMNS, HAS_BIAS, HAS_SOFTCAP)
        z = tl.where(at < VOCAB, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), axis=0)
        top = higher
    # The maximum is subtracted first, or a confident token's log-probability would be lost in the
    # logits' rounding.
    own = _logits(logits, bias, target, scale, softcap, VOCAB, COLUMNS, HAS_BIAS, HAS_SOFTCAP)
    tl.store(logprobs + row, (own - top) - tl.log(total))

    if WITH_SLOPES:
        slopes += row * slopes_stride
        for start in range(0, COLUMNS, BLOCK):
            at = start + lanes
            z = _logits(logits, bias, at, scale, softcap, VOCAB, COLUMNS, HAS_BIAS, HAS_SOFTCAP)
            p = tl.exp(z - top) / total
            slope = tl.where(at == target, 1.0 - p, -p)  # in float32: 1 - p is 0 in bf16 early
            if HAS_SOFTCAP:
                slope *= 1.0 - (z / softcap) * (z / softcap)
            slope = tl.where(at < VOCAB, slope, 0.0)
            tl.store(slopes + at, slope.to(slopes.dtype.element_ty), mask=at < COLUMNS)


def softmax_rows(
    logits: Tensor,
    targets: Tensor,
    vocab: int,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """(n,) float32 log-probabilities of the targets, (n,), under cap(scale * (logits + bias)).

    logits: (n, columns) float32, of which the first `vocab` columns count; bias: (vocab,);
    slopes: (n, columns) in any dtype, filled with d logp / d (scale * (logits + bias)), 0 beyond
    the vocabulary.
    """
    rows, columns = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and columns >= vocab
    assert slopes is None or (slopes.shape == logits.shape and slopes.stride(1) == 1)
    # One row per multiprocessor, if the second read then hits the cache; else several.
    block, warps = (32_768, 32) if columns <= CACHED_COLUMNS else (8192, 16)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return logprobs
    given = logits if slopes is None else slopes  # some pointer, which is not read
    with torch.cuda.device_of(logits):
        _softmax_rows[(rows,)](
            logits, logits.stride(0), logits if bias is None else bias, targets, logprobs,
            given, given.stride(0), scale, softcap or 1.0, VOCAB=vocab, COLUMNS=columns,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            WITH_SLOPES=slopes is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return logprobs
