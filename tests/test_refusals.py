"""What the operating system refuses is one line with the remedy that helps, wherever it was."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
from pathlib import Path

import pytest

from cli_helpers import fails
from dpo_cli import cli
from dpo_cli.durable import disk_errors, write_text
from dpo_cli.durable.refusals import as_refusal, warn_outside_calls
from dpo_cli.errors import ConfigError, DiskError
from dpo_cli.train.guard import run_lock

REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "not read-only",
    errno.ENOLCK: "file locks",
    errno.EFBIG: "ulimit -f",
    errno.EMFILE: "ulimit -n",
    errno.EIO: "failing",
    errno.ESTALE: "failing",
    errno.EINVAL: "check the path",
}


@pytest.mark.parametrize("number", REMEDIES)
def test_each_refusal_has_its_own_remedy(number: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    for error in (
        OSError(number, os.strerror(number), str(path)),
        RuntimeError(f"Error while serializing: IoError(... (os error {number}))"),
    ):
        with pytest.raises(DiskError) as caught, disk_errors(path):
            raise error
        said = str(caught.value)
        assert said.startswith(f"{path}: {os.strerror(number)}")
        assert REMEDIES[number] in said
        full = number in (errno.ENOSPC, errno.EDQUOT)
        assert ("make room" in said) == ("MB free" in said) == full
        assert "\n" not in said


def test_other_errors_are_left_alone() -> None:
    for error in (ValueError("x"), OSError("a library's own"), OSError(-2, "Name not known")):
        assert as_refusal(error) is None


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOSPC])
def test_any_stage_ends_in_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(words: list[str]) -> int:
        raise OSError(number, os.strerror(number), "/some/where")

    monkeypatch.setattr(cli, "dispatch", refused)
    said = fails(capsys, "stage=sft", code=74)
    assert said.startswith(f"/some/where: {os.strerror(number)}")
    assert REMEDIES[number] in said
    assert "\n" not in said


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: list[str]) -> int:
        raise KeyError("x")

    monkeypatch.setattr(cli, "dispatch", broken)
    with pytest.raises(KeyError):
        cli.main(["stage=sft"])


def test_a_thread_of_a_library_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard writes in a thread, which raises there and again at its caller's next write."""

    def write() -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "events")

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    warn_outside_calls.__wrapped__()  # not only once
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert capsys.readouterr().err.startswith("warning: events: File too large: raise the file")


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    told = rf"{tmp_path}/\.lock: No locks available: this file system does not support"
    with pytest.raises(DiskError, match=told), run_lock(tmp_path):
        pass


def test_a_name_that_is_too_long_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    long = "x" * 300
    said = fails(capsys, "stage=sft", f"run_dir={long}")
    assert said == f"{long}: File name too long: choose a shorter name"
    assert "File name too long" in fails(capsys, "stage=sft", "data=jsonl", f"data.path={long}")
    assert "too long" in fails(capsys, f"model={'x' * 5000}")
    with pytest.raises(ConfigError):
        write_text(tmp_path / long, "")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    said = fails(capsys, "reward_fn=lexicon", f"reward_fn.path={tmp_path / 'pipe'}", "stage=sample")
    assert "no such file or folder" in said
