"""Steps of static shape against the dynamic path and the plain forward, on a CPU; on CUDA,
recorded against not recorded."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from dpo_cli.model import forward, generate, static_cache, stepper
from dpo_cli.model.decoding import shares_prompts
from dpo_cli.model.generate import SamplingOptions, sample
from dpo_cli.model.graphs import Graphs
from dpo_cli.model.stepper import Stepper, can_step
from small_models import FAMILIES, compute_in_float64
from test_generate import (
    EOS,
    KINDS,
    PAD,
    PROMPTS,
    RAGGED,
    STEPS,
    assert_the_plain_forwards,
    build,
    quiet,
    ready,
    sample_until_a_common_token,
)


@pytest.fixture
def static(monkeypatch):
    """The static steps on a CPU, with buffers that grow and rows that drop out early."""
    monkeypatch.setitem(generate.STATIC, "cpu", True)
    monkeypatch.setattr(static_cache, "FIRST_OWN", 4)
    monkeypatch.setattr(static_cache, "LEAST_ROWS", 1)
    monkeypatch.setattr(stepper, "LOOK_EVERY", 2)


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
    before, static_cache.LEAST_ROWS = static_cache.LEAST_ROWS, 4
    try:
        order = cache.keep(going, used=1)
    finally:
        static_cache.LEAST_ROWS = before
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
    monkeypatch.setattr(stepper, "LOOK_EVERY", 100)
    model = build("llama")
    forwards, step, counted = [], Stepper._step, Counted()
    assert shares_prompts(model, refuse)
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
    monkeypatch.setattr(stepper, "LOOK_EVERY", 4)
    model, looks, look = build("llama"), [], Stepper.look
    monkeypatch.setattr(Stepper, "look", lambda *words: looks.append(None) or look(*words))
    sample(model, PROMPTS, SamplingOptions(2, max_new_tokens=13), -1, PAD, note=refuse)
    assert len(looks) == 3  # before the tokens 5, 9 and 13


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
    assert "no CUDA graphs are used, which is slower (its logits would be off by" in told[0]
    assert_the_plain_forwards(model, rows)


def test_refusals_are_told_once_and_why():
    model, told = build("gptj"), []
    for _ in range(2):
        sample(model, PROMPTS, SamplingOptions(2, max_new_tokens=2), EOS, PAD, note=told.append)
    assert told == ["sampling from GPTJForCausalLM: the keys of a prompt are copied, which is "
                    "slower (its attention is dense)"]  # fmt: skip


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
                    "(stage.batch_size)"]  # fmt: skip
    assert sizes.count(8) == 1


def test_one_prompt_that_does_not_fit_is_an_error():
    model = build("gpt2")

    def never(module, words, output):
        raise torch.OutOfMemoryError("CUDA out of memory")

    sample(model, PROMPTS, SamplingOptions(1, max_new_tokens=2), EOS, PAD)
    model.register_forward_hook(never)
    with pytest.raises(torch.OutOfMemoryError):
        sample(model, PROMPTS, SamplingOptions(1), EOS, PAD, note=quiet)


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


def on_cuda(family, dtype, trained=True):
    from dpo_cli.model.attention import Placement
    from dpo_cli.model.probe import choose_attention
    from small_models import build as build_family

    model = build_family(family).to(dtype).cuda().requires_grad_(trained)
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
