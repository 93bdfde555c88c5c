"""A side that fails is a row; candidates and variants are sides of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench_workers import SMALL, Record, in_process, job_of, use
from scripts.bench import compare, launch, options, ratios, run, sides
from scripts.bench.equal import drop_unequal
from scripts.bench.launch import Failed

NAME = "gpt2-1x32-h2-v64-cpu"
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


class Bench:
    """`bench.py` with workers in this process. fails(script, settings): the error of a worker, or
    None."""

    def __init__(self, capsys: Any, out: Path) -> None:
        self.capsys, self.out = capsys, out
        self.fails: Callable[[str, Record], BaseException | None] = lambda script, settings: None

    def worker(self, worker: str, files: list[Path], *others: Any) -> None:
        settings = {}
        if worker != "prepare":
            settings = json.loads(files[0].read_text())["settings"]
        if error := self.fails(worker, settings):
            raise error
        in_process(worker, files, *others)

    def __call__(self, *words: str) -> tuple[int, Record, str]:
        code = compare.main([*SMALL, f"--out={self.out}", *words])
        printed = self.capsys.readouterr()
        return code, json.loads(printed.out.splitlines()[-1]), printed.err


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Bench:
    made = Bench(capsys, tmp_path)
    use(made.worker, monkeypatch)
    return made


@needs_trl
def test_candidates_are_measured_instead_of_a_search(bench: Bench, tmp_path: Path) -> None:
    code, record, _ = bench("--candidate=cached", "--candidate=cached-2-ckpt", "--lr=1e-2",
                            "--also=train.micro_batch_tokens=2048")  # fmt: skip
    assert code == 0
    variant = "ours-micro_batch_tokens=2048"
    assert list(record["sides"]) == ["ours", variant, "trl-cached", "trl-cached-2-ckpt"]
    settings = record["sides"]["trl-cached-2-ckpt"]["settings"]
    assert settings == {"gradient_checkpointing": True, "precompute_ref_log_probs": True,
                        "gradient_accumulation_steps": 2}  # fmt: skip
    losses = [side["figures_by_step"]["loss"] for side in record["sides"].values()]
    assert losses[0] == pytest.approx(losses[3], rel=1e-4)
    speeds = {name: flat["per_second"] for name, flat in record["results"].items()}
    best = max(("trl-cached", "trl-cached-2-ckpt"), key=speeds.__getitem__)
    assert record["roles"] == {"best": best}
    assert record["ratio_vs_trl_best"] == pytest.approx(speeds["ours"] / speeds[best])
    assert record[f"ratio_{variant}_vs_trl_best"] == pytest.approx(speeds[variant] / speeds[best])
    text = (tmp_path / f"dpo-{NAME}.md").read_text()
    assert f"speed, ours / TRL ({best}) best" in text
    assert f"speed, {variant} / TRL ({best}) best" in text


@needs_trl
def test_a_side_that_fails_is_a_row(bench: Bench, tmp_path: Path) -> None:
    bench.fails = lambda script, settings: (
        Failed(MEMORY) if settings.get("gradient_checkpointing") is False else None
    )
    code, record, told = bench("--candidate=cached", "--candidate=cached-ckpt", "--rounds=2")
    assert code == 0  # the others are measured
    assert list(record["sides"]) == ["ours", "trl-cached-ckpt"]
    row = record["results"]["trl-cached"]
    assert row.pop("failure") == MEMORY
    assert set(row.values()) == {None}
    assert record["roles"] == {"best": "trl-cached-ckpt"}
    assert told.count(f"FAILED  trl-cached: {MEMORY}") == 2  # at once, and at the end
    text = (tmp_path / f"dpo-{NAME}.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| trl-cached "))
    assert line.rstrip(" |").endswith(MEMORY)
    assert f"**trl-cached failed: {MEMORY}.**" in text


def test_a_page_without_the_other_side_claims_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.fails = lambda script, settings: Failed(MEMORY) if script == "trl" else None
    code, record, _ = bench("--candidate=cached", "--candidate=cached-2")
    assert code == 0
    assert record["ratios"] == {}
    assert not [key for key in record if key.startswith("ratio_")]
    assert record["peer_missing"] == MEMORY
    text = (tmp_path / f"dpo-{NAME}.md").read_text()
    assert f"**{MEMORY}: dpo-run only, without a comparison.**" in text
    assert "| ratio" not in text


def test_ours_may_fail_too(bench: Bench) -> None:
    bench.fails = lambda script, settings: (
        Failed("error: no room") if settings.get("train.micro_batch_tokens") else None
    )
    code, record, _ = bench("--sides=ours", "--also=train.micro_batch_tokens=2048")
    assert code == 1
    assert list(record["sides"]) == ["ours"]
    assert record["results"]["ours-micro_batch_tokens=2048"]["failure"] == "error: no room"
    with pytest.raises(SystemExit, match="nothing was measured: ours: error: no room"):
        bench("--sides=ours", "--ours=train.micro_batch_tokens=2048")


def test_what_is_done_when_time_is_up_is_reported(bench: Bench) -> None:
    bench.fails = lambda script, settings: launch.TimeIsUp() if settings else None
    words = ("--sides=ours,ours-live", "--minutes=1")
    _, record, _ = bench(*words, "--rounds=2")
    late = "not finished within its share of --minutes"
    assert record["results"]["ours-live"]["failure"] == late
    assert record["settings"]["rounds"] == 2  # of the other
    with pytest.raises(SystemExit, match="the same command continues"):
        bench(*words, f"--keep={bench.out / 'kept'}")


def test_a_slow_side_leaves_time_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    three = [sides.Side(name, "x", {}) for name in "abc"]
    now, took = [0.0], {"a": 10.0, "b": 99.0, "c": 24.0}
    given: list[float] = []

    def run_side(side: Any, job: Any, scratch: Path, share: Any) -> dict[str, Any]:
        left = share.seconds_left()
        given.append(left)
        now[0] += min(left, took[side.name])
        if took[side.name] > left:
            raise launch.TimeIsUp
        return result(0.6, others_cpu=0.0, peak_memory_mb=1.0)

    monkeypatch.setattr(run, "run_side", run_side)
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    failures: dict[str, str] = {}
    job = job_of()
    hurry = launch.Launch(until=100.0, goes_on=False)
    results = run.run_rounds(job, three, 3, Path(), hurry, failures)
    # a has 50 of 100 and takes 10; b gets 45 of 90; c all of 45; then a half of 21, c the rest
    assert given == [50.0, 45.0, 45.0, 10.5, 11.0]
    assert failures == {"b": run.LATE}
    assert {name: len(rows) for name, rows in results.items()} == {"a": 1, "c": 1}


def test_ready_made_commands_are_taken() -> None:
    """Of docs/benchmarks/gpu.md, on a machine without the files that they name."""
    root = Path(__file__).resolve().parent.parent
    text = (root / "docs" / "benchmarks" / "gpu.md").read_text().replace("\\\n", "")
    commands = [
        line.split()[2:] for line in text.splitlines() if line.startswith("python scripts/bench.py")
    ]
    assert len(commands) == 7
    for words in commands:
        given = options.parse(options.parser(None), words)
        assert given.minutes is not None
        assert (given.device, given.precision, given.lr) == ("cuda", "bf16", 1e-5)
        assert given.length == (512 if given.lengths_of == "hh" else 1024)


def result(loss: float, **more: Any) -> dict[str, Any]:
    return {"figures": {"loss": [0.69, loss]}, "per_second": 1.0} | more


def test_the_side_that_differs_from_the_others_is_the_failed_one() -> None:
    same, other, nan = [result(0.6)], [result(0.5)], [result(float("nan"))]
    for results, wrong in (
        ({"ours": same, "trl-a": other, "trl-b": same}, {"trl-a"}),
        ({"ours": other, "trl-a": same, "trl-b": same}, {"ours"}),
        ({"ours": same, "trl-a": nan}, {"trl-a"}),
        ({"ours": same, "trl-a": other}, {"ours"}),
        ({"ours": same, "trl-a": same}, set()),
        ({"ours": [result(0.6), result(0.5)], "trl-a": [*same, *same]}, {"ours"}),
    ):
        failures: dict[str, str] = {}
        kept = drop_unequal(results, "fp32", failures)
        assert failures.keys() == wrong
        assert kept.keys() == results.keys() - wrong


def test_reasons_are_one_line() -> None:
    trace = "Traceback (most recent call last):\n  File 'x', line 1\n    boom()\n"
    assert launch.reason(1, f"{trace}{MEMORY}\nsome warning at exit\n") == MEMORY
    elastic = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n====\n"
    assert launch.reason(1, f"{trace}KeyError: 'a'\n{trace}{elastic}") == "KeyError: 'a'"
    assert launch.reason(1, "error: Liger has no kernels for gpt2\n") == (
        "error: Liger has no kernels for gpt2"
    )
    assert launch.reason(-9, "half a line") == "killed by SIGKILL"
    assert launch.reason(1, "") == "it wrote nothing"
    assert len(launch.reason(1, "ValueError: " + "x" * 900)) == 200


def test_names_of_candidates(capsys: Any) -> None:
    for task in ("dpo", "sft", "reward", "decode"):
        for name in (*sides.TRIED[task], *sides.TRIED_ON_CUDA[task]):
            assert sides.settings_of(task, name) is not None
        assert compare.main([f"--task={task}", "--list-candidates"]) == 0
        assert sides.TRIED[task][0] in capsys.readouterr().out
    found = sides.settings_of("dpo", "cached-4-liger-regional")
    assert found == {"gradient_checkpointing": False, "precompute_ref_log_probs": True,
                     "use_liger_kernel": True, "torch_compile": True, "regional": True,
                     "gradient_accumulation_steps": 4}  # fmt: skip
    for wrong in ("free", "cached-0", "cached-x", "", "ckpt"):
        with pytest.raises(SystemExit, match="is none of --task dpo"):
            sides.settings_of("dpo", wrong)
    half = sides.named("dpo", ["cached"], "bf16", "qlora")["cached"]
    assert half["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (None, ["ours", "trl-live"]),
        ("both", ["ours", "trl-live"]),
        ("trl", ["trl-live"]),
        ("trl-live", ["trl-live"]),
        ("ours,ours-live", ["ours", "ours-live", "trl-live"]),
        ("ours,trl-default", ["ours", "trl-default", "trl-live"]),
    ],
)
def test_candidates_beside_other_sides(words: str | None, names: list[str]) -> None:
    live = {"live": sides.settings_of("dpo", "live")}
    assert [side.name for side in sides.with_candidates("dpo", words, live)] == names
    with pytest.raises(SystemExit, match="--sides: no trl-best"):
        sides.with_candidates("dpo", "trl-best", live)


def test_the_fastest_candidate_is_the_best() -> None:
    job = job_of()
    speeds = {"ours": 8.0, "trl-cached": 2.0, "trl-cached-2": 4.0, "trl-live": 5.0}
    named = sides.named("dpo", ["cached", "cached-2", "live"], "fp32", "none")
    measured = sides.with_candidates("dpo", None, named)
    results = {
        name: [result(0.6, per_second=v, peak_memory_mb=v, reference_seconds=None)]
        for name, v in speeds.items()
    }
    roles = ratios.roles_of(job, measured, results)
    assert roles == {"best": "trl-cached-2", "best-live": "trl-live"}
    found = ratios.ratios(job, roles, results)
    assert found["ratio_vs_trl_best"]["median"] == 2.0  # not against the reference in the loop
    assert found["ratio_one_epoch_vs_trl_best"]["median"] == pytest.approx(8 / 5)
    del results["trl-cached-2"]
    assert ratios.roles_of(job, measured, results)["best"] == "trl-cached"
