"""What CUDA does better at the output layer: products that stay unrounded, softmax in one kernel.

Each is tried once on the device, on random numbers against plain operations in float64. What is
absent or wrong there is not used.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
ALIGNED, TILE = 8, 64  # columns: of a half-precision row of whole 16 bytes; of a matmul's tile
ROWS = 6  # tried
LOGIT_SPREAD = 5.0
TOLERANCE = 2e-5  # nats, and of a probability; float32 rounds a logit of 20 by 1e-6
TRIED = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
    RuntimeError, TypeError, ValueError, subprocess.SubprocessError,
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for. dtype: of the weight and so of the slopes."""

    device: torch.device
    dtype: torch.dtype
    vocab: int
    bias: bool
    softcap: bool

    @property
    def columns(self) -> int:
        return columns(self.vocab, self.device)


def columns(vocab: int, device: torch.device) -> int:
    """Rows that the weight is padded to: unaligned rows of logits take cuBLAS's slow kernels."""
    if device.type != "cuda" or vocab % ALIGNED == 0:
        return vocab
    return -(-vocab // TILE) * TILE


def aligned(weight: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """(V, D) -> the weight in a dtype, with `columns` rows, those beyond the vocabulary 0."""
    rows = columns(vocab, weight.device)
    if rows == len(weight):
        return weight.to(dtype)
    padded = weight.new_empty(rows, weight.shape[1], dtype=dtype)
    padded[:vocab] = weight[:vocab]
    padded[vocab:] = 0.0
    return padded


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 where the device can leave half-precision products unrounded.

    Without gradient.
    """
    if unrounded(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, float32, without a copy of the product where the device can do without."""
    if total.dtype == torch.float32 and unrounded(a.device, a.dtype):
        with torch.autocast(a.device.type, enabled=False):  # it may not round the sum
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


@cache
def unrounded(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of that dtype can be had in float32, and added to it in place."""
    return device.type == "cuda" and dtype in HALF and _gives_float32(device, dtype)


def _gives_float32(device: torch.device, dtype: torch.dtype) -> bool:
    ones = torch.full((16, 16), 1.0 + 2.0**-7, device=device, dtype=dtype)
    try:
        found = torch.mm(ones, ones, out_dtype=torch.float32)
        with torch.autocast(device.type, enabled=False):
            torch.addmm(found, ones, ones, out_dtype=torch.float32, out=found)
    except torch.OutOfMemoryError:  # says nothing of the device
        raise
    except (TypeError, RuntimeError):
        return False
    return bool((found == 32 * (1.0 + 2.0**-7) ** 2).all())  # more digits than bf16 has


@cache
def refused(shape: Shape) -> str | None:
    """Why the kernel cannot be used there, or None."""
    if shape.device.type != "cuda":
        return "needs a CUDA device"
    return "computes in float32" if shape.dtype == torch.float64 else error_of(shape)


def error_of(shape: Shape) -> str | None:
    """Why the kernel fails on random logits of that shape, or None."""
    if find_spec("triton") is None:
        return "needs Triton"
    from triton.errors import TritonError

    try:
        with torch.autocast(shape.device.type, enabled=False):  # called from the midst of a step
            return _difference(shape)
    except torch.OutOfMemoryError:
        raise
    except (TritonError, *TRIED) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _difference(shape: Shape) -> str | None:
    from dpo_cli.logprobs.kernel import softmax_rows

    # On the CPU: the device's own random numbers would differ from one to the next.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, shape.columns, generator=generator) * LOGIT_SPREAD
    logits[0, 0] += 20.0  # a confident token, and below one that is all but impossible
    targets = torch.randint(shape.vocab, (ROWS,), generator=generator)
    targets[:3] = torch.tensor([0, shape.vocab - 1, int(logits[2, : shape.vocab].argmin())])
    bias = torch.randn(shape.vocab, generator=generator).to(shape.dtype) if shape.bias else None
    scale, softcap = 0.75, 10.0 if shape.softcap else None
    logits, targets = logits.to(shape.device), targets.to(shape.device)
    bias = None if bias is None else bias.to(shape.device)
    slopes = torch.full_like(logits, float("nan"), dtype=shape.dtype)
    given = (logits, targets, shape.vocab, bias, scale, softcap)
    found = torch.stack([softmax_rows(*given, slopes), softmax_rows(*given)])
    exact, exact_slopes = _exactly(logits[:, : shape.vocab], targets, bias, scale, softcap)
    away = float((found - exact).abs().max())
    if not away < TOLERANCE:
        return f"its log-probabilities are {away:.2g} off"
    if bool(slopes[:, shape.vocab :].count_nonzero()):
        return "its slopes reach beyond the vocabulary"
    off = (slopes[:, : shape.vocab] - exact_slopes).abs()
    rounding = torch.finfo(shape.dtype).eps * exact_slopes.abs()
    worst = float((off - rounding).max())
    return None if worst < TOLERANCE else f"its slopes are {worst:.2g} off"


def _exactly(
    logits: Tensor, targets: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """What the kernel is to find, by autograd in float64."""
    with torch.enable_grad():
        raw = ((logits.double() + (0.0 if bias is None else bias.double())) * scale).detach()
        raw.requires_grad_()
        capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
        logprobs = capped.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
        (slopes,) = torch.autograd.grad(logprobs.sum(), raw)
    return logprobs.detach(), slopes
