"""Copies of a run's state in host memory, to be written while training continues."""

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
TOUCH_BYTES = 1 << 28  # of the buffer at a time
MAX_SHARE = 0.5  # of the free host memory that a copy may take


class HostCopy:
    """Makes copies, one at a time: on CUDA each reuses the buffer of the last.

    An H100 copies to page-locked memory at 50 GB/s, to pageable memory at 10 and to memory whose
    pages the kernel has yet to allocate at 1 (gpt2-large: 0.2, 0.9 and 10 s). So a thread touches
    the pages ahead of time, and the first copy page-locks them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer: Tensor | None = None
        self._locked = False
        self._toucher: Thread | None = None
        self._stop = Event()

    def refusal(self, contents: Contents) -> str | None:
        """Why a copy is not made (too little host memory), or None."""
        if self.buffer is not None and len(self.buffer) >= _buffer_bytes(contents):
            return None
        free = free_bytes()
        if free is None:
            return "the free host memory is unknown"
        if contents.size > MAX_SHARE * free:
            need, available = contents.size / 2**30, free / 2**30
            return (
                f"a copy of the state needs {need:.1f} GiB; the host has {available:.1f} GiB free"
            )
        return None

    def prepare(self, contents: Contents) -> None:
        """Start allocating a buffer of that size in a thread."""
        if self.device.type == "cpu" or self.refusal(contents) is not None:
            return
        self.buffer = _pages(_buffer_bytes(contents))
        self._toucher = Thread(target=_touch, args=(self.buffer, self._stop), daemon=True)
        self._toucher.start()

    def take(self, contents: Contents) -> Contents:
        """A copy of the current state, complete on return."""
        if self.device.type == "cpu":
            return contents.copied(lambda value: value.clone(memory_format=torch.contiguous_format))
        buffer, end = self._buffer(_buffer_bytes(contents)), 0

        def copy(value: Tensor) -> Tensor:
            nonlocal end
            start, end = end, end + value.numel() * value.element_size()
            target = buffer[start:end].view(value.dtype).view(value.shape)
            end += -end % ALIGNMENT
            return target.copy_(value, non_blocking=True)

        copies = contents.copied(copy)
        torch.cuda.synchronize(self.device)
        return copies

    def close(self) -> None:
        """Free the buffer; no copy may be in use."""
        if self._toucher is not None:
            self._stop.set()
            self._toucher.join()
        if self.buffer is not None and self._locked:
            torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr())
        self.buffer, self._toucher, self._locked = None, None, False
        self._stop.clear()

    def _buffer(self, size: int) -> Tensor:
        if self._toucher is not None:
            self._toucher.join()
        if self.buffer is None or len(self.buffer) < size:
            self.close()  # before the larger one is allocated
            self.buffer = _pages(size)
        if not self._locked:
            self._locked = _lock(self.buffer, self.device)
        return self.buffer


def _pages(size: int) -> Tensor:
    """Anonymous memory, in huge pages if the kernel has them; no page is allocated yet."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _touch(buffer: Tensor, stop: Event) -> None:
    for part in buffer.split(TOUCH_BYTES):
        if not stop.is_set():
            part.zero_()


def _lock(buffer: Tensor, device: torch.device) -> bool:
    """Page-lock a buffer; returns False if refused, which only makes copies slower.

    Not in another thread: CUDA calls there break CUDA graph capture in this one.
    """
    refused = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), len(buffer), 0)
    if int(refused):
        with suppress(RuntimeError):  # the next kernel would raise the pending CUDA error
            torch.zeros(1, device=device)
    return not int(refused)


def _buffer_bytes(contents: Contents) -> int:
    count = sum(len(values) for values in contents.tensors.values())
    return contents.size + count * ALIGNMENT


def free_bytes() -> int | None:
    """Memory available without swapping, of the machine or this container; None: unknown."""
    if not MEMINFO.is_file():
        return None
    lines = MEMINFO.read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    limit, used = (_number(CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return free
    lines = (CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
    stat = (line.split() for line in lines)
    cached = next((int(value) for name, value in stat if name == "inactive_file"), 0)
    return min(free, limit - used + cached)


def _number(path: Path) -> int | None:
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
