"""Steps recorded in CUDA graphs against those that are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig

import small_models
from dpo_cli.model import forward
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.attention.probe import choose_attention
from dpo_cli.model.sampling import stepper
from dpo_cli.model.sampling.generate import SamplingOptions, sample
from dpo_cli.model.sampling.graphs import Graphs
from dpo_cli.model.sampling.stepper import Stepper, can_step, has_kernel
from dpo_cli.packing import pack
from dpo_cli.records import EncodedExample
from test_generate import (
    RAGGED,
    assert_the_plain_forwards,
    quiet,
)
from test_stepper import flat, refuse


def on_cuda(family, dtype):
    model = small_models.build(family).to(dtype).cuda()
    choose_attention(model, "sdpa", on=Placement(torch.device("cuda"), torch.bfloat16, quiet))
    return model


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mistral", "qwen3"])
def test_recorded_steps_are_those_that_are_not(family, precision, monkeypatch):
    """The same tokens of greedy and of seeded draws: two replays draw different numbers."""
    monkeypatch.setattr(stepper, "WORTH_DROPPING", 0)  # or other rows would get the numbers
    model = on_cuda(family, torch.bfloat16 if precision == "bf16" else torch.float32)
    low = torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast")
    for options in (SamplingOptions(16, max_new_tokens=40), SamplingOptions(4, 0.0)):
        found = {}
        for record in (True, False):
            with low, torch.no_grad():
                assert can_step(model, refuse)
                made = Stepper(model, options, 3, 0, record, refuse)
                found[record] = flat([made.decode(RAGGED, options.max_new_tokens, 7)])
                if record:
                    assert made.graphs.recorded
        same = np.mean([a == b for a, b in zip(found[True], found[False], strict=True)])
        assert same == 1.0 if precision == "fp32" else same > 0.8  # rounding may break a tie
        if options.temperature:
            drawn = [tuple(ids) for ids, _ in found[True]]
            assert len(set(drawn)) > len(drawn) // 2
            assert any(len(set(ids)) > 3 for ids in drawn)


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_recorded_steps_have_the_plain_forwards_logprobs(family):
    model = on_cuda(family, torch.float32)
    rows = sample(model, RAGGED, SamplingOptions(8, max_new_tokens=30), 3, 0, note=refuse)
    model.cpu().double()
    assert_the_plain_forwards(model, rows, atol=2e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("completions", [1, 6])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bf16_logprobs_are_those_of_packed_rows(family, adapters, completions):
    """With the Triton kernel, as a policy in float32 is sampled from."""
    model = on_cuda(family, torch.float32)
    if adapters:
        model.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    options = SamplingOptions(completions, max_new_tokens=40)
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        rows = sample(model, RAGGED, options, 3, 0, note=refuse)
        assert has_kernel(model, refuse)
        packed = pack([
            EncodedExample(p, tuple(c.ids for c in row), i)
            for i, (p, row) in enumerate(zip(RAGGED, rows, strict=True))
        ], range(len(rows))).to(model.device)  # fmt: skip
        expected = forward.token_logprobs(model, packed).cpu().numpy()
    away = np.abs(np.concatenate([c.logprobs for row in rows for c in row]) - expected)
    assert away.mean() < 0.02
    assert away.max() < 0.2


@pytest.mark.cuda
def test_a_step_that_waits_is_decoded_without_graphs():
    model, told = on_cuda("llama", torch.float32), []
    signs = []
    model.model.layers[0].register_forward_hook(lambda m, i, out: signs.append(bool(out.sum() > 0)))
    options = SamplingOptions(2, 0.0, max_new_tokens=12)
    rows = sample(model, RAGGED, options, -1, 0, note=told.append)
    assert len(told) == 1
    assert "no CUDA graphs are used" in told[0]
    torch.rand(3, device="cuda")  # the default generator still draws
    model.cpu().double()
    assert_the_plain_forwards(model, rows, atol=2e-3)


@pytest.mark.cuda
def test_a_recording_that_breaks_leaves_random_numbers_and_memory_alone():
    device = torch.device("cuda", torch.cuda.current_device())
    generator, sums = torch.Generator(device), torch.zeros(8, device=device)
    graphs = Graphs(generator)

    def step(wait):
        sums.add_(torch.rand(8, device=device, generator=generator))
        if wait:
            sums.sum().item()

    graphs.run((1,), lambda: step(True))
    with pytest.raises(RuntimeError):
        graphs.run((1,), lambda: step(True))
    for own in (None, generator):
        assert torch.rand(3, device=device, generator=own).unique().numel() == 3
    before = torch.cuda.memory_reserved(device)
    big = torch.zeros(2**26, device=device)
    del big
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) <= before
    seen = []
    for _ in range(5):
        graphs.run((2,), lambda: step(False))
        seen.append(sums.sum().item())
    steps = np.diff(seen)
    assert len({round(float(x), 4) for x in steps}) == 4  # replays draw anew
