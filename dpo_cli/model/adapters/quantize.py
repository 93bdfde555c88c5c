"""Frozen weights quantized to 4 or 8 bits (bitsandbytes), under an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from dpo_cli.errors import ConfigError
from dpo_cli.model.attention.interface import Placement

QUANTIZED = ("Linear4bit", "Linear8bitLt")


def quantization_options(kind: str | None, on: Placement) -> dict[str, Any]:
    """Arguments to from_pretrained; weights are quantized on their final device.

    nf4: double-quantized, multiplied in `on.dtype` (arXiv 2305.14314); int8: arXiv 2208.07339.
    """
    if kind is None:
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"lora.quantization={kind} needs bitsandbytes: install it, or use "
            "lora.quantization=null"
        ) from error
    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=on.dtype,
        )  # fmt: skip
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": {"": str(on.device)}}


def match_eval_to_training(model: PreTrainedModel) -> None:
    """Make quantized layers on a CPU compute the same in training and evaluation.

    On a CPU, bitsandbytes permanently repacks 4-bit weights in evaluation, which breaks gradients,
    and in 8 bits rounds activations only in evaluation, so that policy and reference differ.
    """
    for layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False
        if layer.weight.device.type == "cpu" and type(layer).__name__ == "Linear8bitLt":
            layer.training, layer.train = True, partial(_ignore_mode, layer)


def dequantize_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Dequantize 4-bit weights directly to the dtype they are multiplied in. bitsandbytes uses the
    dtype they were quantized from and casts: twice the memory traffic for the same numbers."""
    for layer in quantized_layers(model):
        if state := getattr(layer.weight, "quant_state", None):
            state.dtype = dtype


def _ignore_mode(layer: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return layer


def quantized_layers(model: PreTrainedModel) -> list[Any]:
    return [
        m for m in model.modules() if type(m).__name__ in QUANTIZED
        and type(m).__module__.startswith("bitsandbytes")  # PEFT's wrappers have the same name
    ]  # fmt: skip


def dense_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all weights; quantized ones are dequantized one at a time."""
    quantized = {id(layer.weight): layer for layer in quantized_layers(model)}
    for name, weight in model.named_parameters():
        layer = quantized.get(id(weight))
        yield name, weight if layer is None else _weight(layer)


@contextmanager
def dequantized(model: PreTrainedModel) -> Iterator[None]:
    """In the body, quantized layers multiply like dense ones with the same values.

    int8 rounds activations depending on the rest of the batch, so a packed row would differ from
    the plain forward.
    """
    layers = quantized_layers(model)
    for layer in layers:
        layer.forward = partial(_dense, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _dense(layer: Any, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return cast(Tensor, _Dense.apply(x, bias, layer))


class _Dense(torch.autograd.Function):
    """x W^T + b, with W dequantized again in the backward: if saved, the dense weights of all
    layers would be in memory at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        ctx.layer, ctx.biased = layer, bias is not None
        return torch.nn.functional.linear(x, _weight(layer).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        weight = _weight(ctx.layer).to(grad.dtype)
        return grad @ weight, grad.flatten(0, -2).sum(0) if ctx.biased else None, None


def _weight(layer: Any) -> Tensor:
    """(out, in) dequantized. PEFT's function for it replaces the layer's parameter on a CPU."""
    stored = layer.weight
    if type(layer).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(stored.data, stored.quant_state)
    scale = layer.state.SCB if stored.SCB is None else stored.SCB
    return stored.data.float() * scale.float()[:, None] / 127.0
