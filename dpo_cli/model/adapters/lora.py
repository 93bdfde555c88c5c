"""LoRA and DoRA adapters (PEFT's) in a loaded model: added, loaded, saved.

The model remains a PreTrainedModel: PEFT's layers replace linear ones in place, so packed
attention, the output layer and sampling work unchanged.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype, set_adapter
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_cli.config import LoraConfig
from dpo_cli.device_memory import ran_out
from dpo_cli.durable.tensors import write_tensors
from dpo_cli.errors import ConfigError
from dpo_cli.model.adapters.active import (
    PARTS,
    PREFIX,
    REFERENCE,
    REWARD_HEAD,
    REWARD_TASK,
    TRAINED,
    adapted_layers,
)
from dpo_cli.model.adapters.base import replaced_shapes, subtracts_from_base
from dpo_cli.model.adapters.casts import initialized_in_float32
from dpo_cli.model.adapters.kinds import config_of, trainable_config
from dpo_cli.model.adapters.patterns import refuse_unfit
from dpo_cli.model.source import ADAPTER_WEIGHTS, Origin, loading
from dpo_cli.model.vetting import ADAPTER_CONFIG, one_line

ALL_LINEAR = "all-linear"
NEW_ADAPTER = "lora."  # prefix of the keys with a new adapter's settings
MAGNITUDE = ".lora_magnitude_vector"
FIXED = {  # key of the lora group -> PEFT's name of a setting that an adapter cannot change later
    "r": "r", "alpha": "lora_alpha", "target_modules": "target_modules", "use_dora": "use_dora",
    "use_rslora": "use_rslora", "modules_to_save": "modules_to_save",
}  # fmt: skip


def adapter_config(
    settings: LoraConfig, origin: Origin, task: str, key: str = "model.path"
) -> peft.LoraConfig:
    """The configuration of the adapter to train: a new one, or the origin's.

    Raises ConfigError if the settings contradict the origin's adapter.
    """
    if origin.adapter is None:
        targets = settings.target_modules
        config = peft.LoraConfig(
            r=settings.r,
            lora_alpha=cast(int, settings.alpha),
            target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            modules_to_save=settings.modules_to_save,
        )
    else:
        config = trainable_config(origin, key)
        _refuse_conflicts(settings, config, origin)
    heads = [REWARD_HEAD] if task == REWARD_TASK else []
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *heads}) or None
    config.lora_dropout, config.inference_mode = settings.dropout, False
    config.task_type = cast(Any, task)
    config.base_model_name_or_path, config.revision = origin.identity()
    return config


def _refuse_conflicts(settings: LoraConfig, config: peft.LoraConfig, origin: Origin) -> None:
    """ConfigError for settings, other than defaults, that differ from the adapter's."""
    for key, name in FIXED.items():
        setting, current = getattr(settings, key), getattr(config, name)
        if key == "modules_to_save":
            current = [n for n in current or () if n != REWARD_HEAD]
        if setting != getattr(LoraConfig(), key) and _listed(setting) != _listed(current):
            raise ConfigError(
                f"lora.{key}={setting}: the adapter in {origin.adapter} has {_listed(current)}, "
                f"which further training cannot change: leave lora.{key} out, or merge the adapter "
                "first (stage=export)"
            )


def add_adapter(
    model: PreTrainedModel,
    config: peft.LoraConfig,
    weights: Path | None,
    seed: int = 0,
    name: str = TRAINED,
    prefix: str = NEW_ADAPTER,
) -> None:
    """Freeze the model and add an adapter in float32: that in the folder `weights`, or a new one,
    whose B matrix is zero and whose A matrix depends only on `seed`.

    prefix: of the settings' names in messages. Raises ConfigError for layers that cannot be
    adapted.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), initialized_in_float32():
        warnings.simplefilter("ignore")  # about a second adapter, and GPT-2's transposed layers
        torch.manual_seed(seed)
        available = _adaptable(model)
        refuse_unfit(config, model, prefix)
        try:
            peft.inject_adapter_in_model(config, model, name)
        except Exception as error:  # of a hostile configuration PEFT raises any kind
            if isinstance(error, RuntimeError) and ran_out(error):
                raise
            raise ConfigError(
                f"{prefix}target_modules={_listed(config.target_modules)}: {one_line(error)} "
                f"({available})"
            ) from error
    if prefix == NEW_ADAPTER:
        _refuse_unmatched(model, config, available)
    _refuse_heads(model, config, prefix)
    cast_adapter_dtype(model, name)  # PEFT uses the compute dtype of quantized layers
    cast(Any, model).adapter_files = partial(adapter_files, model)  # what a checkpoint keeps
    if weights is not None:
        read_adapter(model, weights, name)


def settings_prefix(origin: Origin, key: str) -> str:
    """Prefix of an adapter's settings in messages: the keys of a new one, or its folder."""
    return NEW_ADAPTER if origin.adapter is None else f"{key}={origin.adapter}: its "


def _listed(names: Any) -> Any:
    return sorted(names) if isinstance(names, (set, list)) else names


def _adaptable(model: PreTrainedModel) -> str:
    """Names of the linear layers that can be adapted, for error messages."""
    head = model.get_output_embeddings()
    names = {
        place.rpartition(".")[2]: None
        for place, part in model.named_modules()
        if isinstance(part, (torch.nn.Linear, Conv1D)) and part is not head
    }
    return f"its linear layers are {', '.join(list(names)[:12])}"


def _refuse_unmatched(model: PreTrainedModel, config: peft.LoraConfig, available: str) -> None:
    """ConfigError for a name that matches no layer; PEFT accepts it if another one matches."""
    kinds = {"target_modules": BaseTunerLayer, "modules_to_save": AuxiliaryTrainingWrapper}
    for key, kind in kinds.items():
        names = getattr(config, key, None)
        places = [f".{place}" for place, part in model.named_modules() if isinstance(part, kind)]
        for name in names if isinstance(names, (set, list)) else ():
            if not any(place.endswith(f".{name}") for place in places):
                raise ConfigError(
                    f"lora.{key}={_listed(names)}: no suitable layer is named {name} ({available})"
                )


def _refuse_heads(model: PreTrainedModel, config: peft.LoraConfig, prefix: str) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    ends = {"output layer": head, "reward's score": getattr(model, REWARD_HEAD, None)}
    targets = f"{prefix}target_modules={_listed(config.target_modules)}"
    is_new = prefix == NEW_ADAPTER
    remedy = "leave it out" if is_new else "use lora=none, which merges the adapter"
    for name, layer in ends.items():
        if isinstance(layer, BaseTunerLayer):
            alternative = " (lora.modules_to_save trains it in full)" * is_new
            raise ConfigError(
                f"{targets}: includes the {name}, whose weight is read without calling the layer: "
                f"{remedy}{alternative}"
            )
    if (
        isinstance(embedding, BaseTunerLayer)
        and head is not None
        and _weight(head) is _weight(embedding)
    ):
        raise ConfigError(
            f"{targets}: includes the embedding, which is tied to the output layer, whose weight "
            f"is read without calling the layer: {remedy}"
        )
    saved = any(isinstance(x, ModulesToSaveWrapper) for x in (head, embedding))
    if saved and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        raise ConfigError(
            f"{prefix}modules_to_save={config.modules_to_save}: embedding and output layer are "
            f"tied in this model and would be untied: {remedy.replace('it out', 'both out')}"
        )


def _weight(layer: Any) -> Any:
    return (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer).weight


def read_adapter(model: PreTrainedModel, folder: Path, name: str = TRAINED) -> None:
    """Load a folder's weights into an adapter of the model. A module to save that the folder lacks
    keeps its weights, such as the score of a reward model on a policy's adapter. Raises
    ConfigError."""
    with loading(str(folder), "adapter"):
        state = load_file(folder / ADAPTER_WEIGHTS)
        state = {key.removeprefix(PREFIX): value for key, value in state.items()}
        for place, layer in model.named_modules():
            if isinstance(layer, ModulesToSaveWrapper):
                values = layer.state_dict()
                for key, stored_key in layer.adapter_state_dict_load_map(name).items():
                    state.setdefault(f"{place}.{key}", values[stored_key])
        result: Any = set_peft_model_state_dict(model, state, name)
    refuse_other_weights(model, folder, _missing(model, result.missing_keys, name), result[1])
    facts = cast(Any, model).peft_config[name].to_dict()
    cast(Any, model).adapter_replaces = sorted(
        replaced_shapes(folder, facts).keys() & model.state_dict()
    )


def _missing(model: PreTrainedModel, missing: Sequence[str], name: str) -> list[str]:
    own = [k for k in missing if PARTS & set(k.split(".")) and name in k.split(".")]
    return unread(model, own, missing)


def unread(model: torch.nn.Module, own: Sequence[str], missing: Sequence[str]) -> list[str]:
    """The weights of an adapter that were not loaded, under their own or a tied weight's name."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(weight) for key, weight in weights.items() if key not in missing}
    return [k for k in own if k not in weights or id(weights[k]) not in loaded]


def refuse_other_weights(
    model: PreTrainedModel, folder: Path, missing: Sequence[str], extra: Sequence[str]
) -> None:
    """ConfigError for a file that lacks weights of the adapter or has weights unknown to the model
    (other than a policy's output layer for a reward model, and duplicates of tied weights)."""
    extra = [k for k in extra if "token_adapter.trainable_tokens" not in k]
    if model.get_output_embeddings() is None:
        places = {place for place, _ in model.named_modules()}
        extra = [k for k in extra if k.removeprefix(PREFIX).partition(".")[0] in places]
    if missing or extra:
        complaint, names = ("lacks", missing) if missing else ("also has", extra)
        raise ConfigError(
            f"{folder / ADAPTER_WEIGHTS}: {complaint} {len(names)} weights, such as {names[0]}: it "
            "is damaged or belongs to another base model"
        )


def add_reference(model: PreTrainedModel, origin: Origin) -> None:
    """Add a second, frozen adapter as the reference; the trained one stays active."""
    assert origin.adapter is not None
    config = cast(Any, replace(config_of(origin, "stage.reference"), inference_mode=True))
    if subtracts_from_base(origin.facts):  # the first adapter already subtracted its start
        config.init_lora_weights = True
    add_adapter(model, config, origin.adapter, name=REFERENCE, prefix=f"{origin.adapter}: its ")
    set_adapter(model, TRAINED)
    for layer in adapted_layers(model):
        for parameter_name, weight in layer.named_parameters():
            if REFERENCE in parameter_name.split("."):
                weight.requires_grad_(False)


def adapter_files(
    model: PreTrainedModel, state_dict: dict[str, Tensor] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, bytes]]:
    """The trained adapter in PEFT's layout: tensors by file, on their devices, and other files.

    state_dict: the full one, if the model is sharded.
    """
    config = cast(Any, model).peft_config[TRAINED]
    state = get_peft_model_state_dict(model, state_dict, TRAINED, save_embedding_layers=False)
    # PEFT reads DoRA's magnitudes by either name, transformers by the layer's alone.
    weights = {f"{k}.weight" if k.endswith(MAGNITUDE) else k: v for k, v in state.items()}
    if replaced_names := getattr(model, "adapter_replaces", None):  # for added tokens, for example
        all_weights = model.state_dict() if state_dict is None else state_dict
        weights |= {key: all_weights[key] for key in replaced_names}
    named = {PREFIX + key: value.detach() for key, value in weights.items()}
    with tempfile.TemporaryDirectory(prefix="dpo-run-") as scratch:
        replace(config, inference_mode=True).save_pretrained(scratch)
        facts = json.loads(Path(scratch, ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if isinstance(facts["target_modules"], list):  # a set, whose order differs by process
        facts["target_modules"].sort()
    text = json.dumps(facts, indent=2, sort_keys=True)
    return {ADAPTER_WEIGHTS: named}, {ADAPTER_CONFIG: text.encode()}


def save_adapter(model: PreTrainedModel, target: Path) -> None:
    """Save the trained adapter in PEFT's layout into an existing folder."""
    tensors, texts = adapter_files(model)
    for name, values in tensors.items():
        write_tensors(target / name, values, {"format": "pt"})
    for name, text in texts.items():
        (target / name).write_bytes(text)
