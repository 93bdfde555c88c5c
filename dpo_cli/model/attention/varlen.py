"""Variable-length FlashAttention: the installed implementations, best first.

A loaded model's probe (`kernel_check.kernel_mismatch`) rejects implementations with other results.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dpo_cli.model.attention.kernels import Call

HOPPER = 9  # major compute capability required by FlashAttention 3
LOCAL_KERNELS = "LOCAL_KERNELS"  # of the package `kernels`: repository=folder:repository=folder


@dataclass(frozen=True)
class Cuts:
    """Where the sequences of a varlen call begin: int32 (n + 1,) offsets; longest lengths."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


Varlen = Callable[[Tensor, Tensor, Tensor, Cuts, Call], Tensor]


@dataclass(frozen=True)
class Implementation:
    """softcaps: supports soft-capping; grouped: supports fewer key and value heads than query
    heads (otherwise they are repeated)."""

    name: str
    run: Varlen
    softcaps: bool = True
    grouped: bool = True


class _State:
    usable: tuple[Implementation, ...] | None = None  # None: not searched yet


def usable() -> tuple[Implementation, ...]:
    """Usable implementations, best first; searched once, as compiled code reads the result."""
    if _State.usable is None:
        _State.usable = tuple(_installed())
    return _State.usable


def use(implementations: tuple[Implementation, ...]) -> None:
    _State.usable = implementations


def chosen(call: Call) -> Implementation | None:
    """The best implementation that supports a layer's arguments."""
    for implementation in usable():
        if call.softcap is None or implementation.softcaps:
            return implementation
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, call: Call) -> Tensor:
    """q (T, H, d), k and v (T_k, H_kv, d) -> (T, H, d), causal and aligned bottom right.

    Half precision on CUDA. Raises RuntimeError for what nothing installed can do.
    """
    if call.dropout:
        raise RuntimeError("variable-length attention has no dropout")
    implementation = chosen(call)
    if implementation is None:
        lacks = "soft-capping" if call.softcap is not None else "variable-length attention"
        raise RuntimeError(f"{lacks} needs the package flash-attn")
    group = q.shape[1] // k.shape[1]
    if group > 1 and not implementation.grouped:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return implementation.run(q, k, v, cuts, call)


def _installed() -> Iterator[Implementation]:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == HOPPER
    if hopper:
        yield from _flash("flash_attn_interface", "flash-attn 3")
        yield from _hub("flash-attn3")
    yield from _torch()
    yield from _flash("flash_attn", "flash-attn 2")
    yield from _hub("flash-attn2")


def _torch() -> Iterator[Implementation]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return
    run = adapt_torch(varlen_attn)
    yield Implementation("torch", run, softcaps=False)
    yield Implementation("torch with repeated heads", run, softcaps=False, grouped=False)


def adapt_torch(function: Callable[..., Any]) -> Varlen:
    """PyTorch's `varlen_attn`, whose keywords have changed with every release so far.

    2.10 had `is_causal` alone; 2.11 `scale` and `window_size`; later ones demand `enable_gqa` for
    the grouped heads that the kernel under all of them takes. A window of w positions is
    `window_size=(w - 1, 0)`: it counts those before the query.
    """
    known = frozenset(inspect.signature(function).parameters)

    def run(q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, call: Call) -> Tensor:
        options: dict[str, Any] = {}
        if "window_size" in known:
            options["window_size"] = (-1 if call.window is None else call.window - 1, 0)
        elif call.window is None:
            options["is_causal"] = True
        else:
            raise RuntimeError("this PyTorch's varlen_attn has no sliding window")
        if call.scaling is not None and "scale" in known:
            options["scale"] = call.scaling
        elif call.scaling is not None:
            q = q * (call.scaling * q.shape[-1] ** 0.5)
        if "enable_gqa" in known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        return cast(
            Tensor, function(q, k, v, cuts.cu_q, cuts.cu_k, cuts.max_q, cuts.max_k, **options)
        )

    return run


def _flash(module: str, name: str) -> Iterator[Implementation]:
    try:
        library = importlib.import_module(module)
    except (ImportError, OSError):  # OSError: built for another CUDA
        return
    yield Implementation(name, adapt_flash(library.flash_attn_varlen_func))


def _hub(name: str) -> Iterator[Implementation]:
    """A kernel of the Hugging Face hub, of which the user has named a local copy: none is
    downloaded, for it is code to run."""
    entries = (entry.partition("=") for entry in os.environ.get(LOCAL_KERNELS, "").split(":"))
    folder = {repository: path for repository, _, path in entries}.get(f"kernels-community/{name}")
    if not folder:
        return
    try:
        library: Any = importlib.import_module("kernels")
        kernel = library.get_local_kernel(Path(folder))
    except (ImportError, OSError, TypeError, ValueError):
        return
    yield Implementation(f"the hub's {name}", adapt_flash(kernel.flash_attn_varlen_func))


def adapt_flash(function: Callable[..., Any]) -> Varlen:
    """flash-attn's `flash_attn_varlen_func`; its causal mask is bottom right since 2.1."""

    def run(q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, call: Call) -> Tensor:
        out = function(
            q, k, v, cuts.cu_q, cuts.cu_k, cuts.max_q, cuts.max_k,
            softmax_scale=call.scaling, causal=True, softcap=call.softcap or 0.0,
            window_size=(-1, -1) if call.window is None else (call.window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)  # some add log-sums

    return run
