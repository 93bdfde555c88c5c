"""`bench.py memory`: what it runs, what it compares, and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench_workers import runner
from scripts.bench import memory, shapes

SMALL = ("--length=40", "--batch=4", "--warmup=1", "--steps=1", "--threads=1", "--busy-ok",
         "--json", "--precisions=fp32", "--presets=tiny4x256")  # fmt: skip


def test_estimated_beside_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setitem(shapes.PRESETS, "tiny4x256", shapes.Shape("gpt2", 2, 32, 2, 64))
    run = runner(memory, monkeypatch, capsys, tmp_path)
    record = run(*SMALL, "--cases=full,rmsprop")
    full, rmsprop = record["runs"]
    # 29,184 weights: 64 x 32 words, 1024 x 32 places, two blocks of 12,704, the last norm
    weights = (64 * 32 + 1024 * 32 + 2 * 12_704 + 64) * 4 / 2**20
    assert full["parts_mb"]["weights"] == pytest.approx(weights)
    assert full["parts_mb"]["optimizer state"] == pytest.approx(2 * weights)
    assert rmsprop["parts_mb"]["optimizer state"] == pytest.approx(weights)
    for run_facts in (full, rmsprop):
        parts = run_facts["parts_mb"]
        assert run_facts["estimated_mb"] == pytest.approx(sum(parts.values()) - parts["program"])
        assert run_facts["ratio"] == run_facts["estimated_mb"] / run_facts["peak_memory_mb"] > 0
    page = (tmp_path / "memory-cpu.md").read_text()
    assert "| tiny4x256 | fp32      | full    |" in page
    assert "`python scripts/bench.py memory --length=40" in page


@pytest.mark.parametrize("word", ["--presets=gpt5", "--cases=full,none", "--precisions=fp16"])
def test_unknown_names_are_told(word: str) -> None:
    with pytest.raises(SystemExit, match=r"^--\w+: no (gpt5|none|fp16); give "):
        memory.main([word])
