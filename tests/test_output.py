"""console.log, and terminals that go away."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import import_path
from dpo_cli.distributed.signals import stopping_signals
from dpo_cli.report.console import Progress
from dpo_cli.report.output import LOG, Copied, Copy, Log, Terminal, copied_output, go_on_in
from dpo_cli.train.guard import StopRequest


def closed_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_a_terminal_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    for stream in (closed_pipe(), Path("/dev/full").open("w")):  # noqa: SIM115 - Terminal keeps it
        terminal = Terminal(stream)
        with pytest.raises(OSError):  # noqa: PT011 - EPIPE or ENOSPC
            print("before the run has a folder", file=terminal, flush=True)
        terminal.lasting = True
        for _ in range(3):
            print("after", file=terminal, flush=True)
        stream.close()  # what is buffered does not raise, either


def test_what_a_gone_terminal_misses_is_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closed_pipe() as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        with copied_output():
            go_on_in(tmp_path)
            print("first", file=sys.stderr, flush=True)
            print("second")
            Progress("plain").note("third")
    assert (tmp_path / LOG).read_text() == "first\nsecond\nthird\n"
    assert capsys.readouterr().out == "second\n"


def test_the_copy_is_plain_lines_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "correct-horse-battery")
    log = Log()
    log.folder = tmp_path
    copy = Copy(log)
    for text in ("10%\r", "20%\r100%\n", "\x1b[1;31mred\x1b[0m of correct-", "horse-battery\n",
                 "windows\r\n", "bell \x07 \ud800 \u2028 end\n", "half"):  # fmt: skip
        copy.write(text)
    assert (tmp_path / LOG).read_text("utf-8").split("\n") == [
        "100%", "red of [redacted]", "windows", "bell \\x07 \\ud800 \\u2028 end", "",
    ]  # fmt: skip
    copy.close()
    assert (tmp_path / LOG).read_text("utf-8").endswith("\nhalf\n")


def test_nothing_is_printed_twice_and_bars_are_not_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with copied_output():
        print("before the folder is known")
        go_on_in(tmp_path)
        with Progress("rich") as progress:
            progress.begin(10)
            for step in range(1, 11):
                progress.advance(step, {"loss": 1.0})
            progress.note("a note")
            with progress.phase("a phase", 2) as tick:
                tick(2)
        print("error: told at the end", file=sys.stderr)
    *lines, last = (tmp_path / LOG).read_text("utf-8").splitlines()
    assert lines[0] == "before the folder is known"
    assert lines[1].startswith("train 1/10")
    assert "loss 1.0000" in lines[1]
    assert len([line for line in lines if line.startswith("train ")]) == 10
    assert [line for line in lines if "note" in line] == ["a note"]
    assert lines[-1].startswith("a phase: 2 in ")
    assert last == "error: told at the end"
    assert not any(mark in "".join(lines) for mark in ("\x1b", "\r", "━"))
    assert capsys.readouterr().err.count("a note") == 1


def test_the_traceback_of_a_bug_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        with copied_output():
            go_on_in(tmp_path)
            print(1 // 0)

    with pytest.raises(ZeroDivisionError):
        command()
    assert "ZeroDivisionError" in (tmp_path / LOG).read_text()
    assert not isinstance(sys.stdout, Copied)


def test_a_folder_that_was_removed_is_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with copied_output():
        go_on_in(tmp_path / "gone")
        print("lost")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help >&- 2>&-", 0),
        ("--help > /dev/full", 74),
        ("stage=nothing 2> /dev/full", 2),
        ("stage=nothing >&- 2>&-", 2),
        ("--help | true", 141),
    ],
)
def test_exit_codes_do_not_depend_on_who_reads(
    words: str, code: int, clean_env: dict[str, str]
) -> None:
    command = f"set -o pipefail; {sys.executable} -m dpo_cli {words}"
    env = clean_env | {"PYTHONPATH": import_path()}
    assert subprocess.run(["bash", "-c", command], env=env, check=False).returncode == code


def test_a_closed_terminal_stops_a_run_unless_it_was_started_with_nohup() -> None:
    with StopRequest().watching() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == "SIGHUP"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().watching() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == "SIGTERM"
        assert signal.SIGHUP not in stopping_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
