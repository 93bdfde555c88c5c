"""Dtypes of stored weights, and converting loaded weights to others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from dpo_cli.errors import NonFiniteError
from dpo_cli.model.vetting import shards

HALF = {"BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors calls them
INTEGERS = ("I", "U", "BOOL")
SPARE, SPARE_TIMES = 2**27, 4  # numbers, as masks and packed weights need


def weight_files(source: str, options: dict[str, Any]) -> list[Path]:
    """The safetensors files that from_pretrained loads from a folder or hub id (which may download
    them); empty if their names are not transformers' own."""

    def cached(name: str) -> Path | None:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)
        return None if path is None else Path(path)

    single = cached(SAFE_WEIGHTS_NAME)
    if single is not None:
        return [single]
    index = cached(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    return [path for path in map(cached, shards(index, source)) if path is not None]


def stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """The half-precision dtype shared by all floating-point weights of safetensors files, else
    float32, which represents a mixture exactly. Integers (quantized weights) are ignored."""
    kinds = {entry["dtype"] for entry in _entries(files)}
    kinds = {kind for kind in kinds if not kind.startswith(INTEGERS)}
    return HALF.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def refuse_larger(model: PreTrainedModel, files: Sequence[Path]) -> None:
    """ValueError for a model, on the meta device, of far more numbers than its files hold: what a
    file lacks would be allocated and initialized before anybody complained."""
    stored = sum(math.prod(entry["shape"]) for entry in _entries(files))
    needed = sum(part.numel() for part in (*model.parameters(), *model.buffers()))
    if files and needed > SPARE + SPARE_TIMES * stored:
        raise ValueError(
            f"config.json describes a model of {needed:,} numbers, its files hold {stored:,}"
        )


def _entries(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The headers of safetensors files: dtype and shape of each tensor."""
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from (entry for name, entry in header.items() if name != "__metadata__")


@contextmanager
def parameters_in(dtype: torch.dtype) -> Iterator[None]:
    """Models built by from_pretrained in the body get parameters in another dtype, in which weights
    are then read; buffers stay in float32.

    from_pretrained's own `dtype` would compute buffers in half precision as well and permanently
    round some families' rotary tables or embedding scales.
    """
    if dtype == torch.float32:
        yield
        return
    module: Any = torch.nn.Module
    real = module.register_parameter

    def register(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and param.is_meta and param.dtype == torch.float32:
            param.data = param.data.to(dtype)
        real(self, name, param)

    module.register_parameter = register
    try:
        yield
    finally:
        module.register_parameter = real


def convert_weights(
    model: PreTrainedModel, dtype: torch.dtype, trained: Sequence[str] = ()
) -> None:
    """Convert floating-point weights to a dtype in place, one by one; those that the family keeps
    in float32, and modules named in `trained`, to float32. Buffers and integers are unchanged."""
    exact = float32_names(model)
    for name, weight in model.named_parameters():
        full = any(part in name for part in exact) or set(trained) & set(name.split("."))
        target = torch.float32 if full else dtype
        if weight.is_floating_point() and weight.dtype != target:
            weight.data = weight.data.to(target)


def float32_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Substrings of the names of weights that the family always keeps in float32."""
    return tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())


def refuse_non_finite(family: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """NonFiniteError naming the first weight with NaN or infinity. Synchronizes with the device
    once, and copies no weight."""
    named, finite = [], []
    for name, weight in weights:
        if weight.is_floating_point() and weight.itemsize > 1 and weight.numel():
            named.append(name)
            finite.append(torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all())
    bad = ~torch.stack(finite).cpu() if finite else torch.zeros(0, dtype=torch.bool)
    if bad.any():
        raise NonFiniteError(
            f"{family}: its weight {named[int(bad.nonzero()[0])]} is not finite; use other "
            "weights (model.path)"
        )
