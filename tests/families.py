"""Tiny causal language models of many families, by `model_type`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

VOCABULARY = 96
BASE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
HEADS = {**BASE, "head_dim": 8}
WINDOW = {"sliding_window": 6}
EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
DEEPSEEK = {
    **BASE, **EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4,
    "mamba_chunk_size": 4,
}  # fmt: skip
# Keys and values alone; some of a window, some of tokens routed to experts.
ATTENTION: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": {**GPT2, "rotary_dim": 4},
    "codegen": {**GPT2, "rotary_dim": 4, "n_ctx": 64},
    "gpt_neo": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
        "window_size": 5, "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
    },
    "gpt_neox": BASE,
    "gpt_oss": {**HEADS, **EXPERTS, **WINDOW},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4,
              "bos_token_id": 0, "eos_token_id": 0},
    "falcon": {**BASE, "alibi": True},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4,
            "max_seq_len": 64},
    "opt": {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "openai-gpt": GPT2,
    "biogpt": BASE,
    "llama": BASE,
    "llama4_text": {**HEADS, "intermediate_size_mlp": 48, **EXPERTS, "num_experts_per_tok": 1,
                    "attention_chunk_size": 6},
    "mistral": {**BASE, **WINDOW},
    "ministral": {**HEADS, **WINDOW},
    "mixtral": {**BASE, **EXPERTS},
    "phimoe": {**BASE, **EXPERTS},
    "granitemoe": {**BASE, **EXPERTS},
    "qwen2": BASE,
    "qwen2_moe": {**BASE, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, **EXPERTS},
    "gemma": HEADS,
    "gemma2": {**HEADS, **WINDOW},
    "gemma3_text": {**HEADS, **WINDOW},
    "phi": BASE,
    "phi3": {**BASE, **WINDOW},
    "olmo": BASE,
    "olmo2": BASE,
    "olmo3": {**BASE, **WINDOW},
    "olmoe": {**BASE, **EXPERTS},
    "granite": BASE,
    "cohere": BASE,
    "cohere2": {**BASE, **WINDOW},
    "stablelm": BASE,
    "starcoder2": {**BASE, **WINDOW},
    "smollm3": BASE,
    "exaone4": {**BASE, **WINDOW},
    "glm": HEADS,
    "glm4": HEADS,
    "nemotron": BASE,
    "persimmon": {**BASE, "num_key_value_heads": 4},
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "seed_oss": HEADS,
    "arcee": HEADS,
    "ernie4_5": HEADS,
    "diffllama": BASE,
    "minimax_m2": {**HEADS, **EXPERTS},
    "modernbert-decoder": {**BASE, **WINDOW},
    "deepseek_v2": {**DEEPSEEK, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
                    "topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
}  # fmt: skip
# Linear attention, convolutions and state spaces, alone or between layers of attention.
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": {**HEADS, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {**HEADS, **LINEAR},
    "olmo_hybrid": {**BASE, **LINEAR},
    "minimax": {**HEADS, **EXPERTS, "block_size": 4, "layer_types": LINEAR["layer_types"]},
    "lfm2": {**BASE, "conv_L_cache": 3, "layer_types": ["conv", "full_attention"],
             "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**BASE, **EXPERTS, "conv_L_cache": 3, "num_dense_layers": 1,
                 "layer_types": ["conv", "full_attention"]},
    "mamba": {**BASE, "state_size": 4},
    "falcon_mamba": {**BASE, "state_size": 4},
    "mamba2": {**BASE, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1,
               "chunk_size": 4},
    "jamba": {**BASE, **EXPERTS, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2,
              "attn_layer_offset": 1},
    "bamba": {**BASE, **MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**HEADS, **MAMBA2, "mamba_d_ssm": 64},
    "granitemoehybrid": {**BASE, **EXPERTS, **MAMBA2, "layer_types": ["mamba", "attention"],
                         "shared_intermediate_size": 48},
    "nemotron_h": {**HEADS, **EXPERTS, "ssm_state_size": 4, "mamba_num_heads": 8,
                   "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 4,
                   "hybrid_override_pattern": "M*"},
    "zamba2": {**BASE, "num_hidden_layers": 4, "mamba_d_state": 4, "mamba_ngroups": 1,
               "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 4, "num_mem_blocks": 1,
               "layers_block_type": ["mamba", "hybrid"] * 2},
    "recurrent_gemma": {**HEADS, "attention_window_size": 6, "lru_width": 32,
                        "block_types": ["recurrent", "attention"]},
    "rwkv": {**BASE, "context_length": 64, "attention_hidden_size": 32},
    "xlstm": {**BASE, "num_heads": 4, "embedding_dim": 32, "num_blocks": 2, "chunk_size": 4},
}  # fmt: skip
FAMILIES = {**ATTENTION, **RECURRENT}
# Some with rotary factors that depend on the length.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 8.0, 16.0], "original_max_position_embeddings": 8,
}  # fmt: skip
BY_LENGTH = {
    "llama": {**BASE, "rope_parameters": DYNAMIC},
    "phi3": {**BASE, "rope_parameters": LONGROPE, "original_max_position_embeddings": 8},
}


def known_here(family: str) -> bool:
    """Whether the installed transformers has the family."""
    return family in CONFIG_MAPPING_NAMES


TRAINED = {
    name: options
    for name, options in {**FAMILIES, **BY_LENGTH}.items()
    if known_here(name) and name != "diffllama"  # which refuses dropout
}


def build(family: str, seed: int = 1) -> Any:
    """In evaluation mode. Weights are large and biases random, so that attention, states and
    whatever leaks into them matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3.0)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def build_random(family: str, options: dict[str, Any] | None = None) -> Any:
    """Of TRAINED, in float32 and evaluation mode, with weights that let attention matter. Dropout
    of every name and the jitter of routers are set high: no test may see any of it."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **(options or TRAINED[family]))
    for name, value in list(vars(config).items()):
        if ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(config, name, 0.4)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4.0)
    return model.float().eval()
