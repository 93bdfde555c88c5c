"""Input and output of one measured process, and how it measures time and memory."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.common import resident_mb, synchronize, versions, write_atomic

# What both sides log, by our names.
COMPARED = ("loss", "logps/chosen", "logps/rejected")
COMPARED_REWARDS = ("loss", "rewards/margins")
STARTED = "DPO_RUN_BENCH_STARTED"  # environment: `time.time()` at which a worker was started
UNAVAILABLE = "TRL cannot be imported: "  # start of the last line that a worker without it prints


@dataclass(frozen=True)
class Job:
    """One process. `steps` optimizer steps (or decoding calls) are timed after `warmup` others.

    model: folder of weights and tokenizer. ids: file of the rows as token ids. overrides: dpo-run's
    for reading the same rows. settings: of this side, in its naming. scratch: a folder for this
    process only. lora: none, lora or qlora; adapter: folder of the initial rank-`r` adapter of all
    sides. devices: number of processes that share the work.
    """

    task: str
    model: str
    ids: str
    overrides: list[str]
    batch: int
    warmup: int
    steps: int
    lr: float
    precision: str
    device: str
    threads: int
    length: int
    samples: int
    new_tokens: int
    lora: str = "none"
    r: int = 16
    adapter: str = ""
    devices: int = 1
    scratch: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        return self.warmup + self.steps

    def rows(self) -> list[dict[str, list[int]]]:
        return [json.loads(line) for line in Path(self.ids).read_text().splitlines()]

    def text(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Window:
    """Times the steps after the warm-up and records every step's figures, warm-up included.

    The clock is read at the end of the warm-up and of the last step, with the device idle; nothing
    waits for the device in between.
    """

    job: Job
    figures: dict[str, list[float]] = field(default_factory=dict)
    start_memory_mb: float = field(default_factory=lambda: resident_mb("VmRSS"))
    seconds: float = 0.0
    startup_seconds: float = 0.0  # until the first step was done
    began: float = field(default_factory=lambda: float(os.environ.get(STARTED) or time.time()))
    others_cpu: float = 0.0  # cores kept busy by other processes during the timed steps
    flops: float = 0.0  # model FLOPs of the timed steps, of sides that log them
    _started: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def end_of_step(self, number: int, values: Mapping[str, float]) -> bool:
        """Call after each step, counted from 1; True after the last one."""
        for name in COMPARED_REWARDS if self.job.task == "reward" else COMPARED:
            if name in values:
                self.figures.setdefault(name, []).append(float(values[name]))
        if number == 1:
            synchronize(self.job.device)
            self.startup_seconds = time.time() - self.began
        if number > self.job.warmup:
            self.flops += (
                values.get("tflops_per_second", 0.0) * values.get("step_seconds", 0.0) * 1e12
            )
        if number == self.job.warmup:
            synchronize(self.job.device)
            self._started = (time.perf_counter(), own_cpu_seconds(), busy_cpu_seconds())
        if number != self.job.total_steps:
            return False
        synchronize(self.job.device)
        start, own, busy = self._started
        self.seconds = time.perf_counter() - start
        others = busy_cpu_seconds() - busy - (own_cpu_seconds() - own)
        self.others_cpu = max(0.0, others) / self.seconds
        return True

    def result(self, **more: Any) -> dict[str, Any]:
        import torch

        return {
            "seconds": self.seconds,
            "startup_seconds": self.startup_seconds,
            "figures": self.figures,
            "versions": worker_versions(),
            "flops": self.flops,
            "peak_memory_mb": maximum_of_ranks(peak_memory_mb(self.job.device)),
            "start_memory_mb": self.start_memory_mb,
            "others_cpu": self.others_cpu,
            "threads": torch.get_num_threads(),
            "device_name": torch.cuda.get_device_name() if self.job.device == "cuda" else None,
            **more,
        }


def worker_versions() -> dict[str, str]:
    import torch

    cuda = {"cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return versions() | cuda


def maximum_of_ranks(value: float) -> float:
    """The maximum over all processes that share the work."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return max(gathered)


def peak_memory_mb(device: str) -> float:
    """High-water mark of the process (CPU: resident memory; CUDA: the allocator's)."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mb("VmHWM")


def own_cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def busy_cpu_seconds() -> float:
    """Non-idle processor seconds since boot, over all cores; 0 if unknown."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    ticks = [int(value) for value in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # idle, iowait


def work(measure: Callable[[Job], dict[str, Any]]) -> None:
    """A worker's main, with arguments `job.json result.json`; of several ranks, rank 0 writes."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    import torch

    torch.set_num_threads(job.threads)
    result = measure(job)
    if os.environ.get("RANK", "0") == "0":
        write_atomic(Path(sys.argv[2]), json.dumps(result))
