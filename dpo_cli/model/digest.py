"""A digest of the function that a model computes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_cli.model import adapters
from dpo_cli.shard import whole

# Entries of a model's configuration that do not change what it computes.
NOT_THE_FUNCTION = ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache")


def model_digest(model: PreTrainedModel) -> str:
    """sha256 over the configuration and over names, shapes, dtypes and values of all weights: of
    a model with adapters, those that are switched on."""
    shape = {k: v for k, v in model.config.to_dict().items() if k not in NOT_THE_FUNCTION}
    if scales := adapters.scalings(model):
        shape["adapter_scalings"] = scales
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, value in sorted(adapters.function_state(model).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        raw: Any = whole(value.detach()).cpu().reshape(-1).contiguous().view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()
