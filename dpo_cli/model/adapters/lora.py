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
    layers,
)
from dpo_cli.model.adapters.base import replaced, takes_out
from dpo_cli.model.adapters.casts import drawn_in_float32
from dpo_cli.model.adapters.kinds import config_of, trainable_config
from dpo_cli.model.adapters.patterns import refuse_unfit
from dpo_cli.model.source import ADAPTER_WEIGHTS, Origin, loading
from dpo_cli.model.vetting import ADAPTER_CONFIG, one_line

ALL_LINEAR = "all-linear"
LORA = "lora."  # the group of keys that a new adapter's settings are in
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
        names = settings.target_modules
        made = peft.LoraConfig(
            r=settings.r,
            lora_alpha=cast(int, settings.alpha),
            target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            modules_to_save=settings.modules_to_save,
        )
    else:
        made = trainable_config(origin, key)
        _agree(settings, made, origin)
    heads = [REWARD_HEAD] if task == REWARD_TASK else []
    made.modules_to_save = sorted({*(made.modules_to_save or ()), *heads}) or None
    made.lora_dropout, made.inference_mode = settings.dropout, False
    made.task_type = cast(Any, task)
    made.base_model_name_or_path, made.revision = origin.identity()
    return made


def _agree(settings: LoraConfig, made: peft.LoraConfig, origin: Origin) -> None:
    """ConfigError for settings (other than a key's default) that the adapter does not have."""
    for key, name in FIXED.items():
        asked, has = getattr(settings, key), getattr(made, name)
        if key == "modules_to_save":
            has = [n for n in has or () if n != REWARD_HEAD]
        if asked != getattr(LoraConfig(), key) and _listed(asked) != _listed(has):
            raise ConfigError(
                f"lora.{key}={asked}: the adapter in {origin.adapter} has {_listed(has)}, which "
                f"cannot be changed in further training: leave lora.{key} out, or merge the "
                "adapter first (stage=export)"
            )


def put_in(
    model: PreTrainedModel,
    config: peft.LoraConfig,
    weights: Path | None,
    seed: int = 0,
    name: str = TRAINED,
    told: str = LORA,
) -> None:
    """Freeze the model and add an adapter in float32: that in the folder `weights`, or a new one,
    whose update is zero and whose random half depends only on `seed`.

    told: prefix of settings' names in messages. Raises ConfigError for layers that cannot be
    adapted.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), drawn_in_float32():
        warnings.simplefilter("ignore")  # of a second adapter, and of GPT-2's transposed layers
        torch.manual_seed(seed)
        there = _adaptable(model)
        refuse_unfit(config, model, told)
        try:
            peft.inject_adapter_in_model(config, model, name)
        except Exception as error:  # of a hostile configuration PEFT raises any kind
            if isinstance(error, RuntimeError) and ran_out(error):
                raise
            raise ConfigError(
                f"{told}target_modules={_listed(config.target_modules)}: {one_line(error)} "
                f"({there})"
            ) from error
    if told == LORA:
        _refuse_unmatched(model, config, there)
    _refuse_heads(model, config, told)
    cast_adapter_dtype(model, name)  # quantized layers give theirs the dtype they compute in
    cast(Any, model).adapter_files = partial(adapter_files, model)  # what a checkpoint keeps
    if weights is not None:
        read_adapter(model, weights, name)


def told_by(origin: Origin, key: str) -> str:
    """How messages refer to an adapter's settings: by the keys of a new one, or its folder."""
    return LORA if origin.adapter is None else f"{key}={origin.adapter}: its "


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


def _refuse_unmatched(model: PreTrainedModel, config: peft.LoraConfig, there: str) -> None:
    """ConfigError for a name that matches no layer; PEFT accepts it if another one matches."""
    kinds = {"target_modules": BaseTunerLayer, "modules_to_save": AuxiliaryTrainingWrapper}
    for key, kind in kinds.items():
        names = getattr(config, key, None)
        found = [f".{place}" for place, part in model.named_modules() if isinstance(part, kind)]
        for name in names if isinstance(names, (set, list)) else ():
            if not any(place.endswith(f".{name}") for place in found):
                raise ConfigError(
                    f"lora.{key}={_listed(names)}: no suitable layer is named {name} ({there})"
                )


def _refuse_heads(model: PreTrainedModel, config: peft.LoraConfig, told: str) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    ends = {"output layer": head, "reward's score": getattr(model, REWARD_HEAD, None)}
    targets = f"{told}target_modules={_listed(config.target_modules)}"
    new = told == LORA
    remedy = "leave it out" if new else "use lora=none, which merges the adapter"
    for name, layer in ends.items():
        if isinstance(layer, BaseTunerLayer):
            whole = " (lora.modules_to_save trains it whole)" * new
            raise ConfigError(
                f"{targets}: names the {name}, whose weight is read without the layer's forward: "
                f"{remedy}{whole}"
            )
    if (
        isinstance(embedding, BaseTunerLayer)
        and head is not None
        and _weight(head) is _weight(embedding)
    ):
        raise ConfigError(
            f"{targets}: names the embedding, which is the output layer, too, whose weight is read "
            f"without the layer's forward: {remedy}"
        )
    saved = any(isinstance(x, ModulesToSaveWrapper) for x in (head, embedding))
    if saved and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        raise ConfigError(
            f"{told}modules_to_save={config.modules_to_save}: embedding and output layer are one "
            f"weight in this model, and would part: {remedy.replace('it out', 'both out')}"
        )


def _weight(layer: Any) -> Any:
    return (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer).weight


def read_adapter(model: PreTrainedModel, folder: Path, name: str = TRAINED) -> None:
    """Weights of a folder into an adapter that is put in. A module to save that the folder lacks
    stays as it is: a reward's score over the adapter of a policy. Raises ConfigError."""
    with loading(str(folder), "adapter"):
        state = load_file(folder / ADAPTER_WEIGHTS)
        state = {key.removeprefix(PREFIX): value for key, value in state.items()}
        for place, layer in model.named_modules():
            if isinstance(layer, ModulesToSaveWrapper):
                own = layer.state_dict()
                for key, mine in layer.adapter_state_dict_load_map(name).items():
                    state.setdefault(f"{place}.{key}", own[mine])
        found: Any = set_peft_model_state_dict(model, state, name)
    refuse_other_weights(model, folder, _lacking(model, found.missing_keys, name), found[1])
    facts = cast(Any, model).peft_config[name].to_dict()
    cast(Any, model).adapter_replaces = sorted(replaced(folder, facts).keys() & model.state_dict())


def _lacking(model: PreTrainedModel, missing: Sequence[str], name: str) -> list[str]:
    own = [k for k in missing if PARTS & set(k.split(".")) and name in k.split(".")]
    return unread(model, own, missing)


def unread(model: torch.nn.Module, own: Sequence[str], missing: Sequence[str]) -> list[str]:
    """Those of an adapter's weights that got no value: shared ones may have it by another name."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    read = {id(weight) for key, weight in weights.items() if key not in missing}
    return [k for k in own if k not in weights or id(weights[k]) not in read]


def refuse_other_weights(
    model: PreTrainedModel, folder: Path, lacking: Sequence[str], also: Sequence[str]
) -> None:
    """ConfigError for a file that holds less than the adapter, or more than the model: but a
    reward model takes no output layer over from a policy, and tied ones may be there twice."""
    also = [k for k in also if "token_adapter.trainable_tokens" not in k]
    if model.get_output_embeddings() is None:
        places = {place for place, _ in model.named_modules()}
        also = [k for k in also if k.removeprefix(PREFIX).partition(".")[0] in places]
    if lacking or also:
        which, names = ("lacks", lacking) if lacking else ("also has", also)
        raise ConfigError(
            f"{folder / ADAPTER_WEIGHTS}: {which} {len(names)} weights, such as {names[0]}: it is "
            "damaged or belongs to another base model"
        )


def add_reference(model: PreTrainedModel, origin: Origin) -> None:
    """A second adapter, frozen, beside the one that is trained and stays active."""
    assert origin.adapter is not None
    config = cast(Any, replace(config_of(origin, "stage.reference"), inference_mode=True))
    if takes_out(origin.facts):  # the first adapter has taken its start out of the base already
        config.init_lora_weights = True
    put_in(model, config, origin.adapter, name=REFERENCE, told=f"{origin.adapter}: its ")
    set_adapter(model, TRAINED)
    for layer in layers(model):
        for name, weight in layer.named_parameters():
            if REFERENCE in name.split("."):
                weight.requires_grad_(False)


def adapter_files(
    model: PreTrainedModel, state_dict: dict[str, Tensor] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, bytes]]:
    """The trained adapter in PEFT's layout: tensors by file, where they are, and other files.

    state_dict: of a model whose own is sharded.
    """
    config = cast(Any, model).peft_config[TRAINED]
    state = get_peft_model_state_dict(model, state_dict, TRAINED, save_embedding_layers=False)
    # PEFT reads DoRA's magnitudes by either name, transformers by the layer's alone.
    own = {f"{k}.weight" if k.endswith(MAGNITUDE) else k: v for k, v in state.items()}
    if brings := getattr(model, "adapter_replaces", None):  # rows of tokens that were added
        every = model.state_dict() if state_dict is None else state_dict
        own |= {key: every[key] for key in brings}
    named = {PREFIX + key: value.detach() for key, value in own.items()}
    with tempfile.TemporaryDirectory(prefix="dpo-run-") as scratch:
        replace(config, inference_mode=True).save_pretrained(scratch)
        facts = json.loads(Path(scratch, ADAPTER_CONFIG).read_text())
    if isinstance(facts["target_modules"], list):  # a set, whose order is another in each process
        facts["target_modules"].sort()
    text = json.dumps(facts, indent=2, sort_keys=True)
    return {ADAPTER_WEIGHTS: named}, {ADAPTER_CONFIG: text.encode()}


def save_adapter(model: PreTrainedModel, target: Path) -> None:
    """The trained adapter in PEFT's layout, into a folder that is there."""
    tensors, texts = adapter_files(model)
    for name, values in tensors.items():
        write_tensors(target / name, values, {"format": "pt"})
    for name, text in texts.items():
        (target / name).write_bytes(text)
