"""Allocations that fail: which errors say so, and giving back what a failed try held."""

from __future__ import annotations

import gc

import torch

SIGNS = (  # of allocators that raise a plain RuntimeError
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS finds no room for its handle or workspace
)


def ran_out(error: RuntimeError) -> bool:
    """Whether an allocation failed; other errors are none of our business."""
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in SIGNS)


def free_memory(device: torch.device) -> None:
    """Give back what a failed pass held. Leave its `except` block first: the traceback's frames
    keep their tensors alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # else the peak would be the failed try's
