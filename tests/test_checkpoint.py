"""Published folders: whole or absent, verified, restored exactly."""

import errno
import hashlib
import json
import os
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_cli.config import OptimConfig
from dpo_cli.durable import (
    damage,
    mismatch,
    publish_folder,
    replace_json,
    write_checked_text,
    write_json,
)
from dpo_cli.durable.temporary import remove_leftovers
from dpo_cli.errors import CheckpointError, DiskError, RunLockedError
from dpo_cli.grammar.tokenizer import build_tokenizer
from dpo_cli.train import checkpoint
from dpo_cli.train.guard import run_lock
from dpo_cli.train.optim import build_optimizer, take_step


def small_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_embd=16, n_layer=1, n_head=2,
                                      n_positions=16, bos_token_id=0, eos_token_id=0))  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(1024)


def train_step(model, optimizer) -> None:
    ids = torch.randint(0, 100, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    take_step(model, optimizer, 1.0, 1.0, 1e-3)


@pytest.fixture
def saved(tmp_path, tokenizer):
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(), 1e-3)
    for step in (1, 2, 3):
        train_step(model, optimizer)
        checkpoint.save(tmp_path, step, model, tokenizer, optimizer, {"best": None}, {"a": 1})
    return tmp_path


def test_newest_is_found_and_is_a_hugging_face_folder(saved):
    snapshot = checkpoint.newest_valid(saved)
    assert (snapshot.step, snapshot.skipped) == (3, [])
    GPT2LMHeadModel.from_pretrained(snapshot.folder)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(tmp_path, tokenizer, umask, mode):
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(), 1e-3)
    train_step(model, optimizer)
    before = os.umask(umask)
    try:
        step = checkpoint.save(tmp_path, 1, model, tokenizer, optimizer, {"best": None}, {})
        checkpoint.save_final(tmp_path / "final", model, tokenizer, {})
    finally:
        os.umask(before)
    files = [*step.iterdir(), *(tmp_path / "final").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


FILES = ["model.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors",
         "state.json", "config.json", "tokenizer.json", "MANIFEST.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["missing", "truncated", "zeroed", "bit flipped"])
def test_a_damaged_checkpoint_is_passed_over(saved, name, harm):
    path = saved / "step-3" / name
    data = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "zeroed":
        path.write_bytes(bytes(len(data)))
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    snapshot = checkpoint.newest_valid(saved)
    assert snapshot.step == 2
    assert snapshot.skipped[0].startswith("step-3: ")


def test_nothing_valid_is_exit_code_5(saved):
    for step in (1, 2, 3):
        (saved / f"step-{step}" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        checkpoint.newest_valid(saved)
    with pytest.raises(CheckpointError, match="there is none"):
        checkpoint.newest_valid(saved / "absent")


def test_empty_newer_and_stale_temporary_folders_are_ignored(saved):
    (saved / "step-9").mkdir()
    (saved / ".tmp-step-4-abcd").mkdir()
    (saved / "step-x").mkdir()
    assert checkpoint.newest_valid(saved).step == 3


def test_prune_goes_by_number_and_keeps_the_best(saved):
    for step, when in ((1, 3e9), (2, 2e9), (3, 1e9)):  # mtimes the wrong way round
        os.utime(saved / f"step-{step}", (when, when))
    checkpoint.prune(saved, step=3, keep=1, protect=1)
    assert sorted(p.name for p in saved.iterdir()) == ["step-1", "step-3"]


def test_a_removal_that_was_cut_short_leaves_no_damaged_step(saved, monkeypatch):
    def die(path):
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(saved, step=3, keep=2, protect=None)
    assert [p.name[:11] for p in saved.iterdir() if damage(p)] == [".tmp-step-1"]
    remove_leftovers(saved)
    assert sorted(p.name for p in saved.iterdir()) == ["step-2", "step-3"]


def test_prune_does_not_count_damaged_leftovers(saved):
    (saved / "step-900").mkdir()
    checkpoint.prune(saved, step=3, keep=2, protect=None)
    assert checkpoint.steps_in(saved) == [2, 3]


def test_restore_continues_bit_for_bit(saved, tokenizer, tmp_path):
    """The step after a checkpoint, taken by the process that wrote it and by another."""
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(), 1e-3)
    train_step(model, optimizer)
    checkpoint.save(tmp_path / "c", 1, model, tokenizer, optimizer, {"best": None}, {})
    train_step(model, optimizer)  # draws its rows from the saved generator
    snapshot = checkpoint.newest_valid(tmp_path / "c")
    torch.manual_seed(99)
    other = GPT2LMHeadModel.from_pretrained(snapshot.folder).train()  # dropout on
    other_optimizer = build_optimizer(other, OptimConfig(), 1e-3)
    checkpoint.restore(snapshot, other, other_optimizer)
    train_step(other, other_optimizer)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_any_flipped_bit_of_a_manifest_is_survived(tmp_path):
    publish_folder(tmp_path / "step-1", lambda f: (f / "w").write_text("weights"))
    manifest = tmp_path / "step-1" / "MANIFEST.json"
    data = manifest.read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            manifest.write_bytes(flipped)
            damage(tmp_path / "step-1")  # must judge, not raise
    manifest.write_text('{"files": {}}')
    assert damage(tmp_path / "step-1") is not None


def test_a_replacement_cut_between_its_renames_is_put_back(tmp_path):
    publish_folder(tmp_path / "final", lambda f: (f / "w").write_text("good"))
    (tmp_path / "final").rename(tmp_path / ".old-final")
    (tmp_path / ".tmp-final-0badcafe").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "w").read_text() == "good"


def test_every_file_is_synced_and_the_rename_is_last(tmp_path, monkeypatch):
    events = []
    real_fsync, real_rename = os.fsync, type(tmp_path).rename
    monkeypatch.setattr(os, "fsync", lambda fd: (
        events.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)))  # fmt: skip
    monkeypatch.setattr(type(tmp_path), "rename", lambda self, to: (
        events.append(f"rename to {to.name}"), real_rename(self, to))[1])  # fmt: skip

    def write(folder):
        (folder / "a.bin").write_bytes(b"a")
        (folder / "b.bin").write_bytes(b"b")

    publish_folder(tmp_path / "step-1", write)
    names = [os.path.basename(e) for e in events]
    assert names[:3] == ["a.bin", "b.bin", "MANIFEST.json"]
    assert names[3].startswith(".tmp-step-1")
    assert names[4:] == ["rename to step-1", tmp_path.name]


def test_a_failed_write_leaves_the_old_folder_and_exits_74(tmp_path):
    publish_folder(tmp_path / "final", lambda f: (f / "w").write_text("good"))

    def full(folder):
        (folder / "w").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskError, match="No space left") as error:
        publish_folder(tmp_path / "final", full)
    assert error.value.exit_code == 74
    assert (tmp_path / "final" / "w").read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_replacing_a_folder(tmp_path):
    for text in ("one", "two"):
        publish_folder(tmp_path / "final", lambda f, t=text: (f / "w").write_text(t))
    assert (tmp_path / "final" / "w").read_text() == "two"
    assert damage(tmp_path / "final") is None


def test_write_json_replaces_whole(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_one_process_a_folder(tmp_path):
    with (
        run_lock(tmp_path),
        pytest.raises(RunLockedError, match=str(os.getpid())),
        run_lock(tmp_path),
    ):
        pass
    with run_lock(tmp_path):  # free again, though the lock file is still there
        assert (tmp_path / ".lock").is_file()


def test_copying_a_checkpoint_keeps_it_valid(saved, tmp_path):
    shutil.copytree(saved / "step-3", tmp_path / "copy")
    assert damage(tmp_path / "copy") is None


def test_the_manifest_tells_of_what_run_it_is(saved, tmp_path):
    """And what it tells beside the files is no reason for doubt."""
    found = json.loads((saved / "step-3" / "MANIFEST.json").read_text())
    assert found["world_size"] == 1
    publish_folder(tmp_path / "x", lambda f: (f / "w").write_text("w"), {"data": "d1"})
    assert json.loads((tmp_path / "x" / "MANIFEST.json").read_text())["data"] == "d1"
    assert damage(tmp_path / "x") is None


@pytest.mark.parametrize("layout", [0, checkpoint.LAYOUT + 1])
def test_another_layout_is_refused_with_the_ways_on(saved, layout):
    """Not passed over for an older one: that would lose steps without a word."""
    newest = saved / "step-3"
    replace_json(newest, "state.json", {"step": 3, "layout": layout})
    with pytest.raises(CheckpointError, match=rf"layout {layout}, .*model\.path=") as error:
        checkpoint.newest_valid(saved)
    assert error.value.exit_code == 5


def test_a_lock_that_a_dead_process_left_is_told(tmp_path, caplog):
    (tmp_path / ".lock").write_text("123456")
    for _ in range(2):
        with run_lock(tmp_path):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())
    (record,) = caplog.records  # not of the first of the two, which ended well
    assert "taking over from process 123456, which was killed" in record.message


def test_a_file_with_its_checksum(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text in ("{}\n", "[]\n"):
        write_checked_text(path, text)
        assert mismatch(path) is None
    digest = hashlib.sha256(b"[]\n").hexdigest()
    assert (tmp_path / "rows.jsonl.sha256").read_text() == f"{digest}  rows.jsonl\n"
    path.write_text("[")
    assert "truncated or changed" in str(mismatch(path))
    (tmp_path / "rows.jsonl.sha256").unlink()
    assert mismatch(path) is None
