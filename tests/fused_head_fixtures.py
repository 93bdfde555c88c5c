"""The kernel of the output layer for its tests: on a GPU, else in Triton's interpreter."""

import importlib
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from dpo_cli.logprobs import fused_head
from fused_head_helpers import CUDA


def import_kernel():
    """The module with the kernel, or why there is none. Triton must be asked for its interpreter
    before it is first imported, so this runs when the test module is read."""
    if find_spec("triton") is None:
        return "needs Triton"
    if CUDA:
        return importlib.import_module("dpo_cli.logprobs.kernel")
    if "triton" in sys.modules:
        return "Triton is imported already, without its interpreter: run this file alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module("dpo_cli.logprobs.kernel")


KERNEL = import_kernel()


@pytest.fixture
def kernel(monkeypatch):
    if isinstance(KERNEL, str):
        pytest.skip(KERNEL)
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # what it imports when it first runs
    return KERNEL


@pytest.fixture
def used(kernel, monkeypatch):
    """The head takes the kernel and aligned weights, as on CUDA, also in the interpreter."""
    calls = []

    def counted(*args):
        calls.append(args)
        return kernel.softmax_rows(*args)

    fake = SimpleNamespace(softmax_rows=counted)
    monkeypatch.setitem(sys.modules, "dpo_cli.logprobs.kernel", fake)
    monkeypatch.setattr(fused_head, "refused", lambda shape: None)
    monkeypatch.setattr(fused_head, "columns", lambda vocab, device: -(-vocab // 64) * 64)
    return calls


@pytest.fixture
def wide_products(monkeypatch):
    """CUDA's products of half-precision factors into float32."""
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(a, b, out_dtype):
        with torch.autocast("cpu", enabled=False):
            return mm(a.to(out_dtype), b.to(out_dtype))

    def wide_addmm(total, a, b, out_dtype, out):
        with torch.autocast("cpu", enabled=False):
            return addmm(total, a.to(out_dtype), b.to(out_dtype), out=out)

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    return monkeypatch
