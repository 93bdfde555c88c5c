"""The forward of a packed row: hidden states, and log-probabilities of its targets."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.distributed.fsdp import run_unsharded
from dpo_cli.logprobs import (
    Head,
    LossOf,
    fused_loss,
    promote,
    sum_by_sequence,
    target_logprobs,
)
from dpo_cli.model.attention import interface
from dpo_cli.model.blocks import BLOCKS
from dpo_cli.model.fuse import RESIDUAL
from dpo_cli.model.rope import cuts_of
from dpo_cli.records import Batch


def head_of(model: PreTrainedModel) -> Head:
    """The output layer with the family's scaling and soft-capping."""
    layer = cast(Any, model.get_output_embeddings())
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def backbone(model: PreTrainedModel) -> Any:
    """The model without its output layer (Llama 4 names its multimodal model as the base)."""
    base = model.base_model
    return cast(Any, model).model if base is model else base


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(T, D) final hidden states of a packed row, without the output layer."""
    layout, base = interface.layout_for(model, batch), backbone(model)
    return run_unsharded(model, lambda: layout.states(base, batch, model.dtype))


def computed_by(model: PreTrainedModel) -> str:
    """What besides the weights affects the rounding of a packed row, for cache keys."""
    return (
        interface.kernel_of(model)
        + " compiled" * hasattr(model, BLOCKS)
        + " rounded" * hasattr(model, RESIDUAL)
        + " by length" * bool(cuts_of(model.config))
    )


def target_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(N, D) hidden states that predict the row's targets."""
    return hidden_states(model, batch).index_select(0, batch.source_index)


def loss_and_logprobs(
    model: PreTrainedModel, batch: Batch, loss_of: LossOf, together: bool = False
) -> tuple[Tensor, Tensor]:
    """The row's summed loss, with gradient, and the targets' log-probabilities, (N,), without.

    together: `loss_of` needs all examples at once.
    """
    hidden = target_states(model, batch)
    return fused_loss(hidden, head_of(model), batch.targets, batch.counts, loss_of, together)


def token_logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(N,) float32 log-probabilities of the row's targets, without gradient."""
    return target_logprobs(target_states(model, batch), head_of(model), batch.targets)


@torch.no_grad()
def sequence_logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(S,) float32 log-probability of each branch given its prompt, summed over tokens."""
    values = token_logprobs(model, batch)
    return sum_by_sequence(values, batch.sequence_index, len(batch.sequence_lengths))


def padded_token_logprobs(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> Tensor:
    """(R,) log-probabilities of a response by the model's own forward, as a reference."""
    ids = torch.cat([prompt, response])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0]
    picked = promote(logits[len(prompt) - 1 : -1]).log_softmax(-1)
    return picked.gather(1, response[:, None]).squeeze(1)
