"""Regional compilation: one compiled graph for all of a model's blocks and rows of any length.

Compiling the whole backbone would unroll its layers and take minutes; a block takes seconds. What
surrounds a block stays eager: activation checkpointing, FSDP's hooks, and the choice of the
attention kernel. Sampling is eager, as its cache grows with every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from dpo_cli.distributed.fsdp import find_blocks
from dpo_cli.model.adapters.active import adapted_layers
from dpo_cli.model.attention import varlen
from dpo_cli.model.attention.interface import PACKED, kernel_of

Forward = Callable[[Tensor], Any]  # a block's, of all its other arguments

BLOCKS = "dpo_blocks"  # attribute of a model: its `CompiledBlocks`
# Graphs per class of block: training and evaluation, adapters on and off, each attention window.
# Beyond its default limit of 8 the compiler silently falls back to eager.
GRAPHS = 32
# Round to bf16 where eager code does: policy and reference may run as different graphs, which would
# otherwise keep different intermediate values in float32.
OPTIONS = {"emulate_precision_casts": True}
HALF = (torch.bfloat16, torch.float16)
TOLERANCE = {True: 5e-2, False: 1e-3}  # relative; in half precision, in float32
SMALL = 5e-2  # a gradient below this share of the largest of its kind may be rounding alone


@dataclass
class CompiledBlocks:
    """The compiled forwards of a model's blocks, one per class, and their shared state.

    failure: why the blocks run eagerly after all; reported once through `note`.
    """

    note: Callable[[str], None]
    failure: str | None = None
    compiled: dict[type, Callable[..., Any]] = field(default_factory=dict)
    checked: set[type] = field(default_factory=set)

    def add(self, block: torch.nn.Module) -> None:
        kind = type(block)
        if kind not in self.compiled:
            self.compiled[kind] = torch.compile(kind.forward, dynamic=True, options={**OPTIONS})
        # Not by Module.compile, which would compile FSDP's hooks as well.
        block.forward = partial(self._forward, kind, block)

    def _forward(
        self, kind: type, block: torch.nn.Module, hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        def eager(x: Tensor) -> Any:
            return cast(Any, kind).forward(block, x, *args, **kwargs)

        def compiled(x: Tensor) -> Any:
            return self.compiled[kind](block, x, *args, **kwargs)

        if self.failure is not None or kwargs.get("packed_layout") is None:
            return eager(hidden)
        trains = _trains(block)
        try:
            if kind not in self.checked:
                self._check(eager, compiled, hidden, block if trains else None)
                self.checked.add(kind)
            if self.failure is None:
                return _run(compiled, hidden, trains)
        except TorchDynamoException as error:
            self._fail(error)
        return eager(hidden)

    def _check(
        self, eager: Forward, compiled: Forward, hidden: Tensor, trained: torch.nn.Module | None
    ) -> None:
        """Compare result and gradients on the first row. Compilation errors, also of the backward,
        show here rather than within a step."""
        weights = [p for p in trained.parameters() if p.requires_grad] if trained else None
        try:
            result, reference = (_outcome(f, hidden, weights) for f in (compiled, eager))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # all of the compiler's
            self._fail(error)
            return
        difference = _distance(result, reference)
        half = hidden.dtype in HALF or torch.is_autocast_enabled(hidden.device.type)
        if not difference < TOLERANCE[half]:
            self._fail(f"their result or a gradient differs by {difference:.1%}")

    def _fail(self, reason: object) -> None:
        reason = getattr(reason, "inner_exception", reason)
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        self.failure = lines[0]
        self.note(f"hardware.compile=blocks: falling back to eager blocks: {self.failure}")


def compile_blocks(model: PreTrainedModel, note: Callable[[str], None]) -> None:
    """Compile the model's blocks on their first packed row.

    Rows are not padded to a round length: the number of tokens is never the fastest-varying axis of
    a matrix, so alignment is kept, and lengths are dynamic in the graph. To be called before
    weights are sharded, which changes a block's class.
    """
    blocks, kernel = find_blocks(model), kernel_of(model)
    if kernel not in PACKED or not blocks:
        reason = f"attention={kernel}" if blocks else f"a {type(model).__name__}"
        note(f"hardware.compile=blocks: has no effect with {reason}")
        return
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    varlen.usable()  # searched now, as imports would break the graph
    state = CompiledBlocks(note)
    for block in blocks:
        state.add(block)
    setattr(model, BLOCKS, state)


def _trains(block: torch.nn.Module) -> bool:
    """Whether a block has trained weights that are active: the reference may be the policy with its
    adapters disabled."""
    switched = adapted_layers(block)
    if switched and all(layer._disable_adapters for layer in switched):
        return False
    return any(p.requires_grad for p in block.parameters())


def _run(forward: Forward, hidden: Tensor, trains: bool) -> Any:
    """A block's output from few graphs: the input of a trained block always requires a gradient.

    Without gradients such a block still runs its training graph, whose saved activations are freed
    at once: another graph may round differently, so that DPO's first loss would not be that of two
    equal policies.
    """
    if not trains:
        return forward(hidden)
    if torch.is_grad_enabled():
        return forward(hidden if hidden.requires_grad else hidden.detach().requires_grad_())
    with torch.enable_grad():
        out = forward(hidden.detach().requires_grad_())
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, out)


def _outcome(forward: Forward, hidden: Tensor, weights: Sequence[Tensor] | None) -> list[Tensor]:
    """What a block adds to its input and, if it is trained, its gradients."""
    # Activation checkpointing counts what the body saves for the backward: not this.
    with torch.set_grad_enabled(weights is not None), saved_tensors_hooks(_as_is, _as_is):
        leaf = hidden.detach().requires_grad_(weights is not None)
        out = next(x for x in tree_leaves(forward(leaf)) if isinstance(x, Tensor))
        added = out.detach() - hidden.detach()
        if weights is None:
            return [added]
        slope = torch.linspace(-1.0, 1.0, out.numel(), device=out.device, dtype=out.dtype)
        inputs = [leaf, *weights]
        grads = torch.autograd.grad(out, inputs, slope.view_as(out), allow_unused=True)
    pairs = zip(grads, inputs, strict=True)
    return [added, *(torch.zeros_like(w) if g is None else g for g, w in pairs)]


def _as_is(x: Tensor) -> Tensor:
    return x


def _distance(values: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest relative difference of two tensors, NaN if one is."""
    norms = [x.float().norm() for x in reference]
    largest = {x.ndim: torch.zeros_like(norms[0]) for x in reference}
    for x, norm in zip(reference, norms, strict=True):
        largest[x.ndim] = torch.maximum(largest[x.ndim], norm)
    return float(torch.stack([
        (a.float() - b.float()).norm() / (norm + SMALL * largest[b.ndim] + 1e-30)
        for a, b, norm in zip(values, reference, norms, strict=True)
    ]).max())  # fmt: skip
