"""Activation checkpointing: blocks keep their input alone and run again in the backward."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cli.errors import ConfigError


def recompute_blocks(model: PreTrainedModel, every: int) -> None:
    """From now on every `every`-th block, the first among them, keeps no activations in training.

    Memory for time: with `every=1` the blocks' activations shrink to one hidden state each, and
    a third of a step's work is added. The gradients are the same, dropout's draws too. ConfigError
    for a family whose blocks cannot. arXiv 1604.06174.
    """
    blocks = [m for m in model.base_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not (blocks and model.supports_gradient_checkpointing):
        raise ConfigError(
            f"hardware.activation_checkpointing={every}: transformers cannot run the blocks of a "
            f"{type(model).__name__} again; use hardware.activation_checkpointing=0 and a smaller "
            "train.micro_batch_tokens"
        )
    # The reentrant kind gives no gradients where a block's input needs none, as under adapters.
    again = partial(checkpoint, use_reentrant=False)
    for number, block in enumerate(cast(list[Any], blocks)):
        block.gradient_checkpointing = number % every == 0
        block._gradient_checkpointing_func = again
