"""Files of tensors and folders of weights: the same bytes as the libraries write, hashed once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dpo_cli import durable
from dpo_cli.durable import damage, file_digest, publish_folder
from dpo_cli.durable.provenance import PROVENANCE
from dpo_cli.durable.tensors import DTYPES, write_tensors
from dpo_cli.errors import DiskError
from dpo_cli.train import contents


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_bytes_are_those_of_the_librarys_writer(tmp_path: Path, metadata: Any) -> None:
    tensors = {f"ß{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), 'a "b"': torch.ones(5)}
    entry = write_tensors(tmp_path / "ours", tensors, metadata)
    save_file(tensors, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert entry["sha256"] == file_digest(tmp_path / "theirs")
    assert entry["bytes"] == (tmp_path / "theirs").stat().st_size


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "x", {"t": whole.T, "part": whole[1:, 1]})
    found = load_file(tmp_path / "x")
    assert torch.equal(found["t"], whole.T)
    assert torch.equal(found["part"], whole[1:, 1])


def tied() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=8))


def untied() -> Any:
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
                                        num_hidden_layers=1, num_attention_heads=2))  # fmt: skip


def renamed() -> Any:  # experts are one weight in memory and many on disk
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2))  # fmt: skip


@pytest.mark.parametrize("make", [tied, untied, renamed])
def test_weights_are_those_of_save_pretrained(tmp_path: Path, make: Any) -> None:
    model = make()
    (tmp_path / "ours").mkdir()
    contents.of_model(model, {}, {}).write(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    ours = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    del ours[PROVENANCE]
    assert ours == theirs


def test_large_weights_are_split_as_save_pretrained_splits_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = untied()
    monkeypatch.setattr(contents, "MAX_SHARD", "4KB")
    (tmp_path / "ours").mkdir()
    contents.of_model(model, {}, {}).write(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(names) > 4
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_hashed_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], durable.file_digest
    monkeypatch.setattr(durable, "file_digest", lambda path: read.append(path.name) or real(path))
    made = contents.Contents({"a.json": b"{}"}, {"w": {"x": torch.ones(3)}})
    publish_folder(tmp_path / "f", made.write)
    assert read == ["a.json"]
    assert damage(tmp_path / "f") is None


def test_a_file_that_lost_bytes_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(path: Path, *rest: Any) -> Any:
        entry = write_tensors(path, *rest)
        os.truncate(path, path.stat().st_size - 1)
        return entry

    monkeypatch.setattr(contents, "write_tensors", short)
    made = contents.Contents({}, {"w": {"x": torch.ones(3)}})
    with pytest.raises(DiskError, match=r"w has [0-9]+ bytes after the write"):
        publish_folder(tmp_path / "f", made.write)
    assert not (tmp_path / "f").exists()
