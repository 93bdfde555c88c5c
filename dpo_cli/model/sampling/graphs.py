"""CUDA graphs of a decoding step: captured once per shape, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch


class Graphs:
    """Runs a step of device work that reads and writes the same tensors each time.

    The first run of a shape is eager, as libraries initialize themselves in it; the second is
    captured. RuntimeError for a step that cannot be captured, because it synchronizes with the
    device or allocates pinned memory.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.stream = _stream(generator.device)
        self.pool = torch.cuda.graph_pool_handle()  # shared: only one graph runs at a time
        self.prepared: set[tuple[int, ...]] = set()
        self.recorded: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}

    def run(self, shape: tuple[int, ...], step: Callable[[], None]) -> None:
        if shape not in self.prepared:
            step()
            self.prepared.add(shape)
            return
        if shape not in self.recorded:
            self.recorded[shape] = self._record(step)
        self.recorded[shape].replay()

    def forget(self) -> None:
        """To be called before tensors that captured steps read or write are freed."""
        self.prepared.clear()
        self.recorded.clear()

    def _record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)  # else each replay would draw the same
        torch.cuda.synchronize(self.generator.device)
        # Not torch.cuda.graph, which empties the allocator's cache before every capture.
        try:
            with torch.cuda.stream(self.stream):
                # Other threads (data, checkpoints) may use the device meanwhile.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    step()
                except BaseException:
                    with suppress(RuntimeError):  # CUDA reports the invalidated capture
                        graph.capture_end()
                    raise
                graph.capture_end()
        except BaseException:
            self._abandon()  # on the caller's stream: the capture stream cannot take work now
            raise
        return graph

    def _abandon(self) -> None:
        """Clean up after a failed capture, so that later device work does not fail as well.

        PyTorch leaves the device's generators in capture mode: the next random draw would raise.
        Another capture that succeeds resets them; if it fails too, they get clones of their states.
        """
        device = self.generator.device
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index or 0, self.pool)
        self.recorded.clear()
        _stream.cache_clear()
        self.stream, self.pool = _stream(device), torch.cuda.graph_pool_handle()
        with suppress(RuntimeError):
            self._record_anything()
        for generator in (torch.cuda.default_generators[device.index or 0], self.generator):
            generator.graphsafe_set_state(generator.clone_state())

    def _record_anything(self) -> None:
        """A trivial capture that succeeds."""
        device = self.generator.device
        number, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        torch.cuda.synchronize(device)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            number.add_(1)
            graph.capture_end()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The capture stream: always the same, as cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """In the body, operations that synchronize with the device raise RuntimeError."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
