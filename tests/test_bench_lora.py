"""The benchmark with adapters, on several devices and over several commands."""

from __future__ import annotations

import json
import math
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bench_workers import Record, in_process, job_of, use
from scripts.bench import compare, launch, run, sides
from scripts.bench.summary import compute_facts

TINY = (
    "--preset=mistral-7b", "--layers=1", "--width=64", "--heads=4", "--vocab=96", "--length=40",
    "--batch=4", "--steps=2", "--warmup=1", "--rounds=1", "--threads=1", "--busy-ok", "--json",
    "--r=4", "--lr=1e-2",
)  # fmt: skip
NAME = "llama-1x64-h4-v96-cpu"
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")


class Bench:
    """`bench.py` with its workers in this process. scripts: those that ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: Any, out: Path) -> None:
        self.capsys, self.out, self.scripts = capsys, out, []
        self.answers: dict[str, BaseException] = {}  # script -> what it ends with
        use(self.worker, monkeypatch)

    def worker(self, script: str, *others: Any) -> None:
        self.scripts.append(script)
        if script in self.answers:
            raise self.answers[script]
        in_process(script, *others)

    def __call__(self, *words: str) -> tuple[int, Record]:
        self.scripts.clear()
        code = compare.main([*TINY, f"--out={self.out}", *words])
        return code, json.loads(self.capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Bench:
    return Bench(monkeypatch, capsys, tmp_path)


@needs_trl
@pytest.mark.parametrize("lora", ["lora", "qlora"])
def test_adapters_do_the_same_work_as_trls(bench: Bench, lora: str, tmp_path: Path) -> None:
    if lora == "qlora":
        pytest.importorskip("bitsandbytes")
    code, record = bench(f"--lora={lora}", "--sides=ours,trl-best")
    assert code == 0
    ours, theirs = (record["sides"][name] for name in ("ours", "trl-best"))
    for name, values in ours["figures_by_step"].items():
        assert values == pytest.approx(theirs["figures_by_step"][name], rel=1e-5), name
    # That A is the same shows in what the steps change, not in the losses' leading digits.
    changes, others = ([x - math.log(2) for x in side["figures_by_step"]["loss"]]
                       for side in (ours, theirs))  # fmt: skip
    assert changes[0] == pytest.approx(0.0, abs=1e-6)
    assert min(map(abs, changes[1:])) > 1e-4
    assert changes == pytest.approx(others, rel=1e-3, abs=1e-6)
    speeds = [side["tflops_per_second"]["median"] for side in (ours, theirs)]
    assert speeds[0] / speeds[1] == pytest.approx(record["ratio_vs_trl_best"])
    assert ours["attention"] == "grouped"
    assert "mfu" not in ours  # a CPU's peak is not known
    text = (tmp_path / f"dpo-{lora}-{NAME}.md").read_text()
    assert "\ndpo-run: attention=grouped, at most 4,096 tokens per micro-batch.\n" in text
    assert "\n## LoRA rank 4, fp32, batch 4, " in text
    assert "Losses may differ by 0.001, log-probabilities by 0.0001 of their value." in text


@needs_trl
@pytest.mark.slow
def test_sides_of_two_commands_make_one_page(bench: Bench, tmp_path: Path) -> None:
    page, kept = tmp_path / f"dpo-lora-{NAME}.md", f"--keep={tmp_path / 'kept'}"
    words = ("--lora=lora", kept, "--minutes=5")
    assert bench(*words, "--sides=ours")[0] == 0
    assert bench.scripts == ["prepare", "ours"]
    assert not page.exists()  # one side alone is no comparison
    assert bench(*words, "--sides=ours,trl-best")[0] == 0
    assert bench.scripts == ["trl"]
    record = bench(*words, "--sides=trl-best")[1]
    assert bench.scripts == []
    assert record["results"]["trl-best"]["tflops"] > 0  # the work that ours counted before
    text = page.read_text()
    assert "speed, ours / TRL best" in text
    assert str(tmp_path) not in text

    (start,) = (tmp_path / "kept").glob("made-*/adapter-r4/adapter_model.safetensors")
    state = load_file(start)
    save_file({key: value.flip(-1) for key, value in state.items()}, start)
    page.unlink()
    code, record = bench(*words, "--sides=ours,trl-best", "--steps=3")
    assert code == 1
    assert not record["losses_agree"]["agree"]
    assert record["ratios"] == {}
    assert list(record["sides"]) == ["trl-best"]  # of two that differ, ours is in doubt
    why = record["results"]["ours"]["failure"]
    assert why.startswith("does not compute what trl-best does: losses differ by ")
    text = page.read_text()
    assert f"**ours failed: {why}.**" in text
    assert "**A side differs by more: its figures are left out.**" in text
    assert "ours / TRL" not in text


def test_the_adapter_is_the_one_a_run_starts_with(bench: Bench, tmp_path: Path) -> None:
    """PEFT's own numbers, in float32, though the weights under it are stored in bf16."""
    bench("--lora=lora", "--sides=ours", f"--keep={tmp_path / 'kept'}")
    (made,) = (tmp_path / "kept").glob("made-*")
    config = json.loads((made / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["num_key_value_heads"] == 1  # a fourth of the heads, as in the preset
    start = load_file(made / "adapter-r4" / "adapter_model.safetensors")
    weights = trained_from(made / "model")
    assert {key.split(".lora_")[0] for key in start} == {key.split(".lora_")[0] for key in weights}
    for key, value in start.items():
        assert value.equal(weights[key]), key
        assert value.any() == ("lora_A" in key)


def trained_from(folder: Path) -> dict[str, Any]:
    """The adapter of a run that is about to take its first step."""
    from dpo_cli.config import LoraConfig, ModelConfig
    from dpo_cli.model.adapters.active import Adaptation
    from dpo_cli.model.load import load_model, load_tokenizer

    source = ModelConfig(path=str(folder))
    how = Adaptation(LoraConfig(name="lora", r=4, alpha=8.0))
    model = load_model(source, load_tokenizer(source), 0, adaptation=how)
    return {f"base_model.model.{name.replace('.default', '')}": weight.detach()
            for name, weight in model.named_parameters() if "lora_" in name}  # fmt: skip


def test_without_trl_the_page_says_so(bench: Bench, tmp_path: Path) -> None:
    why = "TRL cannot be imported: ModuleNotFoundError: No module named 'trl'"
    bench.answers["trl"] = launch.Unavailable(why)
    code, record = bench("--search", "--sides=ours,trl-best")
    assert code == 0
    assert list(record["sides"]) == ["ours"]
    text = (tmp_path / f"dpo-{NAME}.md").read_text()
    assert f"**{why}: dpo-run only, without a comparison.**" in text
    assert ", without TRL\n" in text
    assert "Both sides" not in text
    with pytest.raises(SystemExit, match="TRL cannot be imported"):
        bench("--sides=trl")


def test_settings_that_fail_are_left_out_of_the_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = job_of(batch=4)
    asked: list[float | None] = []

    def worker(script: str, files: list[Path], *_: Any) -> None:
        settings = json.loads(files[0].read_text())["settings"]
        asked.append(settings["seconds"])
        if settings["seconds"] is None:
            raise launch.Failed("out of memory")
        result = {"seconds": settings["seconds"], "peak_memory_mb": 1.0, "figures": {"loss": [0.7]}}
        files[1].write_text(json.dumps(result))

    use(worker, monkeypatch)
    tried = [sides.Side(str(s), "trl", {"seconds": s}) for s in (None, 2.0, 1.0)]
    best, table = run.search(job, tried, tmp_path / "search")
    assert best == "1.0"
    assert [row.get("failed", False) for row in table] == [True, False, False]
    assert table[0]["why"] == "out of memory"
    assert run.search(job, tried, tmp_path / "search")[1] == table  # nothing is asked again
    assert asked == [None, 2.0, 1.0]
    with pytest.raises(SystemExit, match="none of the other side's settings runs here"):
        run.search(job, tried[:1], tmp_path / "other")


def test_a_worker_is_stopped_when_time_is_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "WORKERS", "toys")
    toys = tmp_path / "toys"
    toys.mkdir()
    (toys / "slow.py").write_text("import time; time.sleep(60)")
    (toys / "lacks.py").write_text(f"raise SystemExit({launch.UNAVAILABLE!r} + 'no trl')")
    started = time.monotonic()
    with pytest.raises(SystemExit, match="time is up"):
        launch.run_worker("slow", [], tmp_path / "a", 1, launch.Launch(until=started + 0.3))
    with pytest.raises(SystemExit, match="time is up"):
        launch.run_worker("slow", [], tmp_path / "b", 1, launch.Launch(until=started))
    assert time.monotonic() - started < 20
    assert not (tmp_path / "b").exists()
    with pytest.raises(launch.Unavailable, match="TRL cannot be imported: no trl"):
        launch.run_worker("lacks", [], tmp_path / "c", 1)


def test_several_devices_are_ranks_of_torchs_launcher() -> None:
    four = launch.Launch("other-python", devices=4)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command = four.command("trl")
    assert command == ["other-python", *words, "-m", "scripts.bench.workers.trl"]
    assert four.command("ours")[0] != "other-python"


def test_what_is_tried_on_the_other_side() -> None:
    known = sides.candidates("dpo", "cuda", "bf16", "lora", devices=2, batch=4)
    assert all(settings["dtype"] == "bfloat16" for settings in known.values())
    assert known["cached-sharded"]["fsdp"] is True
    assert "cached-2" in known
    assert "cached-4" not in known  # of half a pair
    plain = sides.candidates("dpo", "cuda", "bf16", batch=4)
    assert not any("dtype" in settings or "fsdp" in settings for settings in plain.values())
    chosen = sides.select(sides.sides_of("dpo", {}), "ours,trl")
    assert [side.name for side in chosen] == ["ours", "trl-default", "trl-best", "trl-best-live"]


def test_mfu_is_of_the_same_work_on_both_sides() -> None:
    """By hand: 6 TFLOP in 2 s and in 4 s, of two devices of 10 TFLOP/s."""
    ours = [{"seconds": 2.0, "flops": 6e12, "peak_tflops": 10.0}]
    theirs = [{"seconds": 4.0, "flops": 0.0}]
    for rows, speed in ((ours, 3.0), (theirs, 1.5)):
        found = compute_facts(ours[0], rows, 2)
        assert found["tflops_per_second"]["median"] == pytest.approx(speed)
        assert found["mfu"]["median"] == pytest.approx(speed / 20)
    assert compute_facts(theirs[0], theirs, 2) == {}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--lora=lora", "--task=sft"], "--lora: only with --task dpo"),
        (["--candidate=cached", "--search"], "--candidate: names what --search would look for"),
        (["--candidate=cached-8-2"], "--candidate cached-8-2: is none of --task dpo"),
        (["--candidate=cached-8"], "--candidate cached-8: --batch 4 must be a multiple of 8"),
        (["--also=compile"], '--also: write "KEY=VALUE KEY=VALUE"'),
        (["--lengths=tldr", f"--data={__file__}"], "--lengths, .*: of synthetic pairs"),
        (["--batch=6", "--devices=4"], "--batch 6: must be a multiple of --devices 4"),
        (["--ours=compile"], "--ours: write KEY=VALUE"),
        (["--devices=2", "--task=decode"], "--devices: measures training"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], why: str) -> None:
    with pytest.raises(SystemExit, match=why):
        compare.main([*TINY, *words])
