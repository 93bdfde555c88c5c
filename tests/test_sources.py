"""Reading rows: every format gives the same rows, every damage one line that names it."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from composing import composed, problems
from dpo_cli.config import HhDataConfig, JsonlDataConfig
from dpo_cli.config.read import prepare
from dpo_cli.data import sources
from dpo_cli.data.sources import content_digest, find_source, read_rows
from dpo_cli.errors import ConfigError, DataError

ROWS = [
    {"prompt": "a", "chosen": 'line\nbreak, "quoted"', "rejected": "é 🎉 \u2028 x"},
    {"prompt": "b", "chosen": "1", "rejected": "\x00 NUL"},
    {"prompt": "c" * 200_000, "chosen": "2", "rejected": "3"},
]


def write_json_lines(path: Path, rows: list[dict] = ROWS) -> None:
    path.parent.mkdir(exist_ok=True)
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(json_lines(rows))


def json_lines(rows: list[dict] = ROWS) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def write_arrow(path: Path, new: Callable[..., Any]) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "rows.jsonl": write_json_lines,
    "rows.jsonl.gz": write_json_lines,
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": write_json_lines,
    "rows.parquet": lambda path: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), path, row_group_size=2
    ),
    "rows.csv": write_csv,
    "rows.tsv": lambda path: write_csv(path, "\t"),
    "rows.ndjson": write_json_lines,
    "rows.jsonl.zst": lambda path: path.write_bytes(
        pyarrow.compress(json_lines(), codec="zstd", asbytes=True)
    ),
    "rows.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_stream),
    "file.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_file),
    "data.json": lambda path: path.write_text(json.dumps({"data": ROWS}, indent=1)),
    "line.json": lambda path: path.write_text(json.dumps({"version": "1", "rows": ROWS})),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    rows = read_rows(JsonlDataConfig(path=str(tmp_path / name)), "train")
    assert list(rows.rows) == ROWS
    assert rows.origin == name
    assert rows.revision is None


def test_a_pattern_of_files(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "b" / "2.jsonl", ROWS[1:])
    write_json_lines(tmp_path / "a" / "1.jsonl", ROWS[:1])
    write_json_lines(tmp_path / "a" / "1.other", ROWS)
    rows = read_rows(JsonlDataConfig(path=f"{tmp_path}/*/*.jsonl"), "train")
    assert list(rows.rows) == ROWS
    prepare(composed("stage=dpo", "data=jsonl", f"data.path={tmp_path}/*/*.jsonl"))
    (told,) = problems(["stage=dpo", "data=jsonl", f"data.path={tmp_path}/*.jsonl"])
    assert told.endswith("no such file or folder")


def test_one_conversation_is_no_list_of_rows(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "one.json").write_text(json.dumps(row))
    assert read_rows(JsonlDataConfig(path=str(tmp_path / "one.json")), "train").rows == [row]


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "b.jsonl", ROWS[1:])
    write_json_lines(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    assert list(read_rows(JsonlDataConfig(path=str(tmp_path)), "train").rows) == ROWS


def test_files_of_another_split_stay_out_of_training(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "train-00000-of-00001.jsonl", ROWS[:1])
    write_json_lines(tmp_path / "test.jsonl", ROWS[1:])
    config = HhDataConfig(path=str(tmp_path), eval_split="test")
    assert list(read_rows(config, "train").rows) == ROWS[:1]
    assert list(read_rows(config, "eval").rows) == ROWS[1:]
    (tmp_path / "train-00000-of-00001.jsonl").rename(tmp_path / "other.jsonl")
    assert list(read_rows(config, "train").rows) == ROWS[:1]


def test_saved_splits(tmp_path: Path) -> None:
    parts = {"train": ROWS[:1], "test": ROWS[1:]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    saved.save_to_disk(tmp_path)
    config = JsonlDataConfig(path=str(tmp_path), eval_split="test")
    assert list(read_rows(config, "train").rows) == ROWS[:1]
    assert list(read_rows(config, "eval").rows) == ROWS[1:]
    with pytest.raises(DataError, match=r"no split 'valid' \(it has: test, train\)"):
        read_rows(JsonlDataConfig(path=str(tmp_path), train_split="valid"), "train")


@pytest.mark.parametrize("saved", [False, True])
def test_a_split_that_is_not_there(tmp_path: Path, saved: bool) -> None:
    """Named, it is an error that lists what there is; by default a usual one is found."""
    if saved:
        parts = {k: datasets.Dataset.from_list(ROWS[:1]) for k in ("train", "validation")}
        datasets.DatasetDict(parts).save_to_disk(tmp_path)
    else:
        write_json_lines(tmp_path / "train.jsonl", ROWS[:1])
        write_json_lines(tmp_path / "validation-0.jsonl", ROWS[:1])
    with pytest.raises(DataError, match=r"no such split \(it has: train, validation\)"):
        find_source(JsonlDataConfig(path=str(tmp_path), eval_split="test"), "eval")
    found = find_source(JsonlDataConfig(path=str(tmp_path)), "eval")
    assert found is not None
    assert found.origin.endswith("/validation")
    assert len(read_rows(JsonlDataConfig(path=str(tmp_path)), "train").rows) == 1
    assert find_source(JsonlDataConfig(path=str(tmp_path), eval_split=None), "eval") is None


def test_a_hub_repository_has_its_files_in_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset_infos.json").write_text("{}")
    write_json_lines(tmp_path / "data" / "train-00000.jsonl", ROWS[:1])
    write_json_lines(tmp_path / "data" / "test-00000.jsonl", ROWS[1:])
    config = JsonlDataConfig(path=str(tmp_path))
    assert list(read_rows(config, "train").rows) == ROWS[:1]
    assert list(read_rows(config, "eval").rows) == ROWS[1:]


def test_eval_rows_of_a_file_without_splits(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", ROWS[:1])
    write_json_lines(tmp_path / "b.jsonl", ROWS[1:])
    config = HhDataConfig(path=str(tmp_path / "a.jsonl"))
    assert find_source(config, "eval") is None
    with pytest.raises(DataError, match=r"data\.eval_split=test: .*a\.jsonl is a single file"):
        find_source(HhDataConfig(path=str(tmp_path / "a.jsonl"), eval_split="test"), "eval")
    config.eval_path = str(tmp_path / "b.jsonl")
    assert list(read_rows(config, "eval").rows) == ROWS[1:]


@pytest.mark.parametrize("saved", [False, True])
def test_eval_path_may_be_a_folder_of_splits(tmp_path: Path, saved: bool) -> None:
    """Its training rows are no held-out ones."""
    folder = tmp_path / "both"
    if saved:
        parts = {"train": ROWS[:1], "test": ROWS[1:]}
        made = {k: datasets.Dataset.from_list(v) for k, v in parts.items()}
        datasets.DatasetDict(made).save_to_disk(folder)
    else:
        folder.mkdir()
        write_json_lines(folder / "train.jsonl", ROWS[:1])
        write_json_lines(folder / "test.jsonl", ROWS[1:])
    write_json_lines(tmp_path / "own.jsonl", ROWS)
    config = HhDataConfig(path=str(tmp_path / "own.jsonl"), eval_path=str(folder))
    assert list(read_rows(config, "eval").rows) == ROWS[1:]
    (tmp_path / "plain").mkdir()
    write_json_lines(tmp_path / "plain" / "rows.jsonl", ROWS)
    config.eval_path = str(tmp_path / "plain")
    assert list(read_rows(config, "eval").rows) == ROWS


def damaged(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(JsonlDataConfig(path=str(path)), "train")
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_bad_json_line_is_named(tmp_path: Path) -> None:
    assert "line 3" in damaged(tmp_path / "a.jsonl", b'{"a": 1}\n\n{"a": 1,}\n')
    assert "line 2: expected an object, not list" in damaged(
        tmp_path / "b.jsonl", b'{"a": 1}\n[1]\n'
    )
    assert "line 1" in damaged(tmp_path / "c.jsonl", b'{"a": "\xff"}\n')
    assert "line 1" in damaged(tmp_path / "d.jsonl", b"[" * 100_000)
    assert "list of objects" in damaged(tmp_path / "e.json", b"[1, 2]")
    assert "not valid JSON" in damaged(tmp_path / "f.json", b"[1, 2")


def test_torn_files(tmp_path: Path) -> None:
    for name in ("rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet", "file.arrow"):
        WRITERS[name](tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for content in (whole[: len(whole) // 2], whole[:-1], b"no" + whole[2:-4] + b"such"):
            damaged(tmp_path / f"torn-{name}", content)


def test_bad_csv(tmp_path: Path) -> None:
    assert "row 1: more values" in damaged(tmp_path / "a.csv", b"a,b\n1,2\n1,2,3\n")
    assert "unexpected end" in damaged(tmp_path / "b.csv", b'a,b\n1,"2\n')
    damaged(tmp_path / "c.csv", b"a,b\n\xff,2\n")


def test_torn_saved_dataset(tmp_path: Path) -> None:
    WRITERS["saved"](tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match="saved"):
        read_rows(JsonlDataConfig(path=str(tmp_path / "saved")), "train")


def test_pickles_are_never_read(tmp_path: Path) -> None:
    flag = tmp_path / "flag"

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (flag,)

    for name in ("rows.pkl", "rows.pt", "rows.jsonl", "rows.parquet"):
        damaged(tmp_path / name, pickle.dumps(Evil()))
    assert not flag.exists()


def test_missing_source() -> None:
    with pytest.raises(DataError, match=r"data\.path=nowhere: no such file"):
        read_rows(JsonlDataConfig(path="nowhere"), "train")
    with pytest.raises(ConfigError, match=r"data\.path="):
        read_rows(JsonlDataConfig(), "train")


def test_sample_of_rows_is_seeded_and_keeps_numbers(tmp_path: Path) -> None:
    rows = [{"n": str(i)} for i in range(50)]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    taken = []
    for name in ("rows.jsonl", "saved"):
        found = read_rows(JsonlDataConfig(path=str(tmp_path / name)), "train")
        taken.append(list(found.numbered(10, seed=3)))
        assert all(row == rows[i] for i, row in taken[-1])
        assert len(list(found.numbered(None, seed=3))) == 50
        assert list(found.numbered(10, seed=4)) != taken[-1]
    assert taken[0] == taken[1]
    assert [i for i, _ in taken[0]] == sorted({i for i, _ in taken[0]})
    assert len(taken[0]) == 10


def test_digest_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    config = JsonlDataConfig(path=str(path))

    def digest(rows: list[dict]) -> str:
        write_json_lines(path, rows)
        source = find_source(config, "train")
        assert source is not None
        return content_digest(source)

    assert digest(ROWS) == digest(ROWS)
    assert digest(ROWS) != digest(ROWS[:2])


@pytest.fixture
def no_commit_cache() -> None:
    sources.resolve_commit.cache_clear()


@pytest.mark.usefixtures("no_commit_cache")
class TestHub:
    def test_offline_fails_at_once_and_names_the_alternative(self) -> None:
        start = time.monotonic()
        with pytest.raises(DataError, match=r"Anthropic/hh-rlhf .*data\.path=") as caught:
            read_rows(HhDataConfig(hub_id="Anthropic/hh-rlhf"), "train")
        assert time.monotonic() - start < 5
        assert "\n" not in str(caught.value)

    def test_offline_with_a_commit_still_fails_in_one_line(self) -> None:
        with pytest.raises(DataError, match=r"data\.path="):
            read_rows(HhDataConfig(hub_id="Anthropic/hh-rlhf", revision="0" * 40), "train")

    @pytest.mark.parametrize("bad", ["a/b/c", "..", "a b"])
    def test_bad_name(self, bad: str) -> None:
        with pytest.raises(DataError, match=r"data\.path="):
            read_rows(HhDataConfig(hub_id=bad), "train")

    def test_commit_is_resolved_once_and_recorded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked, loaded = [], []

        def dataset_info(self: object, repo: str, *, revision: str | None, timeout: float):
            asked.append((repo, revision, timeout))
            return type("Info", (), {"sha": f"{'ab' * 20}"})

        def load_dataset(repo: str, name: str | None, *, split: str, revision: str):
            loaded.append((repo, name, split, revision))
            return datasets.Dataset.from_list(ROWS)

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        config = HhDataConfig(hub_id="o/n", hub_config="c", revision="v1", eval_split="test")
        train, held = read_rows(config, "train"), read_rows(config, "eval")
        assert train.revision == held.revision == "ab" * 20
        assert train.origin == "o/n@abababababab/train"
        assert list(train.rows) == ROWS
        assert [a[:2] for a in asked] == [("o/n", "v1")]
        assert asked[0][2] <= 10
        assert loaded == [("o/n", "c", s, "ab" * 20) for s in ("train", "test")]

    @pytest.mark.parametrize(
        ("splits", "held"),
        [(["train", "test"], "test"), (["validation", "train"], "validation"), (["train"], None)],
    )
    def test_a_usual_held_out_split_is_found(
        self, monkeypatch: pytest.MonkeyPatch, splits: list[str], held: str | None
    ) -> None:
        asked = []

        def get_dataset_split_names(repo: str, name: str | None, *, revision: str) -> list[str]:
            asked.append((repo, name, revision))
            return splits

        monkeypatch.setattr(datasets, "get_dataset_split_names", get_dataset_split_names)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        commit = "ab" * 20
        monkeypatch.setattr(sources, "resolve_commit", lambda hub_id, revision: commit)
        source = find_source(JsonlDataConfig(hub_id="o/n", hub_config="c"), "eval")
        assert (source.split if source else None) == held
        assert asked == [("o/n", "c", commit)]
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert find_source(JsonlDataConfig(hub_id="o/n"), "eval") is None
