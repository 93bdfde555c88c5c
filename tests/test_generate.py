"""Sampling against transformers' generate, the plain forward and exact frequencies."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import small_models
from dpo_cli.errors import ConfigError, NonFiniteError
from dpo_cli.model import forward
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.attention.probe import choose_attention
from dpo_cli.model.sampling import generate, prefix_cache
from dpo_cli.model.sampling.decoding import start
from dpo_cli.model.sampling.draw import BLOCK, draw
from dpo_cli.model.sampling.generate import SamplingOptions, sample
from dpo_cli.model.sampling.prefix_cache import Grid
from dpo_cli.model.sampling.trial import decoding_mode
from dpo_cli.packing import pack
from dpo_cli.records import EncodedExample
from small_models import FAMILIES, compute_in_float64
from test_attention import UNUSUAL

EOS, PAD = 0, 1
PROMPTS = [np.array(p, dtype=np.int32) for p in ([5], [7, 8, 9, 10], [3, 4], [11, 12, 13])]


KINDS = ("gpt2", "llama", "gemma2", "mistral", "qwen3", "gptj")
SMALL = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40,
    "head_dim": 4, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
GPT2_LIKE = {
    "vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40,
    "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip


def build(kind: str):
    torch.manual_seed(2)
    options = {**GPT2_LIKE, "rotary_dim": 4} if kind == "gptj" else SMALL
    config = AutoConfig.for_model(kind, **(GPT2_LIKE if kind == "gpt2" else options))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(6.0)
    choose_attention(model, "auto")
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate(kind):
    model = build(kind)
    before = model.config._attn_implementation
    ours = sample(model, PROMPTS, SamplingOptions(temperature=0.0, max_new_tokens=12), EOS, PAD)
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    for prompt, row in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor(prompt).long()[None], max_new_tokens=12, do_sample=False
        )[0, len(prompt) :]
        assert row[0].ids.tolist() == theirs.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_kept_logprobs_are_the_models(kind):
    model = build(kind)
    options = SamplingOptions(completions=3, max_new_tokens=10, batch_size=6, seed=4)
    rows = sample(model, PROMPTS, options, EOS, PAD)
    model.set_attn_implementation("eager")
    ended = 0
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert len(row) == 3
        for c in row:
            expected = forward.padded_token_logprobs(
                model, torch.tensor(prompt).long(), torch.tensor(c.ids).long()
            )
            np.testing.assert_allclose(c.logprobs, expected.detach().numpy(), atol=1e-4)
            assert EOS not in c.ids[:-1]
            assert c.finished == (c.ids[-1] == EOS)
            ended += c.finished
    assert ended < 12


def test_same_seed_same_samples():
    model = build("gpt2")
    options = SamplingOptions(completions=2, max_new_tokens=8, seed=1)
    ids = lambda o: [c.ids.tolist() for r in sample(model, PROMPTS, o, EOS, PAD) for c in r]  # noqa: E731
    assert ids(options) == ids(options)
    assert ids(options) != ids(SamplingOptions(completions=2, max_new_tokens=8, seed=2))


def quiet(line):
    """A note that nobody reads."""


STEPS = 13  # beyond the windows of 6
RAGGED = [np.random.default_rng(5).integers(0, 96, n).astype(np.int32) for n in (1, 9, 4, 9)]


def ready(family, options=None):
    model = small_models.build(family, options)
    choose_attention(model, "auto", on=Placement(note=quiet))
    return model


def sample_until_a_common_token(model, options):
    """Rows end at different steps: EOS is what the model says most. Returns it as well."""
    endless = sample(model, RAGGED, options, -1, 0)
    eos = Counter(int(t) for row in endless for c in row for t in c.ids[1:]).most_common(1)[0][0]
    return sample(model, RAGGED, options, eos, 0), eos


def assert_the_plain_forwards(model, rows, greedy=False, atol=1e-10):
    """Every step's log-probability is that of one full forward of prompt and completion."""
    model.set_attn_implementation("eager")
    for prompt, row in zip(RAGGED, rows, strict=True):
        for c in row:
            ids = torch.tensor(np.concatenate([prompt, c.ids])).long()
            with torch.no_grad():
                logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(c.ids)), c.ids]
            np.testing.assert_allclose(c.logprobs, expected.numpy(), rtol=0, atol=atol)
            assert not greedy or c.ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("completions", [1, 4])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gptj"])
def test_shared_prompts_are_exact(family, completions, temperature, monkeypatch):
    compute_in_float64(monkeypatch)
    monkeypatch.setattr(prefix_cache, "INITIAL_TOKENS", 2)  # the buffers must grow
    model = ready(family)
    assert decoding_mode(model, quiet) == "shared_prefix"
    options = SamplingOptions(completions, temperature, max_new_tokens=STEPS)
    rows, eos = sample_until_a_common_token(model, options)
    lengths = {len(c.ids) for row in rows for c in row}
    assert len(lengths) > 1
    assert all(c.finished == (c.ids[-1] == eos) for row in rows for c in row)
    assert_the_plain_forwards(model, rows, greedy=temperature == 0.0)


@pytest.mark.parametrize(("family", "options"), [(f, o) for _, f, o, *_ in UNUSUAL],
                         ids=[name for name, *_ in UNUSUAL])  # fmt: skip
def test_other_families_are_exact_as_well(family, options, monkeypatch):
    compute_in_float64(monkeypatch)
    model = ready(family, options)
    assert (decoding_mode(model, quiet) == "shared_prefix") == (family == "opt")
    options = SamplingOptions(3, max_new_tokens=STEPS)
    assert_the_plain_forwards(model, sample_until_a_common_token(model, options)[0])


@pytest.mark.parametrize("fault", ["padding", "prompt", "refusal"])
def test_a_cache_that_goes_wrong_is_not_used(fault, monkeypatch):
    compute_in_float64(monkeypatch)
    right = prefix_cache._Layer.attend

    def wrong(layer, query, grid, bias, call):
        assert fault != "refusal"
        if fault == "prompt":
            layer.prompt = tuple(torch.zeros_like(x) for x in layer.prompt)
        return right(layer, query, grid, None if fault == "padding" else bias, call)

    monkeypatch.setattr(prefix_cache._Layer, "attend", wrong)
    model = ready("llama")
    rows = sample(model, RAGGED, SamplingOptions(2, max_new_tokens=4), -1, 0)
    assert decoding_mode(model, quiet) != "shared_prefix"
    assert_the_plain_forwards(model, rows)


@pytest.mark.parametrize(("precision", "atol"), [("fp32", 1e-5), ("bf16", 0.05)])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gptj"])
def test_kept_logprobs_are_those_of_packed_rows(kind, precision, atol):
    model = build(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        rows = sample(model, PROMPTS, SamplingOptions(3, max_new_tokens=10), EOS, PAD)
    packed = pack([
        EncodedExample(p, tuple(c.ids for c in row), i)
        for i, (p, row) in enumerate(zip(PROMPTS, rows, strict=True))
    ], range(len(rows)))  # fmt: skip
    with torch.no_grad():
        expected = forward.token_logprobs(model, packed)
    got = np.concatenate([c.logprobs for row in rows for c in row])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=atol)


def test_a_prompts_keys_are_kept_once_and_leave_with_its_last_row():
    model = build("llama")
    rows, position, logits = start(model, PROMPTS, 4, PAD, "shared_prefix")
    assert position.tolist() == [0] * 4 + [3] * 4 + [1] * 4 + [2] * 4
    assert logits.shape == (16, 24)
    shapes = lambda: {tuple(x.prompt[0].shape) for x in rows.cache.shared}  # noqa: E731
    assert shapes() == {(4, 2, 4, 4)}  # prompts, heads of keys, columns, width
    going = np.array([True] * 4 + [False] * 4 + [False, True, True, False] + [True] * 4)
    # Ten rows stay, so those at 10, 12 .. 15 fill the places 4 .. 8.
    assert rows.keep(going).tolist() == [0, 1, 2, 3, 10, 12, 13, 14, 15, 9]
    assert shapes() == {(3, 2, 4, 4)}
    assert rows.cache.prompt_of.tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2, 1]
    assert rows.cache.grid.cells.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 5]


def test_grid_there_and_back():
    grid = Grid.of(np.array([1, 0, 1]), torch.device("cpu"))
    rows = torch.arange(12.0).view(3, 1, 2, 2)  # three rows, one head of keys, two of queries
    spread = grid.spread(rows)
    assert spread[0, 0].tolist() == [[4.0, 5.0], [6.0, 7.0], [0.0, 0.0], [0.0, 0.0]]
    assert spread[1, 0].tolist() == [[0.0, 1.0], [2.0, 3.0], [8.0, 9.0], [10.0, 11.0]]
    assert torch.equal(grid.gather(spread), rows)
    assert Grid.of(np.array([0, 0, 1, 1]), torch.device("cpu")).cells is None
    assert Grid.of(np.array([0, 2, 1]), torch.device("cpu")).cells.tolist() == [0, 2, 1]


def test_looking_for_finished_rows_less_often_changes_nothing(monkeypatch):
    model, options = build("llama"), SamplingOptions(2, 0.0, max_new_tokens=12)
    often = sample(model, PROMPTS, options, EOS, PAD)
    eos = int(often[1][0].ids[2])
    often = sample(model, PROMPTS, options, eos, PAD)
    monkeypatch.setitem(generate.SYNC_EVERY, "cpu", 5)
    seldom = sample(model, PROMPTS, options, eos, PAD)
    assert len(often[1][0].ids) < 12
    for a, b in zip((c for r in often for c in r), (c for r in seldom for c in r), strict=True):
        assert (a.ids.tolist(), a.finished) == (b.ids.tolist(), b.finished)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("call", [1, 3])  # the prefill, the second new token
def test_logits_that_are_not_finite_stop_it(call, temperature):
    model = build("gpt2")
    assert decoding_mode(model, quiet) == "shared_prefix"  # tried before calls are counted
    calls = []

    def spoil(module, inputs, output):
        calls.append(output)
        return output * float("nan") if len(calls) == call else output

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match="not finite"):
        sample(model, PROMPTS, SamplingOptions(2, temperature, max_new_tokens=5), -1, PAD)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_draw_frequencies(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    p = torch.softmax(logits / temperature, 0)
    if top_p < 1.0:  # by hand: 0.644 alone covers 0.6
        p = torch.tensor([1.0, 0.0, 0.0, 0.0])
    n = 20_000
    tokens, logp = draw(logits.expand(n, 4), temperature, top_p, torch.Generator().manual_seed(0))
    seen = torch.bincount(tokens, minlength=4) / n
    assert torch.all((seen - p).abs() <= 4 * (p * (1 - p) / n).sqrt())
    torch.testing.assert_close(logp, p.log()[tokens])


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_draw_from_several_blocks(top_p):
    """The last block is not full; half the tokens are impossible."""
    vocab, n = 2 * BLOCK + 50, 20_000
    weight = torch.rand(vocab, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[::2] = 0.0
    p = weight / weight.sum()
    if top_p < 1.0:
        order = p.argsort(descending=True).tolist()
        while sum(p[order[:-1]].tolist()) >= top_p:
            p[order.pop()] = 0.0
    tokens, logp = draw(
        weight.log().float().expand(n, vocab), 1.0, top_p, torch.Generator().manual_seed(0)
    )
    p = p / p.sum()
    seen = torch.bincount(tokens, minlength=vocab)
    assert seen[p == 0].sum() == 0
    possible = p > 0
    chi2 = ((seen - n * p)[possible] ** 2 / (n * p[possible]).clamp_min(1e-9))[n * p[possible] >= 5]
    assert abs(chi2.sum() - len(chi2)) <= 5 * (2 * len(chi2)) ** 0.5
    torch.testing.assert_close(logp.double(), p.log()[tokens], rtol=0, atol=2e-5)


def test_the_contexts_end_cuts_each_prompt_alone():
    """By its own length, whichever prompts are decoded beside it."""
    model = build("gpt2")  # 40 positions
    lengths = (4, 39, 36, 10, 39, 37)
    prompts = [np.full(n, 5 + i, dtype=np.int32) for i, n in enumerate(lengths)]
    never = 23  # drawn too seldom to matter: 24 tokens, one of them EOS
    for size in (1, 3, 64):
        options = SamplingOptions(max_new_tokens=6, batch_size=size, completions=2, seed=1)
        rows = sample(model, prompts, options, never, PAD)
        for n, row in zip(lengths, rows, strict=True):
            assert all(len(c.ids) == min(6, 40 - n) for c in row if not c.finished)
            assert any(not c.finished for c in row)
    with pytest.raises(ConfigError, match="a prompt of 40 tokens fills the model's context of 40"):
        sample(model, [*prompts, np.full(40, 5, np.int32)], SamplingOptions(), EOS, PAD)
