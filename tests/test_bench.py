"""The benchmark: equal work on both sides, and its arithmetic."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench_workers import SMALL, Record, job_of, runner
from scripts.bench import compare, launch, ratios, report, run, shapes, summary
from scripts.bench.equal import agreement
from scripts.bench.page import listed
from scripts.bench.plan import Plan
from scripts.bench.workers import prepare
from scripts.common import shown_command

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "bench.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Callable[..., Record]:
    """`bench("--task=dpo", ...)`: the record of a small comparison, written to `tmp_path`. Its
    workers run in this process; processes are tested by `test_a_worker_is_a_process`."""
    small = runner(compare, monkeypatch, capsys, tmp_path)
    return lambda *words: small(*SMALL, *words)


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_dpo_does_the_same_work_as_trl(bench: Any, tmp_path: Path) -> None:
    record = bench("--sides=ours,ours-live,trl-best", "--lr=1e-2")
    ours, live, theirs = (record["sides"][name] for name in ("ours", "ours-live", "trl-best"))
    assert ours["figures_by_step"]["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(ours["figures_by_step"]["loss"][1] - math.log(2)) > 1e-3  # a step was taken
    for name, values in ours["figures_by_step"].items():
        assert values == pytest.approx(theirs["figures_by_step"][name], rel=1e-4), name
        assert values == pytest.approx(live["figures_by_step"][name], rel=1e-4), name
    assert "reference_seconds" not in live  # nothing was computed beforehand
    rates = [side["per_second"]["median"] for side in (ours, theirs)]
    assert record["ratio_vs_trl_best"] == pytest.approx(rates[0] / rates[1])
    peaks = [side["peak_memory_mb"]["median"] for side in (ours, theirs)]
    assert record["memory_ratio_vs_trl_best"] == pytest.approx(peaks[0] / peaks[1])
    assert ours["reference_seconds"]["median"] > 0
    assert theirs["reference_seconds"]["median"] > 0
    assert record["shape"]["layers"] == 1
    check_results(record)
    check_files(record, tmp_path)


def check_results(record: dict[str, Any]) -> None:
    """What another script reads of `--json`."""
    assert record["results"].keys() == record["sides"].keys()
    for name, flat in record["results"].items():
        side, tokens = record["sides"][name], record["data"]["real_tokens_per_row"]
        assert flat["per_second"] == side["per_second"]["median"]
        assert flat["tokens_per_second"] == pytest.approx(tokens * flat["per_second"])
        assert flat["peak_memory_mb"] > 0
        assert flat["tflops"] > 0
        assert flat["startup_seconds"] > 0
        assert (flat["reference_seconds"] is None) == name.endswith("-live")
        assert flat["mfu"] is None  # a CPU's peak is not known
        assert flat["failure"] is None
    assert record["versions"]["transformers"] == import_module("transformers").__version__
    assert record["other_versions"] == {}


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_sft_does_the_same_work_as_trl(bench: Any) -> None:
    record = bench("--task=sft", "--lr=1e-2")
    losses = [side["figures_by_step"]["loss"] for side in record["sides"].values()]
    assert len(losses) == 3
    assert losses[0][0] == pytest.approx(math.log(64), abs=0.1)  # untrained: uniform
    for other in losses[1:]:
        assert losses[0] == pytest.approx(other, rel=1e-4)


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_reward_models_do_the_same_work_as_trls(bench: Any, tmp_path: Path) -> None:
    record = bench("--task=reward", "--lr=1e-2")
    ours, *others = (side["figures_by_step"] for side in record["sides"].values())
    assert len(others) == 2
    assert abs(ours["rewards/margins"][0]) > 1e-3  # an untrained head, the same on both sides
    assert abs(ours["rewards/margins"][1] - ours["rewards/margins"][0]) > 1e-3
    for other in others:
        assert ours.keys() == other.keys() == {"loss", "rewards/margins"}
        for name, values in ours.items():
            assert values == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert record["unit"] == "pairs"
    assert 0 < record["data"]["scored_to_padded"] < 0.2  # one token of each sequence
    text = (tmp_path / "reward-gpt2-1x32-h2-v64-cpu.md").read_text()
    assert re.search(r"in every step: losses within \S+, margins of the rewards within \S+\.$",
                     text, re.MULTILINE)  # fmt: skip


def check_files(record: dict[str, Any], folder: Path) -> None:
    """The same conditions replace their section, others get one of their own."""
    path = folder / "dpo-gpt2-1x32-h2-v64-cpu.md"
    assert path.stem == report.name_of(record)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(folder) not in path.read_text()
    report.PAGE.keep(record | {"date": "2001-02-03"}, folder, path.stem)
    report.PAGE.keep(record | {"precision": "bf16", "date": "2004-05-06"}, folder, path.stem)
    text = path.read_text()
    assert text.count("\n## ") == 2
    assert text.count("2001-02-03, commit") == text.count("2004-05-06, commit") == 1
    assert record["date"] + ", commit" not in text


def test_decoding_draws_from_the_same_model(bench: Any) -> None:
    record = bench("--task=decode", "--sides=ours,hf-best", "--samples=3", "--new-tokens=4")
    ours, theirs = (record["sides"][name] for name in ("ours", "hf-best"))
    greedy = ours["figures_by_step"]["logps/greedy"]
    assert greedy == pytest.approx(theirs["figures_by_step"]["logps/greedy"], rel=1e-5)
    assert all(value < -8.0 for value in greedy)  # 8 tokens of an untrained model
    assert record["unit"] == "tokens"
    assert record["ratio_vs_trl_best"] > 0


def test_a_worker_is_a_process(tmp_path: Path) -> None:
    launch.run_worker("__init__", [], tmp_path / "a", threads=1)
    with pytest.raises(SystemExit, match=r"none failed with exit code 1"):
        launch.run_worker("none", [], tmp_path / "b", threads=1)
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert "--trl-python" in done.stdout


def test_a_worker_finds_what_the_caller_finds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Packages in a folder that PYTHONPATH names, except for the Python of another environment."""
    (tmp_path / "carried.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    toys = tmp_path / "toys"
    toys.mkdir()
    (toys / "trl.py").write_text("import carried, dpo_cli")
    monkeypatch.setattr(launch, "WORKERS", "toys")
    launch.run_worker("trl", [], tmp_path / "scratch", 1)
    other = launch.Launch(trl_python=sys.executable)
    (toys / "trl.py").write_text("import os; print(os.environ['PYTHONPATH']); 1 / 0")
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    with pytest.raises(launch.Failed):
        launch.run_worker("trl", [], tmp_path / "other", 1, other)
    assert (tmp_path / "other" / "log.txt").read_text().startswith(f"{tmp_path}\n")


def test_versions_are_those_of_the_workers() -> None:
    rows = {"ours": {"torch": "2.13", "numpy": "2"}, "trl-best": {"torch": "2.11", "trl": "1.16"}}
    results = {side: [{"versions": versions}] for side, versions in rows.items()}
    found = summary.versions_of(results)
    assert found["versions"] == {"torch": "2.13", "numpy": "2", "trl": "1.16"}
    assert found["other_versions"] == {"trl-best": {"torch": "2.11"}}
    assert listed(found["versions"]) == "torch 2.13, numpy 2, trl 1.16"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--data=missing.jsonl"], "missing.jsonl: no such file"),
        (["--width=33"], "--width 33: must be a multiple of --heads 4"),
        (["--warmup=0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], why: str) -> None:
    with pytest.raises(SystemExit, match=why):
        compare.main(words)


def test_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(run, "busy_cpu_seconds", iter([100.0, 100.02] * 3).__next__)
    assert run.refuse_if_busy(allowed=False, seconds=0.1) == pytest.approx(0.2)
    with pytest.raises(SystemExit, match=r"2\.0 of 4 cores busy.*--busy-ok"):
        run.refuse_if_busy(allowed=False, seconds=0.01)
    assert run.refuse_if_busy(allowed=True, seconds=0.01) == pytest.approx(2.0)


def results(*figures: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [{"figures": f} for f in figures]


def test_unequal_work_is_noticed() -> None:
    base = {"loss": [0.7, 0.6], "logps/chosen": [-200.0, -100.0]}
    close = {"loss": [0.7, 0.6005], "logps/chosen": [-200.01, -100.0]}
    found = agreement({"trl-default": results(base), "ours": results(base, close)}, "fp32")
    assert found["agree"]
    assert found["largest_loss_difference"] == pytest.approx(5e-4)
    assert found["largest_relative_logps_difference"] == pytest.approx(5e-5)
    for other in (
        base | {"loss": [0.7, 0.602]},
        base | {"loss": [0.7, math.nan]},
        base | {"logps/chosen": [-200.0, -100.02]},
        {"loss": [0.7, 0.6]},
    ):
        assert not agreement({"trl-default": results(base), "ours": results(other)}, "fp32")[
            "agree"
        ]


def test_ratios_are_taken_within_a_round() -> None:
    rounds = {
        "ours": [{"per_second": v} for v in (4.0, 9.0, 10.0)],
        "other": [{"per_second": v} for v in (2.0, 3.0, 1.0)],
    }
    found = ratios.ratio(rounds, "ours", "other", "per_second")
    assert found == {"median": 3.0, "min": 2.0, "max": 10.0}


def test_one_epoch_counts_the_reference_pass() -> None:
    job = job_of(batch=5, steps=3)
    assert run.per_second(job, seconds=3.0) == 5.0
    one_epoch = ratios.one_epoch  # 20 pairs: 4 s of steps, 1 s of reference
    assert one_epoch(job, {"per_second": 5.0, "reference_seconds": 1.0}) == 4.0
    assert one_epoch(job, {"per_second": 5.0, "reference_seconds": None}) == 5.0


def test_synthetic_lengths_are_those_of_hh() -> None:
    """Medians and the tail of harmless-base/test in GPT-2's tokens."""
    plan = Plan("", shapes.PRESETS["gpt2"], 1024, 20_000, 512, seed=0)
    import numpy as np

    columns = prepare.lengths_of(plan, np.random.default_rng(0)).T
    for drawn, (median, p95) in zip(columns, ((96, 349), (29, 121), (37.5, 147)), strict=True):
        assert np.median(drawn) == pytest.approx(median, rel=0.2)
        assert np.percentile(drawn, 95) == pytest.approx(p95, rel=0.25)
    assert columns.min(axis=1).tolist() == [13, 3, 3]


@pytest.mark.parametrize(
    ("name", "means"), [("tldr", (350, 35, 35)), ("ultrafeedback", (180, 350, 350))]
)
def test_synthetic_lengths_of_other_datasets(name: str, means: tuple[float, float, float]) -> None:
    import numpy as np

    drawn = shapes.draw_lengths(name, 20_000, np.random.default_rng(0))
    assert drawn.mean(axis=0) == pytest.approx(means, rel=0.1)
    assert np.all(drawn >= shapes.KNOWN[name].shortest)
    assert np.all(drawn <= shapes.KNOWN[name].longest)
    longest = drawn[:, 0].max() / np.median(drawn[:, 0])
    assert longest > 20 if name == "ultrafeedback" else longest < 2  # a long tail, or none


def test_published_commands_name_no_folder() -> None:
    words = ["--data", "/home/me/my pairs.jsonl", "--out=/tmp/x", "--json"]
    assert shown_command("bench.py", words) == (
        "python scripts/bench.py --data 'my pairs.jsonl' --out=x --json"
    )
