"""Step 2: each attention kernel against float64 softmax over one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dpo_cli.model.attention import kernels
from dpo_cli.model.attention.interface import PACKED
from dpo_cli.model.attention.kernels import Call
from dpo_cli.model.attention.layouts import LAYOUTS
from dpo_cli.records import Segment
from scripts.gpu_checks.facts import Fact, Setup

# Ragged, with branches of no token and of one; longer than a block of any kernel.
SEGMENTS = (
    Segment(0, 70, (130, 1)), Segment(201, 1, (0, 40)), Segment(242, 9, (33, 0)),
    Segment(284, 300, (211, 57)),
)  # fmt: skip
SHORT = (Segment(0, 7, (5, 1)), Segment(13, 1, (0, 4)))
HEADS = ((20, 20, 64), (32, 8, 128), (4, 1, 256))  # heads, key heads, width
WINDOW = 64
LEFT_OUT = ("flex",)  # it compiles for every shape; tests/test_kernels_cuda.py has it


def check(setup: Setup) -> Iterator[Fact]:
    device, dtype = torch.device(setup.device), torch.bfloat16
    segments = SHORT if setup.small else SEGMENTS
    window = 3 if setup.small else WINDOW
    calls = {"": Call(), f" window {window}": Call(window=window), " scaled": Call(scaling=0.05)}
    for kernel in PACKED:
        why = kernels.lacking(kernel, device, dtype)
        if kernel in LEFT_OUT or why is not None:
            yield f"{kernel} left out", why or "slow to compile"
            continue
        for heads, kv_heads, width in HEADS[:1] if setup.small else HEADS:
            for name, call in calls.items():
                shape = f"({heads}, {kv_heads}, {width})"
                error = difference(kernel, segments, (heads, kv_heads, width), call, device, dtype)
                yield f"difference, {kernel} {shape}{name}", error


def difference(
    kernel: str,
    segments: Sequence[Segment],
    heads: tuple[int, int, int],
    call: Call,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """The largest relative difference of the result and the gradients of q, k, v."""
    generator = torch.Generator(device).manual_seed(0)
    rows = sum(s.prompt + sum(s.branches) for s in segments)
    leaves = [
        torch.randn(1, h, rows, heads[2], generator=generator, device=device).to(dtype)
        for h in (heads[0], heads[1], heads[1])
    ]
    weights = torch.randn(1, rows, heads[0], heads[2], generator=generator, device=device)
    layout = LAYOUTS[kernel].build(segments).to(device)
    result = outcome(lambda q, k, v: layout.attend(q, k, v, call), leaves, weights, dtype)
    exact = outcome(lambda q, k, v: plain(q, k, v, segments, call), leaves, weights, torch.float64)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(result, exact, strict=True))


def outcome(
    attend: Callable[..., Tensor], leaves: list[Tensor], weights: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The result, (1, T, H, d), and the gradients of q, k and v. In float64, settings for float32
    products, such as TF32, have no effect."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
    out = attend(*inputs)
    grads = torch.autograd.grad((out.double() * weights).sum(), inputs)
    return [out.detach().double(), *(g.double() for g in grads)]


def plain(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], call: Call) -> Tensor:
    """softmax(q k^T) v of prompt + branch, separately for every branch; a prompt's rows are those
    of the prompt alone. q (1, H, T, d) -> (1, T, H, d)"""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    pieces = []
    for segment in segments:
        prompt = torch.arange(segment.start, segment.start + segment.prompt, device=q.device)
        pieces.append(causal(q, k, v, prompt, call))
        start = segment.start + segment.prompt
        for size in segment.branches:
            branch = torch.arange(start, start + size, device=q.device)
            pieces.append(causal(q, k, v, torch.cat([prompt, branch]), call)[:, segment.prompt :])
            start += size
    return torch.cat(pieces, 1)


def causal(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, call: Call) -> Tensor:
    q, k, v = (x[:, :, tokens] for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    places = torch.arange(len(tokens), device=q.device)
    behind = places[:, None] - places[None, :]
    hidden = behind < 0
    if call.window is not None:
        hidden |= behind >= call.window
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)
