"""Configurations of small random models, one for each family of decoders that people tune.

Dropout and jitter are set high: no test may see any of it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from small_models import GPT2_LIKE, SMALL

PDROP = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
ATTENTION = {"attention_dropout": 0.5}
HIDDEN = {**ATTENTION, "hidden_dropout": 0.5}
HEADS = {**SMALL, **ATTENTION, "head_dim": 8}
WINDOW = {**HEADS, "sliding_window": 6}
JITTER = {"router_jitter_noise": 0.4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
DEEPSEEK = {
    **SMALL, **ATTENTION, **LATENT, "moe_intermediate_size": 24, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 8.0, 16.0], "original_max_position_embeddings": 8,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"vocab_size": 96, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2,
         "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2_LIKE, **PDROP},
    "gpt_neo": {
        "vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 5,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
        "bos_token_id": 0, "eos_token_id": 0, "resid_dropout": 0.5, "embed_dropout": 0.5,
        "attention_dropout": 0.5,
    },
    "gpt_neox": {**SMALL, **HIDDEN},
    "gptj": {**GPT2_LIKE, **PDROP, "rotary_dim": 4},
    "gpt_bigcode": {**GPT2_LIKE, **PDROP},
    "codegen": {**GPT2_LIKE, **PDROP, "rotary_dim": 4, "n_ctx": 64},
    "opt": {
        **SMALL, **ATTENTION, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5,
        "layerdrop": 0.3,
    },
    "biogpt": {**SMALL, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5,
               "layerdrop": 0.3, "activation_dropout": 0.5},
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0,
              "eos_token_id": 0, **HIDDEN},
    "falcon": {**SMALL, **HIDDEN, "multi_query": True},
    "mpt": {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
            "expansion_ratio": 2, "emb_pdrop": 0.5, "resid_pdrop": 0.5},
    "llama": {**SMALL, **ATTENTION, "rope_parameters": DYNAMIC},
    "mistral": WINDOW,
    "ministral": WINDOW,
    "mixtral": {**WINDOW, **LOCAL, **JITTER},
    "qwen2": {**SMALL, **ATTENTION},
    "qwen2_moe": {**SMALL, **ATTENTION, **EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, **EXPERTS},
    "qwen3_next": {**HEADS, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 24},
    "gemma": HEADS,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "phi": {**SMALL, **ATTENTION, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "phi3": {**SMALL, **ATTENTION, "resid_pdrop": 0.5, "embd_pdrop": 0.5,
             "rope_parameters": LONGROPE, "original_max_position_embeddings": 8},
    "phimoe": {**SMALL, **ATTENTION, **LOCAL, **JITTER, "input_jitter_noise": 0.4},
    "stablelm": {**SMALL, **HIDDEN},
    "olmo": {**SMALL, **ATTENTION},
    "olmo2": {**SMALL, **ATTENTION},
    "olmo3": {**SMALL, **ATTENTION, "sliding_window": 6},
    "olmoe": {**SMALL, **ATTENTION, "num_experts": 4, "num_experts_per_tok": 2},
    "cohere": {**SMALL, **ATTENTION, "logit_scale": 0.5},
    "cohere2": {**SMALL, **ATTENTION, "sliding_window": 6, "logit_scale": 0.5},
    "granite": {**SMALL, **ATTENTION, "logits_scaling": 4.0},
    "granitemoe": {**SMALL, **ATTENTION, **LOCAL},
    "starcoder2": {**SMALL, **ATTENTION, "residual_dropout": 0.5, "embedding_dropout": 0.5},
    "smollm3": {**SMALL, **ATTENTION},
    "glm": HEADS,
    "glm4": HEADS,
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
    "nemotron": {**SMALL, **HIDDEN},
    "persimmon": {**SMALL, **HIDDEN, "num_key_value_heads": 4},
    "ernie4_5": HEADS,
    "exaone4": {**SMALL, **ATTENTION, "sliding_window": 6},
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "seed_oss": {**HEADS, "residual_dropout": 0.5},
    "arcee": HEADS,
    "gpt_oss": {**WINDOW, **LOCAL},
    "lfm2": {**SMALL, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "jamba": {**SMALL, **ATTENTION, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
              "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "mamba": MAMBA,
}  # fmt: skip


def build(family: str, options: dict[str, Any] | None = None) -> Any:
    """In float32 and evaluation mode, with weights that let attention matter."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **(options or FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4.0)
    return model.float().eval()
