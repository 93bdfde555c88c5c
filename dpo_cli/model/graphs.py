"""CUDA graphs of a step: recorded once for each shape, then launched as a whole."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch


class Graphs:
    """Runs a step of device work, which reads and writes the same tensors each time.

    The first run of a shape is an ordinary one, in which libraries prepare themselves; the
    second is recorded. A step that waits for the device or allocates pinned memory cannot be:
    RuntimeError.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.stream = torch.cuda.Stream(generator.device)
        self.pool = torch.cuda.graph_pool_handle()  # shared: only one graph runs at a time
        self.prepared: set[Hashable] = set()
        self.recorded: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, shape: Hashable, step: Callable[[], None]) -> None:
        if shape not in self.prepared:
            step()
            self.prepared.add(shape)
            return
        if shape not in self.recorded:
            self.recorded[shape] = self._record(step)
        self.recorded[shape].replay()

    def forget(self) -> None:
        """Before tensors that recorded steps read or write are freed."""
        self.prepared.clear()
        self.recorded.clear()

    def _record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)  # or each replay would draw the same
        torch.cuda.synchronize(self.generator.device)
        # Not torch.cuda.graph, which empties the allocator's cache before every recording.
        with torch.cuda.stream(self.stream):
            # Other threads (data, checkpoints) may use the device meanwhile.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        return graph


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """RuntimeError from what would wait for the device: it cannot be recorded."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
