"""Folders of tiny random models to put adapters on, and log-probabilities by PEFT's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpo_cli.data.dataset import load_encoded
from dpo_cli.grammar.tokenizer import build_tokenizer
from dpo_cli.records import EncodedExample
from small_models import GPT2_LIKE, NO_DROPOUT, SMALL
from small_runs import TINY, configure

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "tie_word_embeddings": False},
    "gpt2": {**GPT2_LIKE, **NO_DROPOUT},
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "mixtral": {
        **SMALL, "num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        **SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "tie_word_embeddings": False,
    },
}  # fmt: skip
LENGTH = "max_position_embeddings"
LENGTHS = {"gpt2": "n_positions"}


def write_base(folder: Path, family: str) -> Path:
    """A random model of the family, with the tokenizer of the generated reviews."""
    tokenizer = build_tokenizer(1024)
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    special["pad_token_id"] = special["eos_token_id"]  # as many do; the tokenizer has another
    shape = {**SHAPES[family], **special, "vocab_size": 1024, LENGTHS.get(family, LENGTH): 128}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    with torch.no_grad():  # larger weights than at initialisation: layers must matter
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(folder: Path, cache: Path, split: str = "eval") -> list[EncodedExample]:
    """The pairs of a small run's split, as token ids."""
    config = configure(*TINY, "stage=dpo", f"cache_dir={cache}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: list[EncodedExample] = getattr(
        load_encoded(config.data, tokenizer, 128, config.seed, cache), split
    )
    return found


@torch.no_grad()
def plain_logprobs(model: Any, examples: list[EncodedExample]) -> torch.Tensor:
    """(E, K) by the model's own forward, a sequence at a time."""
    model.eval()
    values = []
    for example in examples:
        for response in example.response_ids:
            ids = torch.tensor([*example.prompt_ids, *response]).long()[None]
            logits = model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1]
            picked = logits.float().log_softmax(-1).gather(1, ids[0, -len(response) :, None])
            values.append(picked.sum())
    return torch.stack(values).view(len(examples), -1)
