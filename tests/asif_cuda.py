"""A pretended GPU: tensors that say they are on cuda:0 and compute on the CPU.

What lies on the device is told by its storage. An operation on tensors of both sides fails as on
a real GPU, numpy cannot read the device's, and whatever would make the host wait for the device
is counted. This tells mistakes of placement, and waiting, without a GPU; nothing of speed or
kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import peft  # noqa: F401 - while CUDA is what it is
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_cli.model.attention.kernels import Call
from dpo_cli.model.attention.varlen import Cuts, Implementation, _State

GPU = torch.device("cuda", 0)
# Whose result's shape or value the host must know.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim",
         "_unique2", "unique_consecutive", "bincount"}  # fmt: skip
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}  # indices may be the host's
TO_HOST = (Tensor.tolist, Tensor.cpu)
NUMPY = (Tensor.numpy, Tensor.__array__)


def on_gpu(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return getattr(tensor.untyped_storage(), "on_gpu", False)


def put(made: Any) -> Any:
    """The result on the device."""
    with torch._C.DisableTorchFunction():
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                tensor.untyped_storage().on_gpu = True
    return made


class Placed(TorchDispatchMode):
    """Every operation: on one device, its results are there."""

    def __init__(self, waited: Callable[[str], None]) -> None:
        super().__init__()
        self.waited = waited

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        theirs = [t for t in tensors if on_gpu(t)]
        if theirs and len(theirs) < len(tensors):
            quick = kwargs.get("non_blocking", False) or (name == "copy_" and True in args[2:])
            self.mixed(name, tensors, quick)
        reads = name in READS
        reads |= name in INDEXING and any(t.dtype == torch.bool for t in tensors[1:])
        reads |= name == "repeat_interleave" and kwargs.get("output_size") is None
        if theirs and reads:
            self.waited(name)
        out = func(*args, **kwargs)
        return put(out) if theirs and not (name == "copy_" and not on_gpu(tensors[0])) else out

    def mixed(self, name: str, tensors: list[Tensor], quick: bool) -> None:
        own = [t for t in tensors if not on_gpu(t) and t.ndim > 0]
        if name in ("copy_", "_copy_from"):
            if not quick:
                self.waited(name)
        elif name in INDEXING and on_gpu(tensors[0]) and all(t.dtype == torch.long for t in own):
            if own:
                self.waited(name)
        elif own:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found cuda:0 and "
                f"cpu: {[tuple(t.shape) for t in own]}"
            )


class Named(TorchFunctionMode):
    """Every call by its name: what is asked to be on the device, and what says where it is."""

    def __init__(self, waited: Callable[[str], None]) -> None:
        super().__init__()
        self.waited = waited

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return on_gpu(args[0])
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if on_gpu(args[0]) else func(*args)
        if func in (Tensor.to, Tensor.cuda):
            return self.moved(func, args, kwargs)
        if func in TO_HOST and on_gpu(args[0]):
            self.waited(func.__name__)
            return func(args[0].detach() if func is Tensor.tolist else _copy(args[0]))
        if func is Tensor.backward:
            with self:  # what the backward calls by name is seen, too
                return backward(args[0])
        if func in NUMPY and on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")
        if func is one_hot and on_gpu(args[0]):  # makes its zeros where the numbers are
            return put(func(_raw(args[0]), *args[1:], **kwargs))
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            self.waited("to")
        return put(func(*args, **kwargs))

    def moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """`Tensor.to`: of a device, or of a dtype alone."""
        named = [a for a in (*args[1:], kwargs.get("device")) if isinstance(a, str | torch.device)]
        others = [a for a in args[1:] if isinstance(a, Tensor)]
        here = on_gpu(args[0])
        wanted = here
        if named or func is Tensor.cuda:
            wanted = func is Tensor.cuda or torch.device(named[0]).type == "cuda"
        elif others:
            wanted = on_gpu(others[0])
        rest = [a for a in args[1:] if not isinstance(a, str | torch.device | Tensor)]
        rest = [a for a in rest if isinstance(a, torch.dtype)]
        dtype = kwargs.get("dtype") or (rest[0] if rest else None)
        dtype = dtype or (others[0].dtype if others else args[0].dtype)
        quick = kwargs.get("non_blocking", False)
        if here == wanted:
            return Tensor.to(args[0], dtype, copy=kwargs.get("copy", False))
        if not (wanted and quick):
            self.waited("to")
        made = _copy(args[0]).to(dtype)
        return put(made) if wanted else made


def backward(loss: Tensor) -> None:
    """`loss.backward()` itself, for which no mode is asked."""
    slope = (torch.ones_like(loss, memory_format=torch.preserve_format),)
    torch.autograd.graph._engine_run_backward(
        (loss,), slope, False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _copy(tensor: Tensor) -> Tensor:
    """Its numbers on the CPU, in the graph of autograd as a copy between devices is."""

    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.here = on_gpu(x)
            return _raw(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            made = _raw(grads[0])
            return put(made) if ctx.here else made

    made: Tensor = Copy.apply(tensor)
    return made


def _raw(tensor: Tensor) -> Tensor:
    """Unseen by the modes."""
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        return tensor.detach().clone()


def varlen(q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, call: Call) -> Tensor:
    """What FlashAttention computes of half-precision rows of unequal length, one after another."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
    ends = [_raw(c).tolist() for c in (cuts.cu_q, cuts.cu_k)]
    parts = []
    for (a, b), (c, d) in zip(*([*pairwise(e)] for e in ends), strict=True):
        places = torch.arange(d - c, device=q.device)
        own = places[d - c - (b - a) :, None]
        seen = places <= own
        if call.window is not None:
            seen = seen & (own - places < call.window)
        one, two, three = (x.transpose(0, 1).float() for x in (q[a:b], k[c:d], v[c:d]))
        two, three = (x.repeat_interleave(len(one) // len(x), 0) for x in (two, three))
        scale = q.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        scores = (one @ two.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        parts.append((scores.softmax(-1) @ three).transpose(0, 1).to(q.dtype))
    return torch.cat(parts)


def no_graph(*args: Any) -> None:
    raise RuntimeError("nothing to record")


CUDA: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True, "is_bf16_supported": lambda *a, **k: True,
    "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda device: None,
    "is_initialized": lambda: True, "empty_cache": lambda: None, "synchronize": lambda *a: None,
    "reset_peak_memory_stats": lambda *a: None, "max_memory_allocated": lambda *a: 2**20,
    "get_rng_state": lambda *a: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda *a: None, "manual_seed_all": lambda seed: None,
    "get_device_name": lambda *a: "pretended", "mem_get_info": lambda *a: (2**35, 2**36),
    "Stream": lambda *a: None, "graph_pool_handle": lambda: (0, 0), "CUDAGraph": no_graph,
    "cudart": lambda: SimpleNamespace(
        cudaHostRegister=lambda *a: 0, cudaHostUnregister=lambda *a: 0
    ),
    "is_current_stream_capturing": lambda: False,
    "get_device_capability": lambda *a: (9, 0),
    "get_device_properties": lambda *a: SimpleNamespace(
        name="pretended", total_memory=2**36, major=9, minor=0, multi_processor_count=132
    ),
}  # fmt: skip


@contextmanager
def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """A machine with one GPU; what waited for it, by operation."""
    generator, autocast = torch.Generator, torch.autocast.__init__
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def on_cpu(kind: str) -> str:
        return "cpu" if kind == "cuda" else kind

    def init(own: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(own, on_cpu(device_type), *args, **kwargs)

    def pinned(own: Tensor) -> Tensor:  # in a thread, where the modes are not
        assert not on_gpu(own), "only dense CPU tensors can be pinned"
        return own.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # weights are not moved by threads
    for name, value in CUDA.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(torch.autocast, "__init__", init)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: enabled(on_cpu(kind)))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: dtype(on_cpu(kind)))
    only = Implementation("torch", varlen, softcaps=False)
    monkeypatch.setattr(_State, "usable", (only,))
    # What is saved for the backward is looked at where no mode tells the device.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    monkeypatch.setitem(checks, "default", lambda saved: (saved.shape, saved.dtype))
    waits: Counter[str] = Counter()
    mode = ["default"]

    def waited(name: str) -> None:
        waits[name] += 1
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.__setitem__(0, new))
    with Named(waited), Placed(waited):
        yield waits
