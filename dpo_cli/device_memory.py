"""Out-of-memory errors: recognizing them and freeing memory after a failed attempt."""

from __future__ import annotations

import gc

import torch

OOM_TEXTS = (  # of allocators that raise a plain RuntimeError
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",  # no memory for cuBLAS's handle or workspace
)


def ran_out(error: RuntimeError) -> bool:
    """Whether the error is a failed allocation."""
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in OOM_TEXTS)


def free_memory(device: torch.device) -> None:
    """Release memory cached by a failed pass. Call it outside the `except` block: the traceback's
    frames keep their tensors alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # or the peak would be the failed attempt's
