"""Faster modules that compute the same function."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation


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
