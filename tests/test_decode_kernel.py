"""The decoding kernel against the same attention in PyTorch's operations, over drops of rows: on a
GPU, else in Triton's interpreter, where Triton is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE, TOLERANCE = (torch.bfloat16, 2e-2) if CUDA else (torch.float32, 2e-5)


def missing():
    """Why the kernel cannot be run, or None. Triton must be asked for its interpreter before it
    is first imported, which our modules do, so this runs before any is."""
    if find_spec("triton") is None:
        return "needs Triton"
    if CUDA:
        return None
    if "triton" in sys.modules:
        return "Triton is imported already, without its interpreter: run this file alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from dpo_cli.model.sampling import decode_kernel  # noqa: F401
    return None


WHY = missing()
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY))] + [pytest.mark.cuda] * CUDA


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    from dpo_cli.model.sampling import static_cache

    monkeypatch.setattr(static_cache, "MIN_ROWS", 1)
    if CUDA:
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # what it imports when it first runs
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):  # numpy 2.5 makes no number of an array of one element
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)


def caches(samples, kv_heads, width, lengths):
    """The same keys and values in two caches, with the kernel and without."""
    from transformers import DynamicCache

    from dpo_cli.model.sampling.static_cache import Room, StaticCache

    torch.manual_seed(0)
    prefilled = DynamicCache()
    keys, values = torch.randn(2, len(lengths), kv_heads, max(lengths), width, device=DEVICE)
    prefilled.update(keys.to(DTYPE), values.to(DTYPE), 0)
    made = []
    for kernel in (True, False):
        cache = StaticCache(prefilled, Room(len(lengths), samples, 20, 12), kernel)
        cache.begin(lengths)
        cache.fill_prompts(0, prefilled)
        made.append(cache)
    return made


@pytest.mark.parametrize(("samples", "group", "width", "words"), [
    (1, 1, 24, (None, None, None)), (1, 4, 16, (0.3, 2.0, None)), (1, 2, 24, (None, None, 3)),
    (3, 1, 24, (0.3, None, None)), (3, 2, 16, (None, 2.0, 9)), (10, 2, 24, (None, None, 6)),
])  # fmt: skip
def test_it_is_the_attention_in_pytorch(samples, group, width, words, monkeypatch):
    from dpo_cli.model.attention.kernels import Call
    from dpo_cli.model.sampling import decode_kernel

    monkeypatch.setattr(decode_kernel, "MAX_QUERIES", 16)  # ten samples take two programs
    call, kv_heads, lengths = Call(*words), 2, [1, 13, 5]
    pair = caches(samples, kv_heads, width, lengths)
    for step in range(8):
        rows = pair[0].rows
        query = torch.randn(rows, kv_heads * group, 1, width, device=DEVICE).to(DTYPE)
        new = torch.randn(2, rows, kv_heads, 1, width, device=DEVICE).to(DTYPE)
        found = []
        for cache in pair:
            cache.see(step + 1)
            cache.begin_step()
            cache.update(*new, 0)
            found.append(cache.static[0].attend(query, call))
            cache.column += 1
        torch.testing.assert_close(found[0], found[1], rtol=TOLERANCE, atol=TOLERANCE)
        if step in (3, 5):
            going = np.arange(rows) % 3 == 1
            orders = [cache.keep(going, step + 1) for cache in pair]
            assert str(orders[0]) == str(orders[1])
    assert pair[0].rows < len(lengths) * samples
