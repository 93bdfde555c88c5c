"""Load the weights of a folder or hub id in the dtype they are computed in, without a copy."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AutoConfig, PreTrainedModel

from dpo_cli.config import ModelConfig
from dpo_cli.errors import ConfigError
from dpo_cli.model.adapters.active import REWARD_HEAD, Adaptation, full_weight_shapes
from dpo_cli.model.adapters.base import changes_base, fit_embedding
from dpo_cli.model.adapters.quantize import (
    dequantize_to,
    match_eval_to_training,
    quantization_options,
    quantized_layers,
)
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.base import CONTENT, content_of, refuse_other_base
from dpo_cli.model.digest import keep_digest
from dpo_cli.model.source import Origin, check_safetensors, loading, origin_of, source_of
from dpo_cli.model.stored import (
    convert_weights,
    parameters_in,
    refuse_larger,
    stored_dtype,
    weight_files,
)


def read_pretrained(
    auto: Any,
    config: ModelConfig,
    key: str,
    head: str | None = None,
    adaptation: Adaptation | None = None,
    on: Placement | None = None,
    **changes: Any,
) -> tuple[PreTrainedModel, bool]:
    """(the model of a folder or hub id, loaded by an `auto` class; whether its head was missing).

    head: name prefix of weights that may be missing and are initialized by the caller; any other
    missing weight is a ConfigError. adaptation: do not merge an adapter, and quantize the base.
    changes: overrides of the model's configuration.

    Weights are read in their stored dtype, directly to the device, and converted there one by one:
    to float32, or to the compute dtype of `on` under an adapter. Weights to be sharded stay in the
    memory-mapped files, which all ranks of a node share.
    """
    on = on or Placement()
    origin = origin_of(config, key)
    source, options = source_of(config, key)
    check_safetensors(source, key)
    if not on.sharded and on.device.type != "cpu":
        changes |= {"device_map": {"": str(on.device)}}
    if adaptation is not None:
        changes |= quantization_options(adaptation.settings.quantization, on)
    with loading(source, key, options):
        files = weight_files(source, options)
        refuse_larger(_on_meta(auto, source, config, options), files)
        merged = origin.adapter is not None and adaptation is None
        content = content_of(files, origin.adapter_files if merged else ())
        with parameters_in(stored_dtype(files)):
            loaded: Any = auto.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                trust_remote_code=config.trust_remote_code, **options, **changes,
            )  # fmt: skip
    model, report = loaded
    refuse_other_base(content, origin, config, key, on.note)
    setattr(model, CONTENT, content)
    _normalize(model, adaptation, merged, on)
    fit_embedding(model, origin)
    missing = sorted([*report["missing_keys"], *(str(k) for k in report["mismatched_keys"])])
    lacking = _merged(model, origin, missing, merged, key)
    other_base = not merged and changes_base(origin)
    if not quantized_layers(model) and not (lacking if merged else missing) and not other_base:
        keep_digest(model, content.files if content else None)
    others = [name for name in lacking if head is None or not name.startswith(head)]
    _refuse_incomplete(model, others, f"{key}={source}")
    return cast(PreTrainedModel, model), bool(lacking)


def _on_meta(auto: Any, source: str, config: ModelConfig, options: dict[str, Any]) -> Any:
    """The model as its config.json describes it, without weights."""
    trusted = config.trust_remote_code
    shape = AutoConfig.from_pretrained(source, trust_remote_code=trusted, **options)
    with torch.device("meta"):
        return auto.from_config(shape, trust_remote_code=trusted)


def _merged(
    model: PreTrainedModel, origin: Origin, missing: list[str], merge_now: bool, key: str
) -> list[str]:
    """Merge the origin's adapter if `merge_now`. Returns the names of missing weights, which
    transformers has initialized randomly, except those in the adapter's file."""
    if origin.adapter is None:
        return missing
    shapes = full_weight_shapes(origin.adapter)
    if merge_now:
        from dpo_cli.model.adapters.merge import merge  # PEFT is slow to import

        merge(model, origin, key)
    return [name for name in missing if name not in shapes]


def _refuse_incomplete(model: PreTrainedModel, missing: list[str], where: str) -> None:
    if missing:
        raise ConfigError(
            f"{where}: {len(missing)} weights of {type(model).__name__} are missing, such as "
            f"{missing[0]}: it is damaged or not a causal language model"
        )


def _normalize(
    model: PreTrainedModel, adaptation: Adaptation | None, merged: bool, on: Placement
) -> None:
    """Convert loaded weights to their dtypes, and reset options that change the outputs."""
    if merged or adaptation is not None or not on.sharded:
        settings = adaptation.settings if adaptation is not None else None
        trained = [] if settings is None else [*settings.modules_to_save, REWARD_HEAD]
        convert_weights(model, torch.float32 if settings is None else on.dtype, trained)
    plain_outputs(model)
    match_eval_to_training(model)
    dequantize_to(model, on.dtype)


def plain_outputs(model: PreTrainedModel) -> None:
    """Reset config.json's options for additional or unnamed outputs, which mixtures of experts are
    often saved with and which break sampling and saving."""
    for config in (model.config, model.config.get_text_config()):
        for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name, False):
                setattr(config, name, False)
        config.return_dict = True
