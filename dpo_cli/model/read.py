"""The weights of a folder or hub id in memory, once, in the numbers they are computed in."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dpo_cli.config import ModelConfig
from dpo_cli.errors import ConfigError
from dpo_cli.model.adapters import active as adapters
from dpo_cli.model.adapters.active import REWARD_HEAD, Adaptation
from dpo_cli.model.adapters.base import changes_base, fit_embedding
from dpo_cli.model.adapters.quantize import multiply_in, quantized, quantized_layers, steady
from dpo_cli.model.attention.registered import Placement
from dpo_cli.model.digest import hash_files, keep_digest
from dpo_cli.model.source import check_safetensors, loading, origin_of, source_of
from dpo_cli.model.stored import hold, parameters_in, stored_dtype, weight_files


def read_pretrained(
    auto: Any,
    config: ModelConfig,
    key: str,
    head: str | None = None,
    adaptation: Adaptation | None = None,
    on: Placement | None = None,
    **changes: Any,
) -> tuple[PreTrainedModel, bool]:
    """The model of a folder or hub id as an `auto` class reads it; whether it lacked its head.

    head: start of the names of weights that may be missing, to be made by the caller; any
    other missing weight is a ConfigError. adaptation: leave an adapter out, and quantise the base
    on its device. changes: entries of the model's configuration.

    Weights are read as they are stored, straight to the device, and become what they are held in
    there, one after the other: float32, under an adapter what `on` computes in. Those to be
    sharded stay as they are stored, in the mapped files, which all ranks of a machine share.
    """
    on = on or Placement()
    origin = origin_of(config, key)
    source, options = source_of(config, key)
    check_safetensors(source, key)
    if not on.sharded and on.device.type != "cpu":
        changes |= {"device_map": {"": str(on.device)}}
    if adaptation is not None:
        changes |= quantized(adaptation.settings.quantization, on)
    with loading(source, key):
        files = weight_files(source, options)
        merged = origin.adapter is not None and adaptation is None
        arriving = hash_files([*files, *origin.adapter_files] if merged else files)
        with parameters_in(stored_dtype(files)):
            loaded: Any = auto.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                trust_remote_code=config.trust_remote_code, **options, **changes,
            )  # fmt: skip
    model, report = loaded
    _settle(model, adaptation, merged, on)
    _refuse_adapter_inside(model, f"{key}={source}")
    # transformers fills what is missing with random numbers
    fit_embedding(model, origin)
    missing = sorted([*report["missing_keys"], *(str(k) for k in report["mismatched_keys"])])
    lacking = missing
    if origin.adapter is not None:
        found = adapters.brought(origin.adapter)
        lacking = [name for name in missing if name not in found]
        if merged:
            from dpo_cli.model.adapters.merge import merge  # PEFT is slow to import

            merge(model, origin, key)
    other_base = not merged and changes_base(origin)
    if not quantized_layers(model) and not (lacking if merged else missing) and not other_base:
        keep_digest(model, arriving)
    others = [name for name in lacking if head is None or not name.startswith(head)]
    _refuse_incomplete(model, others, f"{key}={source}")
    return cast(PreTrainedModel, model), bool(lacking)


def _refuse_adapter_inside(model: PreTrainedModel, where: str) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"{where}: holds an adapter that transformers has put in; download the "
            "adapter alone and give its folder as model.path"
        )


def _refuse_incomplete(model: PreTrainedModel, missing: list[str], where: str) -> None:
    if missing:
        raise ConfigError(
            f"{where}: lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{missing[0]}: it is damaged or no causal language model"
        )


def _settle(
    model: PreTrainedModel, adaptation: Adaptation | None, merged: bool, on: Placement
) -> None:
    """Bring freshly read weights into what they are held in, and switch off what would surprise."""
    if merged or adaptation is not None or not on.sharded:
        settings = adaptation.settings if adaptation is not None else None
        trained = [] if settings is None else [*settings.modules_to_save, REWARD_HEAD]
        hold(model, torch.float32 if settings is None else on.dtype, trained)
    plain_outputs(model)
    steady(model)
    multiply_in(model, on.dtype)


def plain_outputs(model: PreTrainedModel) -> None:
    """Take back what config.json asks a model to give beside its logits, or instead of named
    outputs: mixtures of experts are often saved so, and sampling and saving would trip over it."""
    for config in (model.config, model.config.get_text_config()):
        for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name, False):
                setattr(config, name, False)
        config.return_dict = True
