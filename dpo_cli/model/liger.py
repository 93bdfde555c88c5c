"""Liger's fused Triton kernels for norms, gated activations and rotary embeddings, for runs whose
blocks are not compiled.

Each is compared with the module's own forward and gradients on the device before it replaces it.
Modules with other results, or without a matching kernel, are left unchanged.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.errors import ConfigError
from dpo_cli.model.attention.interface import Placement

HALF = (torch.bfloat16, torch.float16)
TOLERANCE = {True: 2e-2, False: 1e-4}  # relative; in half precision, in float32
TOKENS, WIDTH = 67, 128  # of a probe: not a multiple of a block of tokens
ROTARY = "apply_rotary_pos_emb"  # of a family's source file, by transformers' convention
Replacement = Callable[[Any, Tensor], Tensor]  # (module, its input) -> its output


def use_liger(model: PreTrainedModel, on: Placement) -> None:
    """Replace modules by Liger's kernels, with a note. ConfigError without the package."""
    if on.device.type != "cuda":
        on.note("hardware.kernels=liger: has no effect on a CPU")
        return
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            "hardware.kernels=liger: needs the package liger-kernel, which is not installed; use "
            "hardware.kernels=none"
        )
    replaced = replace(model, kernels(), on)
    on.note(
        f"hardware.kernels=liger: {', '.join(replaced) if replaced else 'nothing fits this model'}"
    )


def kernels() -> dict[str, Callable[..., Any]]:
    """Liger's functions by the names used here."""
    from liger_kernel.transformers import functional

    return {
        "rms_norm": functional.liger_rms_norm, "layer_norm": functional.liger_layer_norm,
        "silu_mul": functional.liger_swiglu, "gelu_mul": functional.liger_geglu,
        "rotary": functional.liger_rope,
    }  # fmt: skip


def _failures() -> tuple[type[Exception], ...]:
    """What a kernel may raise for a module that it does not support."""
    usual = AttributeError, RuntimeError, TypeError, ValueError
    if find_spec("triton") is None:
        return usual
    from triton.errors import TritonError

    return *usual, TritonError


def replace(
    model: PreTrainedModel, by: dict[str, Callable[..., Any]], on: Placement
) -> list[str]:  # fmt: skip
    """Replace modules in place. Returns names and counts of what was replaced."""
    verdicts: dict[Any, tuple[str, Replacement] | None] = {}
    counts: dict[str, int] = {}
    for module in model.modules():
        candidates = list(_candidates(module, by))
        if not candidates:
            continue
        kind = type(module), tuple(p.shape for p in module.parameters(recurse=False))
        if kind not in verdicts:
            verdicts[kind] = _right(module, candidates, on)
        if (chosen := verdicts[kind]) is not None:
            name, forward = chosen
            module.forward = partial(forward, module)
            counts[name] = counts.get(name, 0) + 1
    counts |= _replace_rotary(model, by["rotary"], on)
    return [f"{count} x {name}" for name, count in counts.items()]


def _candidates(
    module: Any, by: dict[str, Callable[..., Any]]
) -> Iterator[tuple[str, Replacement]]:
    """Kernels that may compute the same as a module, to be probed."""
    weighted = isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    if "forward" in vars(module):  # replaced by someone else
        return
    if isinstance(module, torch.nn.LayerNorm) and weighted and module.bias is not None:
        yield "LayerNorm", partial(_layer_norm, by["layer_norm"])
    elif type(module).__name__.endswith("RMSNorm") and weighted:
        for offset, casting in ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma")):
            yield "RMSNorm", partial(_rms_norm, by["rms_norm"], offset, casting)
    elif all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        for name in ("silu_mul", "gelu_mul"):
            yield "gated activation", partial(_gated, by[name])


def _layer_norm(kernel: Callable[..., Tensor], module: Any, x: Tensor) -> Tensor:
    return kernel(x, module.weight, module.bias, module.eps)


def _rms_norm(
    kernel: Callable[..., Tensor], offset: float, casting: str, module: Any, x: Tensor
) -> Tensor:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    # Not in place: the incoming gradient may be shared with the residual.
    return kernel(x, module.weight, eps, offset, casting, False)


def _gated(kernel: Callable[..., Tensor], module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(kernel(module.gate_proj(x), module.up_proj(x)))
    return out


def _right(
    module: Any, candidates: Sequence[tuple[str, Replacement]], on: Placement
) -> tuple[str, Replacement] | None:
    """The first candidate with the module's own values and gradients."""
    trial, width = _trial_of(module)
    trial = trial.to(on.device).requires_grad_()
    for name, forward in candidates:
        original = partial(type(module).forward, trial)
        try:
            if all(
                _same(
                    original,
                    partial(forward, trial),
                    list(trial.parameters()),
                    (TOKENS, width),
                    d,
                    on,
                )
                for d in {torch.float32, on.dtype}
            ):
                return name, forward
        except _failures():
            continue  # the kernel does not support the module
    return None


def _trial_of(module: Any) -> tuple[Any, int]:
    """A copy to probe, with small random matrices, and the width of its input."""
    if not hasattr(module, "gate_proj"):
        trial = copy.deepcopy(module)
        with torch.no_grad():
            for weight in trial.parameters():
                weight.copy_(torch.linspace(-1.0, 2.0, weight.numel()))
        return trial, module.weight.shape[-1]
    trial = copy.copy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {name: torch.nn.Linear(WIDTH, WIDTH) for name in ("gate_proj", "up_proj")}
    trial._modules = module._modules | parts | {"down_proj": torch.nn.Identity()}
    return trial, WIDTH


def _same(
    original: Callable[..., Any], other: Callable[..., Any], weights: Sequence[Tensor],
    shape: tuple[int, ...], dtype: torch.dtype, on: Placement,
) -> bool:  # fmt: skip
    """Whether two functions agree in values and in the gradients of input and weights."""
    generator = torch.Generator(on.device).manual_seed(0)
    inputs = torch.randn(1, *shape, generator=generator, device=on.device).to(dtype)
    outcomes = []
    for function in (original, other):
        x = inputs.clone().requires_grad_()
        with torch.autocast(on.device.type, on.dtype, enabled=on.dtype in HALF):
            out = function(x * 1)  # not a leaf: a kernel may write into it
        slope = torch.linspace(-1.0, 1.0, out.numel(), device=out.device).view_as(out)
        grads = torch.autograd.grad((out.float() * slope).sum(), [x, *weights])
        outcomes.append([out.detach().float(), *(g.float() for g in grads)])
    differences = [(a - b).norm() / b.norm() for a, b in zip(outcomes[1], outcomes[0], strict=True)]
    return all(float(difference) < TOLERANCE[on.dtype in HALF] for difference in differences)


def _replace_rotary(
    model: PreTrainedModel, rotary: Callable[..., Any], on: Placement
) -> dict[str, int]:
    """Replace the function in the family's module, where it is looked up by name."""
    source: Any = sys.modules[type(model).__module__]
    original = getattr(source, ROTARY, None)
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if original is None or hasattr(original, "replaces"):
        return {} if original is None else {"rotary embedding": 1}
    angles = torch.arange(TOKENS, device=on.device)[:, None] / torch.arange(
        1, width // 2 + 1, device=on.device
    )
    cos, sin = (
        f(torch.cat([angles, angles], -1))[None].to(on.dtype) for f in (torch.cos, torch.sin)
    )

    def concatenated(function: Callable[..., Any], x: Tensor) -> Tensor:  # (1, T, 3, d)
        q, k = (part.transpose(1, 2) for part in x.split([2, 1], dim=2))
        return torch.cat(function(q, k, cos, sin), dim=1)

    try:
        shape = (TOKENS, 3, width)
        pair = partial(concatenated, original), partial(concatenated, rotary)
        if not _same(*pair, [], shape, on.dtype, on):
            return {}
    except _failures():
        return {}

    def guarded(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> Any:
        supported = not args and not options and q.dim() == 4 and q.device.type == on.device.type
        function = rotary if supported and cos.shape[-1] == q.shape[-1] else original
        return function(q, k, cos, sin, *args, **options)

    guarded.replaces = original  # type: ignore[attr-defined]
    setattr(source, ROTARY, guarded)
    return {"rotary embedding": 1}
