"""Splits, the hold-out, fingerprints, the cache on disk, and what inspect shows."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer

import small_tokenizers
from dpo_cli.config import (
    HhDataConfig,
    ImdbDataConfig,
    JsonlDataConfig,
    SeDataConfig,
    SentimentDataConfig,
)
from dpo_cli.data import part as reading
from dpo_cli.data.adapt import adapt
from dpo_cli.data.dataset import (
    EncodedSplits,
    fingerprint,
    load_encoded,
    load_splits,
)
from dpo_cli.data.drops import DropReport
from dpo_cli.data.held_out import hold_out
from dpo_cli.data.show import describe, token_text
from dpo_cli.data.sources import Rows
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.records import EncodedExample, PreferenceExample

ROWS = [
    {"prompt": f"w{i % 30} the", "chosen": f" w{i}", "rejected": f" w{99 - i}"} for i in range(40)
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def encoded_lists(examples: list[EncodedExample]) -> list[Any]:
    return [
        (e.row, e.scores, *(a.tolist() for a in (e.prompt_ids, *e.response_ids))) for e in examples
    ]


class TestAdapt:
    def read(self, rows: list[dict[str, Any]], **config: Any) -> tuple[list[int], DropReport]:
        drops = DropReport()
        kept = adapt(Rows(rows, "pairs.jsonl", None), JsonlDataConfig(**config), 0, drops)
        return [e.row for e in kept], drops

    def test_bad_rows_are_counted_by_reason(self) -> None:
        good = ROWS[0]
        rows = [
            good,
            good | {"rejected": ""},
            good | {"rejected": " \n\t"},
            good | {"chosen": None},
            good | {"rejected": 5},
            {"prompt": "x", "chosen": "y"},
            good | {"rejected": good["chosen"]},
            good | {"chosen": "half \ud800"},
            good | {"prompt": "half \ud800"},
            good | {"prompt": [{"role": "user", "content": "half \ud800"}]},
            good | {"prompt": [{"role": "user", "content": "a \U0001f600"}]},
        ]
        kept, drops = self.read(rows)
        assert kept == [0, 10]
        assert drops.read == 11
        assert drops.dropped == {
            "rejected is blank": [1, 2],
            "chosen is None, not text": [3],
            "rejected is int, not text": [4],
            "rejected is missing": [5],
            "chosen and rejected are the same": [6],
            "text contains a lone surrogate, which is not a valid character": [7, 8, 9],
        }

    def test_column_missing_from_the_first_row_names_the_key(self) -> None:
        rows = [{"ask": "q", "chosen": "a", "rejected": "b"}] * 3
        with pytest.raises(DataError) as caught:
            self.read(rows)
        assert str(caught.value) == (
            "pairs.jsonl: no column 'prompt' (it has: ask, chosen, rejected): "
            "set data.prompt_field="
        )
        assert self.read(rows, prompt_field="ask")[0] == [0, 1, 2]
        with pytest.raises(DataError, match=r"'win' .*data\.chosen_field="):
            self.read(rows, prompt_field="ask", chosen_field="win")
        with pytest.raises(DataError, match=r"'text' .*data\.text_field="):
            adapt(Rows(rows, "x", None), ImdbDataConfig(), 0, DropReport())
        with pytest.raises(DataError, match=r"no column 'question'.*data=jsonl"):
            adapt(Rows(rows, "x", None), SeDataConfig(), 0, DropReport())

    def test_none_left(self) -> None:
        with pytest.raises(DataError) as caught:
            self.read([ROWS[0] | {"chosen": " "}] * 7 + [ROWS[0] | {"prompt": None}])
        assert caught.value.exit_code == 3
        assert str(caught.value) == (
            "pairs.jsonl: no row can be used: "
            "dropped 7 of 8 rows: chosen is blank (rows 0, 1, 2, 3, 4 and 2 more); "
            "dropped 1 of 8 rows: prompt is None, not text (row 7)"
        )

    def test_one_bad_pair_of_a_question_leaves_the_others(self) -> None:
        answers = [{"text": t, "pm_score": s} for t, s in (("a", 3), ("", 2), ("b", 1))]
        drops = DropReport()
        rows = [{"question": "q", "answers": answers}]
        kept = adapt(Rows(rows, "se", None), SeDataConfig(), 0, drops)
        assert [e.responses for e in kept] == [(" a", " b")]
        assert drops.dropped == {"rejected is blank": [0], "chosen is blank": [0]}

    def test_max_rows_counts_source_rows(self) -> None:
        kept, drops = self.read(ROWS, max_rows=15)
        assert len(kept) == drops.read == 15
        assert kept == sorted(set(kept))


def pairs(prompts: list[str]) -> list[PreferenceExample]:
    return [PreferenceExample(p, (f"a{i}", f"b{i}"), i) for i, p in enumerate(prompts)]


class TestHoldOut:
    @settings(max_examples=200, deadline=None)
    @given(
        sizes=st.lists(st.integers(1, 6), min_size=2, max_size=20),
        share=st.floats(0, 1),
        seed=st.integers(0, 5),
    )
    def test_prompts_stay_on_one_side(self, sizes: list[int], share: float, seed: int) -> None:
        prompts = [f"p{seed}-{i}" for i, n in enumerate(sizes) for _ in range(n)]
        examples = pairs(prompts)
        count = int(share * (len(examples) - 1))
        try:
            train, held = hold_out(examples, count)
        except ConfigError:
            assert 0 < count < max(sizes)
            return
        assert {e.prompt for e in train}.isdisjoint(e.prompt for e in held)
        assert sorted([*train, *held], key=lambda e: e.row) == examples
        assert [e.row for e in train] == sorted(e.row for e in train)
        assert [e.row for e in held] == sorted(e.row for e in held)
        assert count - max(sizes) < len(held) <= count

    def test_messages_are_grouped_by_content(self) -> None:
        talk = [{"role": "user", "content": "q"}]
        examples = [PreferenceExample(list(talk), ("a", "b"), i) for i in range(4)]
        same = PreferenceExample("q", ("a", "b"), 4)
        others = pairs([f"p{i}" for i in range(20)])
        for count in range(5, 20):
            _, held = hold_out([*examples, same, *others], count)
            assert len({same in held, *(e in held for e in examples)}) == 1

    def test_what_is_held_out_is_a_matter_of_content(self) -> None:
        """Not of a seed, of the file's order, or of what else is in it; a larger share holds out
        the same prompts and more."""
        examples = pairs([f"p{i}" for i in range(200)])
        chosen = {e.prompt for e in hold_out(examples, 50)[1]}
        assert chosen == {e.prompt for e in hold_out(examples[::-1], 50)[1]}
        fewer = {e.prompt for e in hold_out(examples[10:], 50)[1]}
        assert len(chosen & fewer) >= 40
        smaller = [{e.prompt for e in hold_out(examples, count)[1]} for count in (10, 20, 50, 90)]
        assert all(a < b for a, b in itertools.pairwise(smaller))
        # not simply the first rows: their mean place is about the middle
        assert 60 < np.mean([e.row for e in hold_out(examples, 50)[1]]) < 140

    def test_prompt_too_frequent(self) -> None:
        with pytest.raises(
            ConfigError, match=r"data\.eval_rows=2 .* set data\.eval_rows=4 or more"
        ):
            hold_out(pairs(["p"] * 3 + ["q"] * 4), 2)


class TestLoadSplits:
    def test_held_out_rows(self, file: Path) -> None:
        splits = load_splits(JsonlDataConfig(path=str(file), eval_rows=10), 0)
        assert (len(splits.train), len(splits.eval)) == (30, 10)
        assert (splits.origin, splits.revision) == ("pairs.jsonl", None)
        assert load_splits(JsonlDataConfig(path=str(file)), 0).eval == []

    @pytest.mark.parametrize("max_rows", [None, 20, 39])
    def test_neither_seed_nor_max_rows_moves_what_is_held_out(
        self, file: Path, max_rows: int | None
    ) -> None:
        wanted = {e.row for e in load_splits(JsonlDataConfig(path=str(file), eval_rows=10), 0).eval}
        config = JsonlDataConfig(path=str(file), eval_rows=10, max_rows=max_rows)
        for seed in (0, 3):
            splits = load_splits(config, seed)
            assert {e.row for e in splits.eval} == wanted
            assert len(splits.train) == (max_rows or 40) - 10
        share = JsonlDataConfig(path=str(file), eval_rows=0.25)
        assert {e.row for e in load_splits(share, 1).eval} == wanted

    def test_too_many_held_out(self, file: Path) -> None:
        with pytest.raises(ConfigError, match=r"data\.eval_rows=40 leaves no training rows"):
            load_splits(JsonlDataConfig(path=str(file), eval_rows=40), 0)

    def test_eval_file(self, file: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.jsonl"
        other.write_text(
            "\n".join(
                json.dumps({**row, "prompt": f"another, {row['prompt']}"})
                for row in [ROWS[0], ROWS[1] | {"chosen": ""}, *ROWS[2:9]]
            )
        )
        config = JsonlDataConfig(path=str(file), eval_path=str(other))
        splits = load_splits(config, 0)
        assert [len(splits.train), len(splits.eval)] == [40, 8]
        assert splits.drops.dropped == {"eval split: chosen is blank": [1]}
        config.eval_rows = 3
        assert [len(s) for s in (load_splits(config, 0).train, load_splits(config, 0).eval)] == [
            40,
            3,
        ]

    def test_far_fewer_than_asked_are_told(self, tmp_path: Path) -> None:
        """Of two prompts, the one that comes first has one example, the other twenty."""
        first, second = sorted("ab", key=lambda p: hashlib.sha256(p.encode()).digest())
        rows = [{"prompt": p, "chosen": f"c{i}", "rejected": f"r{i}"}
                for i, p in enumerate([first, *[second] * 20])]  # fmt: skip
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for count, held in ((10, 1), (1, 1)):
            splits = load_splits(JsonlDataConfig(path=str(path), eval_rows=count), 0)
            assert [len(splits.train), len(splits.eval)] == [21 - held, held]
            told = [what for what in splits.drops.noted if "holds out only 1 examples" in what]
            assert len(told) == (count == 10)

    def test_generated(self) -> None:
        config = SentimentDataConfig(rows=20, eval_rows=5, responses=2)
        splits = load_splits(config, 0)
        assert [len(splits.train), len(splits.eval)] == [20, 5]
        assert splits.revision is None
        share = load_splits(dataclasses.replace(config, eval_rows=0.25), 0)
        assert [e.prompt for e in share.eval] == [e.prompt for e in splits.eval]
        again = load_encoded(config, small_tokenizers.byte_level(), 256, 0, None)
        assert (
            len(again.train) + len(again.eval) + sum(map(len, again.drops.dropped.values())) == 25
        )


def example(*ids: list[int], row: int = 0) -> EncodedExample:
    arrays = [np.array(i, np.int32) for i in ids]
    return EncodedExample(arrays[0], tuple(arrays[1:]), row)


def test_fingerprint_is_of_ids_order_and_borders() -> None:
    base = [example([1, 2], [3], [4]), example([5], [6], [7])]
    variants = [
        base[::-1],
        base[:1],
        [example([1], [2, 3], [4]), base[1]],
        [example([1, 2], [3], [8]), base[1]],
        [example([1, 2], [3]), example([4], [5]), example([6], [7])],
        [example([1, 2], [3], [4], [5], [6], [7])],
        [],
    ]
    assert len({fingerprint(v) for v in [base, *variants]}) == len(variants) + 1
    assert fingerprint([replace(e, row=9) for e in base]) == fingerprint(base)


class TestCache:
    def load(self, file: Path, cache: Path, **config: Any) -> EncodedSplits:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        ranked = "ranked" in rows[0]
        settings = {"responses_field": "ranked", "scores_field": "s"} if ranked else {}
        full = JsonlDataConfig(path=str(file), **({"eval_rows": 8} | settings | config))
        return load_encoded(full, small_tokenizers.byte_level(), 64, 0, cache)

    def test_second_load_is_the_first(
        self, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = [
            {"prompt": f"q{i}", "ranked": ["a", "b", "c"][: 1 + i % 3], "s": [3, 2, 1][: 1 + i % 3]}
            for i in range(20)
        ]
        rows[4]["ranked"] = rows[4]["s"] = []
        rows[5]["prompt"] = "long " * 100
        file.write_text("\n".join(map(json.dumps, rows)))
        first = self.load(file, tmp_path / "cache")
        monkeypatch.setattr(reading, "read_source", None)  # it must not be asked again
        second = self.load(file, tmp_path / "cache")
        assert encoded_lists(second.train) == encoded_lists(first.train)
        assert encoded_lists(second.eval) == encoded_lists(first.eval)
        assert replace(second, train=[], eval=[]) == replace(first, train=[], eval=[])
        assert first.drops.dropped == {"ranked is an empty list, not a list of responses": [4]}
        assert list(first.drops.truncated.values()) == [[5]]
        ids = second.train[0].prompt_ids
        assert ids.dtype == np.int32
        assert ids.flags.writeable  # torch.from_numpy warns otherwise

    def test_prompts_are_kept_as_their_source_has_them(
        self, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Texts of any script; after the first load no source is read."""
        texts = [
            "plain",
            "naïve 漢字 🎉",
            'a "quote" \\ and\n\u2028 lines',
            "\t",
        ]
        rows = [{"prompt": f"{text} {i}", "chosen": "a", "rejected": "b"}
                for i, text in enumerate(texts * 6)]  # fmt: skip
        file.write_text("\n".join(map(json.dumps, rows)))
        for _ in range(2):  # the second time out of the cache
            found = self.load(file, tmp_path / "cache")
            examples = [*found.train, *found.eval]
            assert len(examples) == len(rows)
            assert all(e.prompt == rows[e.row]["prompt"] for e in examples)
            monkeypatch.setattr(reading, "read_source", None)

    def test_changes_are_seen(self, file: Path, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        base = self.load(file, cache)
        assert self.load(file, cache, eval_rows=9).fingerprint != base.fingerprint
        assert self.load(file, cache, max_length=8).fingerprint != base.fingerprint
        file.write_text(file.read_text().replace(" w7", " w77"))
        assert self.load(file, cache).fingerprint != base.fingerprint
        assert len(list(cache.iterdir())) == 4
        key = JsonlDataConfig(path=str(file), eval_rows=8)
        other = load_encoded(key, small_tokenizers.words(), 64, 0, cache)
        assert other.train[0].prompt_ids.tolist() == [other.train[0].row % 30, 101]

    def test_cut_responses_are_other_rows(self, file: Path, tmp_path: Path) -> None:
        """One row is dropped, one ends early: no flag slips to a neighbour."""
        cut = {(i, side) for i in range(40) for side in (0, 1) if (i + side) % 3 == 0}
        rows = [row | {"ended": [(i, s) not in cut for s in (0, 1)]} for i, row in enumerate(ROWS)]
        rows[4]["chosen"] = " "
        file.write_text("\n".join(map(json.dumps, rows)))
        cache = tmp_path / "cache"
        base = self.load(file, cache)
        for _ in range(2):  # the second time out of the cache
            found = self.load(file, cache, finished_field="ended")
            assert found.fingerprint != base.fingerprint
            examples = [*found.train, *found.eval]
            assert {e.row for e in examples} == {*range(40)} - {4}
            eos = small_tokenizers.byte_level().eos_token_id
            for e in examples:
                ended = [ids[-1] == eos for ids in e.response_ids]
                assert ended == [(e.row, side) not in cut for side in (0, 1)]
        assert len(list(cache.iterdir())) == 2

    @pytest.mark.parametrize("damage", ["cut", "empty", "flip", "zeros"])
    def test_damaged_file_is_rebuilt(
        self, damage: str, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = tmp_path / "cache"
        first = self.load(file, cache)
        (stored,) = cache.iterdir()
        content = bytearray(stored.read_bytes())
        if damage == "flip":
            content[-5] ^= 1
        broken = {"cut": content[:-9], "empty": b"", "flip": content, "zeros": bytes(len(content))}
        stored.write_bytes(bytes(broken[damage]))
        with caplog.at_level(logging.WARNING):
            second = self.load(file, cache)
        assert "is damaged" in caplog.text
        assert second.fingerprint == first.fingerprint
        caplog.clear()
        assert self.load(file, cache).fingerprint == first.fingerprint
        assert caplog.text == ""

    def test_cache_that_cannot_be_written(
        self, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        blocked = tmp_path / "cache"
        blocked.write_text("a file where the folder should be")
        with caplog.at_level(logging.WARNING):
            assert len(self.load(file, blocked).train) == 32
        assert "not cached" in caplog.text

    def test_nothing_else_is_left_in_the_folder(self, file: Path, tmp_path: Path) -> None:
        self.load(file, tmp_path / "cache")
        assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".safetensors"]


class TestShow:
    def show(self, splits: EncodedSplits, tokenizer: Any, **options: Any) -> str:
        console = Console(width=160, record=True, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(*describe(splits, tokenizer, **options))
        return console.export_text()

    def test_what_is_shown(self, file: Path) -> None:
        row = {"prompt": "[bold red]the[/] \x1b[31m\x07", "chosen": " cat\n", "rejected": "w" * 99}
        file.write_text("\n".join(map(json.dumps, [row, row | {"chosen": ""}])))
        tokenizer = small_tokenizers.byte_level()
        config = JsonlDataConfig(path=str(file), max_length=60)
        text = self.show(load_encoded(config, tokenizer, 64, 0, None), tokenizer)
        assert "\x1b" not in text
        assert "\x07" not in text
        for part in ("\\x1b", "\\x07", "\\n", "·cat", "EOS", "truncated: no EOS", "more"):
            assert part in text
        assert "dropped 1 of 2 rows: chosen is blank (row 1)" in text
        assert "1 training and 0 held-out examples of 2 rows" in text
        roles = Counter(line.split("│")[-2].strip() for line in text.splitlines() if "│" in line)
        assert roles["EOS"] == 1

    def test_percentiles(self, file: Path) -> None:
        rows = [
            {"prompt": "w0 " * n, "chosen": "w1 " * (2 * n), "rejected": "w2"}
            for n in range(1, 102)
        ]
        file.write_text("\n".join(map(json.dumps, rows)))
        config = JsonlDataConfig(path=str(file))
        splits = load_encoded(config, small_tokenizers.words(), 4096, 0, None)
        lines = self.show(splits, small_tokenizers.words(), examples=0).splitlines()
        cells = {
            line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]]
            for line in lines
            if line.count("│") == 6 and "p50" not in line
        }
        assert cells["prompt"] == ["6", "51", "96", "101"]
        assert cells["chosen"] == ["13", "103", "193", "203"]  # with EOS
        assert cells["rejected"] == ["2", "2", "2", "2"]

    def test_empty_split(self, file: Path) -> None:
        config = JsonlDataConfig(path=str(file))
        splits = load_encoded(config, small_tokenizers.words(), 64, 0, None)
        assert "0 eval examples" in self.show(splits, small_tokenizers.words(), split="eval")

    def test_token_text_keeps_sentencepiece_spaces(self) -> None:
        tokenizer = small_tokenizers.llama()
        vocab = tokenizer.get_vocab()
        assert token_text(vocab["▁dog"], tokenizer) == "·dog"
        assert token_text(vocab["<0x0A>"], tokenizer) == "\\n"


class TestRealFiles:
    def test_hh(self, shared: Path, tmp_path: Path) -> None:
        path = shared / "data/preferences/hh_harmless_base_test.jsonl.gz"
        tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/stories260k-llama")
        config = HhDataConfig(path=str(path), eval_rows=312)
        splits = load_encoded(config, tokenizer, 512, 0, tmp_path)
        assert splits.drops.read == 2312
        assert splits.drops.dropped == {"chosen is blank": [86, 516, 925, 1103]}
        assert (len(splits.train), len(splits.eval)) == (1996, 312)
        prompts = [{e.prompt_ids.tobytes() for e in side} for side in (splits.train, splits.eval)]
        assert len(prompts[0] & prompts[1]) <= 1  # long ones may become equal once cut
        texts = load_splits(config, 0)
        assert {e.prompt for e in texts.train}.isdisjoint(e.prompt for e in texts.eval)

    def test_autoj_bad_rows_are_reported_by_number(self, shared: Path) -> None:
        path = shared / "data/preferences/autoj_human.jsonl.gz"
        splits = load_splits(JsonlDataConfig(path=str(path), eval_rows=100), 0)
        assert splits.drops.summary_lines() == [
            "dropped 1 of 1,019 rows: rejected is blank (row 423)",
            "dropped 1 of 1,019 rows: chosen and rejected are the same (row 924)",
        ]
        # one short: the next prompt has several rows, which stay together
        assert (len(splits.train), len(splits.eval)) == (918, 99)

    def test_many_answers_a_prompt(self, shared: Path) -> None:
        path = shared / "data/preferences/finegrained_qa_human.jsonl.gz"
        splits = load_splits(JsonlDataConfig(path=str(path), eval_rows=200), 0)
        assert 190 < len(splits.eval) <= 200  # up to the first prompt that does not fit
        assert {e.prompt for e in splits.train}.isdisjoint(e.prompt for e in splits.eval)

    def test_imdb_sample_has_both_labels(self, shared: Path) -> None:
        path = shared / "data/sentiment/imdb_train.jsonl.gz"
        splits = load_splits(ImdbDataConfig(path=str(path), max_rows=200, eval_rows=50), 0)
        assert (len(splits.train), len(splits.eval)) == (150, 50)
        first_half = sum(e.row < 12_500 for e in splits.train)  # the file is sorted by label
        assert 50 < first_half < 100
