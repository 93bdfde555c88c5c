"""Merge adapters of any type into their base by PEFT's own classes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.device_memory import ran_out
from dpo_cli.errors import ConfigError, UserError
from dpo_cli.model.adapters.active import TRAINED, adapted_layers
from dpo_cli.model.adapters.casts import initialized_in_float32
from dpo_cli.model.adapters.kinds import (
    config_of,
    kind_of,
    refuse_unmergeable,
    unusual,
)
from dpo_cli.model.adapters.lora import refuse_other_weights, unread
from dpo_cli.model.adapters.patterns import refuse_unfit
from dpo_cli.model.source import Origin
from dpo_cli.model.vetting import one_line

PROBE_TOKENS = 8
TOLERANCE = 1e-2  # of the largest difference from the base's logits; rounding gives 1e-5


def merge(model: PreTrainedModel, origin: Origin, key: str) -> None:
    """Merge the origin's adapter into the weights of its base.

    Raises ConfigError for a type that weights cannot express, and for a damaged folder.
    """
    assert origin.adapter is not None
    config = config_of(origin, key)
    refuse_unmergeable(config, origin, key)
    config.inference_mode, config.task_type = True, None
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    compare = tied or unusual(config)
    where = f"{key}={origin.adapter}: its {kind_of(config)} adapter"
    base = _logits(model) if compare else None
    refuse_unfit(config, model, f"{key}={origin.adapter}: its ")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = _wrapped(model, config, origin.adapter)
            before = _logits(model) if compare else None
            _split_tied(model)
            wrapped.merge_and_unload(safe_merge=True)  # ValueError: not finite
    except Exception as error:  # of a hostile configuration PEFT raises any kind
        if isinstance(error, UserError) or (isinstance(error, RuntimeError) and ran_out(error)):
            raise
        raise ConfigError(f"{where} cannot be merged: {one_line(error)}") from error
    if adapted_layers(model):
        raise ConfigError(f"{where} cannot be merged: PEFT leaves it in the model")
    if before is not None and base is not None:
        _refuse_difference(base, before, _logits(model), where)
    _untie(model)
    model.requires_grad_(True)


def _wrapped(model: PreTrainedModel, config: peft.PeftConfig, folder: Path) -> Any:
    with torch.random.fork_rng(devices=[]), initialized_in_float32():
        torch.manual_seed(0)  # for projections that some types draw again when loaded
        wrapped = peft.PeftModel(model, config, TRAINED)
        result = wrapped.load_adapter(
            str(folder), TRAINED, is_trainable=False, torch_device=str(model.device)
        )
    wrapped.eval()
    missing = unread(wrapped, result.missing_keys, result.missing_keys)
    refuse_other_weights(model, folder, missing, result.unexpected_keys)
    return wrapped


def _split_tied(model: PreTrainedModel) -> None:
    """Split a weight shared by embedding and output layer if only one of them is adapted: PEFT
    would merge into both."""
    ends: Any = [model.get_input_embeddings(), model.get_output_embeddings()]
    adapted = [
        x for x in ends if isinstance(x, BaseTunerLayer) and not isinstance(x, TrainableTokensLayer)
    ]
    if adapted and ends[1] is not None:
        inner: list[Any] = [
            x.get_base_layer() if isinstance(x, BaseTunerLayer) else x for x in ends
        ]
        if inner[0].weight is inner[1].weight:
            inner[1].weight = torch.nn.Parameter(inner[1].weight.detach().clone())


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """Logits of the model's own forward on a few tokens: (1, T, V) or (1, labels)."""
    vocab = int(cast(Any, model.get_input_embeddings()).weight.shape[0])
    ids = torch.arange(1, PROBE_TOKENS + 1, device=model.device)[None] % vocab
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = ids.masked_fill(ids == (-1 if pad is None else pad), 0)
    return cast(Tensor, model(input_ids=ids, use_cache=False).logits.float())


def _refuse_difference(base: Tensor, before: Tensor, after: Tensor, where: str) -> None:
    """ConfigError if the merged logits differ: PEFT silently merges some types incorrectly."""
    effect = float((before - base).abs().max()) + 1e-3 * float(before.abs().max())
    difference = float((after - before).abs().max())
    if not difference <= TOLERANCE * effect:
        raise ConfigError(
            f"{where} cannot be merged: the logits of the merged weights differ by {difference:.3g}"
        )


def _untie(model: PreTrainedModel) -> None:
    """Untie embedding and output layer in the configuration if the merge made them different."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and cast(Any, head).weight is not cast(Any, embedding).weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
