"""Which GPU a rank takes, and an allocator whose growing segments fail: CUDA has a stand-in."""

import logging
import os

import pytest
import torch

from dpo_cli.distributed import launch
from dpo_cli.distributed.ranks import SHARE_GPUS, Ranks
from dpo_cli.errors import ConfigError
from dpo_cli.train import runtime

GPU = torch.device("cuda", 0)
REFUSED = "CUDA driver error: operation not supported\nmore"


class Allocator:
    """A device that maps no memory at will. error: what allocating then raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception, growing: bool) -> None:
        self.error, self.growing, self.set = error, growing, []
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", self.settings)
        monkeypatch.setattr(os, "environ", dict(os.environ))
        for name in runtime.ALLOCATOR:
            os.environ.pop(name, None)

    def empty(self, size: int, device: torch.device) -> None:
        if self.growing:
            raise self.error

    def settings(self, text: str) -> None:
        self.set.append(text)
        self.growing = "expandable_segments:True" in text


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", "expandable_segments:False"),
        (
            "PYTORCH_CUDA_ALLOC_CONF",
            "max_split_size_mb:64,expandable_segments:True",
            "max_split_size_mb:64,expandable_segments:False",
        ),
    ],
)
def test_fixed_segments_where_growing_ones_fail(monkeypatch, caplog, name, given, expected):
    allocator = Allocator(monkeypatch, RuntimeError(REFUSED), growing=True)
    os.environ[name] = given
    with caplog.at_level(logging.WARNING):
        runtime.check_allocator(GPU)
    assert allocator.set == [expected]
    assert os.environ[name] == expected  # of workers, which start anew
    assert caplog.messages == [
        "expandable memory segments fail on this device (CUDA driver error: operation not "
        "supported): using fixed ones"
    ]


def test_other_failures_of_the_device_are_its_own(monkeypatch):
    allocator = Allocator(monkeypatch, RuntimeError(REFUSED), growing=True)
    with pytest.raises(RuntimeError, match="not supported"):  # nobody asked for growing ones
        runtime.check_allocator(GPU)
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    allocator.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        runtime.check_allocator(GPU)
    assert allocator.set == []


def test_nothing_is_told_where_segments_grow(monkeypatch, caplog):
    allocator = Allocator(monkeypatch, RuntimeError(REFUSED), growing=False)
    runtime.check_allocator(GPU)
    assert (allocator.set, caplog.messages) == ([], [])


def test_the_real_allocator_takes_the_setting():
    """By the name that this PyTorch has for it."""
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


def test_ranks_share_a_gpu_only_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv(SHARE_GPUS, raising=False)
    second = Ranks(rank=1, size=2, local=1)
    assert runtime.gpu_of_rank(Ranks()) == 0
    with pytest.raises(ConfigError, match=r"this node has 1 GPUs.*use hardware.devices=1"):
        runtime.gpu_of_rank(second)
    monkeypatch.setenv(SHARE_GPUS, "1")
    assert runtime.gpu_of_rank(second) == 0


@pytest.mark.parametrize(("shared", "of_gpus"), [("1", "gloo"), ("0", "nccl")])
def test_ranks_that_share_a_gpu_talk_by_gloo(monkeypatch, shared, of_gpus):
    """NCCL refuses two ranks on one device."""
    asked = []
    monkeypatch.setenv(SHARE_GPUS, shared)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **rest: asked.append(backend)
    )
    monkeypatch.setattr(torch.distributed, "PrefixStore", lambda prefix, store: store)
    config = type("Config", (), {"hardware": launch.HardwareConfig()})()
    launch._join(None, config)
    assert asked == [f"cpu:gloo,cuda:{of_gpus}"]
