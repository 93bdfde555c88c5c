"""FSDP2: a model's weights spread over the ranks, block by block.

Each block's weights are gathered for its forward and backward; the rest (embeddings, last
norm, output layer) stays gathered from the forward to the end of the backward, so that the
loss can read the output layer's weight like that of a whole model.
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

ROOT = "dpo_root"  # the attribute of a sharded model that gathers its weights


class _Root(torch.nn.Module):
    """What FSDP takes for the whole model: computes anything that needs its weights.

    Our forwards call the model's body, not the model, so hooks on the model would not run.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute().clone()  # FSDP hangs its hooks on the result, which must not be a view


def make_mesh(device: str, devices: int, nodes: int, sharding: str) -> DeviceMesh:
    """All ranks in a line, or nodes x devices for weights that each node holds whole."""
    if sharding == "hybrid":
        return init_device_mesh(device, (nodes, devices), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (nodes * devices,), mesh_dim_names=("shard",))


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    arrived: Callable[[list[tuple[str, torch.nn.Parameter]]], None] = lambda weights: None,
) -> None:
    """Spread the weights in place; every rank has loaded the same ones.

    dtype: what gathered weights are computed in; sums over ranks are in float32. Quantised
    weights, which nothing trains, stay whole on every rank. arrived: what is done to a block's
    weights, by name, when they have come whole to the device and before this rank keeps its part:
    no more than one block is there whole. Raises ConfigError for a model whose blocks are not
    known.
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
        # The step divides by its weight; a division by the ranks here would be one too many.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # else by PREMUL_SUM, which gloo lacks
    # By default FSDP gathers ahead by the order of all forwards since the last backward, and
    # after sampling that order differs between ranks, which then wait for each other for ever.
    for before, part in pairwise(parts):
        part.set_modules_to_backward_prefetch([before])
    parts[0].set_modules_to_backward_prefetch([root])  # there already; none would mean the default
    object.__setattr__(model, ROOT, root)  # as an attribute of a module it would be its part


def find_blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The repeated layers, by transformers' own list of what must not be split."""
    names = set(model._no_split_modules or ())
    return [m for m in model.modules() if type(m).__name__ in names]


def _arrive(
    part: torch.nn.Module,
    device: torch.device,
    names: dict[int, str],
    arrived: Callable[[list[tuple[str, torch.nn.Parameter]]], None],
) -> None:
    """Weights of a part that are not sharded yet. No reference to one may outlive this: FSDP puts
    others in their place, and the whole ones would stay in memory."""
    weights = [p for p in part.parameters() if not isinstance(p, DTensor)]
    for weight in weights:
        weight.data = weight.data.to(device)
    arrived([(names[id(weight)], weight) for weight in weights])


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """As `find_blocks`; ConfigError where there are none."""
    found = find_blocks(model)
    if not found:
        raise ConfigError(
            f"hardware.devices: {type(model).__name__} does not say which its blocks are "
            "(_no_split_modules): train it on one device"
        )
    return found


def computed(model: PreTrainedModel, compute: Callable[[], Tensor]) -> Tensor:
    """`compute()`, with the weights gathered that it and what follows it will read."""
    root = getattr(model, ROOT, None)
    return compute() if root is None else cast(Tensor, root(compute))


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[None]:
    """All weights whole on every rank, for forwards that ranks make at different times.

    In the body no gradients; decoding is as long on each rank as its own completions.
    """
    root = getattr(model, ROOT, None)
    if root is None:
        yield
        return
    parts = [part for part in root.modules() if isinstance(part, FSDPModule)]
    # FSDP finds out which module is the root in its first forward: it must be this one.
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
    """FSDP's own forward hooks have nothing to gather in the body; but they make streams wait for
    each other, which breaks the recording of a CUDA graph."""
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
            table.update(hooks)  # in their order


def settle(model: PreTrainedModel) -> None:
    """Let go of gathered weights: `parameters()` are then the sharded ones, which train.

    A forward without a backward leaves some gathered.
    """
    root = getattr(model, ROOT, None)
    if root is not None:
        root.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor with all its values; every rank must ask. Others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """The values of a sharded tensor that this rank holds. Others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
