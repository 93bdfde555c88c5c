"""A copy of a run's state in the host's memory, to be written while the run goes on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dpo_cli.train.contents import Contents

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
ALIGNMENT = 64  # bytes, of each tensor in the buffer
SHARE = 0.5  # of the free memory that a copy may take


class HostCopy:
    """Makes copies, one at a time: on CUDA the next one takes the room of the last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer: Tensor | None = None

    def refusal(self, made: Contents) -> str | None:
        """Why there is no room for a copy."""
        if self.buffer is not None and len(self.buffer) >= _room(made):
            return None
        free = free_bytes()
        if free is None:
            return "how much memory is free is not known"
        if made.size > SHARE * free:
            need, there = made.size / 2**30, free / 2**30
            return f"a copy of the state takes {need:.1f} GiB of the host's {there:.1f} GiB free"
        return None

    def take(self, made: Contents) -> Contents:
        """The state of now; returns when it no longer depends on the run's tensors."""
        if self.device.type == "cpu":
            return made.copied(lambda value: value.clone(memory_format=torch.contiguous_format))
        buffer, end = self._buffer(_room(made)), 0

        def copy(value: Tensor) -> Tensor:
            nonlocal end
            start, end = end, end + value.numel() * value.element_size()
            place = buffer[start:end].view(value.dtype).view(value.shape)
            end += -end % ALIGNMENT
            return place.copy_(value, non_blocking=True)

        copies = made.copied(copy)
        torch.cuda.synchronize(self.device)
        return copies

    def _buffer(self, size: int) -> Tensor:
        if self.buffer is None or len(self.buffer) < size:
            self.buffer = None  # goes before the larger one comes
            self.buffer = torch.empty(size, dtype=torch.uint8)
        return self.buffer


def _room(made: Contents) -> int:
    count = sum(len(values) for values in made.tensors.values())
    return made.size + count * ALIGNMENT


def free_bytes() -> int | None:
    """Memory that can be had without swapping, of the machine or of this container; None: not
    known."""
    if not MEMINFO.is_file():
        return None
    lines = MEMINFO.read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    limit, used = (_number(CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return free
    stat = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    cached = next((int(value) for name, value in stat if name == "inactive_file"), 0)
    return min(free, limit - used + cached)


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
