"""dpo-run's training steps by part, for `bench.py profile`.

`settings.watch` is `parts` (clocks around the functions of the real code path, the matmul peak, the
work of a step) or `operators` (torch.profiler).
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_cli.model import forward
from dpo_cli.model.attention import interface
from dpo_cli.records import Batch
from dpo_cli.stages import dpo
from dpo_cli.train import loop
from dpo_cli.train.flops import Sizes, Work, step_flops
from scripts.bench.job import Job, Window, work
from scripts.bench.workers import ours
from scripts.bench.workers.matmul import matmul_peaks
from scripts.bench.workers.ours import ClockSink
from scripts.common import synchronize

TOP_OPERATORS = 15


@dataclass
class Clocks:
    """Seconds and work of the timed steps; the device is idle at each reading of a clock."""

    device: str
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    work: Work = field(default_factory=Work)
    sizes: Sizes | None = None

    def restart(self) -> None:
        self.seconds.clear()
        self.work = Work()

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            result = function(*args, **kwargs)
            self.seconds[name] += self.now() - started
            return result

        return timed

    def around_batches(self, batches_of: Callable[..., Any]) -> Callable[..., Any]:
        """Packing costs a step nothing if another thread does it ahead of time."""

        def make(*args: Any, **kwargs: Any) -> Callable[[int], list[Batch]]:
            batches = batches_of(*args, **kwargs)
            timed = self.around("packing", batches)

            def of_step(step: int) -> list[Batch]:
                ahead = threading.current_thread() is not threading.main_thread()
                return batches(step) if ahead else timed(step)

            return of_step

        return make

    def around_forward(self, hidden_states: Callable[..., Tensor]) -> Callable[..., Tensor]:
        timed = self.around("forward", hidden_states)

        def run(model: PreTrainedModel, batch: Batch) -> Tensor:
            self.sizes = self.sizes or Sizes.of(model)
            self.work += Work.of(batch)
            return timed(model, batch)

        return run

    def around_attention(self, function: Callable[..., Any]) -> Callable[..., Any]:
        timed = self.around("attention forward", function)

        def run(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any,
                **kwargs: Any) -> Any:  # fmt: skip
            out, weights = timed(module, query, key, value, *args, **kwargs)
            if out.requires_grad:
                self.watch_backward(out, (query, key, value))
            return out, weights

        return run

    def watch_backward(self, out: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """Time from the arrival of `out`'s gradient to that of the first input's.

        Autograd runs in reverse order of recording, so by then all of attention's backward is done.
        """
        started: list[float] = []

        def begin(gradient: Tensor) -> None:
            started.append(self.now())

        def end(gradient: Tensor) -> None:
            if started:
                self.seconds["attention backward"] += self.now() - started.pop()

        out.register_hook(begin)
        for tensor in inputs:
            if tensor.requires_grad:
                tensor.register_hook(end)


@contextmanager
def watched(clocks: Clocks) -> Iterator[None]:
    """Install clocks around the functions of a training step."""
    around = clocks.around
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (dpo, "batches_of", clocks.around_batches),
        (forward, "hidden_states", clocks.around_forward),
        (forward, "fused_loss", lambda f: around("head and loss", f)),
        (torch.Tensor, "backward", lambda f: around("backward", f)),
        (loop, "take_step", lambda f: around("optimiser", f)),
    ]
    registered = ALL_ATTENTION_FUNCTIONS[interface.NAME]
    with ExitStack() as stack:
        for owner, name, wrap in places:
            changed = mock.patch.object(owner, name, wrap(getattr(owner, name)))
            stack.enter_context(changed)
        AttentionInterface.register(interface.NAME, clocks.around_attention(registered))
        stack.callback(AttentionInterface.register, interface.NAME, registered)
        yield


class AfterWarmup(ClockSink):
    """Calls `begin` when the timed steps begin."""

    def __init__(self, window: Window, begin: Callable[[], object]) -> None:
        super().__init__(window)
        self.begin = begin

    def write(self, step: int, values: Mapping[str, float]) -> None:
        super().write(step, values)
        if step == self.window.job.warmup and "loss" in values:
            self.begin()


def parts(job: Job) -> dict[str, Any]:
    """Seconds per step of each part, of the total and of the rest; work and FLOPs per step."""
    clocks = Clocks(job.device)
    with watched(clocks):
        result = ours.measure(job, lambda window: AfterWarmup(window, clocks.restart))
    seconds = {name: value / job.steps for name, value in clocks.seconds.items()}
    seconds["step"] = result["seconds"] / job.steps
    inside = ("packing", "forward", "head and loss", "backward", "optimiser")
    seconds["the rest"] = seconds["step"] - sum(seconds.get(name, 0.0) for name in inside)
    assert clocks.sizes is not None
    flops = step_flops(clocks.sizes, clocks.work)
    return result | {
        "parts": seconds,
        "flops": {name: value / job.steps for name, value in flops.items()},
        "work": {name: value / job.steps for name, value in asdict(clocks.work).items()},
        "sizes": asdict(clocks.sizes),
        "peaks": matmul_peaks(job.device),
    }


def operators(job: Job) -> dict[str, Any]:
    """The operators with the longest self time: ms and calls per step, share of the total."""
    on_device = job.device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    profiler = profile(activities=kinds)
    result = ours.measure(job, lambda window: AfterWarmup(window, profiler.start))
    profiler.stop()
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    # kernels have rows of their own, whose time is already in their operators'
    events = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]
    events.sort(key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    return result | {"operators": [
        {"operator": event.key, "ms": getattr(event, key) / 1000 / job.steps,
         "calls": event.count / job.steps, "share": getattr(event, key) / total}
        for event in events[:TOP_OPERATORS]
    ]}  # fmt: skip


WATCH = {"parts": parts, "operators": operators}


def measure(job: Job) -> dict[str, Any]:
    return WATCH[job.settings["watch"]](replace(job, settings={}))


if __name__ == "__main__":
    work(measure)
