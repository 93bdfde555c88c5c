"""What leaves nothing in runs/: inspect, starts that failed, and writers that were killed."""

from __future__ import annotations

import json
import os
import shutil
import sys

from omegaconf import OmegaConf

from dpo_cli.durable.temporary import (
    is_leftover,
    remove_leftovers,
    temporary_file,
    temporary_folder,
)
from dpo_cli.report.files import write_run_files
from dpo_cli.run_folder import check_free, claimed, clear_leftovers

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
SMALL = "data.rows=8", "data.eval_rows=2", "hardware=cpu", "logger=none"


def test_inspect_and_failed_starts_leave_no_folder(cli, tmp_path):
    done = cli("stage=inspect", *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 training and 2 held-out examples" in done.stdout
    assert not (tmp_path / "runs").exists()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "a"}) + "\n")
    done = cli("stage=dpo", "data=jsonl", f"data.path={rows}", "hardware=cpu", "logger=none")
    assert done.returncode == 3, done.stderr[-2000:]
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_named_is_kept(cli, tmp_path):
    assert cli("stage=inspect", *SMALL, "run_dir=here").returncode == 0
    assert (tmp_path / "here" / "config.yaml").is_file()


def test_only_what_dead_writers_left_is_removed(tmp_path):
    (tmp_path / ".tmp-final-0badcafe").mkdir()
    (tmp_path / ".tmp-final-0badcafe" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-config.yaml-0badcafe").write_text("half")
    (tmp_path / ".old-final").mkdir()
    with temporary_folder(tmp_path / "cache") as folder, temporary_file(tmp_path / "x") as file:
        remove_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([folder, file, tmp_path / "final"])
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_other_files_of_a_shared_folder_stay(tmp_path):
    for name in (".tmp-mine", ".tmp-rows-1-0badcafe", "rows-1"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, of="rows-")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-mine", "rows-1"]


def test_a_folder_whose_start_was_killed_can_be_used(tmp_path, monkeypatch):
    """Killed before each operation on the files of a first start, and of one over a failed one."""
    monkeypatch.setattr("dpo_cli.report.files.versions", dict)  # git is slow
    cfg = OmegaConf.create({"seed": 0, "hydra": {"overrides": {"task": ["seed=0"]}}})

    def start(folder):
        with claimed(folder, cfg, resume=False):
            write_run_files(folder, {"seed": 0}, ["dpo-run"])
            (folder / "metrics.jsonl").touch()

    start(tmp_path / "failed")
    for before in (None, tmp_path / "failed"):
        at = 0
        while killed_before(at, tmp_path / "run", start, before):
            folder = tmp_path / "run"
            check_free(folder, resume=False)  # raises where the folder cannot be used
            start(folder)
            clear_leftovers(folder)
            assert not [path for path in folder.rglob("*") if is_leftover(path.name)], at
            at += 1
        assert at > 20, "operations were not seen"


def killed_before(at, folder, start, before):
    """A process that starts a run dies before operation `at`; False: it ended before that."""
    shutil.rmtree(folder, ignore_errors=True)
    if before is not None:
        shutil.copytree(before, folder)
    if (child := os.fork()) == 0:
        left = at

        def hear(event, args):
            nonlocal left
            writes = event in CHANGES or (event == "open" and args[2] & os.O_CREAT)
            if writes and str(args[0]).startswith(str(folder)):
                if left == 0:
                    os._exit(9)
                left -= 1

        sys.addaudithook(hear)
        try:
            start(folder)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9
