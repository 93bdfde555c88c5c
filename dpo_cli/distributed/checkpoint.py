"""Checkpoints of many ranks: each writes what it holds, any number of them reads it back.

torch.distributed.checkpoint in its safetensors format: `step-N/shards/*.safetensors`, with
every trained weight under its name and the optimiser's state under `<name>//<key>`.
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

from dpo_cli.errors import DiskError

SHARDS = "shards"
OF = "//"  # between a weight's name and a key of its optimiser state


def is_sharded(folder: Path) -> bool:
    return (folder / SHARDS).is_dir()


def write(folder: Path, model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Every rank's part, to the same folder; all ranks must call it. Raises DiskError."""
    writer = HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    try:
        with _quiet():
            dcp.save(tensors_of(model, optimizer), storage_writer=writer)
    except CheckpointException as error:  # of all ranks, whatever any of them ran into
        for number, (cause, _) in error.failures.items():
            if isinstance(cause, OSError) or "os error" in str(cause):
                raise DiskError(
                    f"{folder}: rank {number} cannot write its shard: {cause}: make room or "
                    "choose another disk, then resume the run"
                ) from error
        raise


def read(folder: Path, model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Weights and optimiser state in place, whatever number of ranks wrote them."""
    fill_state(optimizer)
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    with _quiet():
        dcp.load(tensors_of(model, optimizer), storage_reader=reader)


def tensors_of(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Trained weights, tied ones once, and what the optimiser keeps of each."""
    found: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            found[name] = weight.detach()
            for key, value in optimizer.state[weight].items():
                found[f"{name}{OF}{key}"] = value
    return found


def fill_state(optimizer: Optimizer) -> None:
    """Make the state that an optimiser else makes in its first step, without a change."""
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
    """Optimiser state of a whole model, as `Optimizer.state_dict` has it, to sharded weights."""
    fill_state(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, saved in state.items():
        own = optimizer.state[weights[index]]
        for key, value in saved.items():
            mine, full = own[key], value.to(own[key].device)
            if isinstance(mine, DTensor):
                full = distribute_tensor(full, mine.device_mesh, mine.placements)
            mine.copy_(full)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings that a single process needs no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
