"""A kernel on random rows of a model's shapes, compared with matmuls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_cli.errors import first_line
from dpo_cli.model.attention import kernels, varlen
from dpo_cli.model.attention.interface import Placement, Seen
from dpo_cli.model.attention.layout import Layout
from dpo_cli.model.attention.layouts import LAYOUTS, PaddedLayout
from dpo_cli.model.skeleton import PROBE_ERRORS
from dpo_cli.records import Segment

HALF = (torch.bfloat16, torch.float16)
TOLERANCE = {True: 5e-2, False: 1e-3}  # relative; in half precision, in float32


def kernel_mismatch(
    kernel: str, seen: Sequence[Seen], on: Placement, dropout: float = 0.0
) -> str | None:
    """Why a kernel is wrong for the layers' arguments, compared with matmuls on random rows, or
    None. Excludes wrong implementations of `varlen`, with a note."""
    if dropout and kernel != "sdpa":
        return "it does not support dropout (model.dropout)"
    # More than a block of FlexAttention, ragged, with branches of zero tokens and of one.
    segments = (Segment(0, 70, (130, 1)), Segment(201, 1, (0, 40)), Segment(242, 9, (33, 0)))
    packed, exact = (
        LAYOUTS[name].build(segments).to(on.device) for name in (kernel, "sdpa")
    )  # fmt: skip
    assert isinstance(exact, PaddedLayout)
    implementations = varlen.usable()
    for layer in seen:
        first = reason = _mismatch(packed, exact, layer, on)
        while (
            reason is not None
            and kernel == "varlen"
            and (implementation := varlen.chosen(layer.call))
        ):
            varlen.use(tuple(x for x in varlen.usable() if x is not implementation))
            reason = _mismatch(packed, exact, layer, on)
            if reason is None:
                on.note(f"attention=varlen: does not use {implementation.name}: {first}")
        if reason is not None:
            varlen.use(implementations)  # they may be right for another model
            return first
    return None


def _mismatch(packed: Layout, exact: PaddedLayout, layer: Seen, on: Placement) -> str | None:
    try:
        difference = _kernel_difference(packed, exact, layer, on)
    except PROBE_ERRORS as error:
        return first_line(error)
    if not difference < TOLERANCE[on.dtype in HALF]:
        return f"its result or gradient differs by {difference:.1%} for {layer}"
    return None


def _kernel_difference(packed: Any, exact: PaddedLayout, layer: Seen, on: Placement) -> float:
    generator = torch.Generator(on.device).manual_seed(0)
    shapes = [(layer.heads, layer.head_dim), (layer.kv_heads, layer.head_dim),
              (layer.kv_heads, layer.value_dim)]  # fmt: skip
    rows = len(exact.scatter)
    leaves = [
        torch.randn(1, h, rows, d, generator=generator, device=on.device).to(on.dtype)
        for h, d in shapes
    ]
    exactly = partial(exact.attend_by, kernels.matmul)
    versions: list[tuple[Callable[..., Tensor], torch.dtype]] = [
        (packed.attend, on.dtype), (exactly, torch.float32)
    ]  # fmt: skip
    outcomes = []
    for attend, dtype in versions:
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = attend(*inputs, layer.call)
        weights = torch.linspace(-1.0, 1.0, out.numel(), device=on.device).view(out.shape)
        grads = torch.autograd.grad((out.float() * weights).sum(), inputs)
        outcomes.append([out.detach().float(), *(g.float() for g in grads)])
    pairs = zip(*outcomes, strict=True)
    return largest((a - b).norm() / b.norm() for a, b in pairs)


def largest(values: Iterable[Tensor]) -> float:
    """The largest value, 0 if there are none, NaN if any is (Python's `max` may skip it)."""
    return float(torch.stack([torch.zeros(()), *(v.float().cpu() for v in values)]).max())
