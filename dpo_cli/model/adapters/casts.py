"""Dtypes of adapters, where PEFT's own choice loses precision or time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.model.adapters.active import adapted_layers
from dpo_cli.model.stored import HALF


@contextmanager
def initialized_in_float32() -> Iterator[None]:
    """Keep PEFT from rounding new adapters, and DoRA's norms, to the dtype of the base."""
    layer: Any = BaseTunerLayer
    real = layer._get_base_layer_device_and_dtype

    def unrounded(self: Any, base: Any) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = real(self, base)
        return device, None if dtype in HALF.values() else dtype

    layer._get_base_layer_device_and_dtype = unrounded
    try:
        yield
    finally:
        layer._get_base_layer_device_and_dtype = real


def leave_casts_to_autocast(model: PreTrainedModel) -> None:
    """Skip PEFT's cast of an adapter's input to float32, which autocast reverts at once: it costs
    a tenth of a step for the same numbers.

    Without autocast PEFT still casts, as it does for DoRA, whose norm uses the input's dtype.
    """
    for layer in adapted_layers(model):
        if isinstance(layer, LoraLayer):
            cast(Any, layer)._cast_input_dtype = partial(_cast_without_autocast, layer)


def _cast_without_autocast(layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.is_autocast_enabled(x.device.type) and not layer.lora_variant:
        return x
    return cast(Tensor, type(layer)._cast_input_dtype(layer, x, dtype))
