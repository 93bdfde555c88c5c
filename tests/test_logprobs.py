"""The chunked head against plain autograd, in float64."""

import math
import weakref

import pytest
import torch

from dpo_cli import logprobs
from dpo_cli.logprobs import Head, fused_loss, sum_by_sequence, target_logprobs, token_kl

N, D, V = 23, 8, 40


def make(bias: bool, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(V, generator=g, dtype=torch.float64, requires_grad=True) if bias else None
    return hidden, weight, offset, torch.randint(0, V, (N,), generator=g)


def plain(hidden, weight, bias, targets, scale, softcap):
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)


COUNTS = (5, 1, 9, 8)  # targets of four examples


def loss_of(values, examples):
    starts = [0, 5, 6, 15, 23]
    first = starts[examples.start]
    sums = [values[starts[i] - first : starts[i + 1] - first].sum()
            for i in range(examples.start, examples.stop)]  # fmt: skip
    coefficients = values.new_tensor([1.0, -0.5, 2.0, 0.3])
    return (torch.stack(sums).mul(0.05).exp() * coefficients[examples]).sum()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_rows", [1, 16, 1000])
def test_values_and_gradients(monkeypatch, bias, scale, softcap, chunk_rows):
    """A loss that is not linear in an example's log-probabilities, as DPO's is not."""
    monkeypatch.setattr(Head, "rows_per_chunk", lambda self: chunk_rows)
    monkeypatch.setattr(Head, "rows_per_block", lambda self: 4)
    hidden, weight, offset, targets = make(bias)
    leaves = [x for x in (hidden, weight, offset) if x is not None]
    expected = plain(hidden, weight, offset, targets, scale, softcap)
    expected_loss = loss_of(expected, slice(0, 4))
    expected_grads = torch.autograd.grad(3.0 * expected_loss, leaves)
    head = Head(weight, offset, scale, softcap)
    loss, got = fused_loss(hidden, head, targets, COUNTS, loss_of)
    got_grads = torch.autograd.grad(3.0 * loss, leaves)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(target_logprobs(hidden, head, targets), got, rtol=0, atol=1e-12)
    for a, b in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_loss_of_all_examples_together(monkeypatch):
    """A loss that is no sum over examples, computed in chunks of single examples."""
    monkeypatch.setattr(Head, "rows_per_chunk", lambda self: 1)
    hidden, weight, offset, targets = make(True)

    def product_of_sums(values, examples):
        assert (examples.start, examples.stop) == (0, len(COUNTS))
        return torch.stack([part.sum() for part in values.split(COUNTS)]).mul(0.05).exp().prod()

    leaves = (hidden, weight, offset)
    expected = product_of_sums(plain(*leaves, targets, 1.0, None), slice(0, len(COUNTS)))
    loss, _ = fused_loss(hidden, Head(weight, offset), targets, COUNTS, product_of_sums, True)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(expected, leaves), torch.autograd.grad(loss, leaves)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


def test_frozen_head_gets_no_gradient():
    hidden, weight, _, targets = make(False)
    weight = weight.detach()
    loss, _ = fused_loss(hidden, Head(weight), targets, COUNTS, lambda values, _: values.sum())
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_gradients_are_formed_for_evaluation(monkeypatch):
    monkeypatch.setattr(logprobs, "_logprobs_and_slopes", lambda *a: pytest.fail("formed"))
    hidden, weight, _, targets = make(False)
    with torch.no_grad():
        loss, _ = fused_loss(hidden, Head(weight), targets, COUNTS, lambda v, _: v.sum())
    assert not loss.requires_grad


def test_slopes_of_one_chunk_live_at_a_time(monkeypatch):
    real, made = logprobs._logprobs_and_slopes, []

    def watched(*args):
        assert not any(slopes() is not None for slopes in made)
        values, slopes = real(*args)
        made.append(weakref.ref(slopes))
        return values, slopes

    monkeypatch.setattr(logprobs, "_logprobs_and_slopes", watched)
    monkeypatch.setattr(Head, "rows_per_chunk", lambda self: 8)
    hidden, weight, _, targets = make(False)
    fused_loss(hidden, Head(weight), targets, COUNTS, loss_of)
    assert len(made) == 3


def test_a_confident_token_keeps_its_digits_among_large_logits():
    """log(1 + e^-8) beside logits of 1,000, whose own rounding is 3e-5."""
    weight = torch.tensor([[1000.0], [992.0]])
    got = target_logprobs(torch.ones(1, 1), Head(weight), torch.tensor([0]))
    assert got.item() == pytest.approx(-math.log1p(math.exp(-8.0)), rel=1e-4)


def test_autocast_keeps_float32_log_softmax():
    hidden, weight, _, targets = (x.float() if x is not None and x.is_floating_point() else x
                                  for x in make(False))  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = target_logprobs(hidden, Head(weight), targets)
    assert low.dtype == torch.float32
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()  # only the matmul is in bf16
    expected = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(low, expected, rtol=0, atol=1e-5)


ROUNDING = 2.0**-9  # to bf16, at most


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_under_autocast(monkeypatch, bias, scale, softcap):
    """Rounded to bf16 are hidden states, weights, logits and slopes; of a chunk the products
    that make up the head's gradients. The sum over chunks, as the loss, is in float32. Found
    are 0.9 to 2.7 roundings."""
    monkeypatch.setattr(Head, "rows_per_chunk", lambda self: 8)
    monkeypatch.setattr(Head, "rows_per_block", lambda self: 4)
    wide = make(bias)
    leaves = [x.detach().float().requires_grad_() for x in wide[:3] if x is not None]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    targets = wide[3]
    logprobs = plain(*exact[:2], exact[2] if bias else None, targets, scale, softcap)
    expected = torch.autograd.grad(loss_of(logprobs, slice(0, 4)), exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = fused_loss(
            leaves[0], Head(leaves[1], leaves[2] if bias else None, scale, softcap), targets,
            COUNTS, loss_of,
        )  # fmt: skip
    for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 5 * ROUNDING * b.norm()


def test_a_confident_token_keeps_its_gradient_under_autocast():
    """p = 1 - e^-9, in bf16 1: its slope 1 - p is e^-9 all the same."""
    hidden = torch.ones(1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):  # logits 9 and 0: exact in bf16
        head = Head(torch.tensor([[9.0], [0.0]]))
        loss, _ = fused_loss(hidden, head, torch.tensor([0]), [1], lambda v, _: v.sum())
    loss.backward()
    p = 1.0 / (1.0 + math.exp(-9.0))
    assert hidden.grad.item() == pytest.approx(9.0 * (1.0 - p), rel=3 * ROUNDING)


def test_sum_by_sequence():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert sum_by_sequence(values, torch.tensor([0, 0, 2, 2]), 3).tolist() == [3.0, 0.0, 12.0]


def test_token_kl_by_definition(monkeypatch):
    monkeypatch.setitem(logprobs.BLOCK_BYTES, "cpu", 4 * V * 16)
    (p, w, _, _), (q, u, _, _) = make(False, 1), make(False, 2)
    logp, logq = (p @ w.T).log_softmax(1), (q @ u.T).log_softmax(1)
    expected = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(token_kl(p, Head(w), q, Head(u)), expected, rtol=0, atol=1e-10)
    assert token_kl(p, Head(w), p, Head(w)).abs().max() < 1e-12
