"""Cheaper ways to compute the same function."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation

from dpo_cli.distributed.fsdp import find_blocks

RESIDUAL = "dpo_half_residual"  # the attribute of a model that rounds its residual stream


def fuse_gelu(model: PreTrainedModel) -> None:
    """GPT-2's `gelu_new` is seven elementwise passes; PyTorch's tanh GELU is the same formula."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, GELUTanh())


def skip_padding_check(model: PreTrainedModel) -> None:
    """Without a mask, GPT-2 with a padding token looks for it among a row's tokens to warn of it,
    which waits for the device in every forward. Packed rows have no padding."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.warn_if_padding_and_no_attention_mask = _nothing  # type: ignore[method-assign]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Neither looks nor warns."""


def round_residual(model: PreTrainedModel) -> None:
    """Under autocast, hold the hidden states between blocks in its half precision.

    Over float32 weights embeddings and norms give float32, and so every sum with the residual
    does. Norms still compute in float32 and sums are rounded once, as in a model of half-precision
    weights. Only compiled blocks gain: eager norms make a float32 copy of what they are given.
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
