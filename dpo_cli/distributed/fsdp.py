"""FSDP2: a model's weights are sharded over the ranks, block by block.

Each block is all-gathered for its forward and backward. The root (embeddings, final norm, output
layer) stays unsharded from the forward to the end of the backward, so that the loss can read the
output layer's weight as on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_cli.errors import ConfigError

ROOT = "dpo_root"  # attribute of a sharded model: its root FSDP module


class _Root(torch.nn.Module):
    """FSDP's root module, whose forward runs any computation that reads the model's weights.

    Our forwards call the model's backbone, not the model, so hooks on the model would not run.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute().clone()  # FSDP registers hooks on the result, which must not be a view


def make_mesh(device: str, devices: int, nodes: int, sharding: str) -> DeviceMesh:
    """A 1-D mesh over all ranks, or nodes x devices for hybrid sharding (replicated per node)."""
    if sharding == "hybrid":
        return init_device_mesh(device, (nodes, devices), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (nodes * devices,), mesh_dim_names=("shard",))


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    arrived: Callable[[list[tuple[str, torch.nn.Parameter]]], None] = lambda weights: None,
) -> None:
    """Shard the weights in place; all ranks must have loaded the same ones.

    dtype: compute dtype of unsharded weights; gradients are reduced in float32. Quantized
    weights, which are frozen, are replicated on every rank. arrived: called with a block's
    (name, weight) pairs once they are on the device and before they are sharded; at most one
    block is unsharded at a time. Raises ConfigError if the model does not declare its blocks.
    """
    device = torch.device(mesh.device_type, torch.cuda.current_device()) \
        if mesh.device_type == "cuda" else torch.device("cpu")  # fmt: skip
    ignored = {p for p in model.parameters() if not p.is_floating_point()}
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    root = _Root(model)
    blocks = blocks_of(model)
    parts: list[Any] = [*blocks, root]
    names = {id(weight): name for name, weight in model.named_parameters()}
    for part in parts:
        _arrive(part, device, names, arrived)
        sharded = fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        # The step divides by its total weight; FSDP must not divide by the world size as well.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # PREMUL_SUM is missing from gloo
    # By default FSDP prefetches in the order of all forwards since the last backward; after
    # sampling that order differs between ranks, which then deadlock.
    for before, part in pairwise(parts):
        part.set_modules_to_backward_prefetch([before])
    parts[0].set_modules_to_backward_prefetch([root])  # a no-op; an empty list means the default
    object.__setattr__(model, ROOT, root)  # plain setattr would register it as a submodule


def find_blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The repeated blocks, by transformers' `_no_split_modules`."""
    names = set(model._no_split_modules or ())
    return [m for m in model.modules() if type(m).__name__ in names]


def _arrive(
    part: torch.nn.Module,
    device: torch.device,
    names: dict[int, str],
    arrived: Callable[[list[tuple[str, torch.nn.Parameter]]], None],
) -> None:
    """Move a part's unsharded weights to the device. No reference to one may outlive this call:
    FSDP replaces them, and the unsharded ones would stay in memory."""
    weights = [p for p in part.parameters() if not isinstance(p, DTensor)]
    for weight in weights:
        weight.data = weight.data.to(device)
    arrived([(names[id(weight)], weight) for weight in weights])


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """As `find_blocks`; ConfigError if there are none."""
    blocks = find_blocks(model)
    if not blocks:
        raise ConfigError(
            f"hardware.devices: {type(model).__name__} does not declare its blocks "
            "(_no_split_modules) and cannot be sharded: use one device"
        )
    return blocks


def run_unsharded(model: PreTrainedModel, compute: Callable[[], Tensor]) -> Tensor:
    """`compute()` with the root's weights unsharded until their use in the backward."""
    root = getattr(model, ROOT, None)
    return compute() if root is None else cast(Tensor, root(compute))


@contextmanager
def unsharded(model: PreTrainedModel) -> Iterator[None]:
    """Unshard all weights on every rank, for forwards that ranks run independently (sampling).

    The body must not need gradients.
    """
    root = getattr(model, ROOT, None)
    if root is None:
        yield
        return
    parts = [part for part in root.modules() if isinstance(part, FSDPModule)]
    # FSDP takes the first module that runs a forward as its root: it must be this one.
    with torch.no_grad():
        root(lambda: torch.zeros(()))
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with _without_hooks(parts):
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not root, recurse=False)
            part.reshard()


@contextmanager
def _without_hooks(parts: list[FSDPModule]) -> Iterator[None]:
    """Remove FSDP's forward hooks in the body: the weights are unsharded already, and the hooks'
    stream synchronization breaks CUDA graph capture."""
    tables = [
        table
        for part in cast(list[torch.nn.Module], parts)
        for table in (part._forward_pre_hooks, part._forward_hooks)
    ]
    before = [dict(table) for table in tables]
    for table in tables:
        for key, hook in list(table.items()):
            owner = type(getattr(hook, "__self__", None))
            if owner.__module__.startswith("torch.distributed.fsdp"):
                del table[key]
    try:
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)  # in their original order


def reshard(model: PreTrainedModel) -> None:
    """Free unsharded weights: `parameters()` are then the sharded ones that are trained.

    A forward without a backward leaves the root unsharded.
    """
    root = getattr(model, ROOT, None)
    if root is not None:
        root.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """All-gather a sharded tensor (a collective); other tensors are returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; other tensors are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
