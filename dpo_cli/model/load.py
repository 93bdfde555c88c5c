"""Weights and tokenizer from a local folder, a run folder, the hub, or from scratch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dpo_cli.config import ModelConfig
from dpo_cli.errors import ConfigError
from dpo_cli.grammar.tokenizer import build_tokenizer
from dpo_cli.model import attention, forward
from dpo_cli.model.fuse import fuse_gelu
from dpo_cli.model.hub import hub_options
from dpo_cli.packing import pack
from dpo_cli.records import Batch, EncodedExample

# Entries of a model's configuration that do not change what it computes.
NOT_THE_FUNCTION = ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache")
PROBE_TOLERANCE = 2e-3  # nats, on random tokens in float32


def model_folder(path: str, key: str = "model.path") -> Path:
    """The HF folder meant by `path`: itself, or the final model of a run folder.

    key: where the user wrote it, for the message of the ConfigError.
    """
    folder = Path(path)
    if (folder / "final" / "config.json").is_file():
        return folder / "final"
    if (folder / "config.json").is_file():
        return folder
    unfinished = (
        " (this run has checkpoints but no final/: resume it)" * (folder / "checkpoints").is_dir()
    )
    raise ConfigError(
        f"{key}={path}: no config.json there nor in final/{unfinished}; "
        "give a Hugging Face model folder or a finished run folder"
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer beside the weights, or `model.tokenizer`."""
    if config.tokenizer is None and config.path is None and config.architecture is not None:
        return build_tokenizer(config.architecture.vocab)
    if config.tokenizer is None:
        source, options = _source(config)
    else:
        local = Path(config.tokenizer).is_dir()
        source, options = config.tokenizer, {} if local else hub_options(config.tokenizer, None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=config.trust_remote_code, **options
        )
    except (OSError, ValueError) as error:
        raise ConfigError(_unavailable(config, source, error)) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{source}: the tokenizer has no EOS token, responses could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerFast, tokenizer)


def _source(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Folder or hub id, and the arguments that pin its commit."""
    if config.path:
        return str(model_folder(config.path)), {}
    assert config.hub_id is not None  # checked with the configuration
    return config.hub_id, hub_options(config.hub_id, config.revision)


def load_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0
) -> PreTrainedModel:
    """Float32 master weights on the CPU, packed attention where the family supports it.

    `seed` decides the weights of a model from scratch, whatever was drawn before.
    """
    if config.path is None and config.architecture is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _from_scratch(config, tokenizer)
    else:
        model = _pretrained(config)
    set_dropout(model, config.dropout)
    fuse_gelu(model)
    vocab = cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if len(tokenizer) > vocab:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's embedding {vocab}: "
            "set model.tokenizer to the one that belongs to these weights"
        )
    choose_attention(model, config.attention)
    return model


def _from_scratch(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return GPT2LMHeadModel(_gpt2_config(config, tokenizer))


def _gpt2_config(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    shape = config.architecture
    assert shape is not None
    return GPT2Config(
        vocab_size=max(shape.vocab, len(tokenizer)), n_positions=shape.context,
        n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own formula, in one fused operation
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _pretrained(config: ModelConfig) -> PreTrainedModel:
    source, options = _source(config)
    if config.path and not list(Path(source).glob("*.safetensors")):
        raise ConfigError(
            f"model.path={config.path}: no .safetensors weights; pickled weights (.bin, .pt) are "
            "not read: convert them with save_pretrained(..., safe_serialization=True)"
        )
    try:
        return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True,
            trust_remote_code=config.trust_remote_code, **options,
        ))  # fmt: skip
    except (OSError, ValueError) as error:
        raise ConfigError(_unavailable(config, source, error)) from error


def _unavailable(config: ModelConfig, source: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if config.path:
        return f"model.path={config.path}: cannot be loaded: {first}"
    return (
        f"model={config.name}: {source} is neither on the Hugging Face hub as seen from here nor "
        "in the local cache (no network, or a gated or wrong id): give a local folder with "
        "model.path=/folder/with/config.json"
    )


def set_dropout(model: PreTrainedModel, rate: float) -> None:
    """Dropout would make policy and reference differ at step 0, so the default is none.

    Families call it attention_dropout, resid_pdrop, layerdrop, ...: all with "drop" in them.
    """
    for part in (model.config, *model.modules()):
        if isinstance(part, torch.nn.Dropout):
            part.p = rate
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, rate if value <= 1.0 else value)


@torch.no_grad()
def choose_attention(model: PreTrainedModel, choice: str) -> None:
    """Packed attention if it reproduces the plain forward, else the dense mask, else refuse.

    Some families accept a registered attention and ignore it, so each is tried on the
    loaded weights. The choice is `model.config._attn_implementation`.
    """
    model.eval()
    model.set_attn_implementation("eager")
    plain = torch.cat(
        [forward.padded_token_logprobs(model, p, r) for p, r in _probe_sequences(model)]
    )
    names = {"packed": [attention.NAME], "dense": ["eager"]}
    reasons = []
    for name in names.get(choice, [attention.NAME, "eager"]):
        why = _probe(model, name, plain)
        if why is None:
            return
        reasons.append(f"{'dense' if name == 'eager' else 'packed'}: {why}")
    raise ConfigError(
        f"model.attention={choice}: {type(model).__name__} cannot be used ({'; '.join(reasons)})"
    )


def _probe(model: PreTrainedModel, name: str, plain: torch.Tensor) -> str | None:
    """Why an attention implementation cannot be used, or None."""
    if name == "eager" and getattr(model.config.get_text_config(), "sliding_window", None):
        return "its sliding-window attention needs the packed kernel"
    model.set_attn_implementation(name)
    try:
        packed = forward.token_logprobs(model, _probe_row(model))
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    error_nats = float((packed - plain).abs().max())
    if error_nats < PROBE_TOLERANCE:
        return None
    return f"log-probabilities are {error_nats:.2g} away from the plain forward's"


def _probe_examples(model: PreTrainedModel) -> list[EncodedExample]:
    vocab = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, 16).astype(np.int32)
    return [
        EncodedExample(ids[:3], (ids[3:7], ids[7:9]), 0),
        EncodedExample(ids[9:10], (ids[10:11], ids[11:16]), 1),
    ]


def _probe_row(model: PreTrainedModel) -> Batch:
    return pack(_probe_examples(model), [0, 1]).to(model.device)


def _probe_sequences(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.tensor(e.prompt_ids, device=model.device).long(),
         torch.tensor(r, device=model.device).long())
        for e in _probe_examples(model)
        for r in e.response_ids
    ]  # fmt: skip


def context_length(model: PreTrainedModel) -> int:
    """Most tokens a sequence may have."""
    return _positions(model.config)


def _positions(config: PretrainedConfig) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", 2**20))


def hf_config(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The model's Hugging Face configuration, without its weights."""
    if config.path is None and config.architecture is not None:
        return _gpt2_config(config, tokenizer)
    source, options = _source(config)
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(
            source, trust_remote_code=config.trust_remote_code, **options
        ))  # fmt: skip
    except (OSError, ValueError) as error:
        raise ConfigError(_unavailable(config, source, error)) from error


def configured_context(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """As `context_length`, without loading weights."""
    return _positions(hf_config(config, tokenizer))


def count_parameters(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of weights, tied ones once, without loading any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(config, tokenizer))
    return sum(p.numel() for p in model.parameters())


def model_digest(model: PreTrainedModel) -> str:
    """sha256 over the configuration and over names, shapes, dtypes and values of all weights."""
    shape = {k: v for k, v in model.config.to_dict().items() if k not in NOT_THE_FUNCTION}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        raw = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()
