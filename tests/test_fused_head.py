"""The kernel of the output layer against autograd in float64: on a GPU, else in Triton's
interpreter, where Triton is installed."""

import importlib
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from dpo_cli import fused_head
from dpo_cli import logprobs as chunked
from dpo_cli.fused_head import Shape
from dpo_cli.logprobs import Head, fused_loss, target_logprobs

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
V, D = 41, 16
COUNTS = (5, 1, 9, 8)  # targets of four examples


def import_kernel():
    """The module with the kernel, or why there is none. Triton must be asked for its interpreter
    before it is first imported, so this runs when the test module is read."""
    if find_spec("triton") is None:
        return "needs Triton"
    if CUDA:
        return importlib.import_module("dpo_cli.head_kernel")
    if "triton" in sys.modules:
        return "Triton is imported already, without its interpreter: run this file alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module("dpo_cli.head_kernel")


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
    monkeypatch.setitem(sys.modules, "dpo_cli.head_kernel", fake)
    monkeypatch.setattr(fused_head, "refused", lambda shape: None)
    monkeypatch.setattr(fused_head, "columns", lambda vocab, device: -(-vocab // 64) * 64)
    return calls


def exactly(logits, targets, bias, scale, softcap):
    raw = logits.double() if bias is None else logits.double() + bias.double()
    raw = (raw * scale).requires_grad_()
    capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    values = capped.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    (slopes,) = torch.autograd.grad(values.sum(), raw)
    return values.detach(), slopes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 30.0)])
@pytest.mark.parametrize(("vocab", "columns"), [(41, 48), (64, 64), (9_001, 9_024)])
def test_values_and_slopes(kernel, vocab, columns, scale, softcap, bias):
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, columns, generator=g) * 5).to(DEVICE)
    targets = torch.tensor([0, vocab - 1, 7, 7, 20], device=DEVICE)
    offset = torch.randn(vocab, generator=g).to(DEVICE) if bias else None
    slopes = torch.full_like(logits, float("nan"))
    found = kernel.softmax_rows(logits, targets, vocab, offset, scale, softcap, slopes)
    alone = kernel.softmax_rows(logits, targets, vocab, offset, scale, softcap)
    values, expected = exactly(logits[:, :vocab], targets, offset, scale, softcap)
    torch.testing.assert_close(found.double(), values, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(slopes[:, :vocab].double(), expected, rtol=2e-5, atol=1e-6)
    assert not slopes[:, vocab:].any()
    torch.testing.assert_close(alone, found, rtol=1e-6, atol=1e-6)


def test_no_rows(kernel):
    none = torch.empty(0, 16, device=DEVICE)
    assert (
        kernel.softmax_rows(none, torch.empty(0, dtype=torch.long, device=DEVICE), 16).numel() == 0
    )


def test_extreme_rows(kernel):
    """A token that is certain, one that is impossible, logits at -inf, a row that is not finite."""
    logits = torch.zeros(4, 16, device=DEVICE)
    logits[0, 3], logits[1, 3], logits[2, 4:], logits[3, 5] = 1000.0, 1000.0, -torch.inf, torch.nan
    targets = torch.tensor([3, 4, 0, 0], device=DEVICE)
    slopes = torch.empty_like(logits)
    found = kernel.softmax_rows(logits, targets, 16, slopes=slopes)
    assert found[:2].tolist() == [0.0, -1000.0]
    assert found[2].item() == pytest.approx(-torch.tensor(4.0).log().item(), rel=1e-6)
    assert slopes[2, 4:].tolist() == [0.0] * 12
    assert found[3].isnan()


def make(dtype, bias):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(sum(COUNTS), D, generator=g).to(DEVICE, dtype)
    weight = torch.randn(V, D, generator=g).to(DEVICE, dtype)
    offset = torch.randn(V, generator=g).to(DEVICE, dtype) if bias else None
    targets = torch.randint(0, V, (sum(COUNTS),), generator=g).to(DEVICE)
    return hidden, weight, offset, targets


def loss_of(values, examples):
    """Not linear in an example's log-probabilities."""
    starts = [0, 5, 6, 15, 23]
    first = starts[examples.start]
    sums = [values[starts[i] - first : starts[i + 1] - first].sum()
            for i in range(examples.start, examples.stop)]  # fmt: skip
    return (torch.stack(sums) * 0.05).exp().sum()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients(used, monkeypatch, dtype, scale, softcap, bias):
    """Through padded weights, in several chunks and blocks."""
    monkeypatch.setattr(Head, "rows_per_chunk", lambda self: 10)
    monkeypatch.setattr(Head, "rows_per_block", lambda self: 4)
    hidden, weight, offset, targets = make(dtype, bias)
    leaves = [x.requires_grad_() for x in (hidden, weight, offset) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logits = torch.nn.functional.linear(exact[0], exact[1], exact[2] if bias else None) * scale
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    values = capped.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    expected_loss = loss_of(values, slice(0, 4))
    expected = torch.autograd.grad(2.0 * expected_loss, exact)
    head = Head(weight, offset, scale, softcap)
    loss, got = fused_loss(hidden, head, targets, COUNTS, loss_of)
    grads = torch.autograd.grad(2.0 * loss, leaves)
    assert used
    half = dtype == torch.bfloat16
    near = 0.15 if half and not CUDA else 2e-4  # a CPU rounds the logits to bf16 first
    assert (got.double() - values).abs().max() < near
    assert loss.item() == pytest.approx(expected_loss.item(), rel=near)
    for found, right in zip(grads, expected, strict=True):
        assert found.dtype == dtype
        assert found.shape == right.shape
        assert (found.double() - right).norm() < (2e-2 if half else 1e-5) * right.norm()
    if not half:  # other blocks of rows, and no rounding that depends on them
        torch.testing.assert_close(
            target_logprobs(hidden, head, targets), got, rtol=1e-6, atol=1e-6
        )


def test_a_frozen_head_gets_no_gradient(used):
    hidden, weight, _, targets = make(torch.float32, False)
    hidden.requires_grad_()
    loss, _ = fused_loss(hidden, Head(weight), targets, COUNTS, lambda values, _: values.sum())
    loss.backward()
    assert used
    assert hidden.grad is not None
    assert weight.grad is None


def test_policy_and_reference_agree(used):
    """So that the first DPO loss is ln 2: with slopes or without, the same log-probabilities."""
    hidden, weight, _, targets = make(torch.float32, False)
    reference = target_logprobs(hidden, Head(weight), targets)
    hidden.requires_grad_()
    _, policy = fused_loss(hidden, Head(weight), targets, COUNTS, loss_of)
    torch.testing.assert_close(policy, reference, rtol=1e-6, atol=1e-6)


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
    monkeypatch.setitem(sys.modules, "dpo_cli.head_kernel", broken(kernel, **changes))
    monkeypatch.setattr(fused_head, "columns", lambda vocab, device: -(-vocab // 64) * 64)
    assert fused_head.error_of(SHAPES[0]).startswith(why)


@pytest.mark.parametrize("error", [RuntimeError("no C compiler"), OSError("no C compiler")])
def test_a_kernel_that_does_not_compile_is_refused(monkeypatch, error):
    pytest.importorskip("triton")

    def fails(*args):
        raise error

    monkeypatch.setitem(
        sys.modules, "dpo_cli.head_kernel", SimpleNamespace(softmax_rows=fails)
    )  # fmt: skip
    assert fused_head.error_of(SHAPES[0]) == "no C compiler"


def test_memory_that_runs_out_says_nothing_of_the_kernel(monkeypatch):
    pytest.importorskip("triton")

    def fails(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(
        sys.modules, "dpo_cli.head_kernel", SimpleNamespace(softmax_rows=fails)
    )  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError):
        fused_head.error_of(SHAPES[0])


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


@pytest.mark.parametrize(
    ("vocab", "columns"), [(50_257, 50_304), (151_936, 151_936), (32_000, 32_000), (49_160, 49_160)]
)
def test_rows_of_logits_are_aligned_on_cuda(vocab, columns):
    assert fused_head.columns(vocab, torch.device("cuda")) == columns


def test_eager_rows_of_a_padded_head(monkeypatch):
    """Where the kernel is refused, weights are aligned all the same."""
    monkeypatch.setattr(fused_head, "columns", lambda vocab, device: -(-vocab // 64) * 64)
    if CUDA:
        monkeypatch.setattr(fused_head, "refused", lambda shape: "refused")
    hidden, weight, offset, targets = make(torch.float32, True)
    head = Head(weight, offset).cast(torch.float32)
    assert head.weight.shape == (64, D)
    assert head.tokens == V
    found, slopes = chunked._logprobs_and_slopes(hidden, head, targets)
    logits = torch.nn.functional.linear(hidden.double(), weight.double())
    values, expected = exactly(logits, targets, offset, 1.0, None)
    torch.testing.assert_close(found.double(), values, rtol=0, atol=1e-5)
    torch.testing.assert_close(slopes[:, :V].double(), expected, rtol=0, atol=1e-5)
    assert not slopes[:, V:].any()


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("vocab", [50_257, 151_936])
def test_on_a_gpu_it_is_used_and_exact(vocab):
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(300, 256, generator=g, device=DEVICE, requires_grad=True)
    weight = (torch.randn(vocab, 256, generator=g, device=DEVICE) / 8).requires_grad_()
    targets = torch.randint(vocab, (300,), generator=g, device=DEVICE)
    head = Head(weight)
    assert head.refused(DEVICE, torch.bfloat16) is None
    fused_head.unrounded.cache_clear()
    with torch.autocast("cuda", torch.bfloat16):
        loss, found = fused_loss(hidden, head, targets, [100] * 3, lambda v, _: v.sum())
    assert head.rounding(DEVICE, torch.bfloat16) == " fused head in float32"
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    right = (exact[0] @ exact[1].t()).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    assert (found - right).abs().max() < 1e-4  # rounding logits to bf16 would cost 0.03
    grads = torch.autograd.grad(loss, (hidden, weight))
    for got, expected in zip(grads, torch.autograd.grad(right.sum(), exact), strict=True):
        assert (got - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_more_logits_than_int32_counts(kernel):
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB of a GPU's memory")
    vocab, rows = 151_936, 2**31 // 151_936 + 8
    logits = torch.zeros(rows, vocab, device=DEVICE)
    targets = torch.full((rows,), 5, device=DEVICE)
    logits[-1, 5] = 3.0
    slopes = torch.empty_like(logits, dtype=torch.bfloat16)
    found = kernel.softmax_rows(logits, targets, vocab, slopes=slopes)
    last = 3.0 - torch.tensor(vocab - 1 + torch.tensor(3.0).double().exp().item()).log().item()
    assert found[-1].item() == pytest.approx(last, abs=1e-4)
    assert slopes[-1, 5].item() == pytest.approx(1.0, abs=1e-2)
