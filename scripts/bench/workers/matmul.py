"""Floating-point operations per second of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scripts.measuring import best_seconds

SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}  # of square matrices
CALLS = 10  # of each size, kernel and precision
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def matmul_peaks(device: str) -> dict[str, dict[str, Any]]:
    """Precision -> FLOP/s, size and kernel of the fastest product of two square matrices."""
    results: dict[str, dict[str, Any]] = {}
    for precision, dtype in DTYPES.items():
        tried = [
            {"flops_per_second": speed(kernel, size, dtype, device), "size": size, "kernel": name}
            for size in SIZES[device]
            for name, kernel in kernels(device).items()
        ]
        results[precision] = max(tried, key=lambda one: one["flops_per_second"])
    return results


def kernels(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """PyTorch's default, and on a CPU also oneDNN, which the default does not use in float32."""
    results: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"matmul": torch.matmul}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        results["oneDNN"] = lambda a, b: linear(a, b, None, "none", [], "")
    return results


def speed(
    kernel: Callable[[Tensor, Tensor], Tensor], size: int, dtype: torch.dtype, device: str
) -> float:
    """FLOP/s of the fastest of CALLS calls."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = best_seconds(device, lambda: kernel(a, b), times=1, groups=CALLS)
    return 2.0 * size**3 / seconds
