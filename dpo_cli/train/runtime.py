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
from dpo_cli.errors import ConfigError
from dpo_cli.ranks import Ranks, current

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
    if ranks.local >= torch.cuda.device_count():
        raise ConfigError(
            f"hardware.devices: a node needs more than its {torch.cuda.device_count()} GPUs for "
            f"its ranks; use hardware.devices={torch.cuda.device_count()}"
        )
    torch.cuda.set_device(ranks.local)
    return Runtime(torch.device(kind, ranks.local), precision, ranks)


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
