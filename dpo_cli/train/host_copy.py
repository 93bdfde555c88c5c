"""A copy of a run's state in the host's memory, to be written while the run goes on."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import torch
from torch import Tensor

from dpo_cli.train.contents import Contents

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
ALIGNMENT = 64  # bytes, of each tensor in the buffer
TOUCHED = 1 << 28  # bytes of the buffer at a time
SHARE = 0.5  # of the free memory that a copy may take


class HostCopy:
    """Makes copies, one at a time: on CUDA the next one takes the room of the last.

    A device copies to memory that is there and page-locked at 50 GB/s on an H100, at 10 to memory
    that is there, and at 1 to memory whose pages the kernel has yet to make (gpt2-large: 0.2, 0.9
    and 10 s). So a thread makes the pages ahead of time, and the first copy locks them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer: Tensor | None = None
        self._locked = False
        self._making: Thread | None = None
        self._enough = Event()

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

    def prepare(self, made: Contents) -> None:
        """Make room for copies of that size, without waiting for it."""
        if self.device.type == "cpu" or self.refusal(made) is not None:
            return
        self.buffer = _pages(_room(made))
        self._making = Thread(target=_touch, args=(self.buffer, self._enough), daemon=True)
        self._making.start()

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

    def close(self) -> None:
        """Give the room back; no copy may be in use."""
        if self._making is not None:
            self._enough.set()
            self._making.join()
        if self.buffer is not None and self._locked:
            torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr())
        self.buffer, self._making, self._locked = None, None, False
        self._enough.clear()

    def _buffer(self, size: int) -> Tensor:
        if self._making is not None:
            self._making.join()
        if self.buffer is None or len(self.buffer) < size:
            self.close()  # the old room goes before the larger one comes
            self.buffer = _pages(size)
        if not self._locked:
            self._locked = _lock(self.buffer, self.device)
        return self.buffer


def _pages(size: int) -> Tensor:
    """Memory of its own, in large pages where the kernel has them; none of them is there yet."""
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)


def _touch(buffer: Tensor, enough: Event) -> None:
    for part in buffer.split(TOUCHED):
        if not enough.is_set():
            part.zero_()


def _lock(buffer: Tensor, device: torch.device) -> bool:
    """Page-lock a buffer; where that is refused, copies are slower.

    Not in another thread: CUDA calls there break the recording of CUDA graphs here.
    """
    refused = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), len(buffer), 0)
    if int(refused):
        with suppress(RuntimeError):  # the next kernel is told of the refusal: let it be this one
            torch.zeros(1, device=device)
    return not int(refused)


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
