"""Activation checkpointing: blocks save only their input and are recomputed in the backward."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cli.errors import ConfigError


def recompute_blocks(model: PreTrainedModel, every: int) -> None:
    """Checkpoint every `every`-th block, starting with the first (arXiv 1604.06174).

    With `every=1` the saved activations shrink to one hidden state per block, for a third more
    work per step. Gradients and dropout masks are unchanged. ConfigError for a family that does not
    support it.
    """
    blocks = [m for m in model.base_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not (blocks and model.supports_gradient_checkpointing):
        raise ConfigError(
            f"hardware.activation_checkpointing={every}: {type(model).__name__} does not support "
            "it; use hardware.activation_checkpointing=0 and a smaller train.micro_batch_tokens"
        )
    # Reentrant checkpointing gives no gradients if a block's input needs none, as with adapters.
    again = partial(checkpoint, use_reentrant=False)
    for number, block in enumerate(cast(list[Any], blocks)):
        block.gradient_checkpointing = number % every == 0
        block._gradient_checkpointing_func = again
