"""Every token that ends a text ends it: of configurations, tokenizer and chat template."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from chat_templates import ENDS, TEMPLATES, tokenizer
from dpo_cli.model.sampling import generate
from dpo_cli.model.sampling.generate import SamplingOptions, sample
from dpo_cli.model.sampling.sampled import ended_by
from dpo_cli.model.sampling.stepper import Stepper
from dpo_cli.session.sampling import stop_ids

PROMPTS = [np.array(p, np.int32) for p in ([5], [7, 8, 9, 10], [3, 4], [11, 12, 13])]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 24}
    made = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, eos_token_id=0, **shape)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.mul_(6.0)
    return made


def greedy(model: Any, prompt: np.ndarray, ends: set[int], most: int) -> list[int]:
    """Without a cache: the whole text through the model for each token."""
    ids = prompt.tolist()
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("static", [False, True])
def test_any_end_stops_a_row(model: Any, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generate.STATIC, "cpu", static)
    free = [greedy(model, p, set(), 12) for p in PROMPTS]
    ends = (0, free[0][3], free[1][5], free[2][1])
    assert len(set(ends)) > 2
    options = SamplingOptions(temperature=0.0, max_new_tokens=12)
    if static:
        with torch.no_grad():
            rows = Stepper(model, options, ends, 1, False).decode(PROMPTS, 12, 0)
    else:
        rows = [row for (row,) in sample(model, PROMPTS, options, ends, 1)]
    for prompt, row in zip(PROMPTS, rows, strict=True):
        wanted = greedy(model, prompt, set(ends), 12)
        assert row.ids.tolist() == wanted
        assert row.finished == (wanted[-1] in ends)
    assert any(len(row.ids) < 12 for row in rows)


def test_ended_by() -> None:
    tokens = torch.tensor([1, 2, 3, 1])
    assert ended_by(tokens, 1).tolist() == [True, False, False, True]
    assert ended_by(tokens, [3, 2]).tolist() == [False, True, True, False]


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_ends_of_a_model(family: str, model: Any) -> None:
    of = tokenizer(family)
    wanted = {of.eos_token_id, of.convert_tokens_to_ids(ENDS.get(family, "</s>"))}
    model.config.eos_token_id = None
    model.generation_config = GenerationConfig()
    assert set(stop_ids(model, of)) == wanted
    model.generation_config = GenerationConfig(eos_token_id=[of.eos_token_id, 17])
    model.config.eos_token_id = 9
    assert set(stop_ids(model, of)) == wanted | {17, 9}
