"""Shapes, lengths and configurations whose memory tests work out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import GPT2Config, LlamaConfig

from dpo_cli.config import RunConfig
from dpo_cli.plan.memory.estimate import Estimate, estimate
from dpo_cli.plan.memory.facts import Facts, Texts
from dpo_cli.plan.memory.shape import shape_of
from small_runs import configure

GIB = 2**30
GPT2_XL = shape_of(GPT2Config(n_embd=1600, n_layer=48, n_head=25))
LLAMA = shape_of(LlamaConfig(  # Llama 3.1 8 B
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256,
))  # fmt: skip
TEXTS = Texts(step=4096, longest=700, typical=512, keys=1.25, scored=0.5, prompt=256)


def facts(shape: Any = LLAMA, device: str = "cuda", half: bool = True, **texts: Any) -> Facts:
    return Facts(shape, replace(TEXTS, **texts), device, half)


def of(*words: str, **changes: Any) -> Estimate:
    """The estimate of a configuration composed from words, for the facts above."""
    return estimate(configured(*words), facts(**changes))


def configured(*words: str) -> RunConfig:
    return configure("model=custom", "model.hub_id=a/b", "data=hh", *words)
