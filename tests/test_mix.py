"""data=mix: shares, held-out rows and duplicates over several sources."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from composing import problems
from dpo_cli.config.datasets import MixDataConfig
from dpo_cli.config.literals import as_override
from dpo_cli.data.dataset import load_splits
from dpo_cli.data.part import Splits
from small_runs import metrics, train_on_rows


def write(path: Path, prompts: range, chosen: str = " good", rejected: str = " bad") -> str:
    rows = [{"prompt": f"Q{i}?", "chosen": chosen, "rejected": rejected} for i in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talks(path: Path, count: int) -> str:
    heads = [f"\n\nHuman: H{i}\n\nAssistant:" for i in range(count)]
    rows = [{"chosen": f"{head} fine", "rejected": f"{head} no"} for head in heads]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(seed: int = 0, eval_rows: float | None = None, **sources: Any) -> Splits:
    return load_splits(MixDataConfig(sources=sources, eval_rows=eval_rows), seed)


def prompts(examples: Any) -> Counter[str]:
    return Counter(str(example.prompt).strip() for example in examples)


def test_each_source_is_read_by_its_adapter_and_taken_by_its_share(tmp_path):
    own, hh = write(tmp_path / "own.jsonl", range(20)), talks(tmp_path / "hh.jsonl", 10)
    splits = read(own={"path": own, "share": 0.5}, hh={"data": "hh", "path": hh, "share": 2})
    found = prompts(splits.train)
    assert Counter(found.values()) == {1: 10, 2: 10}
    assert {count for prompt, count in found.items() if "Human" in prompt} == {2}
    assert splits.drops.reading == [
        "own: 20 rows, read as pairs (prompt, chosen and rejected)",
        "own: 10 to train on (share 0.5 of 20), 0 held out",
        "hh: 20 to train on (share 2 of 10), 0 held out",
    ]
    assert splits.drops.read == 30
    assert splits.origin == "own + hh"


def test_a_share_is_a_seeded_sample(tmp_path):
    own = write(tmp_path / "own.jsonl", range(40))
    takes = [prompts(read(seed, own={"path": own, "share": 0.25}).train) for seed in (0, 0, 1)]
    assert takes[0] == takes[1] != takes[2]


def test_rows_are_held_out_over_all_sources_and_shares_do_not_move_them(tmp_path):
    a, b = write(tmp_path / "a.jsonl", range(30)), write(tmp_path / "b.jsonl", range(20, 60), " ok")
    splits = read(0, 0.2, a={"path": a}, b={"path": b})
    assert len(splits.eval) >= 10
    assert not prompts(splits.train).keys() & prompts(splits.eval).keys()
    other = read(7, 0.2, b={"path": b, "share": 0.5}, a={"path": a, "share": 3})
    assert prompts(other.eval) == prompts(splits.eval)


def test_repeated_pairs_and_held_out_prompts_are_dropped_and_counted(tmp_path):
    a, b = write(tmp_path / "a.jsonl", range(10)), write(tmp_path / "b.jsonl", range(5, 15))
    held = write(tmp_path / "held.jsonl", range(3))
    splits = read(a={"path": a}, b={"path": b, "eval_path": held})
    assert prompts(splits.train) == Counter(f"Q{i}?" for i in range(3, 15))
    assert splits.drops.dropped == {
        "a: the prompt is held out": [0, 1, 2],
        "b: prompt and responses occur before": [0, 1, 2, 3, 4],
    }


@pytest.mark.parametrize(
    ("sources", "line"),
    [
        ("{}", "data.sources={}: nothing to mix; give {a: {path: a.jsonl}, b: {path: b.jsonl}}"),
        ("{a: {}}", "data.sources.a={}: expected keys such as {path: pairs.jsonl}"),
        ("{a: {path: no.jsonl}}", "data.sources.a.path=no.jsonl: no such file or folder"),
        ("{a: {data: hhh, path: x}}",
         "data.sources.a.data=hhh: no dataset that is read from files; did you mean hh?"),
        ("{a: {share: 0, path: x}}",
         "data.sources.a.share=0: must be a number above 0, at most 100"),
        ("{a: {max_length: 9, path: x}}",
         "data.sources.a.max_length: is common to all sources; set data.max_length"),
        ("{a: {data: hh, format: text}}", "data.sources.a.format: unknown key; "),
        ("{a: {data: hh}}", "data.sources.a: no rows; give its path or hub_id"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_source_is_told(sources, line):
    told = problems(["stage=dpo", "data=mix", f"data.sources={sources}"])
    assert any(found.startswith(line) for found in told), told


def test_keys_of_one_file_are_refused():
    told = problems(["stage=dpo", "data=mix", "data.path=x.jsonl"])
    assert "data.path=x.jsonl: has no effect with data=mix; set it in data.sources" in told


def test_a_run_trains_on_a_mix_and_goes_on_bit_for_bit(tmp_path):
    a, b = write(tmp_path / "a.jsonl", range(20)), talks(tmp_path / "b.jsonl", 10)
    sources = {"a": {"path": a}, "b": {"data": "hh", "path": b, "share": 1.5}}
    words = ("stage=dpo", "data=mix", as_override("data.sources", sources), "data.eval_rows=6",
             "train.max_steps=4", "train.save_every_steps=2", "train.batch_size=4")  # fmt: skip
    for name in ("whole", "again"):
        train_on_rows(tmp_path / name, *words)
    shutil.rmtree(tmp_path / "again" / "final")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-4")
    (tmp_path / "again" / "summary.json").unlink()
    train_on_rows(tmp_path / "again", *words, "resume=true")
    losses = [[row.get("loss") for row in metrics(tmp_path / n)] for n in ("whole", "again")]
    assert losses[0] == losses[1]
