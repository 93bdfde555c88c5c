"""Dropout at the configured rate, with all other random noise of a model turned off."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cli.model.adapters.active import adapted_layers


def set_dropout(model: PreTrainedModel, rate: float) -> None:
    """Set all dropout rates. The default is 0, as dropout makes policy and reference differ at
    step 0.

    Families name the rates attention_dropout, resid_pdrop, layerdrop, ...: all contain "drop".
    Other noise in training, such as router jitter, is turned off: `model.train()` leaves such
    modules in evaluation mode. (Setting the noise to 0 would change Phi-MoE, which routes by it in
    evaluation as well.)
    """
    for part in _places(model):
        if isinstance(part, _DropoutNd):
            part.p = rate
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, rate if value <= 1.0 else value)
    setattr(model, "train", partial(_train, model, rate > 0))  # noqa: B010


def _places(model: PreTrainedModel) -> Iterator[Any]:
    """All modules and configurations, including nested ones, each once."""
    seen: set[int] = set()
    queue: list[Any] = [model.config, *model.modules()]
    while queue:
        part = queue.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        queue += [x for x in vars(part).values() if isinstance(x, PretrainedConfig)]


def _train(model: PreTrainedModel, dropout: bool, mode: bool = True) -> PreTrainedModel:
    """Like `model.train(mode)`, but modules with unwanted noise stay in evaluation mode.

    dropout: whether the model has any; otherwise only adapters may, which have their own rate.
    """
    type(model).train(model, mode)
    if mode:
        adapter_parts = {id(part) for layer in adapted_layers(model) for part in _adapter(layer)}
        for part in model.modules():
            pinned = "train" in vars(part)  # this model, and quantized layers on a CPU
            # Blocks recompute their activations only in training mode, and have no noise.
            block = isinstance(part, GradientCheckpointingLayer)
            if not (pinned or dropout or block or id(part) in adapter_parts) or _jitters(part):
                part.training = False
    return model


def _adapter(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules of a layer's adapter, without its base layer."""
    base = getattr(layer, "base_layer", None)
    under = set() if base is None else {id(part) for part in base.modules()}
    return (part for part in layer.modules() if id(part) not in under)


def _jitters(part: torch.nn.Module) -> bool:
    return any("jitter" in name for name in vars(part))
