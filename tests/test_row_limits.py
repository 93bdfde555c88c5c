"""Rows, lines, cells and files within stated limits; long texts are cut before they are encoded."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import small_tokenizers
from dpo_cli.config import JsonlDataConfig
from dpo_cli.data import encode
from dpo_cli.data.adapt import adapt
from dpo_cli.data.cut import CHARACTERS, EXAMPLES, chunks, cut
from dpo_cli.data.drops import DropReport
from dpo_cli.data.files import MB
from dpo_cli.data.held_out import hold_out
from dpo_cli.data.limits import Limits
from dpo_cli.data.sources import Rows, read_rows
from dpo_cli.data.tokens import Piece
from dpo_cli.data.trained import prompt_words
from dpo_cli.errors import DataError
from dpo_cli.records import PreferenceExample, most_characters

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def refused(path: Path, **limits: float) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(JsonlDataConfig(path=str(path), **limits), "train")
    return str(caught.value)


def test_a_line_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR | {"x": "y" * MB}) + "\n")
    assert len(read_rows(JsonlDataConfig(path=str(path)), "train").rows) == 2
    assert refused(path, max_row_mb=1) == (
        f"{path}, line 2: longer than 1 MB: shorten it, or raise data.max_row_mb"
    )
    assert "data.max_file_mb" in refused(path, max_file_mb=0.5)


def test_a_compressed_file_is_read_no_further_than_its_limits(tmp_path: Path) -> None:
    """A line of a gigabyte, and rows that take more memory than their bytes."""
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", 9) as file:
        for _ in range(8):
            file.write(b" " * (16 * MB))
    tracemalloc.start()
    assert "line 1: longer than 64 MB" in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 256 * MB
    tracemalloc.stop()
    for content in (b"\n", b"{}\n"):
        path.write_bytes(gzip.compress(content * 10_000_000, 9))
        assert "more than 64 MB of rows: split it, or set data.max_file_mb" in refused(path)


def test_cells_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = "\n".join(["y" * 1000] * 2000)
    path.write_text(f'prompt,chosen,rejected\na,b,"{lines}"\n')
    assert len(read_rows(JsonlDataConfig(path=str(path)), "train").rows) == 1
    told = "a cell is longer than 1 MB: shorten it, or raise data.max_row_mb"
    assert told in refused(path, max_row_mb=1)
    path.write_text("prompt,chosen,chosen\na,b,c\n")
    assert refused(path) == f"{path}: two columns are named 'chosen'; rename one"
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "chosen", "chosen"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "two columns are named 'chosen'" in refused(tmp_path / "a.parquet")


def test_keys_that_stand_twice(tmp_path: Path) -> None:
    twice = '{"prompt": "a", "chosen": "b", "chosen": "c"}'
    for name, content in (
        ("a.jsonl", twice),
        ("a.json", f"[{twice}]"),
        ("b.jsonl", f'{{"m": [{twice}]}}'),
    ):
        (tmp_path / name).write_text(content)
        assert "the key 'chosen' occurs twice" in refused(tmp_path / name)


def adapted(row: dict[str, Any], **limits: float) -> list[PreferenceExample]:
    return adapt(Rows([row], "x.json", None), JsonlDataConfig(**limits), 0, DropReport())


def test_rows_of_any_source() -> None:
    deep: Any = "x"
    for _ in range(50):
        deep = [{"a": deep}]
    with pytest.raises(DataError, match=r"^x\.json, row 0: nested more than 64 deep$"):
        adapted(PAIR | {"more": deep})
    long = PAIR | {"more": [{"a": "y" * MB}, "y"]}
    with pytest.raises(DataError, match="row 0: longer than 1 MB"):
        adapted(long, max_row_mb=1)
    assert len(adapted(long)) == 1


@pytest.mark.parametrize("name", ["byte level", "llama", "chatml"])
@pytest.mark.parametrize("keep", ["start", "end"])
def test_a_cut_text_has_the_tokens_of_the_whole_one(
    name: str, keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the end that is truncated anyway."""
    tokenizer = {
        "byte level": small_tokenizers.byte_level,
        "llama": small_tokenizers.llama,
        "chatml": small_tokenizers.chatml,
    }[name]()
    rng = np.random.default_rng(0)
    words = rng.choice(["good", "bad ", "\nfilm", "a", " the  "], 120_000)
    text = " ".join(words)
    assert len(text) > 2 * most_characters(512)
    prompt: Any = [{"role": "user", "content": text}] if name == "chatml" else text
    example = PreferenceExample(prompt, (f" good{text}", " bad film"), 0)
    config, limits = JsonlDataConfig(keep_prompt=keep), Limits(512, 256)

    def encoded() -> tuple[Any, DropReport]:
        drops = DropReport()
        (found,) = encode.encode_examples([example], tokenizer, config, limits, drops)
        ids = [found.prompt_ids.tolist(), *(r.tolist() for r in found.response_ids)]
        return ids, drops

    short, drops = encoded()
    monkeypatch.setattr(encode, "most_characters", lambda tokens: 10**9)
    assert (short, drops) == encoded()
    assert len(drops.truncated) == 2


def test_pieces_are_cut_at_either_end() -> None:
    pieces = [Piece("abc", template=True, start=True), Piece("de"), Piece("fgh", template=True)]
    assert cut(pieces, 4, at_end=False) == [*pieces[:1], Piece("d")]
    assert cut(pieces, 4, at_end=True) == [Piece("e"), pieces[2]]
    assert cut(pieces, 7, at_end=True)[0] == Piece("bc", template=True)
    assert cut(pieces, 8, at_end=True) == pieces


def test_batches_for_the_tokenizer() -> None:
    short = [PreferenceExample("a", ("b",), row) for row in range(EXAMPLES + 1)]
    assert [len(chunk) for chunk in chunks(short)] == [EXAMPLES, 1]
    long = [PreferenceExample("a" * (CHARACTERS // 2), ("b",), row) for row in range(5)]
    assert [len(chunk) for chunk in chunks([*long, *short[:2]])] == [2, 2, 3]


def test_words_of_a_long_prompt_are_collapsed_in_parts() -> None:
    text = " \u00a0".join(["word\t\n x"] * 300_000) + "  "
    assert len(text) > 2 * 2**20
    assert prompt_words(text) == " ".join(text.split())


def test_holding_out_takes_memory_by_the_row() -> None:
    examples = [PreferenceExample(f"p{row}", ("a",), row) for row in range(40_000)]
    tracemalloc.start()
    train, held = hold_out(examples, 20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(train), len(held)) == (20_000, 20_000)
    assert peak < 1000 * len(examples)
