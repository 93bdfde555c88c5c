"""Which decoding mode is used, what is told of a slower one, and what memory allows."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_cli.errors import ConfigError
from dpo_cli.model import forward
from dpo_cli.model.sampling import generate, static_cache
from dpo_cli.model.sampling.generate import SamplingOptions, sample
from dpo_cli.model.sampling.sampled import DecodingLimit
from dpo_cli.model.sampling.stepper import Stepper
from dpo_cli.packing import pack
from dpo_cli.records import EncodedExample
from small_models import compute_in_float64
from test_generate import (
    EOS,
    PAD,
    PROMPTS,
    RAGGED,
    assert_the_plain_forwards,
    build,
    quiet,
    ready,
)
from test_stepper import flat, refuse, use_static_steps


@pytest.fixture
def static(monkeypatch):
    use_static_steps(monkeypatch)


@pytest.mark.parametrize("fault", ["mask", "prompt", "column"])
def test_a_static_cache_that_goes_wrong_is_not_used(fault, monkeypatch, static):
    compute_in_float64(monkeypatch)
    layer, told = static_cache._Layer, []
    if fault == "mask":

        def blind(cache, window):
            return cache.first[: cache.prompts, None, None, None] < 0, cache.column < 0

        monkeypatch.setattr(static_cache.StaticCache, "masks", blind)
    elif fault == "prompt":
        monkeypatch.setattr(layer, "fill_prompts", lambda *words: None)
    else:
        update = layer.update

        def shifted(self, *words, **more):
            self.cache.column += 1
            out = update(self, *words, **more)
            self.cache.column -= 1
            return out

        monkeypatch.setattr(layer, "update", shifted)
    model = ready("llama")
    options = SamplingOptions(2, max_new_tokens=4)
    rows = [sample(model, RAGGED, options, -1, 0, note=told.append) for _ in range(2)][1]
    assert len(told) == 1
    assert "is slower: no CUDA graphs are used (its logits would differ by" in told[0]
    assert_the_plain_forwards(model, rows)


def test_refusals_are_told_once_and_why():
    model, told = build("gptj"), []
    for _ in range(2):
        sample(model, PROMPTS, SamplingOptions(2, max_new_tokens=2), EOS, PAD, note=told.append)
    assert told == ["sampling from GPTJForCausalLM is slower: prompt keys and values are copied "
                    "per sample (shared_prefix: its attention is dense)"]  # fmt: skip


@pytest.mark.parametrize("way", ["dynamic", "static"])
def test_running_out_of_memory_halves_the_prompts_together(way, monkeypatch, static):
    model, told = build("llama"), []
    monkeypatch.setitem(generate.STATIC, "cpu", way == "static")
    options = SamplingOptions(2, 0.0, max_new_tokens=6, batch_size=8)
    expected = flat(sample(model, PROMPTS, options, EOS, PAD, note=refuse))
    sizes = []

    def scarce(module, words, output):
        rows = output.logits.shape[0]
        sizes.append(rows)
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_hook(scarce)
    assert flat(sample(model, [*PROMPTS, *PROMPTS], options, EOS, PAD, note=told.append)) \
        == expected * 2  # fmt: skip
    assert told == ["out of memory with 4 prompts sampled together: from now on at most 2 "
                    "(stage.batch_size=4)"]  # fmt: skip
    assert sizes.count(8) == 1


def test_one_prompt_that_does_not_fit_is_an_error():
    model = build("gpt2")

    def never(module, words, output):
        raise torch.OutOfMemoryError("CUDA out of memory")

    sample(model, PROMPTS, SamplingOptions(1, max_new_tokens=2), EOS, PAD)
    model.register_forward_hook(never)
    with pytest.raises(ConfigError, match=r"sampling from a single prompt of \d+ tokens \(1 compl"):
        sample(model, PROMPTS, SamplingOptions(1), EOS, PAD, note=quiet)


def test_what_memory_has_shown_counts_for_later_passes_of_a_run():
    """In sequences: 2 prompts of 2 completions fit, so 4 prompts of one do."""
    model, told, limit = build("llama"), [], DecodingLimit()
    sample(model, PROMPTS, SamplingOptions(1, max_new_tokens=2), EOS, PAD, note=quiet)
    sizes = []

    def scarce(module, words, output):
        sizes.append(output.logits.shape[0])
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_hook(scarce)
    for completions in (2, 2, 1):
        options = SamplingOptions(completions, max_new_tokens=2, batch_size=8)
        sample(model, [*PROMPTS, *PROMPTS], options, EOS, PAD, note=told.append, limit=limit)
    assert limit.sequences == 4
    assert len(told) == 1
    assert sum(size > 4 for size in sizes) == 1


@pytest.mark.parametrize(("precision", "atol"), [("fp32", 1e-5), ("bf16", 0.05)])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_static_logprobs_are_those_of_packed_rows(kind, precision, atol, static):
    """What PPO trains on: the same autocast in sampling and in training's forward."""
    model = build(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
        rows = sample(model, PROMPTS, SamplingOptions(3, max_new_tokens=10), EOS, PAD, note=refuse)
        packed = pack([
            EncodedExample(p, tuple(c.ids for c in row), i)
            for i, (p, row) in enumerate(zip(PROMPTS, rows, strict=True))
        ], range(len(rows)))  # fmt: skip
        expected = forward.token_logprobs(model, packed)
    got = np.concatenate([c.logprobs for row in rows for c in row])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=atol)


def test_rows_that_a_gpu_holds(monkeypatch):
    """By hand: a token keeps 2 * 10 layers * 4 heads * 50 wide * 2 bytes = 8 kB, a row of 100 new
    tokens and a half of 200 of its prompt 1.6 MB, and logits 24 * 100,000 = 2.4 MB."""
    config = SimpleNamespace(
        num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=4, hidden_size=400,
        vocab_size=100_000,
    )  # fmt: skip
    config.get_text_config = lambda: config
    model = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), config=config, dtype=torch.bfloat16
    )
    prompts = [np.zeros(n, np.int32) for n in (7, 200)] * 100
    options = SamplingOptions(2, max_new_tokens=100, batch_size=None)
    fits = lambda memory, ranks=1: (  # noqa: E731
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory / 0.3)),
        generate.rows_that_fit(model, prompts, options, ranks),
    )[1]
    assert [fits(x) for x in (4.1e6, 4.0e6 * 255, 4.01e6 * 256, 1e12)] == [1, 128, 256, 512]
    assert fits(1e12, ranks=4) == 128  # of 400 sequences 100 each


@pytest.mark.parametrize("trained", [True, False])
def test_autocast_casts_weights_once_a_call(trained):
    model = build("gpt2").float().requires_grad_(trained)
    counted, inside = Counter(), TorchDispatchMode

    class Casts(inside):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "aten::_to_copy" and args[0].shape == (16, 48):
                counted["casts"] += 1
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Casts():
        sample(model, PROMPTS, SamplingOptions(1, max_new_tokens=6), -1, PAD)
    assert counted["casts"] == 2  # of the two layers' c_attn
    assert all(p.requires_grad == trained for p in model.parameters())


def test_buffers_are_freed_without_the_collector(static):
    model = build("llama")
    made = Stepper(model, SamplingOptions(2), EOS, PAD, record=False)
    made.begin(PROMPTS, 8)
    cache = weakref.ref(made.cache)
    gc.disable()
    try:
        made._free()
        assert cache() is None
    finally:
        gc.enable()
