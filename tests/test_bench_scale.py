"""How cost grows: every curve changes one size alone, and a shared point is measured once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench_workers import SMALL, Record, in_process, runner, use
from scripts.bench import scale
from scripts.bench.job import Job
from scripts.bench.page import short

SIZES = ("--length=24", "--lengths=12,24", "--batches=1,2", "--models=1x32,2x64", "--vocab=61")


@pytest.mark.slow
def test_each_curve_changes_one_size(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """The rows that the processes were given, beside what the record says of them."""
    given: list[tuple[str, int, set[tuple[int, ...]]]] = []

    def worker(script: str, files: list[Path], *others: Any) -> None:
        if script == "ours":
            job = Job(**json.loads(files[0].read_text()))
            shape = json.loads((Path(job.model) / "config.json").read_text())
            lengths = {tuple(map(len, row.values())) for row in job.rows()}
            given.append((f"{shape['n_layer']}x{shape['n_embd']}", job.batch, lengths))
        in_process(script, files, *others)

    run = runner(scale, monkeypatch, capsys, tmp_path)
    use(worker, monkeypatch)
    record = run(*SMALL, *SIZES, "--rounds=2")
    once = [
        ("1x32", 2, {(8, 4, 4)}), ("1x32", 2, {(16, 8, 8)}), ("1x32", 1, {(16, 8, 8)}),
        ("1x32", 2, {(16, 8, 8)}), ("2x64", 2, {(16, 8, 8)}),
    ]  # fmt: skip
    assert given == once * 2  # the fourth has GPT-2's vocabulary
    sizes = {name: [(p["length"], p["batch"]) for p in points]
             for name, points in record["curves"].items()}  # fmt: skip
    assert sizes == {"lengths": [(12, 2), (24, 2)], "batches": [(24, 1), (24, 2)],
                     "models": [(24, 2), (24, 2)]}  # fmt: skip
    assert record["curves"]["lengths"][1] == record["curves"]["batches"][1]
    check_weights(record)
    check_page(record, tmp_path / "scale-gpt2-1x32-h2-v61-cpu.md")


def check_weights(record: Record) -> None:
    """Embeddings of tokens and 1024 positions; a layer's 12 d^2 + 13 d; the last norm."""
    expected = {(1, 32): (50257 + 1024) * 32 + 12 * 32**2 + 15 * 32,
                (2, 64): (50257 + 1024) * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64}  # fmt: skip
    for point in record["curves"]["models"]:
        layers, width = map(int, point["model"].split("x"))
        assert point["parameters"] == pytest.approx(expected[layers, width], rel=2e-3)


def check_page(record: Record, path: Path) -> None:
    text = path.read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for start in ("| tokens of a sequence ", "| pairs per step ", "| 1x32 (1.7M weights) "):
        assert text.count(f"\n{start}") == 1
    point = record["curves"]["lengths"][0]
    tokens = (8 + 4 + 4) / point["seconds_per_pair"]["median"]
    assert f"| {short(tokens)} " in text


def test_a_single_curve(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    run = runner(scale, monkeypatch, capsys, tmp_path)
    assert list(run(*SMALL, *SIZES, "--curves=batches")["curves"]) == ["batches"]
    assert "by batches; else 24 tokens" in (tmp_path / "scale-gpt2-1x32-h2-v61-cpu.md").read_text()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--curves=widths"], "--curves: no widths; give lengths, batches, models"),
        (["--models=large"], "--models: no large; give LAYERSxWIDTH or one of tiny4x256"),
        (["--lengths=4,64"], "must be at least 6"),
        (["--lengths=65,66"], "--lengths: two of them round to the same prompt"),
        (["--batches=0,1"], "--batches: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], why: str) -> None:
    with pytest.raises(SystemExit, match=why):
        scale.main(words)
