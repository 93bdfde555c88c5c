"""Sharded checkpoints: each rank writes its shards; any number of ranks can read them.

The safetensors format of torch.distributed.checkpoint: `step-N/shards/*.safetensors`, with every
trained weight under its name and the optimizer's state under `<name>//<key>`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from dpo_cli.durable.refusals import as_refusal
from dpo_cli.errors import DiskError

SHARDS = "shards"
STATE_SEPARATOR = "//"  # between a weight's name and a key of its optimizer state


def is_sharded(folder: Path) -> bool:
    return (folder / SHARDS).is_dir()


def write(folder: Path, model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Write this rank's shards to the shared folder; all ranks must call it. Raises DiskError."""
    writer = HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    try:
        with _quiet():
            dcp.save(tensors_of(model, optimizer), storage_writer=writer)
    except CheckpointException as error:  # on all ranks, with the failures of any
        for number, (cause, _) in error.failures.items():
            if refusal := as_refusal(cause, folder / SHARDS):
                raise DiskError(f"rank {number} cannot write its shard: {refusal}") from error
        raise


def read(folder: Path, model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Load weights and optimizer state in place; the number of ranks may have changed."""
    fill_state(optimizer)
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    with _quiet():
        dcp.load(tensors_of(model, optimizer), storage_reader=reader)


def tensors_of(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Trained weights (tied ones once) and their optimizer state, by name."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            tensors[name] = weight.detach()
            for key, value in optimizer.state[weight].items():
                tensors[f"{name}{STATE_SEPARATOR}{key}"] = value
    return tensors


def fill_state(optimizer: Optimizer) -> None:
    """Create the optimizer state of the first step, leaving the weights unchanged."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def distribute(state: dict[int, dict[str, Tensor]], optimizer: Optimizer) -> None:
    """Shard the optimizer state of an unsharded model (`Optimizer.state_dict`) over the ranks."""
    fill_state(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, saved in state.items():
        state_of_weight = optimizer.state[weights[index]]
        for key, value in saved.items():
            target, full = state_of_weight[key], value.to(state_of_weight[key].device)
            if isinstance(target, DTensor):
                full = distribute_tensor(full, target.device_mesh, target.placements)
            target.copy_(full)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning that a single process has no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
