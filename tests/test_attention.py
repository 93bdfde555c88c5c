"""Packed rows against each model family's own forward, one sequence at a time."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.errors import ConfigError
from dpo_cli.model import attention, forward
from dpo_cli.model.load import set_dropout
from dpo_cli.model.probe import choose_attention
from dpo_cli.packing import pack
from dpo_cli.records import EncodedExample

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2_LIKE = {
    "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "gpt2": {**GPT2_LIKE, **NO_DROPOUT},
    "gptj": {**GPT2_LIKE, **NO_DROPOUT, "rotary_dim": 4},
    "gpt_neox": {**SMALL, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "mistral": {**SMALL, "sliding_window": 6},
    "mixtral": {**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2},
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 6},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 6},
    "phi3": SMALL,
    "olmo2": SMALL,
    "granite": {**SMALL, "logits_scaling": 4.0},
    "cohere": {**SMALL, "logit_scale": 0.5},
}
RESPONSES = [(5, 7, 1, 2), (1, 3, 4, 9), (12, 2, 3, 3)]
PROMPTS = [1, 9, 4]


@pytest.fixture(autouse=True)
def _float64_inside_the_models(monkeypatch):
    """Norms and rotary embeddings ask for float32 by name; give them float64 here."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def build(family: str) -> torch.nn.Module:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():  # larger weights than at initialisation: attention must matter
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
    return model.double().eval()


def examples(branches: int) -> list[EncodedExample]:
    rng = np.random.default_rng(3)
    ids = lambda n: rng.integers(0, 96, n).astype(np.int32)  # noqa: E731
    return [
        EncodedExample(ids(p), tuple(ids(r) for r in lengths[:branches]), i)
        for i, (p, lengths) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
    ]


def weighted(values: torch.Tensor, first: int, total: int) -> torch.Tensor:
    """A loss that gives every token another weight."""
    coefficients = torch.linspace(-1.0, 2.0, total, dtype=values.dtype)
    return (values * coefficients[first : first + len(values)]).sum()


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def oracle(model, rows):
    model.set_attn_implementation("eager")
    return torch.cat([
        forward.padded_token_logprobs(model, torch.tensor(e.prompt_ids).long(),
                                      torch.tensor(r).long())
        for e in rows for r in e.response_ids
    ])  # fmt: skip


@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_the_plain_forward(family, branches):
    model, rows = build(family), examples(branches)
    expected = oracle(model, rows)
    expected_loss = weighted(expected, 0, len(expected))
    expected_grads = gradients(model, expected_loss)
    choose_attention(model, "auto")
    batch = pack(rows, [0, 1, 2])
    starts = [0, *itertools.accumulate(batch.counts)]
    loss, got = forward.loss_and_logprobs(
        model, batch, lambda v, examples: weighted(v, starts[examples.start], len(expected))
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-10)
    got_grads = gradients(model, loss)
    assert got_grads.keys() == expected_grads.keys()
    for name, grad in got_grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_dense_mask_equals_packed(family):
    model, rows = build(family), examples(2)
    model.set_attn_implementation(attention.NAME)
    packed = forward.token_logprobs(model, pack(rows, [0, 1, 2]))
    choose_attention(model, "dense")
    assert model.config._attn_implementation == "eager"
    dense = forward.token_logprobs(model, pack(rows, [0, 1, 2]))
    torch.testing.assert_close(dense, packed, rtol=0, atol=1e-10)


def test_families_without_the_interface_fall_back():
    model = build("gptj")
    choose_attention(model, "auto")
    assert model.config._attn_implementation == "eager"


def test_sliding_window_has_no_dense_fallback():
    with pytest.raises(ConfigError, match="sliding-window"):
        choose_attention(build("mistral"), "dense")


def test_a_branch_does_not_see_its_sibling():
    model, rows = build("llama"), examples(2)
    choose_attention(model, "packed")
    before = forward.sequence_logprobs(model, pack(rows, [0, 1, 2]))
    other = rows[1].response_ids[0][::-1].copy()
    changed = [rows[0], EncodedExample(rows[1].prompt_ids, (other, rows[1].response_ids[1]), 1)]
    after = forward.sequence_logprobs(model, pack([*changed, rows[2]], [0, 1, 2]))
    keep = [0, 1, 3, 4, 5]
    torch.testing.assert_close(after[keep], before[keep], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["opt", "starcoder2", "gpt2"])
def test_dropout_off_is_off_whatever_the_family_calls_it(family):
    options = GPT2_LIKE if family == "gpt2" else {**SMALL, "num_key_value_heads": 2}
    if family == "opt":
        options = {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}
    config = AutoConfig.for_model(family, **options)
    for name in ("residual_dropout", "embedding_dropout", "attention_dropout", "dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    set_dropout(model, 0.0)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
