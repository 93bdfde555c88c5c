"""Caches that others share, fill and remove: computed again, never an error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import small_tokenizers
from dpo_cli.config import JsonlDataConfig
from dpo_cli.data import cache as row_cache
from dpo_cli.data import dataset, part
from dpo_cli.durable import cache
from dpo_cli.records import EncodedExample
from dpo_cli.session import reference

EXAMPLE = EncodedExample(np.array([1, 2], np.int32), (np.array([3], np.int32),), 0)


def fill(target: Path) -> None:
    save_file({"logprobs": torch.tensor([[1.0, 2.0]])}, target / reference.LOGPROBS)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_entries_have_the_permissions_of_the_cache(tmp_path: Path) -> None:
    for allowed in (0o2775, 0o700, 0o777):
        root = tmp_path / f"{allowed:o}"
        root.mkdir()
        root.chmod(allowed)
        before = os.umask(0o022)
        try:
            folder = cache.subfolder(root, "reference")
            cache.keep_folder(folder / "a", fill)
            row_cache.save(root / "rows", {"train": [EXAMPLE]}, {})
        finally:
            os.umask(before)
        assert mode(folder) == mode(folder / "a") == allowed
        files = [root / "rows", *(folder / "a").iterdir()]
        assert {mode(path) for path in files} == {allowed & 0o666}


@pytest.mark.parametrize("harm", ["absent", "no file", "other", "unreadable", "other shape"])
def test_a_damaged_entry_is_none(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    cache.keep_folder(folder, fill)
    found = reference.read(folder, (1, 2))
    assert found is not None
    assert found.tolist() == [[1.0, 2.0]]
    shape = (1, 2)
    if harm == "absent":
        folder = tmp_path / "b"
    elif harm == "no file":
        (folder / reference.LOGPROBS).unlink()
    elif harm == "other":
        (folder / reference.LOGPROBS).write_bytes(b"x" * 100)
    elif harm == "unreadable":
        monkeypatch.setattr(Path, "read_bytes", denied)
    else:
        shape = (2, 2)
    assert reference.read(folder, shape) is None


def denied(path: Path) -> bytes:
    raise PermissionError(13, "Permission denied", str(path))


def test_rows_that_cannot_be_read_are_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows"
    assert row_cache.load(path) is None
    assert caplog.text == ""
    row_cache.save(path, {"train": [EXAMPLE]}, {"a": 1})
    lists, meta = row_cache.load(path) or ({}, {})
    assert (lists["train"][0].prompt_ids.tolist(), meta) == ([1, 2], {"a": 1})
    monkeypatch.setattr(Path, "read_bytes", denied)
    assert row_cache.load(path) is None
    assert "encoding the rows again" in caplog.text


def test_a_file_that_is_written_while_it_is_read_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its old rows would be those of its new content, for ever."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"a {n}", "chosen": " good", "rejected": " bad"} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, rows[:2])))
    config = JsonlDataConfig(path=str(path))
    tokenizer = small_tokenizers.byte_level()

    def load() -> int:
        return len(dataset.load_encoded(config, tokenizer, 64, 0, tmp_path / "cache").train)

    real = part.read_source

    def slow(*args: Any) -> Any:
        found = real(*args)
        path.write_text("\n".join(map(json.dumps, rows)))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(part, "read_source", slow)
        assert load() == 2
    assert load() == load() == 4
    path.write_text("\n".join(map(json.dumps, rows[:2])))
    assert load() == 2
