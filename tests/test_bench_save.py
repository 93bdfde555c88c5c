"""The measurement of saves: what is compared is the same tensors, in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from scripts.bench import save as bench

SMALL = ("--layers=1", "--width=32", "--repeats=2", "--steps=10")


def test_the_plain_way_writes_the_tensors_of_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer = bench.trained(1, 32, 1024)
    bench.plain_writer(model, optimizer, synced=True)(tmp_path / "plain")
    saved = bench.checkpoint.save(
        tmp_path, 1, model, bench.build_tokenizer(1024), optimizer, {"best": None}, {}
    )
    for name in ("model", "optimizer"):
        plain, ours = (
            sum(value.numel() for value in load_file(folder / f"{name}.safetensors").values())
            for folder in (tmp_path / "plain", saved)
        )
        assert plain == ours > 0


def test_a_small_measurement(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    assert bench.main([*SMALL, f"--folder={tmp_path}"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    ways = ["plain", "synced", "hashed", "foreground", "copy", "background"]
    assert [row[0] for row in rows] == ways
    for row in rows:
        median, lowest, highest = map(float, row[1:4])
        assert lowest <= median <= highest
    assert rows[0][5] == "1.0"
    assert "With a save every ten steps" in out
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        bench.main(["--repeats=0"])
