"""Device, precision, threads, seeds."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import resource
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers

from dpo_cli.config import HardwareConfig
from dpo_cli.distributed.ranks import Ranks, current, share_gpus
from dpo_cli.errors import ConfigError

log = logging.getLogger(__name__)

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # where the older name wins
GROWING = "expandable_segments:True"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Runtime:
    """Where the run computes. `precision` is fp32 or bf16 (autocast)."""

    device: torch.device
    precision: str
    ranks: Ranks = field(default_factory=Ranks)

    def autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def micro_batch_tokens(self, configured: int | None) -> int:
        return configured or MICRO_BATCH_TOKENS[self.device.type]

    def own_random_numbers(self, seed: int, step: int) -> None:
        """Among several ranks, draws of dropout that are this rank's and this step's: no state
        of theirs must be saved, and a step done by another number of ranks draws anew."""
        if self.ranks.size > 1:
            words = np.random.SeedSequence([seed, step, self.ranks.rank]).generate_state(1)
            torch.manual_seed(int(words[0]))

    def peak_memory_mb(self) -> float:
        """High-water mark of the run (on CUDA since memory last ran out), the room it needs: of
        the device's allocator on CUDA, of resident memory on the CPU, where a step has none of
        its own."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        unit = 2**10 if sys.platform == "linux" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def start_runtime(config: HardwareConfig, seed: int) -> Runtime:
    """Choose the device, set threads, seed every generator."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("hardware.device=cuda: no CUDA device here; use hardware.device=cpu")
    kind = "cuda" if available and config.device != "cpu" else "cpu"
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    seed_everything(seed)
    quiet_libraries()
    ranks = current()
    if kind == "cpu":
        keep_freed_memory()
        return Runtime(torch.device("cpu"), precision, ranks)
    device = torch.device(kind, own_gpu(ranks))
    torch.cuda.set_device(device)
    exact_float32()
    settle_allocator(device)
    return Runtime(device, precision, ranks)


def own_gpu(ranks: Ranks) -> int:
    """The GPU of this rank. ConfigError where the node has fewer than ranks."""
    count = torch.cuda.device_count()
    if ranks.local >= count and not share_gpus():
        raise ConfigError(
            f"hardware.devices: a node needs more than its {count} GPUs for its ranks; use "
            f"hardware.devices={count}"
        )
    return ranks.local % count


def exact_float32() -> None:
    """Float32 products in float32, whatever the environment says: TF32 has 10 bits of it, and a
    ground-truth reward or hardware.precision=fp32 asks for all of them."""
    torch.set_float32_matmul_precision("highest")


def settle_allocator(device: torch.device) -> None:
    """Fixed segments where growing ones (see cli.py) fail: they need a driver that maps memory
    at will, which some virtual machines lack. Tried before anything is allocated."""
    try:
        torch.empty(1, device=device)
        return
    except torch.OutOfMemoryError:
        raise  # the device is full: fixed segments would find no room either
    except RuntimeError as error:
        names = [name for name in ALLOCATOR if GROWING in os.environ.get(name, "")]
        if not names:
            raise
        (first, *_) = str(error).splitlines()
    settings = os.environ[names[0]].replace(GROWING, GROWING.replace("True", "False"))
    torch._C._accelerator_setAllocatorSettings(settings)
    torch.empty(1, device=device)
    os.environ[names[0]] = settings  # of processes that this one starts
    log.warning("memory in fixed segments, growing ones fail here (%s)", first)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep large freed buffers: page faults on fresh ones cost up to a third."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # neither musl nor macOS
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def quiet_libraries() -> None:
    """One progress display, ours; transformers' bars and advice would tear it."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
