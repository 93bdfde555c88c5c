"""The profile of a step: its FLOPs by hand, its parts, its page."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench_workers import SMALL, Record, runner
from dpo_cli.model.attention import interface
from scripts.bench import profile
from scripts.bench.workers import matmul as flops
from scripts.bench.workers.parts import Clocks

PARTS = {"packing", "forward", "head and loss", "backward", "optimiser", "the rest"}


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Callable[..., Record]:
    monkeypatch.setattr(flops, "SIZES", {"cpu": (32, 64)})
    monkeypatch.setattr(flops, "CALLS", 2)
    return runner(profile, monkeypatch, capsys, tmp_path)


def test_the_parts_make_up_the_step(profiled: Any, tmp_path: Path) -> None:
    registered = ALL_ATTENTION_FUNCTIONS[interface.NAME]
    record = profiled(*SMALL, "--steps=3", "--prompt-length=8", "--response-length=4")
    assert ALL_ATTENTION_FUNCTIONS[interface.NAME] is registered
    seconds = {name: part["seconds"]["median"] for name, part in record["parts"].items()}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds[name] for name in PARTS) == pytest.approx(seconds["step"])
    assert seconds["attention forward"] < seconds["forward"]
    assert seconds["attention backward"] < seconds["backward"]
    # two pairs of 8 + 3 + 3 tokens and 8 targets; the warm-up step is not among them
    visible = 2 * (36 + 2 * (24 + 6))
    assert record["work"] == {"tokens": 28, "scored": 16, "visible": visible,
                              "near": visible}  # fmt: skip
    forward = 2 * 28 * 12 * 32**2 + 4 * visible * 32
    head = 6 * 16 * 32 * 64
    parts = record["parts"]
    assert parts["forward"]["flops"] == forward
    assert parts["head and loss"]["flops"] == head
    assert parts["ours"]["flops"] == parts["step"]["flops"] == 3 * forward + head
    speed = (3 * forward + head) / seconds["ours"]
    assert parts["ours"]["flops_per_second"]["median"] == pytest.approx(speed)
    peak = record["peaks"]["fp32"]["flops_per_second"]["median"]
    assert parts["ours"]["share_of_peak"]["median"] == pytest.approx(speed / peak)
    check_page(record, tmp_path / "profile-gpt2-1x32-h2-v64-cpu.md")


def check_page(record: Record, path: Path) -> None:
    text = path.read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for label in ("packing", "backbone forward", "optimiser (clip, step)", "step"):
        assert text.count(f"\n| {label} ") == 1
    assert text.count("\n|   of it attention ") == 2
    assert len(record["operators"]) == 15
    longest = [one["ms"] for one in record["operators"]]
    assert longest == sorted(longest, reverse=True)
    for one in record["operators"]:
        assert f"| `{one['operator']}` " in text


def test_bf16_is_measured_against_its_own_peak(profiled: Any) -> None:
    record = profiled(*SMALL, "--precision=bf16")
    peaks = {name: peak["flops_per_second"]["median"] for name, peak in record["peaks"].items()}
    assert peaks.keys() == {"fp32", "bf16"}
    step = record["parts"]["step"]
    assert step["share_of_peak"]["median"] == pytest.approx(
        step["flops_per_second"]["median"] / peaks["bf16"]
    )


def test_a_peak_is_the_fastest_of_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {(32, torch.float32): 2.0, (64, torch.float32): 3.0, (32, torch.bfloat16): 5.0}
    monkeypatch.setattr(flops, "SIZES", {"cpu": (32, 64)})
    monkeypatch.setattr(flops, "kernels", lambda device: {"matmul": torch.matmul})
    monkeypatch.setattr(
        flops, "speed", lambda kernel, size, dtype, device: speeds.get((size, dtype), 1.0)
    )
    assert flops.matmul_peaks("cpu") == {
        "fp32": {"flops_per_second": 3.0, "size": 64, "kernel": "matmul"},
        "bf16": {"flops_per_second": 5.0, "size": 32, "kernel": "matmul"},
    }


@pytest.mark.parametrize("name", ["matmul", "oneDNN"])
def test_the_kernels_multiply(name: str) -> None:
    kernels = flops.kernels("cpu")
    if name not in kernels:
        pytest.skip(f"this build of PyTorch has no {name}")
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    expected = a @ (b if name == "matmul" else b.t())
    torch.testing.assert_close(kernels[name](a, b), expected)


def test_packing_ahead_of_time_is_no_part_of_a_step() -> None:
    clocks = Clocks("cpu")
    batches = clocks.around_batches(lambda rows: lambda step: [rows, step])("rows")
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(batches, 3).result() == ["rows", 3]
    assert not clocks.seconds
    assert batches(4) == ["rows", 4]
    assert clocks.seconds.keys() == {"packing"}
    assert clocks.seconds["packing"] > 0
