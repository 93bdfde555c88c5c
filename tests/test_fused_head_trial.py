"""When the kernel of the output layer, and CUDA's products into float32, are used."""

import sys
from types import SimpleNamespace

import pytest
import torch

from dpo_cli.logprobs import Head, fused_head
from dpo_cli.logprobs.fused_head import Shape
from fused_head_helpers import CUDA, DEVICE

pytest_plugins = ["fused_head_fixtures"]
SHAPES = [Shape(DEVICE, dtype, vocab, bias, cap) for dtype, vocab, bias, cap in (
    (torch.float32, 41, False, False), (torch.float32, 41, True, True),
    (torch.float16, 9_001, True, False), (torch.float32, 128, False, True),
)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_passes_its_own_trial(kernel, shape):
    assert fused_head.error_of(shape) is None


def broken(kernel, **changes):
    """The kernel with its results changed."""

    def softmax_rows(logits, targets, vocab, bias, scale, softcap, slopes=None):
        found = kernel.softmax_rows(logits, targets, vocab, bias, scale, softcap, slopes)
        if "value" in changes:
            found[0] += changes["value"]
        if slopes is not None and "slope" in changes:
            slopes[1, vocab - 1] *= changes["slope"]
        if slopes is not None and "beyond" in changes:
            slopes[0, -1] = changes["beyond"]
        return found

    return SimpleNamespace(softmax_rows=softmax_rows)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"value": 1e-3}, "its log-probabilities are 0.001 off"),
        ({"slope": 1.02}, "its slopes are"),
        ({"slope": float("nan")}, "its slopes are nan off"),
        ({"beyond": 1.0}, "its slopes reach beyond the vocabulary"),
    ],
    ids=str,
)
def test_a_wrong_kernel_is_refused(kernel, monkeypatch, changes, why):
    monkeypatch.setitem(sys.modules, "dpo_cli.logprobs.kernel", broken(kernel, **changes))
    monkeypatch.setattr(fused_head, "columns", lambda vocab, device: -(-vocab // 64) * 64)
    assert fused_head.error_of(SHAPES[0]).startswith(why)


@pytest.mark.parametrize("error", [RuntimeError("no C compiler"), OSError("no C compiler")])
def test_a_kernel_that_does_not_compile_is_refused(monkeypatch, error):
    pytest.importorskip("triton")

    def fails(*args):
        raise error

    monkeypatch.setitem(
        sys.modules, "dpo_cli.logprobs.kernel", SimpleNamespace(softmax_rows=fails)
    )  # fmt: skip
    assert fused_head.error_of(SHAPES[0]) == "no C compiler"


def test_memory_that_runs_out_says_nothing_of_the_kernel(monkeypatch):
    pytest.importorskip("triton")

    def fails(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(
        sys.modules, "dpo_cli.logprobs.kernel", SimpleNamespace(softmax_rows=fails)
    )  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError):
        fused_head.error_of(SHAPES[0])


@pytest.mark.skipif(CUDA, reason="has products of its own")
def test_products_are_tried_alike_in_the_midst_of_a_step(wide_products):
    """A trial under autocast must not compare with what autocast has rounded."""
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            assert fused_head._gives_float32(DEVICE, torch.bfloat16)
    rounding = torch.mm
    wide_products.setattr(torch, "mm", lambda *a, **k: rounding(*a, **k).bfloat16().float())
    assert not fused_head._gives_float32(DEVICE, torch.bfloat16)


@pytest.mark.skipif(CUDA, reason="has products of its own")
def test_products_that_are_absent():
    assert not fused_head._gives_float32(DEVICE, torch.bfloat16)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(fused_head, "find_spec", lambda name: None)
    assert fused_head.error_of(SHAPES[0]) == "needs Triton"


def test_a_cpu_keeps_its_own_path():
    shape = Shape(torch.device("cpu"), torch.bfloat16, 50_257, False, False)
    assert fused_head.refused(shape) == "needs a CUDA device"
    assert shape.columns == 50_257
    assert Head(torch.zeros(8, 4)).rounding(torch.device("cpu"), torch.bfloat16) == ""
    assert Head(torch.zeros(8, 4)).cast(torch.float32).weight.shape == (8, 4)
