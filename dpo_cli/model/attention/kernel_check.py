"""A kernel on random rows of a model's shapes, compared with matmuls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_cli.model.attention import products as kernels
from dpo_cli.model.attention import varlen
from dpo_cli.model.attention.layout import Layout
from dpo_cli.model.attention.layouts import LAYOUTS, PaddedLayout
from dpo_cli.model.attention.registered import Placement, Seen
from dpo_cli.model.skeleton import TRIED
from dpo_cli.records import Segment

HALF = (torch.bfloat16, torch.float16)
TOLERANCE = {True: 5e-2, False: 1e-3}  # relative; in half precision, in float32


def kernel_error(
    kernel: str, seen: Sequence[Seen], on: Placement, dropout: float = 0.0
) -> str | None:
    """Why a kernel is wrong for the layers' arguments on random rows (against matmuls), or None."""
    if dropout and kernel != "sdpa":
        return "it does not support dropout (model.dropout)"
    # More than a block of FlexAttention, ragged, with branches of zero tokens and of one.
    segments = (Segment(0, 70, (130, 1)), Segment(201, 1, (0, 40)), Segment(242, 9, (33, 0)))
    packed, exact = (
        LAYOUTS[name].build(segments).to(on.device) for name in (kernel, "sdpa")
    )  # fmt: skip
    assert isinstance(exact, PaddedLayout)
    everything = varlen.usable()
    for asked in seen:
        first = why = _refusal(packed, exact, asked, on)
        while why is not None and kernel == "varlen" and (wrong := varlen.chosen(asked.call)):
            varlen.use(tuple(x for x in varlen.usable() if x is not wrong))
            why = _refusal(packed, exact, asked, on)
            if why is None:
                on.note(f"attention=varlen: not by {wrong.name}: {first}")
        if why is not None:
            varlen.use(everything)  # another model may need less
            return first
    return None


def _refusal(packed: Layout, exact: PaddedLayout, asked: Seen, on: Placement) -> str | None:
    try:
        worst = _kernel_difference(packed, exact, asked, on)
    except TRIED as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not worst < TOLERANCE[on.dtype in HALF]:
        return f"its result or gradient differs by {worst:.1%} for {asked}"
    return None


def _kernel_difference(packed: Any, exact: PaddedLayout, asked: Seen, on: Placement) -> float:
    generator = torch.Generator(on.device).manual_seed(0)
    shapes = [(asked.heads, asked.head_dim), (asked.kv_heads, asked.head_dim),
              (asked.kv_heads, asked.value_dim)]  # fmt: skip
    rows = len(exact.scatter)
    leaves = [
        torch.randn(1, h, rows, d, generator=generator, device=on.device).to(on.dtype)
        for h, d in shapes
    ]
    exactly = partial(exact.attend_by, kernels.matmul)
    ways: list[tuple[Callable[..., Tensor], torch.dtype]] = [
        (packed.attend, on.dtype), (exactly, torch.float32)
    ]  # fmt: skip
    outcomes = []
    for attend, dtype in ways:
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = attend(*inputs, asked.call)
        weights = torch.linspace(-1.0, 1.0, out.numel(), device=on.device).view(out.shape)
        grads = torch.autograd.grad((out.float() * weights).sum(), inputs)
        outcomes.append([out.detach().float(), *(g.float() for g in grads)])
    pairs = zip(*outcomes, strict=True)
    return largest((a - b).norm() / b.norm() for a, b in pairs)


def largest(values: Iterable[Tensor]) -> float:
    """The largest value, 0 if there are none, NaN if any is (Python's `max` may skip it)."""
    return float(torch.stack([torch.zeros(()), *(v.float().cpu() for v in values)]).max())
