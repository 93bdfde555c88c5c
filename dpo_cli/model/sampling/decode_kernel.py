"""Attention of one new token per row as one Triton kernel, or two if prompts have several samples.

It reads only the columns that are filled; their number is read on the device, so one captured step
serves every token. `static_cache` has the same in PyTorch operations. Notation as there; a program
computes all G query heads of a key head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_cli.model.attention.kernels import Call

MAX_QUERIES = 64  # per program: further samples of a prompt go to other programs


@triton.jit
def _span(  # type: ignore[no-untyped-def]
    queries, most, total, acc, keys, values, first, last, width,
    softcap: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Continue an online softmax over columns first .. last - 1; `keys` and `values` point to
    column 0. Every block has at least one visible column, its first.
    """
    column, at = tl.arange(0, BLOCK), tl.arange(0, D)
    for start in range(first, last, BLOCK):
        seen = start + column < last
        where = (start + column)[:, None] * width + at[None, :]
        inside = seen[:, None] & (at < width)[None, :]
        k = tl.load(keys + where, mask=inside, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if softcap > 0.0:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        faded, weights = tl.exp(most - now), tl.exp(scores - now[:, None])
        v = tl.load(values + where, mask=inside, other=0.0)
        total = total * faded + tl.sum(weights, 1)
        acc = acc * faded[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = now
    return most, total, acc


@triton.jit
def _prompts(  # type: ignore[no-untyped-def]
    query, rows_of, keys, values, first, column, partial, sums,
    scale, samples, heads, columns, width, query_row, query_head, window,
    GROUP: tl.constexpr, softcap: tl.constexpr,
    Q: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per prompt, key head and Q queries: the prompt's part of their softmax."""
    prompt, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    at, number = tl.arange(0, D), tl.program_id(1) * Q + tl.arange(0, Q)
    sample, member = number // GROUP, head * GROUP + number % GROUP
    row = tl.load(rows_of + prompt * samples + sample, mask=sample < samples, other=-1)
    if tl.max(row, 0) >= 0:
        there, inside = row >= 0, (row >= 0)[:, None] & (at < width)[None, :]
        from_ = row.to(tl.int64) * query_row + member * query_head
        q = tl.load(query + from_[:, None] + at[None, :], mask=inside, other=0.0)
        q = (q.to(tl.float32) * scale).to(keys.dtype.element_ty)
        begin = tl.load(first + prompt)
        if window > 0:
            begin = tl.maximum(begin, columns + tl.load(column) + 1 - window)
        base = (prompt * heads + head).to(tl.int64) * columns * width
        most = tl.full([Q], float("-inf"), tl.float32)
        total, acc = tl.zeros([Q], tl.float32), tl.zeros([Q, D], tl.float32)
        most, total, acc = _span(
            q, most, total, acc, keys + base, values + base, begin.to(tl.int32), columns, width,
            softcap, D, BLOCK,
        )  # fmt: skip
        to = row.to(tl.int64) * heads * GROUP + member
        tl.store(partial + to[:, None] * width + at[None, :], acc, mask=inside)
        tl.store(sums + 2 * to, most, mask=there)
        tl.store(sums + 2 * to + 1, total, mask=there)


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    query, cells, prompt_keys, prompt_values, keys, values, first, column, partial, sums, out,
    scale, samples, heads, columns, own, width, query_row, query_head, window,
    GROUP: tl.constexpr, WITH_PROMPT: tl.constexpr, softcap: tl.constexpr,
    Q: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and key head: the row's own tokens, after the prompt's part."""
    row, head = tl.program_id(0), tl.program_id(1)
    at, number = tl.arange(0, D), tl.arange(0, Q)
    inside = (number < GROUP)[:, None] & (at < width)[None, :]
    member = head * GROUP + number
    from_ = row.to(tl.int64) * query_row + member * query_head
    q = tl.load(query + from_[:, None] + at[None, :], mask=inside, other=0.0)
    q = (q.to(tl.float32) * scale).to(keys.dtype.element_ty)
    newest = tl.load(column).to(tl.int32)
    to = row.to(tl.int64) * heads * GROUP + member
    if WITH_PROMPT:
        most = tl.full([Q], float("-inf"), tl.float32)
        total, acc = tl.zeros([Q], tl.float32), tl.zeros([Q, D], tl.float32)
        prompt = tl.load(cells + row) // samples
        begin = tl.load(first + prompt).to(tl.int32)
        if window > 0:
            begin = tl.maximum(begin, columns + newest + 1 - window)
        base = (prompt * heads + head).to(tl.int64) * columns * width
        most, total, acc = _span(
            q, most, total, acc, prompt_keys + base, prompt_values + base, begin, columns, width,
            softcap, D, BLOCK,
        )  # fmt: skip
    else:
        acc = tl.load(partial + to[:, None] * width + at[None, :], mask=inside, other=0.0)
        most = tl.load(sums + 2 * to, mask=number < GROUP, other=float("-inf"))
        total = tl.load(sums + 2 * to + 1, mask=number < GROUP, other=0.0)
    oldest = newest * 0
    if window > 0:
        oldest = tl.maximum(oldest, newest + 1 - window)
    base = (row * heads + head).to(tl.int64) * own * width
    most, total, acc = _span(
        q, most, total, acc, keys + base, values + base, oldest, newest + 1, width,
        softcap, D, BLOCK,
    )  # fmt: skip
    normalized = acc / total[:, None]
    tl.store(
        out + to[:, None] * width + at[None, :], normalized.to(out.dtype.element_ty), mask=inside
    )


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    new_keys, new_values, keys, values, column, own, width,
    key_row, key_head, value_row, value_head, D: tl.constexpr,
):  # fmt: skip
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    at = tl.arange(0, D)
    to = ((row * heads + head) * own + tl.load(column)) * width + at
    key = tl.load(new_keys + row * key_row + head * key_head + at, mask=at < width)
    tl.store(keys + to, key.to(keys.dtype.element_ty), mask=at < width)
    value = tl.load(new_values + row * value_row + head * value_head + at, mask=at < width)
    tl.store(values + to, value.to(values.dtype.element_ty), mask=at < width)


def store(own: tuple[Tensor, ...], new: tuple[Tensor, Tensor], column: Tensor) -> None:
    """Write a token's keys and values, (R, H_kv, 1, d) each, to column `column` of `own`."""
    keys, values = own
    _refuse(keys.shape != values.shape or any(x.stride(3) != 1 for x in new))
    rows, heads, _, width = new[0].shape
    _store[rows, heads](
        *new, keys, values, column, keys.shape[2], width,
        *(stride for x in new for stride in x.stride()[:2]), D=triton.next_power_of_2(width),
    )  # fmt: skip


def _refuse(unsupported: bool) -> None:
    if unsupported:
        raise RuntimeError("the kernel does not support these shapes or strides")


def attend(
    query: Tensor, prompt: tuple[Tensor, ...], own: tuple[Tensor, ...], cells: Tensor,
    rows_of: Tensor | None, first: Tensor, column: Tensor, call: Call,
) -> Tensor:  # fmt: skip
    """q (R, H, 1, d) -> (R, H, d). prompt: keys and values (P, H_kv, C, d), own (R, H_kv, N, d).

    cells: (R,) prompt * M + sample. rows_of: (P, M) the row of each cell, -1 if none; None
    reads a prompt's keys once per row. first: (P,) each prompt's first column. column: (1,) the
    new token's own column. RuntimeError for unsupported shapes.
    """
    rows, heads, _, width = query.shape
    keys, values = own
    _refuse(keys.shape != values.shape or query.stride(3) != 1)
    key_heads, columns = keys.shape[1], prompt[0].shape[2]
    group, d = heads // key_heads, max(16, triton.next_power_of_2(width))
    out = torch.empty(rows, heads, width, dtype=query.dtype, device=query.device)
    scale = width**-0.5 if call.scaling is None else call.scaling
    samples = 1 if rows_of is None else rows_of.shape[1]
    block = 64 if d <= 128 else 32
    window, softcap = call.window or 0, float(call.softcap or 0.0)
    strides = query.stride(0), query.stride(1), window
    partial = sums = out
    if rows_of is not None:
        partial = torch.empty(rows, heads, width, dtype=torch.float32, device=query.device)
        sums = torch.empty(rows, heads, 2, dtype=torch.float32, device=query.device)
        most = _block_of(samples * group, MAX_QUERIES)
        grid = len(rows_of) * key_heads, triton.cdiv(samples * group, most)
        _prompts[grid](
            query, rows_of, *prompt, first, column, partial, sums,
            scale, samples, key_heads, columns, width, *strides,
            GROUP=group, softcap=softcap, Q=most, D=d, BLOCK=block,
        )  # fmt: skip
    rows_kernel: Any = _rows[rows, key_heads]
    rows_kernel(
        query, cells, *prompt, *own, first, column, partial, sums, out,
        scale, samples, key_heads, columns, keys.shape[2], width, *strides,
        GROUP=group, WITH_PROMPT=rows_of is None, softcap=softcap,
        Q=_block_of(group, MAX_QUERIES * 2), D=d, BLOCK=block,
    )  # fmt: skip
    return out


def _block_of(count: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(count)))
