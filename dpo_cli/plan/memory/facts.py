"""Inputs of an estimate besides the configuration: text lengths, device memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_cli.config import HardwareConfig
from dpo_cli.plan.memory.shape import Shape
from dpo_cli.session.workload import Lengths

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Texts:
    """Lengths in tokens. step: packed, of the largest step, over all devices; longest: packed, of
    the longest example; typical: of an average token's example; keys: as in `Rows`; scored: share
    of tokens that are targets; prompt: of the longest prompt; new: maximum per completion, 0
    without sampling."""

    step: int
    longest: int
    typical: int
    keys: float
    scored: float
    prompt: int
    new: int = 0


@dataclass(frozen=True)
class Facts:
    """Inputs of an estimate other than the configuration. device: cpu | cuda; half: whether it
    computes in bf16; scorer: number of (float32) weights of a reward model or classifier; stored:
    bytes per weight in the model's files."""

    shape: Shape
    texts: Texts
    device: str
    half: bool
    scorer: int = 0
    stored: int = 4


def texts_of(lengths: Sequence[Lengths], steps: Iterable[Sequence[int]]) -> Texts:
    """Lengths of packed rows, which contain each prompt once. steps: the examples of each optimizer
    step."""
    sizes = [prompt + sum(responses) for prompt, responses in lengths]
    keys = sum(prompt * len(responses) + sum(responses) for prompt, responses in lengths)
    total = sum(sizes)
    return Texts(
        step=max((sum(sizes[i] for i in step) for step in steps), default=total),
        longest=max(sizes),
        typical=sum(size * size for size in sizes) // total,
        keys=keys / total,
        scored=sum(sum(responses) for _, responses in lengths) / total,
        prompt=max(prompt for prompt, _ in lengths),
    )


def capacity(hardware: HardwareConfig, device: str) -> float | None:
    """Bytes of one device: `hardware.memory_gb` (GiB), otherwise detected; None if unknown.

    Processes on a CPU share its memory.
    """
    if hardware.memory_gb is not None:
        return hardware.memory_gb * 2**30
    if device == "cuda":
        if not torch.cuda.is_available():
            return None
        return float(torch.cuda.get_device_properties(0).total_memory)
    if not MEMINFO.is_file():
        return None
    lines = MEMINFO.read_text(encoding="utf-8").splitlines()
    total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal:"))
    return total * 2**10 / hardware.devices


def room(hardware: HardwareConfig, device: torch.device) -> float:
    """Bytes of a CUDA device that this process holds or could allocate, without its context; at
    most `hardware.memory_gb`."""
    free, _ = torch.cuda.mem_get_info(device)
    available = float(free + torch.cuda.memory_reserved(device))
    return available if hardware.memory_gb is None else min(available, hardware.memory_gb * 2**30)
