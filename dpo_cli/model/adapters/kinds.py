"""Adapter configurations: which types and settings can be merged or trained further."""

from __future__ import annotations

import warnings

import peft

from dpo_cli.errors import ConfigError
from dpo_cli.model.adapters.base import SUBTRACTING, initialization_of
from dpo_cli.model.source import Origin, loading

SUPPORTED = {  # settings of an adapter that can be trained further
    "r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "modules_to_save",
    "lora_dropout", "init_lora_weights", "exclude_modules", "fan_in_fan_out",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters",
    "trainable_token_indices", "lora_bias", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",  # initial only
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "runtime_config",
}  # fmt: skip
CONVERT = (
    "convert it where it was trained, by PEFT's save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...)"
)
IRREPRODUCIBLE = {  # initializations that changed the base by something the folder does not contain
    "corda": "CorDA changed its base by covariances of training data",
    "lora_ga": "LoRA-GA changed its base by gradients of training data",
    "pissa_niter": "PiSSA's fast start changed its base by a random projection",
}
TRAINABLE = ("", "gaussian", "orthogonal", "eva", *SUBTRACTING)  # that can be trained further
BY_INPUT = ("XLORA", "POLY", "SHADOW")  # whose weights depend on the input


def config_of(origin: Origin, key: str) -> peft.PeftConfig:
    """The adapter's configuration, read by PEFT. Raises ConfigError."""
    with loading(str(origin.adapter), key), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftConfig.from_pretrained(str(origin.adapter))


def trainable_config(origin: Origin, key: str) -> peft.LoraConfig:
    """As `config_of`; ConfigError for an adapter that can only be merged."""
    config = config_of(origin, key)
    refuse_unmergeable(config, origin, key)
    where, remedy = f"{key}={origin.adapter}", "use lora=none to merge it"
    if not isinstance(config, peft.LoraConfig) or kind_of(config) != "LORA":
        raise ConfigError(
            f"{where}: is an adapter of type {kind_of(config)}, but only LoRA adapters can be "
            f"trained further: {remedy}"
        )
    names = unusual(config)
    if initialization_of(origin.facts) not in TRAINABLE:
        names = ["init_lora_weights", *names]
    if names:
        given = ", ".join(f"{name}={str(getattr(config, name))[:80]}" for name in names)
        raise ConfigError(f"{where}: has {given}, which training does not support: {remedy}")
    return config


def kind_of(config: peft.PeftConfig) -> str:
    """PEFT's name of the adapter's type, such as LORA."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def unusual(config: peft.PeftConfig) -> list[str]:
    """Settings other than PEFT's defaults that are not supported in training."""
    if kind_of(config) != "LORA":
        return ["peft_type"]
    plain = vars(peft.LoraConfig())
    return sorted(
        name for name, value in vars(config).items()
        if name not in SUPPORTED and name in plain and value != plain[name]
    )  # fmt: skip


def refuse_unmergeable(config: peft.PeftConfig, origin: Origin, key: str) -> None:
    """ConfigError for adapters that cannot be expressed as weights (prompts, prefixes, routers), or
    whose changes to the base cannot be reproduced."""
    kind, where = kind_of(config), f"{key}={origin.adapter}"
    inputs = config.is_prompt_learning or config.is_adaption_prompt
    if inputs or kind in BY_INPUT:
        why = "learned inputs" if inputs else "changes that depend on the input"
        raise ConfigError(
            f"{where}: is an adapter of type {kind}, {why} instead of weights, which can neither "
            "be merged nor trained here; use its base model, or a LoRA adapter"
        )
    initialization = initialization_of(origin.facts)
    for name, change in IRREPRODUCIBLE.items():
        if initialization.startswith(name):
            raise ConfigError(
                f"{where}: init_lora_weights={initialization}: {change}, which its folder does not "
                f"contain: {CONVERT}"
            )
