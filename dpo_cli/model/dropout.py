"""What is random in training: dropout at the configured rates, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cli.model.adapters.active import layers


def set_dropout(model: PreTrainedModel, rate: float) -> None:
    """Dropout would make policy and reference differ at step 0, so the default is none.

    Families call it attention_dropout, resid_pdrop, layerdrop, ...: all with "drop" in them.
    Whatever else a family draws in training, such as the jitter of its routers or the experts of
    Phi-MoE's, is drawn no more: `model.train()` puts such parts into evaluation mode. Not by
    setting the noise to 0: Phi-MoE routes by it in evaluation, too.
    """
    for part in _places(model):
        if isinstance(part, _DropoutNd):
            part.p = rate
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, rate if value <= 1.0 else value)
    setattr(model, "train", partial(_train, model, rate > 0))  # noqa: B010


def _places(model: PreTrainedModel) -> Iterator[Any]:
    """Modules and configurations, those inside others, too, each once."""
    seen: set[int] = set()
    waiting: list[Any] = [model.config, *model.modules()]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        waiting += [x for x in vars(part).values() if isinstance(x, PretrainedConfig)]


def _train(model: PreTrainedModel, dropout: bool, mode: bool = True) -> PreTrainedModel:
    """As `model.train(mode)`, but for the parts that would draw what nobody asked for.

    dropout: the model has some; else adapters alone may, whose rate is a key of its own.
    """
    type(model).train(model, mode)
    if mode:
        own = {id(part) for layer in layers(model) for part in _adapter(layer)}
        for part in model.modules():
            steady = "train" in vars(part)  # this model, and quantized layers on a CPU
            # Blocks recompute their activations in training mode alone, and draw nothing.
            block = isinstance(part, GradientCheckpointingLayer)
            if not (steady or dropout or block or id(part) in own) or _jitters(part):
                part.training = False
    return model


def _adapter(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The parts of a layer's adapter, without the layer under it."""
    base = getattr(layer, "base_layer", None)
    under = set() if base is None else {id(part) for part in base.modules()}
    return (part for part in layer.modules() if id(part) not in under)


def _jitters(part: torch.nn.Module) -> bool:
    return any("jitter" in name for name in vars(part))
