"""The CPU's grouped attention in bf16, at lengths of its real blocks, against float64."""

import pytest
import torch

from dpo_cli.model.attention import grouped, kernels
from dpo_cli.model.attention.grouped import GroupedLayout
from dpo_cli.model.attention.kernels import Call
from dpo_cli.model.attention.layouts import PaddedLayout
from dpo_cli.records import Segment

# 1,050 and 900 tokens: probabilities are worked out again; 350 and 300: kept, three blocks.
LENGTHS = ((200, (450, 400)), (1, (899,)), (90, (200, 60)), (250, (0, 50)), (4, (1, 4)))
HEADS, KV_HEADS, WIDTH = 4, 2, 32
# A rounding to bf16 is off by 2^-9 at most. One after the other are rounded, on the longest way
# (to dk): scaled queries, scores, probabilities, their gradient, the scores' gradient and dk.
# Errors of many terms average out: found are 1.2 to 3.4 roundings.
TOLERANCE = 5 * 2.0**-9


def segments():
    start, found = 0, []
    for prompt, branches in LENGTHS:
        found.append(Segment(start, prompt, branches))
        start += prompt + sum(branches)
    return found, start


def outcome(attend, dtype, call):
    """The result and the gradients of q, k and v, (T, H, d) each."""
    _, tokens = segments()
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(1, *shape, generator=generator).bfloat16()  # noqa: E731
    inputs = [
        draw(heads, tokens, WIDTH).to(dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    out = attend(*inputs, call)
    grads = torch.autograd.grad(out, inputs, draw(tokens, HEADS, WIDTH).to(dtype))
    return [out.detach()[0], *(g[0].transpose(0, 1) for g in grads)]


def exactly(q, k, v, call):
    """Matmuls over one example at a time."""
    layouts = [PaddedLayout.build([row]) for row in segments()[0]]
    return torch.cat([x.attend_by(kernels.matmul, q, k, v, call) for x in layouts], dim=1)


def test_the_lengths_reach_every_path():
    groups = GroupedLayout.build(segments()[0]).groups
    sizes = [group.branch.shape[1] for group in groups]
    assert [2 * size <= grouped.SAVED_BYTES for size in sizes] == [False, True, True]
    assert [size > grouped.BLOCK for size in sizes] == [True, True, False]
    assert [group.places is None for group in groups] == [False, False, True]


@pytest.mark.parametrize("call", [Call(), Call(0.3, None, 150), Call(softcap=2.0)], ids=str)
def test_values_and_gradients_of_every_example(call):
    rows, _ = segments()
    truth = outcome(exactly, torch.float64, call)
    found = outcome(GroupedLayout.build(rows).attend, torch.bfloat16, call)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, truth, strict=True):
        assert a.dtype == torch.bfloat16
        for row in rows:
            part = slice(row.start, row.start + row.prompt + sum(row.branches))
            error = (a[part].double() - b[part]).norm() / b[part].norm()
            assert error < TOLERANCE, (name, row)
