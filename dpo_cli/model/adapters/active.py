"""Which adapter of a model is active, without importing PEFT, which takes a second.

Adapted layers are PEFT's, with one entry per adapter, by name (`lora.add_adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config import LoraConfig
from dpo_cli.model.source import ADAPTER_WEIGHTS
from dpo_cli.model.stored import float32_names

TRAINED, REFERENCE = "default", "reference"  # names of adapters in memory, not in files
POLICY_TASK, REWARD_TASK = "CAUSAL_LM", "SEQ_CLS"  # PEFT's task types
REWARD_HEAD = "score"
PREFIX = "base_model.model."  # of the names in adapter files
PARTS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
         "trainable_tokens_delta", "modules_to_save"}  # fmt: skip

WRAPPERS = (
    "base_layer",
    "original_module",
    "token_adapter",
)  # PEFT's names for the base's own parts


@dataclass(frozen=True)
class Adaptation:
    """How a run adapts the model it trains. weights: folder of the checkpoint's adapter."""

    settings: LoraConfig
    weights: Path | None = None


def adapted_layers(model: torch.nn.Module) -> list[Any]:
    """The modules of a model with adapters or fully trained copies (modules_to_save)."""
    return [m for m in model.modules() if is_adapted_layer(m)]


def is_adapted_layer(module: torch.nn.Module) -> bool:
    return hasattr(module, "_get_available_adapters")


def is_adapted(model: torch.nn.Module) -> bool:
    return hasattr(model, "peft_config")


def active_part(module: Any) -> Any:
    """A module itself, or its active fully trained copy (modules_to_save)."""
    if not isinstance(getattr(module, "modules_to_save", None), torch.nn.ModuleDict):
        return module
    if module.disable_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


@contextmanager
def adapter_as(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Run the body with another adapter, or with none.

    PEFT's own switch also changes `requires_grad`, which FSDP and the optimizer have read already.
    """
    switched = adapted_layers(model)
    before = [(layer._disable_adapters, layer._active_adapter) for layer in switched]
    for layer in switched:
        layer._disable_adapters = name not in layer._get_available_adapters()
        if not layer._disable_adapters:
            layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(switched, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def function_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that are active, by their names without adapters; with all adapters disabled,
    exactly those of the base model."""
    base, own = function_parts(model)
    return {**base, **own}


def function_parts(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As `function_state`, in two parts: the base's weights and the active adapter's, which may
    have the same names."""
    if not is_adapted(model):
        return model.state_dict(), {}
    base: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    active = {
        place: None if layer._disable_adapters else layer.active_adapters[0]
        for place, layer in model.named_modules() if is_adapted_layer(layer)
    }  # fmt: skip
    for key, value in model.state_dict().items():
        parts = key.split(".")
        index = next((i for i, part in enumerate(parts) if part in PARTS), None)
        if index is None:
            name = [p for p in parts if p not in WRAPPERS]
            base[".".join(name)] = value
        elif parts[index + 1] == active[".".join(parts[:index])]:
            name = parts[:index] if parts[index] == "modules_to_save" else parts[: index + 1]
            adapter[".".join(name + parts[index + 2 :])] = value
    return base, adapter


def scalings(model: PreTrainedModel) -> list[Any]:
    """What the weights do not contain: each active adapter's scaling and trained token indices."""
    enabled = [(layer, layer.active_adapters[0]) for layer in adapted_layers(model)
          if not layer._disable_adapters]  # fmt: skip
    factors = [layer.scaling[name] for layer, name in enabled if hasattr(layer, "scaling")]
    return factors + [
        layer.token_indices[name] for layer, name in enabled
        if isinstance(getattr(layer, "token_indices", None), dict)
    ]  # fmt: skip


def round_base(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the frozen float32 weights to another dtype.

    Adapters, modules_to_save, buffers (rotary frequencies) and weights that the family keeps in
    float32 are unchanged.
    """
    adapter_weights = {id(p) for layer in adapted_layers(model) for p in _own_parameters(layer)}
    names = float32_names(model)
    for name, weight in model.named_parameters():
        unchanged = id(weight) in adapter_weights or any(part in name for part in names)
        if not unchanged and weight.dtype == torch.float32:
            weight.data = weight.data.to(dtype)


def _own_parameters(layer: Any) -> Iterator[torch.nn.Parameter]:
    for name in layer.adapter_layer_names:
        part = getattr(layer, name, None)
        if isinstance(part, torch.nn.Module):
            yield from part.parameters()


def full_weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of full weights in an adapter's file, such as a reward model's score."""
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if not PARTS & set(name.split("."))]  # noqa: SIM118
        return {n.removeprefix(PREFIX): tuple(file.get_slice(n).get_shape()) for n in names}
