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
    """Device, precision (fp32 or bf16 autocast) and ranks of a run."""

    device: torch.device
    precision: str
    ranks: Ranks = field(default_factory=Ranks)

    def autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def micro_batch_tokens(self, configured: int | None) -> int:
        return configured or MICRO_BATCH_TOKENS[self.device.type]

    def seed_rank(self, seed: int, step: int) -> None:
        """With several ranks, seed dropout by rank and step, so that checkpoints need no
        generator state per rank. A resume with another world size draws differently."""
        if self.ranks.size > 1:
            words = np.random.SeedSequence([seed, step, self.ranks.rank]).generate_state(1)
            torch.manual_seed(int(words[0]))

    def peak_memory_mb(self) -> float:
        """Peak memory of the run in MiB: of the CUDA allocator (since the last out-of-memory
        retry), or the process's resident memory on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        unit = 2**10 if sys.platform == "linux" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def start_runtime(config: HardwareConfig, seed: int) -> Runtime:
    """Choose the device, set threads, seed every generator."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("hardware.device=cuda: no CUDA device found; use hardware.device=cpu")
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
    device = torch.device(kind, gpu_of_rank(ranks))
    torch.cuda.set_device(device)
    exact_float32()
    check_allocator(device)
    return Runtime(device, precision, ranks)


def gpu_of_rank(ranks: Ranks) -> int:
    """Index of this rank's GPU. ConfigError if the node has fewer GPUs than ranks."""
    count = torch.cuda.device_count()
    if ranks.local >= count and not share_gpus():
        raise ConfigError(
            f"hardware.devices: this node has {count} GPUs, fewer than its ranks; use "
            f"hardware.devices={count}"
        )
    return ranks.local % count


def exact_float32() -> None:
    """Disable TF32, whatever the environment says: it has 10 mantissa bits, and a ground-truth
    reward or hardware.precision=fp32 needs float32."""
    torch.set_float32_matmul_precision("highest")


def check_allocator(device: torch.device) -> None:
    """Fall back from expandable segments (set in cli.py) to fixed ones where the driver lacks
    virtual memory management, as on some virtual machines. Runs before any allocation."""
    try:
        torch.empty(1, device=device)
        return
    except torch.OutOfMemoryError:
        raise  # the device is full; fixed segments would not help
    except RuntimeError as error:
        names = [name for name in ALLOCATOR if GROWING in os.environ.get(name, "")]
        if not names:
            raise
        (first, *_) = str(error).splitlines()
    settings = os.environ[names[0]].replace(GROWING, GROWING.replace("True", "False"))
    torch._C._accelerator_setAllocatorSettings(settings)
    torch.empty(1, device=device)
    os.environ[names[0]] = settings  # for child processes
    log.warning("expandable memory segments fail on this device (%s): using fixed ones", first)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep large freed buffers: page faults cost up to a third of the time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # neither musl nor macOS
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def quiet_libraries() -> None:
    """Silence libraries' progress bars and advice, which would garble our progress display."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
