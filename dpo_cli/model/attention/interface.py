"""The attention function registered with transformers, and the kernel that a model uses.

`packed_attention` passes each layer's queries, keys and values to the row's layout. A kernel is one
of `layouts.LAYOUTS`, four of which need this function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from dpo_cli.model.attention.kernels import Call
from dpo_cli.model.attention.layout import Layout
from dpo_cli.model.attention.layouts import LAYOUTS
from dpo_cli.model.rope import SplitLayout, cuts_of
from dpo_cli.records import Batch

NAME = "dpo_packed"
PACKED = ("grouped", "varlen", "flex", "sdpa")  # kernels that need the registered function
KERNEL = "dpo_kernel"  # attribute of a model: the name of its kernel
# Maximum tokens per micro-batch of kernels whose memory grows faster than linearly: eager attention
# saves (heads, T, T) scores per layer; a plain forward repeats prompts.
MAX_TOKENS = {"dense": 2048, "plain": 8192}

SHORT_WINDOW = 3  # shorter than the few tokens of a trial
WINDOWS = ("sliding_window", "attention_chunk_size")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """Where a loaded model will compute, and the dtype of its attention inputs there.

    note: receives a line about anything slower than usual. sharded: weights stay on the CPU until
    they are moved to the device shard by shard, one block at a time.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    note: Callable[[str], None] = warnings.warn
    sharded: bool = False


@dataclass(frozen=True)
class Seen:
    """The arguments and shapes with which a layer called `packed_attention`."""

    call: Call
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


class _Recorder:
    seen: list[Seen] | None = None


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    packed_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q (1, H, T, d), k and v (1, H_kv, T, d)."""
    assert packed_layout is not None, "it does not pass keyword arguments on to its attention"
    assert kwargs.get("s_aux") is None, "it has attention sinks"
    call = Call(scaling, softcap, sliding_window, dropout)
    if _Recorder.seen is not None:
        shape = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        _Recorder.seen.append(Seen(call, *shape))
    # Under autocast rotary embeddings leave q and k in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    attend = packed_layout.attend if packed_layout.traced else partial(_apart, packed_layout)
    return attend(query, key, value, call), None


@torch.compiler.disable
def _apart(layout: Layout, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    return layout.attend(query, key, value, call)


@contextmanager
def recording_calls() -> Iterator[list[Seen]]:
    """The calls of layers in the body: none if the model ignores the registered function."""
    seen: list[Seen] = []
    _Recorder.seen = seen
    try:
        yield seen
    finally:
        _Recorder.seen = None


def use_kernel(model: PreTrainedModel, kernel: str) -> None:
    """Set the kernel for the model's packed rows."""
    plain = cached_attention(model) if kernel == "plain" else "eager"
    model.set_attn_implementation(NAME if kernel in PACKED else plain)
    setattr(model, KERNEL, kernel)


def kernel_of(model: PreTrainedModel) -> str:
    return str(getattr(model, KERNEL, "sdpa"))


def prepare_layout(batch: Batch, kernel: str) -> Batch:
    """Add the batch's layout for a kernel, on the batch's device, if it has none."""
    if kernel not in batch.layouts:
        layout = SplitLayout.split(batch.layout, batch.cuts, LAYOUTS[kernel])
        batch.layouts[kernel] = layout.to(batch.input_ids.device)
    return batch


def layout_for(model: PreTrainedModel, batch: Batch) -> Layout:
    kernel = kernel_of(model)
    assert set(cuts_of(model.config)) <= set(batch.cuts), "pack(..., cuts=cuts_of(model.config))"
    layout: Layout = prepare_layout(batch, kernel).layouts[kernel]
    return layout


@contextmanager
def short_windows(model: PreTrainedModel) -> Iterator[None]:
    """In the body, sliding windows and attention chunks are short, so that a trial of a few tokens
    detects a family that ignores or hides them."""
    config = model.config.get_text_config()
    before = [(part, name, vars(part)[name]) for part in (config, *model.modules())
              for name in WINDOWS if isinstance(vars(part).get(name), int)]  # fmt: skip
    for part, name, _ in before:
        setattr(part, name, SHORT_WINDOW)
    try:
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


@contextmanager
def attention_as(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the body with another attention implementation (sampling needs a cached one)."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def cached_attention(model: PreTrainedModel) -> str:
    """An implementation that decodes with a cache: SDPA lacks soft-capping and attention sinks."""
    softcapped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if softcapped or not model._supports_sdpa else "sdpa"


AttentionInterface.register(NAME, packed_attention)
