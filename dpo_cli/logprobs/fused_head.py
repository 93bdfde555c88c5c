"""Faster CUDA operations for the output layer: matmuls with float32 output, and a softmax kernel.

Each is probed once per device against plain float64 operations on random numbers, and not used if
it is missing or wrong.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dpo_cli.errors import first_line

HALF = (torch.bfloat16, torch.float16)
ALIGNED, TILE = 8, 64  # columns: multiple of 16 bytes in half precision; tile of a matmul
ROWS = 6  # probed
LOGIT_SPREAD = 5.0
TOLERANCE = 2e-5  # nats, and of a probability; float32 rounds a logit of 20 by 1e-6
PROBE_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
    RuntimeError, TypeError, ValueError, subprocess.SubprocessError,
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for. dtype: of the weight and of the slopes."""

    device: torch.device
    dtype: torch.dtype
    vocab: int
    bias: bool
    softcap: bool

    @property
    def columns(self) -> int:
        return columns(self.vocab, self.device)


def columns(vocab: int, device: torch.device) -> int:
    """The vocabulary padded for alignment: cuBLAS uses slow kernels for unaligned logits."""
    if device.type != "cuda" or vocab % ALIGNED == 0:
        return vocab
    return -(-vocab // TILE) * TILE


def aligned(weight: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """(V, D) weight -> (columns, D) in another dtype, padded with rows of zeros."""
    rows = columns(vocab, weight.device)
    if rows == len(weight):
        return weight.to(dtype)
    padded = weight.new_empty(rows, weight.shape[1], dtype=dtype)
    padded[:vocab] = weight[:vocab]
    padded[vocab:] = 0.0
    return padded


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, with float32 output if the device supports it for half precision. No gradient."""
    if unrounded(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place without a copy of the product if the device supports it."""
    if total.dtype == torch.float32 and unrounded(a.device, a.dtype):
        with torch.autocast(a.device.type, enabled=False):  # it would round the sum
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


@cache
def unrounded(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matmuls of that dtype can output float32 and accumulate into it in place."""
    return device.type == "cuda" and dtype in HALF and _gives_float32(device, dtype)


def _gives_float32(device: torch.device, dtype: torch.dtype) -> bool:
    ones = torch.full((16, 16), 1.0 + 2.0**-7, device=device, dtype=dtype)
    try:
        result = torch.mm(ones, ones, out_dtype=torch.float32)
        with torch.autocast(device.type, enabled=False):
            torch.addmm(result, ones, ones, out_dtype=torch.float32, out=result)
    except torch.OutOfMemoryError:  # says nothing about the device
        raise
    except (TypeError, RuntimeError):
        return False
    return bool((result == 32 * (1.0 + 2.0**-7) ** 2).all())  # more digits than bf16 has


@cache
def refused(shape: Shape) -> str | None:
    """Why the kernel cannot be used for a shape, or None."""
    if shape.device.type != "cuda":
        return "needs a CUDA device"
    return "computes in float32" if shape.dtype == torch.float64 else error_of(shape)


def error_of(shape: Shape) -> str | None:
    """Why the kernel fails its probe on random logits of that shape, or None."""
    if find_spec("triton") is None:
        return "needs Triton"
    from triton.errors import TritonError

    try:
        with torch.autocast(shape.device.type, enabled=False):  # may be called within a step
            return _difference(shape)
    except torch.OutOfMemoryError:
        raise
    except (TritonError, *PROBE_ERRORS) as error:
        return first_line(error)


def _difference(shape: Shape) -> str | None:
    from dpo_cli.logprobs.kernel import softmax_rows

    # Drawn on the CPU, as random numbers differ between CUDA devices.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, shape.columns, generator=generator) * LOGIT_SPREAD
    logits[0, 0] += 20.0  # a confident token; below, the least likely one
    targets = torch.randint(shape.vocab, (ROWS,), generator=generator)
    targets[:3] = torch.tensor([0, shape.vocab - 1, int(logits[2, : shape.vocab].argmin())])
    bias = torch.randn(shape.vocab, generator=generator).to(shape.dtype) if shape.bias else None
    scale, softcap = 0.75, 10.0 if shape.softcap else None
    logits, targets = logits.to(shape.device), targets.to(shape.device)
    bias = None if bias is None else bias.to(shape.device)
    slopes = torch.full_like(logits, float("nan"), dtype=shape.dtype)
    arguments = (logits, targets, shape.vocab, bias, scale, softcap)
    logprobs = torch.stack([softmax_rows(*arguments, slopes), softmax_rows(*arguments)])
    exact, exact_slopes = _exactly(logits[:, : shape.vocab], targets, bias, scale, softcap)
    difference = float((logprobs - exact).abs().max())
    if not difference < TOLERANCE:
        return f"its log-probabilities are {difference:.2g} off"
    if bool(slopes[:, shape.vocab :].count_nonzero()):
        return "its slopes reach beyond the vocabulary"
    errors = (slopes[:, : shape.vocab] - exact_slopes).abs()
    rounding = torch.finfo(shape.dtype).eps * exact_slopes.abs()
    largest = float((errors - rounding).max())
    return None if largest < TOLERANCE else f"its slopes are {largest:.2g} off"


def _exactly(
    logits: Tensor, targets: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The expected log-probabilities and slopes, by autograd in float64."""
    with torch.enable_grad():
        raw = ((logits.double() + (0.0 if bias is None else bias.double())) * scale).detach()
        raw.requires_grad_()
        capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
        logprobs = capped.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
        (slopes,) = torch.autograd.grad(logprobs.sum(), raw)
    return logprobs.detach(), slopes
