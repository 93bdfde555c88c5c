"""Load model and tokenizer from a local folder, a run folder or the hub, or from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

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
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from dpo_cli.config import LoraConfig, ModelConfig
from dpo_cli.errors import ConfigError
from dpo_cli.grammar.tokenizer import build_tokenizer
from dpo_cli.model.adapters.active import (
    POLICY_TASK,
    REWARD_HEAD,
    REWARD_TASK,
    Adaptation,
    full_weight_shapes,
    round_base,
)
from dpo_cli.model.adapters.base import embedding_rows, subtracts_from_base
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.attention.probe import choose_attention, refuse_unavailable
from dpo_cli.model.dropout import set_dropout
from dpo_cli.model.fuse import fuse_gelu, skip_padding_check
from dpo_cli.model.read import read_pretrained
from dpo_cli.model.source import (
    Origin,
    check_safetensors,
    hub_source,
    loading,
    origin_of,
    source_of,
    tokenizer_source,
)


def load_tokenizer(config: ModelConfig, key: str = "model.path") -> PreTrainedTokenizerFast:
    """The tokenizer beside the weights, or `model.tokenizer`."""
    if config.tokenizer is None and config.path is None and config.architecture is not None:
        return build_tokenizer(config.architecture.vocab)
    options: dict[str, Any] = {}
    if config.tokenizer is None:
        source, options = tokenizer_source(config, key)
    elif Path(config.tokenizer).is_dir():
        source, key = config.tokenizer, "model.tokenizer"
    else:
        key = "model.tokenizer"
        source, options = hub_source(config.tokenizer, None, key)
    with loading(source, key, options):
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=config.trust_remote_code, **options
        )
        refuse_odd(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{source}: the tokenizer has no EOS token to end responses with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerFast, tokenizer)


def refuse_odd(tokenizer: Any) -> None:
    """Raise, in `loading`, for a tokenizer whose files give it values that none can have."""
    templates = tokenizer.chat_template
    texts = templates.values() if isinstance(templates, dict) else [templates]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise TypeError(f"chat_template={str(templates)[:80]}: expected text")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise TypeError(f"model_max_length={tokenizer.model_max_length}: expected a number")
    tokenizer("a")
    len(tokenizer)


def load_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    key: str = "model.path",
    on: Placement | None = None,
    adaptation: Adaptation | None = None,
) -> PreTrainedModel:
    """Load a model to its device and choose the attention kernel for its packed rows.

    Weights are in float32; frozen ones under an adapter in the dtype of `on`. seed: for the weights
    of a model from scratch. key: configuration key of the model, for messages. on: where it will
    compute (default: the CPU, in float32). An adapter is merged into its base, unless `adaptation`
    is given, to train it or a new one. Raises ConfigError for a model that cannot be loaded
    completely, and NonFiniteError for non-finite weights.
    """
    refuse_unavailable(config.attention, on)
    if config.path is None and config.architecture is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _from_scratch(config, tokenizer)
    else:
        refuse_reward_model(config, key)
        if adaptation is not None:  # raises for layers that cannot be adapted, before loading
            count_trained(config, tokenizer, adaptation.settings, key=key)
        model, _ = read_pretrained(AutoModelForCausalLM, config, key, None, adaptation, on)
        _refuse_classifier(model, config, key)
    make_ready(model, config, tokenizer)
    choose_attention(model, config.attention, on=on, key=key)
    if adaptation is not None:
        adapt(model, config, adaptation, seed, key, on)
    return model


def adapt(
    model: PreTrainedModel,
    config: ModelConfig,
    adaptation: Adaptation,
    seed: int,
    key: str = "model.path",
    on: Placement | None = None,
    task: str = POLICY_TASK,
) -> None:
    """Freeze a loaded base and add the adapter to train: a new one, that of `config`'s folder, or
    that of the checkpoint. Converts the base to the compute dtype of `on`."""
    from dpo_cli.model.adapters import casts, lora  # PEFT is slow to import

    origin = origin_of(config, key)
    adapter = lora.adapter_config(adaptation.settings, origin, task, key)
    if on is not None and on.sharded and adapter.trainable_token_indices:
        raise ConfigError(
            f"{key}={config.path}: is an adapter with trainable_token_indices, which cannot be "
            "sharded: use hardware.devices=1, or lora=none to merge it"
        )
    weights = adaptation.weights or origin.adapter
    lora.add_adapter(model, adapter, weights, seed, prefix=lora.settings_prefix(origin, key))
    if on is not None and on.dtype != torch.float32:
        round_base(model, on.dtype)
        casts.leave_casts_to_autocast(model)


def make_ready(
    model: PreTrainedModel, config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Set dropout and fused activations. ConfigError for a tokenizer that does not match."""
    set_dropout(model, config.dropout)
    fuse_gelu(model)
    skip_padding_check(model)
    vocab = cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if len(tokenizer) > vocab:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's embedding has {vocab} "
            "rows: set model.tokenizer to the tokenizer of these weights"
        )


def _from_scratch(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return GPT2LMHeadModel(gpt2_config(config, tokenizer))


def gpt2_config(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    """The configuration of a model from scratch."""
    shape = config.architecture
    assert shape is not None
    return GPT2Config(
        vocab_size=max(shape.vocab, len(tokenizer)), n_positions=shape.context,
        n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own formula, in one fused operation
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def refuse_reward_model(config: ModelConfig, key: str) -> None:
    """ConfigError if the model is the adapter of a reward model."""
    if origin_of(config, key).task == REWARD_TASK:
        raise ConfigError(
            f"{key}={config.path}: is the adapter of a reward model, not of a policy: use the "
            "model it was trained from"
        )


def _refuse_classifier(model: PreTrainedModel, config: ModelConfig, key: str) -> None:
    """ConfigError for a reward model, which with tied embeddings has all weights of a policy."""
    for name in model.config.architectures or ():
        if name.endswith("ForSequenceClassification"):
            raise ConfigError(
                f"{key}={config.path or config.hub_id}: is a {name}, such as stage=reward trains, "
                "not a policy: use the model it was trained from"
            )


def context_length(model: PreTrainedModel) -> int:
    """Maximum number of tokens of a sequence."""
    return _positions(model.config)


def _positions(config: PretrainedConfig) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", 2**20)
    if not isinstance(positions, int) or positions < 1:
        raise ConfigError(
            f"config.json: max_position_embeddings={positions}: expected the maximum tokens"
        )
    return positions


def hf_config(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, key: str = "model.path"
) -> PretrainedConfig:
    """The model's Hugging Face configuration, without its weights."""
    if config.path is None and config.architecture is not None:
        return gpt2_config(config, tokenizer)
    source, options = source_of(config, key)
    check_safetensors(source, key, needed=False)
    with loading(source, key, options):
        hf = cast(PretrainedConfig, AutoConfig.from_pretrained(
            source, trust_remote_code=config.trust_remote_code, **options
        ))  # fmt: skip
        _positions(hf)
        return _with_adapters_head(hf, origin_of(config, key))


def _with_adapters_head(hf: PretrainedConfig, origin: Origin) -> PretrainedConfig:
    """The base's configuration with the head that a reward adapter adds."""
    if origin.adapter is not None and origin.task == REWARD_TASK:
        kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(hf)]
        own = full_weight_shapes(origin.adapter)
        head = f"{REWARD_HEAD}.weight"
        rows = [shape[0] for name, shape in own.items() if name == head or head not in own]
        hf.architectures, hf.num_labels = [kind.__name__], min(rows, default=1)
    if origin.adapter is not None and full_weight_shapes(origin.adapter):
        with torch.device("meta"):
            vocab = embedding_rows(AutoModelForCausalLM.from_config(hf), origin)
        hf.get_text_config().vocab_size = vocab or hf.get_text_config().vocab_size
    return hf


def configured_context(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """As `context_length`, without loading weights."""
    return _positions(hf_config(config, tokenizer))


def count_parameters(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, auto: Any = AutoModelForCausalLM
) -> int:
    """Number of weights, tied ones once, without loading any."""
    return sum(p.numel() for p in _without_weights(config, tokenizer, auto).parameters())


def count_trained(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    settings: LoraConfig,
    auto: Any = AutoModelForCausalLM,
    key: str = "model.path",
) -> int:
    """Number of weights that an adapter trains, without loading any. ConfigError for layers that
    cannot be adapted."""
    from dpo_cli.model.adapters import lora  # PEFT is slow to import

    task = POLICY_TASK if auto is AutoModelForCausalLM else REWARD_TASK
    model = _without_weights(config, tokenizer, auto, key)
    origin = origin_of(config, key)
    adapter = lora.adapter_config(settings, origin, task, key)
    if subtracts_from_base(origin.facts):  # the initialization would need the base's values
        adapter.init_lora_weights = True
    lora.add_adapter(model, adapter, None, prefix=lora.settings_prefix(origin, key))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _without_weights(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, auto: Any, key: str = "model.path"
) -> Any:
    shape = hf_config(config, tokenizer, key)
    with loading(config.path or config.hub_id or config.name, key), torch.device("meta"):
        return auto.from_config(shape, trust_remote_code=config.trust_remote_code)
