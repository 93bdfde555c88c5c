"""The CUDA ways to attend packed rows, with their kernels emulated on a CPU."""

import numpy as np
import pytest
import torch

from dpo_cli import logprobs
from dpo_cli.config import DpoConfig
from dpo_cli.model import forward
from dpo_cli.model.attention import varlen
from dpo_cli.model.attention.interface import Placement, Seen, prepare_layout, use_kernel
from dpo_cli.model.attention.kernel_check import kernel_mismatch
from dpo_cli.model.attention.kernels import Call
from dpo_cli.model.attention.layouts import LAYOUTS, VarlenLayout
from dpo_cli.records import Segment
from dpo_cli.stages.dpo import dpo_loss
from small_models import (
    assert_loss_and_gradients_are_the_plain_ones,
    build,
    compute_in_float64,
    examples,
    oracle,
    packed,
    sequences,
)

CPU = Placement()
VARLEN_FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "mistral", "gemma2", "gemma3_text")
SEGMENTS = (Segment(0, 3, (2, 0, 4, 1)), Segment(10, 1, (0, 0, 0, 2)), Segment(13, 2, (1, 3, 0, 1)))


def emulated(q, k, v, cuts, call, top_left=False):
    """What a varlen kernel is documented to do, a segment and a query at a time."""
    scale = q.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    group = q.shape[1] // k.shape[1]
    cu_q, cu_k = cuts.cu_q.tolist(), cuts.cu_k.tolist()
    assert (cuts.cu_q.dtype, cuts.cu_k.dtype) == (torch.int32, torch.int32)
    assert cuts.max_q == max(np.diff(cu_q))
    assert cuts.max_k == max(np.diff(cu_k))
    rows = []
    for first_q, end_q, first_k, end_k in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        assert end_q > first_q, "an empty segment has no maximum"
        for i in range(first_q, end_q):
            last = first_k + i - first_q if top_left else end_k - (end_q - i)
            first = first_k if call.window is None else max(first_k, last + 1 - call.window)
            keys, values = (
                x[first : last + 1].repeat_interleave(group, dim=1) for x in (k, v)
            )  # fmt: skip
            scores = torch.einsum("hd,khd->hk", q[i], keys) * scale
            if call.softcap is not None:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values))
    return torch.stack(rows)


@pytest.fixture
def in_float64(monkeypatch):
    compute_in_float64(monkeypatch)


@pytest.fixture
def emulator(monkeypatch, in_float64):
    monkeypatch.setattr(varlen, "attend", emulated)


@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("family", VARLEN_FAMILIES)
def test_varlen_gives_the_plain_loss_and_gradients(emulator, family, branches):
    model = build(family)
    use_kernel(model, "varlen")
    assert_loss_and_gradients_are_the_plain_ones(model, examples(branches))


@pytest.mark.parametrize("kernel", ["varlen", "flex"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_hidden_states_of_rows_that_keep_their_last_tokens(emulator, family, kernel):
    model, rows = build(family), examples(4)
    use_kernel(model, kernel)
    with torch.no_grad():
        got = forward.hidden_states(model, packed(rows, keep_last=True))
        model.set_attn_implementation("eager")
        whole = [
            model.base_model(torch.cat([p, r])[None]).last_hidden_state[0]
            for p, r in sequences(rows)
        ]
    expected = []
    for number, states in enumerate(whole):
        prompt = len(rows[number // 4].prompt_ids)
        expected.append(states[0 if number % 4 == 0 else prompt :])
    torch.testing.assert_close(got, torch.cat(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("family", VARLEN_FAMILIES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_gives_the_plain_logprobs(in_float64, family, branches):
    """On a CPU FlexAttention has no backward."""
    model, rows = build(family), examples(branches)
    expected = oracle(model, rows)
    use_kernel(model, "flex")
    with torch.no_grad():
        got = forward.token_logprobs(model, packed(rows))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_the_varlen_layout_by_hand():
    """[p p p a a|c c c c|d] [q|z z] [s s t|u u u|w]: branches without tokens are left out."""
    layout = VarlenLayout.build(SEGMENTS)
    assert layout.cu_q.tolist() == [0, 5, 9, 10, 11, 13, 16, 19, 20]
    assert layout.cu_k.tolist() == [0, 5, 12, 16, 17, 20, 23, 28, 31]
    assert (layout.max_q, layout.max_k) == (5, 7)
    assert layout.keys.tolist() == [
        0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 0, 1, 2, 9, 10, 10, 11, 12,
        13, 14, 15, 13, 14, 16, 17, 18, 13, 14, 19,
    ]  # fmt: skip


def test_prompt_gradients_are_summed_over_their_branches():
    """Against the gradient of a plain gather, which adds in no fixed order on CUDA."""
    layout = VarlenLayout.build(SEGMENTS)
    assert len(layout.again) == 2
    seen = {}

    def attend(q, k, v, cuts, call):
        seen["keys"] = k
        return q

    rows = torch.randn(1, 2, 20, 3, dtype=torch.float64, requires_grad=True)
    plain = rows.detach().clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "attend", attend)
        layout.attend(rows, rows, rows, Call())
    expected = plain[0].transpose(0, 1)[layout.keys]
    assert torch.equal(seen["keys"], expected)
    upstream = torch.randn_like(expected)
    seen["keys"].backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(rows.grad, plain.grad, rtol=0, atol=1e-14)


def test_one_branch_an_example_needs_no_gather():
    layout = VarlenLayout.build((Segment(0, 2, (3,)), Segment(5, 1, (0,))))
    assert layout.again == ()
    assert layout.keys.tolist() == list(range(6))


# PyTorch's varlen_attn as documented: without and with windows, scales and grouped heads.


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    assert is_causal
    return emulated(query, key, value, varlen.Cuts(cu_seq_q, cu_seq_k, max_q, max_k), Call())


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
    *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0
    window = None if window_size[0] == -1 else window_size[0] + 1
    cuts = varlen.Cuts(cu_seq_q, cu_seq_k, max_q, max_k)
    return emulated(query, key, value, cuts, Call(scale, None, window))


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    assert causal
    assert dropout_p == 0.0
    window = None if window_size == (-1, -1) else window_size[0] + 1
    cuts = varlen.Cuts(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return emulated(q, k, v, cuts, Call(softmax_scale, softcap or None, window))


def rows_of(layout, heads=4, kv_heads=2, width=8):
    generator = torch.Generator().manual_seed(5)
    draw = lambda t, h: torch.randn(t, h, width, generator=generator)  # noqa: E731
    keys = len(layout.keys)
    return draw(20, heads), draw(keys, kv_heads), draw(keys, kv_heads)


@pytest.mark.parametrize(
    ("adapted", "call"),
    [
        (varlen.adapt_torch(varlen_2_10), Call()),
        (varlen.adapt_torch(varlen_2_10), Call(scaling=0.3)),
        (varlen.adapt_torch(varlen_2_13), Call()),
        (varlen.adapt_torch(varlen_2_13), Call(scaling=0.3, window=3)),
        (varlen.adapt_flash(flash_attn_2), Call()),
        (varlen.adapt_flash(flash_attn_2), Call(scaling=0.3, softcap=1.5, window=3)),
    ],
)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_kernels_get_what_the_layer_asked_for(adapted, call, kv_heads):
    layout = VarlenLayout.build(SEGMENTS)
    cuts = varlen.Cuts(layout.cu_q, layout.cu_k, layout.max_q, layout.max_k)
    tensors = rows_of(layout, kv_heads=kv_heads)
    torch.testing.assert_close(
        adapted(*tensors, cuts, call), emulated(*tensors, cuts, call), rtol=0, atol=1e-6
    )


@pytest.fixture
def implementations():
    """Those of this machine, whatever the test has left of them."""
    before = varlen.usable()
    varlen.use(tuple(x for x in before if x.name.startswith("torch")))
    yield
    varlen.use(before)


def test_what_a_kernel_lacks_is_an_error_not_a_wrong_number(implementations):
    layout = VarlenLayout.build(SEGMENTS)
    cuts = varlen.Cuts(layout.cu_q, layout.cu_k, layout.max_q, layout.max_k)
    tensors = rows_of(layout)
    with pytest.raises(RuntimeError, match="no sliding window"):
        varlen.adapt_torch(varlen_2_10)(*tensors, cuts, Call(window=3))
    with pytest.raises(RuntimeError, match="has no dropout"):
        varlen.attend(*tensors, cuts, Call(dropout=0.1))
    with pytest.raises(RuntimeError, match="soft-capping needs the package flash-attn"):
        varlen.attend(*tensors, cuts, Call(softcap=50.0))
    varlen.use(())
    with pytest.raises(RuntimeError, match="variable-length attention needs the package"):
        varlen.attend(*tensors, cuts, Call())


ASKED = [
    Seen(Call(), 4, 4, 16, 16),
    Seen(Call(scaling=0.3), 4, 2, 16, 16),
    Seen(Call(window=3), 4, 1, 16, 16),
]


def wrong_with_grouped_heads(q, k, v, cuts, call):
    assert q.shape[1] == k.shape[1], "as many heads of keys"
    return emulated(q, k, v, cuts, call)


@pytest.mark.parametrize(
    ("runs", "used", "told"),
    [
        ((emulated, emulated), "first", 0),
        ((lambda *a: emulated(*a, top_left=True), emulated), "second", 1),
        ((wrong_with_grouped_heads, wrong_with_grouped_heads), "second", 1),
        ((lambda *a: emulated(*a) * 1.1,) * 2, None, 0),
    ],
)
def test_the_best_implementation_that_is_right_is_used(implementations, runs, used, told):
    """The second one is given repeated keys and values."""
    first, second = runs
    both = (varlen.Implementation("first", first),
            varlen.Implementation("second", second, grouped=False))  # fmt: skip
    varlen.use(both)
    notes = []
    error = kernel_mismatch("varlen", ASKED, Placement(note=notes.append))
    assert len(notes) == told
    if used is None:
        assert "differs by" in error
        assert varlen.usable() == both  # another model may ask for less
    else:
        assert error is None
        assert varlen.usable()[0].name == used
    assert all(note.startswith("attention=varlen: does not use first: ") for note in notes)


class NanGradient(torch.autograd.Function):
    """Right values, no gradient worth the name."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def test_a_kernel_is_held_against_matmuls_before_it_is_used(monkeypatch):
    """Right, aligned top left, a window off by one, not finite, not there."""
    monkeypatch.setattr(varlen, "attend", emulated)
    assert kernel_mismatch("varlen", ASKED, CPU) is None
    assert "does not support dropout" in kernel_mismatch("varlen", ASKED, CPU, dropout=0.1)

    def off_by_one(q, k, v, cuts, call):
        window = None if call.window is None else call.window + 1
        return emulated(q, k, v, cuts, Call(call.scaling, None, window))

    monkeypatch.setattr(varlen, "attend", off_by_one)
    assert kernel_mismatch("varlen", ASKED[:2], CPU) is None
    assert "window=3" in kernel_mismatch("varlen", ASKED, CPU)
    monkeypatch.setattr(varlen, "attend", lambda *a: emulated(*a, top_left=True))
    assert "differs by" in kernel_mismatch("varlen", ASKED, CPU)
    monkeypatch.setattr(varlen, "attend", lambda *a: emulated(*a) * float("nan"))
    assert "differs by nan%" in kernel_mismatch("varlen", ASKED, CPU)
    monkeypatch.setattr(varlen, "attend", lambda q, *rest: NanGradient.apply(emulated(q, *rest)))
    assert "differs by nan%" in kernel_mismatch("varlen", ASKED, CPU)
    monkeypatch.undo()
    assert kernel_mismatch("varlen", ASKED, CPU)  # PyTorch's own, which no CPU has


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("kernel", ["varlen", "sdpa", "dense"])
def test_a_micro_batch_never_waits_for_the_device(monkeypatch, kernel, family):
    """Meta tensors have no values: whatever asks for one raises."""
    monkeypatch.setattr(logprobs, "compute_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setattr(
        varlen, "attend", lambda q, k, v, cuts, call: q + 0 * (k.sum() + v.sum())
    )  # fmt: skip
    model = build(family).float().to("meta")
    use_kernel(model, kernel)
    batch = prepare_layout(packed(examples(2)), kernel).to("meta")
    assert all(x.is_meta for x in (batch.input_ids, *tensors_in(batch.layouts[kernel])))
    reference = torch.zeros(3, 2, device="meta")
    out = dpo_loss(model, batch, lambda row: reference[row.example_ids], DpoConfig())
    out.loss_sum.backward()
    assert model.get_input_embeddings().weight.grad.is_meta


def tensors_in(layout):
    return [value for value in vars(layout).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("kernel", [k for k in LAYOUTS if k != "grouped"])  # stays on the CPU
def test_layouts_are_made_once_a_row_and_move_with_it(kernel):
    batch = packed(examples(2))
    assert batch.layouts == {}
    layout = prepare_layout(batch, kernel).layouts[kernel]
    assert prepare_layout(batch, kernel).layouts[kernel] is layout
    moved = batch.to("meta")
    assert tensors_in(moved.layouts[kernel])
    assert all(x.is_meta for x in tensors_in(moved.layouts[kernel]))
    assert not any(x.is_meta for x in tensors_in(layout))
