"""A copy of a few layers of a model in float32, small enough to probe in a second."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.model.adapters.quantize import QUANTIZED, dequantized
from dpo_cli.model.stored import HALF

TOKENS = 64  # of the embedding and the output layer
NOT_A_KIND = ("layer_idx", "layer_id", "training")  # what differs between layers of one kind
PROBE_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def smallest_copy(
    model: PreTrainedModel,
    device: torch.device,
    plain: Callable[[PreTrainedModel, Tensor, Tensor], Tensor],
) -> PreTrainedModel:
    """A copy of a few layers, or of all if the forward fails with a few. plain: the forward, of a
    prompt and a response."""
    copied = skeleton(model, device)
    try:
        with torch.no_grad(), dequantized(copied):
            copied.set_attn_implementation("eager")
            ids = torch.zeros(2, dtype=torch.long, device=device)
            plain(copied, ids[:1], ids[1:])
    except PROBE_ERRORS:
        return skeleton(model, device, complete=True)
    return copied


def skeleton(
    model: PreTrainedModel, device: torch.device, complete: bool = False
) -> PreTrainedModel:
    """A copy of a model with only its first layer, its last and one of each kind, and a vocabulary
    of `TOKENS`; on `device`, with half-precision weights in float32. complete: with all layers and
    tokens.

    Layers of one kind share one copy of their weights, so about 1 GiB of a model of 8 billion
    parameters is copied. Weights that need no conversion are shared with the model, which is not
    changed.
    """
    device = torch.empty(0, device=device).device  # with its index, as weights have it
    layers = None if complete else _layers(model)
    memo: dict[int, Any] = {}
    indices: list[int] = []
    if layers is not None:
        kinds = [_kind(model, layer, i, len(layers)) for i, layer in enumerate(layers)]
        indices = sorted({0, len(layers) - 1, *(kinds.index(kind) for kind in kinds)})
        for i in indices:
            _share_weights(layers[kinds.index(kinds[i])], layers[i], memo, device)
    if not complete:
        _truncate_vocabulary(model, memo, device)
    dropped = {
        id(p) for i, x in enumerate(layers or ()) if i not in indices for p in x.parameters()
    }
    for weight in model.parameters():
        if id(weight) not in dropped and id(weight) not in memo:
            memo[id(weight)] = _as_float32(weight, device)
    if layers is not None:
        copied_layers = torch.nn.ModuleList(copy.deepcopy(layers[i], memo) for i in indices)
        memo[id(layers)] = copied_layers
    few = copy.deepcopy(model, memo)
    for part in few.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    _fit_config(few, len(layers or ()), indices)
    return few


def _layers(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """The list of the decoder's layers, if it is unambiguous."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    inside = {
        id(part) for module_list in lists for layer in module_list for part in layer.modules()
    }
    outer = [module_list for module_list in lists if id(module_list) not in inside]
    return outer[0] if len(outer) == 1 and len(outer[0]) > 0 else None


def _kind(model: PreTrainedModel, layer: torch.nn.Module, index: int, count: int) -> Any:
    """Equal for layers that run the same code on weights of the same shapes."""
    settings = [
        value[index] for value in _per_layer_lists(model.config.get_text_config(), count).values()
    ]
    parts = [(name, type(part), _plain(part)) for name, part in layer.named_modules()]
    shapes = [(name, value.shape, value.dtype) for name, value in layer.state_dict().items()]
    return repr(settings), parts, shapes


def _plain(part: torch.nn.Module) -> dict[str, Any]:
    return {
        name: value for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str | None)
        and not name.startswith("_") and name not in NOT_A_KIND
    }  # fmt: skip


def _per_layer_lists(config: Any, count: int) -> dict[str, list[Any]]:
    """Configuration entries with one value per layer."""
    return {k: v for k, v in vars(config).items() if isinstance(v, list) and len(v) == count}


def _share_weights(
    first: torch.nn.Module, layer: torch.nn.Module, memo: dict[int, Any], device: torch.device
) -> None:
    """Make weights of a layer that must be copied refer to the copy of the first of its kind."""
    for reference, own in zip(first.parameters(), layer.parameters(), strict=True):
        if id(reference) not in memo:
            memo[id(reference)] = _as_float32(reference, device)
        memo[id(own)] = own if memo[id(reference)] is reference else memo[id(reference)]


def _as_float32(weight: Tensor, device: torch.device) -> Tensor:
    """The weight on `device`, in float32 if it is in half precision; itself if nothing changes."""
    dtype = torch.float32 if weight.dtype in HALF.values() else weight.dtype
    if weight.dtype == dtype and weight.device == device:
        return weight
    return _parameter(weight.detach().to(device, dtype), weight)


def _parameter(value: Tensor, like: Tensor) -> Tensor:
    return torch.nn.Parameter(value, requires_grad=like.requires_grad)


def _truncate_vocabulary(
    model: PreTrainedModel, memo: dict[int, Any], device: torch.device
) -> None:
    """Keep `TOKENS` rows of the embedding and the output layer, if both are plain layers."""
    config: Any = model.config.get_text_config()
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    matrices = [part for part in ends if part is not None]
    usual = (torch.nn.Embedding, torch.nn.Linear)
    vocab = int(config.vocab_size)
    for part in matrices:
        weight = getattr(part, "weight", None)
        unusual = not isinstance(part, usual) or type(part).__name__ in QUANTIZED
        if unusual or weight is None or len(weight) < vocab or vocab <= TOKENS:
            return
    rows = torch.arange(TOKENS) * (vocab // TOKENS)
    for weight in (p for part in matrices for p in part.parameters(recurse=False)):
        if id(weight) not in memo:  # tied ones come twice
            truncated = _as_float32(weight.detach()[rows.to(weight.device)], device)
            memo[id(weight)] = _parameter(truncated.detach(), weight)


def _fit_config(few: PreTrainedModel, count: int, indices: list[int]) -> None:
    config: Any = few.config.get_text_config()
    if indices:
        for name, value in _per_layer_lists(config, count).items():
            setattr(config, name, [value[i] for i in indices])
        config.num_hidden_layers = len(indices)
    embedding: Any = few.get_input_embeddings()
    if len(embedding.weight) == TOKENS:
        config.vocab_size = TOKENS
        embedding.padding_idx = None  # may be a dropped row
