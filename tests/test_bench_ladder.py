"""The ladder: every rung computes what the plain one does, and in the way that it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.activations import NewGELUActivation

from bench_workers import SCRIPTS, SMALL, Record, runner

RUNGS = ["plain", "cached", "scored", "packed", "shared", "fused", "extras", "bf16"]
VOCAB = 64


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Callable[..., Record]:
    return runner("bench_ladder", monkeypatch, capsys, tmp_path)


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module("bench_rung")


@pytest.fixture
def job(rung: Any, tmp_path: Path) -> Any:
    """Two steps of two pairs on a small model."""
    prepare, shapes = import_module("bench_prepare"), import_module("bench_shapes")
    shape = shapes.Shape("gpt2", 1, 32, 2, VOCAB)
    plan = prepare.Plan(str(tmp_path), shape, shape.context, pairs=4, length=40, seed=0)
    prepare.prepare(plan)
    return import_module("bench_job").Job(
        task="dpo", model=str(plan.model), ids=str(plan.ids),
        overrides=plan.data_overrides(str(plan.rows)), batch=2, warmup=1, steps=1, lr=1e-2,
        precision="fp32", device="cpu", threads=1, length=40, samples=1, new_tokens=1,
        scratch=str(tmp_path / "own"),
    )  # fmt: skip


def test_every_rung_computes_the_same(ladder: Any, tmp_path: Path) -> None:
    record = ladder(*SMALL, "--steps=2", "--lr=1e-2")
    assert list(record["rungs"]) == RUNGS == list(import_module("bench_rung").RUNGS)
    figures = {name: facts["figures_by_step"] for name, facts in record["rungs"].items()}
    losses = figures["plain"]["loss"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(losses) == 3
    assert abs(losses[1] - math.log(2)) > 1e-3  # a step was taken
    for name, of_rung in figures.items():
        for key, values in figures["plain"].items():
            tolerance = 1e-2 if name == "bf16" else 1e-5
            assert of_rung[key] == pytest.approx(values, rel=tolerance), (name, key)
    assert figures["bf16"] != figures["extras"]
    for facts in record["rungs"].values():
        one_epoch, alone = (facts[k]["median"] for k in ("per_second_one_epoch", "per_second"))
        assert one_epoch == alone if facts["adds"] == "plain padded" else one_epoch < alone
    check_page(record, tmp_path)


def check_page(record: Record, folder: Path) -> None:
    """A row a rung; the same conditions replace their section, others get one of their own."""
    path = folder / "ladder-gpt2-1x32-h2-v64-cpu.md"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = path.read_text()
    for facts in record["rungs"].values():
        assert text.count(f"\n| {facts['adds']} ") == 1
    assert "`python scripts/bench_ladder.py --layers=1" in text
    assert str(folder) not in text
    page, other = import_module("bench_ladder").PAGE, record["settings"] | {"batch": 7}
    page.keep(record | {"date": "2001-02-03"}, folder, path.stem)
    page.keep(record | {"settings": other, "date": "2004-05-06"}, folder, path.stem)
    text = path.read_text()
    assert text.count("\n## ") == 2
    assert text.count("2001-02-03, commit") == text.count("2004-05-06, commit") == 1
    assert record["date"] + ", commit" not in text


def test_unequal_rungs_are_not_published(
    ladder: Any, rung: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(job: Any) -> Record:
        result: Record = plain(job)
        return result | {"figures": result["figures"] | {"loss": [9.0, 9.0]}}

    plain = rung.RUNGS["plain"]
    monkeypatch.setattr(rung, "RUNGS", dict.fromkeys(RUNGS, plain) | {"shared": wrong})
    main = import_module("bench_ladder").main
    assert main([*SMALL, f"--out={tmp_path}"]) == 1
    assert not list(tmp_path.glob("ladder-*"))


def test_each_rung_is_judged_by_its_own_precision(rung: Any) -> None:
    agreement = import_module("bench_ladder").agreement
    plain, off = ([{"figures": {"loss": [loss]}}] for loss in (0.70, 0.71))
    assert agreement({"plain": plain, "bf16": off})["agree"]
    found = agreement({"plain": plain, "shared": off})
    assert not found["agree"]
    assert found["differences"]["shared"]["loss"] == pytest.approx(0.01)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """What trains: forwards, tokens embedded, rows at the output layer; and tokens embedded
    elsewhere (the reference; for dpo-run also the probe of a loaded model)."""
    found = dict.fromkeys(("forwards", "tokens", "rows", "elsewhere"), 0)

    def look(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == VOCAB:
            found["tokens" if module.training else "elsewhere"] += inputs[0].numel()
            found["forwards"] += module.training
        if isinstance(module, torch.nn.Linear) and module.out_features == VOCAB:
            found["rows"] += module.training * inputs[0].numel() // module.in_features

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def lengths(job: Any) -> list[tuple[int, int, int]]:
    """Of each pair: prompt, chosen, rejected."""
    return [(len(r["prompt"]), len(r["chosen"]), len(r["rejected"])) for r in job.rows()]


def test_each_rung_does_less(rung: Any, job: Any) -> None:
    """Counted by hand from the rows' lengths."""
    pairs = lengths(job)
    padded = sum(4 * max(p + max(c, r) for p, c, r in step) for step in (pairs[:2], pairs[2:]))
    scored = sum(c + r for _, c, r in pairs)
    apart = sum(2 * p + c + r - 2 for p, c, r in pairs)  # without the last tokens
    together = apart - sum(p for p, _, _ in pairs)
    expected = {
        "plain": (padded, padded), "cached": (padded, padded), "scored": (padded, scored),
        "packed": (apart, scored), "shared": (together, scored), "fused": (together, 0),
    }  # fmt: skip
    for name, (tokens, rows) in expected.items():
        with counted() as found:
            result = rung.RUNGS[name](replace(job, scratch=f"{job.scratch}-{name}"))
        assert (found["tokens"], found["rows"], found["forwards"]) == (tokens, rows, 2), name
        if name in ("plain", "cached", "scored"):
            assert found["elsewhere"] == padded
        assert (result["reference_seconds"] is None) == (name == "plain")


@pytest.mark.parametrize("name", ["packed", "shared"])
def test_packed_rungs_keep_the_token_budget(
    rung: Any, job: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rung.RUNGS[name](job)["figures"]
    prompts = {"packed": 2, "shared": 1}[name]
    sizes = [prompts * p + c + r for p, c, r in lengths(job)]
    assert sum(sizes[:2]) > max(sizes) < sum(sizes[2:])
    monkeypatch.setitem(rung.runtime.MICRO_BATCH_TOKENS, "cpu", max(sizes))  # a pair a row
    with counted() as found:
        split = rung.RUNGS[name](replace(job, scratch=f"{job.scratch}-split"))["figures"]
    assert found["forwards"] == 4
    for key, values in whole.items():
        assert split[key] == pytest.approx(values, rel=1e-5), key


def test_cpu_extras_can_be_switched_off(rung: Any, job: Any) -> None:
    from dpo_cli.config import ModelConfig
    from dpo_cli.model import load
    from dpo_cli.train import runtime

    def slow_activations() -> int:
        config = ModelConfig(path=job.model)
        model = load.load_model(config, load.load_tokenizer(config))
        return sum(isinstance(module, NewGELUActivation) for module in model.modules())

    kept = runtime.keep_freed_memory
    with rung.no_cpu_extras() as names:
        assert runtime.keep_freed_memory is not kept
        assert slow_activations() == 1
    assert "keep_freed_memory" in names
    assert len(names) >= 2
    assert runtime.keep_freed_memory is kept
    assert slow_activations() == 0
