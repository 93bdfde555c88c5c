"""What leaves nothing in runs/: inspect, and starts that failed before they did anything."""

from __future__ import annotations

import json

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
