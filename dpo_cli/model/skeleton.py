"""A few layers of a model in float32: what a probe can try in a second, however large it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.model.adapters.quantize import QUANTIZED, dequantized
from dpo_cli.model.stored import HALF

ROWS = 64  # of the embedding and the output layer
NOT_A_KIND = ("layer_idx", "layer_id", "training")  # what differs between layers of one kind
TRIED = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def smallest(
    model: PreTrainedModel,
    device: torch.device,
    plain: Callable[[PreTrainedModel, Tensor, Tensor], Tensor],
) -> PreTrainedModel:
    """A few of its layers, or all where its forward cannot do without. plain: that forward, of a
    prompt and a response."""
    few = skeleton(model, device)
    try:
        with torch.no_grad(), dequantized(few):
            few.set_attn_implementation("eager")
            ids = torch.zeros(2, dtype=torch.long, device=device)
            plain(few, ids[:1], ids[1:])
    except TRIED:
        return skeleton(model, device, whole=True)
    return few


def skeleton(model: PreTrainedModel, device: torch.device, whole: bool = False) -> PreTrainedModel:
    """A copy of a model's code over the first layer, the last and one of each kind, with `ROWS`
    tokens; on that device, half-precision weights in float32. whole: over all layers and tokens.

    Layers of one kind share one copy of their weights, so that of 8 billion parameters a GiB is
    copied; the model itself is not changed. Weights that need no copy are the model's own.
    """
    device = torch.empty(0, device=device).device  # with its number, as weights have it
    found = None if whole else _layers(model)
    memo: dict[int, Any] = {}
    kept: list[int] = []
    if found is not None:
        kinds = [_kind(model, layer, i, len(found)) for i, layer in enumerate(found)]
        kept = sorted({0, len(found) - 1, *(kinds.index(kind) for kind in kinds)})
        for i in kept:
            _share(found[kinds.index(kinds[i])], found[i], memo, device)
    if not whole:
        _cut_tokens(model, memo, device)
    dropped = {id(p) for i, x in enumerate(found or ()) if i not in kept for p in x.parameters()}
    for weight in model.parameters():
        if id(weight) not in dropped and id(weight) not in memo:
            memo[id(weight)] = _exact(weight, device)
    if found is not None:
        layers = torch.nn.ModuleList(copy.deepcopy(found[i], memo) for i in kept)
        memo[id(found)] = layers
    few = copy.deepcopy(model, memo)
    for part in few.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    _fit_config(few, len(found or ()), kept)
    return few


def _layers(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """The list of the decoder's layers, where it is beyond doubt."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    inside = {id(part) for one in lists for layer in one for part in layer.modules()}
    outer = [one for one in lists if id(one) not in inside]
    return outer[0] if len(outer) == 1 and len(outer[0]) > 0 else None


def _kind(model: PreTrainedModel, layer: torch.nn.Module, index: int, count: int) -> Any:
    """Equal for layers that run the same code on weights of the same shapes."""
    told = [value[index] for value in _lists(model.config.get_text_config(), count).values()]
    parts = [(name, type(part), _plain(part)) for name, part in layer.named_modules()]
    shapes = [(name, value.shape, value.dtype) for name, value in layer.state_dict().items()]
    return repr(told), parts, shapes


def _plain(part: torch.nn.Module) -> dict[str, Any]:
    return {
        name: value for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str | None)
        and not name.startswith("_") and name not in NOT_A_KIND
    }  # fmt: skip


def _lists(config: Any, count: int) -> dict[str, list[Any]]:
    """The entries that say something of each layer."""
    return {k: v for k, v in vars(config).items() if isinstance(v, list) and len(v) == count}


def _share(
    first: torch.nn.Module, layer: torch.nn.Module, memo: dict[int, Any], device: torch.device
) -> None:
    """Weights of a layer that have to be copied are those of the first of its kind."""
    for one, own in zip(first.parameters(), layer.parameters(), strict=True):
        if id(one) not in memo:
            memo[id(one)] = _exact(one, device)
        memo[id(own)] = own if memo[id(one)] is one else memo[id(one)]


def _exact(weight: Tensor, device: torch.device) -> Tensor:
    """In float32 if it is in half precision; itself where that changes nothing."""
    dtype = torch.float32 if weight.dtype in HALF.values() else weight.dtype
    if weight.dtype == dtype and weight.device == device:
        return weight
    return _parameter(weight.detach().to(device, dtype), weight)


def _parameter(value: Tensor, like: Tensor) -> Tensor:
    return torch.nn.Parameter(value, requires_grad=like.requires_grad)


def _cut_tokens(model: PreTrainedModel, memo: dict[int, Any], device: torch.device) -> None:
    """Some rows of the embedding and of the output layer, where both are of the usual kind."""
    config: Any = model.config.get_text_config()
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = [part for part in ends if part is not None]
    usual = (torch.nn.Embedding, torch.nn.Linear)
    vocab = int(config.vocab_size)
    for part in tables:
        weight = getattr(part, "weight", None)
        odd = not isinstance(part, usual) or type(part).__name__ in QUANTIZED
        if odd or weight is None or len(weight) < vocab or vocab <= ROWS:
            return
    rows = torch.arange(ROWS) * (vocab // ROWS)
    for weight in (p for part in tables for p in part.parameters(recurse=False)):
        if id(weight) not in memo:  # tied ones come twice
            cut = _exact(weight.detach()[rows.to(weight.device)], device)
            memo[id(weight)] = _parameter(cut.detach(), weight)


def _fit_config(few: PreTrainedModel, count: int, kept: list[int]) -> None:
    config: Any = few.config.get_text_config()
    if kept:
        for name, value in _lists(config, count).items():
            setattr(config, name, [value[i] for i in kept])
        config.num_hidden_layers = len(kept)
    embedding: Any = few.get_input_embeddings()
    if len(embedding.weight) == ROWS:
        config.vocab_size = ROWS
        embedding.padding_idx = None  # may be a row that is left out
