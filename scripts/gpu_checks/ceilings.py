"""Step 0: the peak performance of the machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from scripts.gpu_checks.facts import Fact, Setup
from scripts.measuring import best_seconds

MIB = 2**20


def check(setup: Setup) -> Iterator[Fact]:
    device = torch.device(setup.device)
    if not setup.small:
        free, total = torch.cuda.mem_get_info()
        yield "device memory, GiB", total / 2**30
        yield "of it free, GiB", free / 2**30
        yield "capability", str(torch.cuda.get_device_capability())
    size = 16 * MIB if setup.small else 2048 * MIB
    yield "copy, TB/s", copy_speed(device, size) / 1e12
    side = 256 if setup.small else 8192
    yield "bf16 matmul, TFLOP/s", matmul_speed(device, side) / 1e12
    yield "disk write, GB/s", disk_speed(setup, 4 * MIB if setup.small else 1024 * MIB) / 1e9


def copy_speed(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(device.type, lambda: target.copy_(source))


def matmul_speed(device: torch.device, side: int) -> float:
    """FLOP/s of square products in bf16."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> Tensor:
        return torch.mm(a, b, out=out)

    return 2 * side**3 / best_seconds(device.type, product)


def disk_speed(setup: Setup, size: int) -> float:
    """Bytes per second into a file, with fsync."""
    path = setup.folder("disk") / "file"
    block = os.urandom(4 * MIB)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return size / seconds
