"""Tiny random models of many families, rows for them, and their own forward as the oracle."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.model import forward
from dpo_cli.model.rope import cuts_of
from dpo_cli.packing import pack
from dpo_cli.records import Batch, EncodedExample

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
FAMILIES: dict[str, dict[str, Any]] = {
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


def compute_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and rotary embeddings ask for float32 by name; give them float64.

    The compiler's tables of dtypes are read first: made meanwhile, they would lack float32.
    """
    importlib.import_module("torch._inductor.codegen.cpp")
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def build(family: str, options: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **(FAMILIES[family] if options is None else options))
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():  # larger weights than at initialisation: attention must matter
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
    return model.double().eval()


def examples(branches: int) -> list[EncodedExample]:
    """Ragged, with prompts and responses of one token."""
    rng = np.random.default_rng(3)
    ids = lambda n: rng.integers(0, 96, n).astype(np.int32)  # noqa: E731
    return [
        EncodedExample(ids(p), tuple(ids(r) for r in lengths[:branches]), i)
        for i, (p, lengths) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
    ]


def packed(rows: list[EncodedExample], keep_last: bool = False, cuts: Sequence[int] = ()) -> Batch:
    return pack(rows, range(len(rows)), keep_last, cuts)


def sequences(rows: list[EncodedExample]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(prompt, response) token ids of every branch."""
    return [
        (torch.tensor(e.prompt_ids).long(), torch.tensor(r).long())
        for e in rows
        for r in e.response_ids
    ]


def oracle(model: Any, rows: list[EncodedExample]) -> torch.Tensor:
    """Log-probabilities of all targets, one sequence at a time."""
    model.set_attn_implementation("eager")
    return torch.cat([forward.padded_token_logprobs(model, p, r) for p, r in sequences(rows)])


def weighted(values: torch.Tensor, first: int, total: int) -> torch.Tensor:
    """A loss that gives every token another weight. Made on the device: a copy would wait for it,
    which a test of what waits would take for the product's."""
    coefficients = torch.linspace(-1.0, 2.0, total, dtype=values.dtype, device=values.device)
    return (values * coefficients[first : first + len(values)]).sum()


def packed_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """`weighted` of all targets of a row, with gradient, and their log-probabilities."""
    starts = [0, *itertools.accumulate(batch.counts)]
    total = starts[-1]
    return forward.loss_and_logprobs(
        model, batch, lambda v, examples: weighted(v, starts[examples.start], total)
    )


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_loss_and_gradients_are_the_plain_ones(model: Any, rows: list[EncodedExample]) -> None:
    """The model's rows as it is set now, against the plain forward: 1e-10."""
    loss, got = packed_loss(model, packed(rows, cuts=cuts_of(model.config)))
    got_grads = gradients(model, loss)
    expected = oracle(model, rows)
    expected_loss = weighted(expected, 0, len(expected))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-10)
    expected_grads = gradients(model, expected_loss)
    assert got_grads.keys() == expected_grads.keys()
    for name, grad in got_grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-9, msg=name)
