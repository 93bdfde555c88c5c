"""Small random models of many families whose configurations ask for everything random.

Dropout of every name and the jitter of routers are set high: no test may see any of it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import families
from families import BASE, EXPERTS, GPT2, HEADS

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 8.0, 16.0], "original_max_position_embeddings": 8,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
DEEPSEEK_V2 = {
    **families.FAMILIES["deepseek_v3"], "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "topk_method": "greedy",
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "codegen": {**GPT2, "rotary_dim": 4, "n_ctx": 64},
    "llama": {**BASE, "rope_parameters": DYNAMIC},
    "phi3": {**BASE, "rope_parameters": LONGROPE, "original_max_position_embeddings": 8},
    "phimoe": {**BASE, **EXPERTS},
    "olmo": BASE,
    "granitemoe": {**BASE, **EXPERTS},
    "glm": HEADS,
    "deepseek_v2": DEEPSEEK_V2,
    "nemotron": BASE,
    "persimmon": {**BASE, "num_key_value_heads": 4},
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "seed_oss": HEADS,
    "arcee": HEADS,
}  # fmt: skip
FAMILIES = {
    name: options
    for name, options in {**families.FAMILIES, **MORE}.items()
    if families.known_here(name) and name != "diffllama"  # which refuses dropout
}


def build(family: str, options: dict[str, Any] | None = None) -> Any:
    """In float32 and evaluation mode, with weights that let attention matter."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **(options or FAMILIES[family]))
    for name, value in list(vars(config).items()):
        if _random(name) and isinstance(value, float):
            setattr(config, name, 0.4)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4.0)
    return model.float().eval()


def _random(name: str) -> bool:
    return "drop" in name or "jitter" in name
