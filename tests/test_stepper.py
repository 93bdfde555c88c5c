"""Steps of static shape against the dynamic path and the plain forward, on a CPU."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from dpo_cli.model import forward
from dpo_cli.model.sampling import generate, static_cache, stepper
from dpo_cli.model.sampling.generate import SamplingOptions, sample
from dpo_cli.model.sampling.stepper import Stepper, can_step
from dpo_cli.model.sampling.trial import decoding_mode
from small_models import FAMILIES, compute_in_float64
from test_generate import (
    EOS,
    KINDS,
    PAD,
    PROMPTS,
    STEPS,
    assert_the_plain_forwards,
    build,
    ready,
    sample_until_a_common_token,
)


def use_static_steps(monkeypatch):
    """On a CPU, with buffers that grow and rows that drop out early."""
    monkeypatch.setitem(generate.STATIC, "cpu", True)
    monkeypatch.setattr(static_cache, "INITIAL_TOKENS", 4)
    monkeypatch.setattr(static_cache, "MIN_ROWS", 1)
    monkeypatch.setattr(stepper, "SYNC_EVERY", 2)


@pytest.fixture
def static(monkeypatch):
    use_static_steps(monkeypatch)


def refuse(line):
    raise AssertionError(line)


@pytest.mark.parametrize(("completions", "temperature"), [(1, 0.0), (4, 1.0)])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gptj"])
def test_static_steps_are_exact(family, completions, temperature, monkeypatch, static):
    compute_in_float64(monkeypatch)
    model = ready(family)
    assert can_step(model, refuse)
    shapes = seen_shapes(monkeypatch)
    options = SamplingOptions(completions, temperature, max_new_tokens=STEPS)
    rows, eos = sample_until_a_common_token(model, options)
    assert len({len(c.ids) for row in rows for c in row}) > 1
    assert all(c.finished == (c.ids[-1] == eos) for row in rows for c in row)
    assert {columns for *_, columns in shapes} == {4, 8, 16}
    assert_the_plain_forwards(model, rows, greedy=temperature == 0.0)


@pytest.mark.parametrize("completions", [1, 3])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gptj"])
def test_rows_and_prompts_drop_out_by_halves(kind, completions, monkeypatch, static):
    """Samples of a prompt end at different tokens; what is left has the plain log-probs."""
    model, prompts = build(kind), [np.arange(n, n + 1 + n % 5) for n in range(2, 18)]
    sampled = lambda eos: sample(  # noqa: E731
        model, prompts, SamplingOptions(completions, max_new_tokens=34, batch_size=128), eos, PAD,
        note=refuse,
    )  # fmt: skip
    tokens = Counter(int(t) for row in sampled(-1) for c in row for t in c.ids[2:])
    shapes = seen_shapes(monkeypatch)
    rows = sampled(tokens.most_common(1)[0][0])
    assert len({rows for _, rows, _ in shapes}) > 1
    assert completions > 1 or len({prompts for prompts, *_ in shapes}) > 1
    model.set_attn_implementation("eager")
    for prompt, row in zip(prompts, rows, strict=True):
        for c in row[:2]:
            expected = forward.padded_token_logprobs(
                model, torch.tensor(prompt), torch.tensor(c.ids).long()
            )
            np.testing.assert_allclose(c.logprobs, expected.detach().numpy(), atol=2e-4)


def test_what_is_kept_of_rows_and_prompts():
    """Eight prompts, two samples each; of 16 rows 4 stay, of three prompts, at most 4 kept."""
    prefilled, samples = DynamicCache(), 2
    values = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 2, 3, 4)
    prefilled.update(values, values + 100, 0)
    cache = static_cache.StaticCache(prefilled, static_cache.Room(8, samples, 5, 6))
    cache.begin(range(1, 9))
    cache.fill_prompts(0, prefilled)
    (layer,) = cache.static
    new = torch.arange(16.0).view(16, 1, 1, 1).expand(16, 2, 1, 4)
    cache.update(new, new + 100, 0)
    going = np.zeros(16, bool)
    going[[1, 7, 14, 15]] = True
    before, static_cache.MIN_ROWS = static_cache.MIN_ROWS, 4
    try:
        order = cache.keep(going, used=1)
    finally:
        static_cache.MIN_ROWS = before
    assert sorted(order.tolist()) == [1, 7, 14, 15]
    assert cache.shape == (4, 4, 6)
    own, prompt = layer.own[1][:4, 0, 0, 0] - 100, layer.prompt[0][:4, 0, -1, 0]
    assert own.tolist() == order.tolist()
    prompts, cells = prompt[cache.cells[:4] // samples], cache.cells[:4] % samples
    assert prompts.tolist() == [row // samples for row in order]
    assert cells.tolist() == [row % samples for row in order]
    first = cache.first[:4][cache.cells[:4] // samples]
    assert first.tolist() == [5 - (row // samples + 1) for row in order]
    assert layer.prompt[0][0, 0].eq(0).all(1).tolist()[:2] == [True, True]  # left of the prompt


def seen_shapes(monkeypatch):
    shapes, step = set(), Stepper._step

    def noted(self):
        shapes.add(self.cache.shape)
        step(self)

    monkeypatch.setattr(Stepper, "_step", noted)
    return shapes


def flat(rows):
    return [(c.ids.tolist(), c.finished) for row in rows for c in row]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
@pytest.mark.parametrize("options", [
    SamplingOptions(3, 0.8, 0.9, max_new_tokens=10, seed=3, batch_size=6), SamplingOptions(1, 0.0),
])  # fmt: skip
def test_static_steps_draw_what_dynamic_ones_do(kind, options, monkeypatch, static):
    """Where no row drops out, as then the random numbers go to other rows."""
    model = build(kind)
    found = sample(model, PROMPTS, options, -1, PAD, note=refuse)
    monkeypatch.setitem(generate.STATIC, "cpu", False)
    expected = sample(model, PROMPTS, options, -1, PAD, note=refuse)
    assert flat(found) == flat(expected)
    for a, b in zip((c for r in found for c in r), (c for r in expected for c in r), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("completions", [1, 2])
def test_buffers_serve_batches_of_any_size(completions, monkeypatch, static):
    """Larger and smaller batches than the first, longer prompts, less room in the context."""
    shapes = seen_shapes(monkeypatch)
    model = build("llama")  # 40 positions
    prompts = [np.arange(2, 2 + n, dtype=np.int32) % 24 for n in (1, 2, 3, 5, 8, 13, 20, 31, 33)]
    never = sample(model, prompts, SamplingOptions(1, 0.0, max_new_tokens=12), -1, PAD)
    often = Counter(int(c.ids[-1]) for (c,) in never).most_common(1)[0][0]
    for size in (2, 4, 8):
        options = SamplingOptions(completions, 0.0, max_new_tokens=12, batch_size=size)
        monkeypatch.setitem(generate.STATIC, "cpu", True)
        found = sample(model, prompts, options, often, PAD, note=refuse)
        assert len({len(c.ids) for (c, *_) in found}) > 2
        monkeypatch.setitem(generate.STATIC, "cpu", False)
        assert flat(found) == flat(sample(model, prompts, options, often, PAD, note=refuse))
    assert len({rows for _, rows, _ in shapes}) > 4


def test_a_long_prefill_in_parts_changes_nothing(monkeypatch, static):
    model = build("mistral")
    options = SamplingOptions(2, 0.0, max_new_tokens=8)
    whole = flat(sample(model, PROMPTS, options, EOS, PAD))
    prefill, calls = stepper.prefill, []

    def parts(*words):
        for part in prefill(*words, most_tokens=4):
            calls.append(part)
            yield part

    monkeypatch.setattr(stepper, "prefill", parts)
    assert flat(sample(model, PROMPTS, options, EOS, PAD)) == whole
    assert [first for first, *_ in calls] == [0, 1, 2, 3]


class Counted(TorchDispatchMode):
    """Reads of a device's value by the host, among the operations of the body."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self):
        names = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
        return sum(self.seen[f"aten::{name}"] for name in names)


def test_a_step_waits_for_nothing_and_launches_one_forward(monkeypatch, static):
    monkeypatch.setattr(stepper, "SYNC_EVERY", 100)
    model = build("llama")
    forwards, step, counted = [], Stepper._step, Counted()
    assert decoding_mode(model, refuse) == "shared_prefix"
    assert can_step(model, refuse)
    model.register_forward_hook(lambda *_: forwards.append(None))

    def watched(self):
        with counted:
            step(self)

    monkeypatch.setattr(Stepper, "_step", watched)
    sample(model, PROMPTS, SamplingOptions(2, max_new_tokens=9), -1, PAD, note=refuse)
    assert len(forwards) == 9  # the prefill, and a step a further token
    assert counted.seen["aten::index_copy_"] >= 8 * 2 * 2  # keys and values of two layers
    assert counted.waits == 0


def test_the_host_looks_once_in_several_tokens(monkeypatch, static):
    monkeypatch.setattr(stepper, "SYNC_EVERY", 4)
    model, looks, look = build("llama"), [], Stepper.drop_finished
    monkeypatch.setattr(Stepper, "drop_finished", lambda *words: looks.append(None) or look(*words))
    sample(model, PROMPTS, SamplingOptions(2, max_new_tokens=13), -1, PAD, note=refuse)
    assert len(looks) == 3  # before the tokens 5, 9 and 13
