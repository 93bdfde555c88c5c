"""The attention kernels themselves, on a GPU."""

import pytest
import torch

from dpo_cli.model.attention import varlen
from dpo_cli.model.attention.interface import Placement, Seen, kernel_of, prepare_layout, use_kernel
from dpo_cli.model.attention.kernel_check import kernel_mismatch
from dpo_cli.model.attention.kernels import Call
from dpo_cli.model.attention.probe import choose_attention
from dpo_cli.model.blocks import compile_blocks
from small_models import (
    FAMILIES,
    SMALL,
    build,
    examples,
    gradients,
    oracle,
    packed,
    packed_loss,
    weighted,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = Placement(torch.device("cuda"), torch.bfloat16)
slow = pytest.mark.slow  # compiles FlexAttention
WIDER = {  # heads of 16, the narrowest that FlexAttention takes
    "gpt2": FAMILIES["gpt2"] | {"n_embd": 64},
    "llama": FAMILIES["llama"] | {"hidden_size": 64},
}


@pytest.mark.parametrize("kernel", ["varlen", "sdpa"])
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128), (4, 1, 256)], ids=str)
@pytest.mark.parametrize("call", [Call(), Call(scaling=0.2, window=3)], ids=str)
def test_real_kernels_forward_and_gradients(kernel, heads, call):
    h, kv, width = heads
    assert kernel_mismatch(kernel, [Seen(call, h, kv, width, width)], CUDA) is None


@slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("call", [Call(), Call(scaling=0.2, window=3)], ids=str)
def test_real_flex_attention_forward_and_gradients(call):
    assert kernel_mismatch("flex", [Seen(call, 8, 2, 64, 64)], CUDA) is None


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kernel", [pytest.param("flex", marks=slow), "sdpa"])
def test_real_kernels_with_soft_capping(kernel):
    assert kernel_mismatch(kernel, [Seen(Call(softcap=2.0), 8, 4, 64, 64)], CUDA) is None


@pytest.mark.parametrize("call", [Call(), Call(0.2, 2.0, 3)], ids=str)
def test_the_flash_attn_package(call):
    pytest.importorskip("flash_attn")
    everything = varlen.usable()
    varlen.use(tuple(x for x in everything if x.name == "flash-attn 2"))
    try:
        assert kernel_mismatch("varlen", [Seen(call, 8, 2, 64, 64)], CUDA) is None
    finally:
        varlen.use(everything)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "kernel", ["varlen", pytest.param("flex", marks=slow), "sdpa", "dense", "plain"]
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_in_bf16_stay_near_the_plain_forward(family, kernel):
    """Near: rounding moves log-probabilities by 0.01, another mask by 0.5."""
    model, rows = build(family, WIDER[family]).float(), examples(4)
    values = oracle(model, rows)
    expected = gradients(model, weighted(values, 0, len(values)))
    use_kernel(model.to(CUDA.device), kernel)
    batch = prepare_layout(packed(rows), kernel).pin_memory().to(CUDA.device)
    with torch.autocast(CUDA.device.type, torch.bfloat16):
        loss, got = packed_loss(model, batch)
    found = gradients(model, loss)
    assert (got.cpu() - values).abs().max() < 0.05
    names = sorted(expected)
    exact, near = (torch.cat([g[n].cpu().flatten() for n in names]) for g in (expected, found))
    assert (near - exact).norm() < 0.05 * exact.norm()


def test_the_fastest_kernel_is_chosen_and_a_micro_batch_never_waits():
    model, notes = build("llama", {**SMALL, "head_dim": 64}).float(), []
    choose_attention(model, "auto", on=Placement(CUDA.device, CUDA.dtype, notes.append))
    assert notes == []
    assert kernel_of(model) == "varlen"
    model.to(CUDA.device)
    batch = prepare_layout(packed(examples(4)), "varlen").pin_memory()
    for mode in ("default", "error"):  # the first pass may set libraries up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast(CUDA.device.type, torch.bfloat16):
                loss, _ = packed_loss(model, batch.to(CUDA.device))
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_blocks_compile_once_and_stay_near_the_eager_ones(family):
    def figures(model, row):
        with torch.autocast(CUDA.device.type, torch.bfloat16):
            loss, values = packed_loss(model, row)
        return values.detach(), torch.cat([g.flatten() for g in gradients(model, loss).values()])

    rows = [packed(examples(k)).to(CUDA.device) for k in (2, 2)] + [
        packed(examples(2)[1:]).to(CUDA.device)
    ]
    model = build(family, WIDER[family]).float().to(CUDA.device).train()
    use_kernel(model, "varlen")
    expected = [figures(model, row) for row in rows]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(model, pytest.fail)
    for row, (values, grads) in zip(rows, expected, strict=True):
        found = figures(model, row)
        assert (found[0] - values).abs().max() < 0.05
        assert (found[1] - grads).norm() < 0.05 * grads.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
