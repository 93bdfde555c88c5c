"""Cheaper implementations of the same function."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation

from dpo_cli.distributed.fsdp import find_blocks

RESIDUAL = "dpo_half_residual"  # attribute of a model with a half-precision residual stream


def fuse_gelu(model: PreTrainedModel) -> None:
    """GPT-2's `gelu_new` is seven elementwise passes; PyTorch's tanh GELU is the same formula."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, GELUTanh())


def skip_padding_check(model: PreTrainedModel) -> None:
    """Disable transformers' search for padding tokens in unmasked inputs, which synchronizes with
    the device in every forward. Packed rows have no padding."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.warn_if_padding_and_no_attention_mask = _nothing  # type: ignore[method-assign]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces the check."""


def round_residual(model: PreTrainedModel) -> None:
    """Under autocast, keep the residual stream in autocast's half precision.

    With float32 weights, embeddings and norms return float32, and so does every residual sum.
    Norms still compute in float32 and sums are rounded once, as in a model with half-precision
    weights. Only compiled blocks gain, as eager norms make a float32 copy of their input.
    """
    blocks = find_blocks(model)
    if blocks:
        blocks[0].register_forward_pre_hook(_in_half)
        setattr(model, RESIDUAL, True)


def _in_half(block: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden, *rest = given
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return (hidden, *rest)
