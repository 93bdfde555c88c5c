"""The kernel of the output layer against autograd in float64: on a GPU, else in Triton's
interpreter, where Triton is installed."""

import pytest
import torch

from dpo_cli import logprobs as chunked
from dpo_cli.logprobs import Head, fused_head, fused_loss, target_logprobs
from fused_head_helpers import CUDA, DEVICE, also_cuda, exactly

pytest_plugins = ["fused_head_fixtures"]
V, D = 41, 16
COUNTS = (5, 1, 9, 8)  # targets of four examples


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


@also_cuda
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


@also_cuda
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


@also_cuda
def test_bf16_with_products_in_float32(used, request, monkeypatch):
    """Nothing but the factors is rounded: not the logits, not the sum over chunks."""
    if not CUDA:
        request.getfixturevalue("wide_products")
        monkeypatch.setattr(fused_head, "unrounded", lambda *_: True)
    monkeypatch.setattr(Head, "rows_per_chunk", lambda self: 10)
    hidden, weight, offset, targets = make(torch.bfloat16, True)
    leaves = [x.float().requires_grad_() for x in (hidden, weight, offset)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    values = torch.nn.functional.linear(*exact).log_softmax(1).gather(1, targets[:, None])
    expected = torch.autograd.grad(loss_of(values.squeeze(1), slice(0, 4)), exact)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss, got = fused_loss(leaves[0], Head(*leaves[1:]), targets, COUNTS, loss_of)
    assert (got.double() - values.squeeze(1)).abs().max() < 1e-5
    for found, right in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - right).norm() < 5e-3 * right.norm()


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
