"""Sampling against transformers' generate, teacher-forced log-probs and exact frequencies."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.model import forward
from dpo_cli.model.generate import SamplingOptions, draw, sample
from dpo_cli.model.probe import choose_attention

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
