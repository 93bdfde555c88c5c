"""Progress and tables: what appears where, and that data cannot drive the terminal."""

import io
import re

import pytest
from rich.console import Console

from dpo_cli.errors import ConfigError
from dpo_cli.report.console import Progress, printable
from dpo_cli.report.numbers import brief
from dpo_cli.report.table import summary_table

ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Clock:
    """A clock that a test turns."""

    now = 100.0

    def __call__(self):
        return self.now


def capture(mode, terminal=False, width=80):
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    return Progress(mode, console, clock), clock, console.file


def test_plain_prints_the_first_step_and_each_tenth():
    progress, clock, out = capture("plain")
    with progress:
        progress.begin(total=1000)
        for step in range(1, 1001):
            clock.now += 0.02
            progress.advance(step, {"loss": 0.5})
    steps = [int(line.split()[1].split("/")[0].replace(",", "")) for line in lines(out)]
    assert steps == [1, *range(100, 1001, 100)]


def lines(out):
    return out.getvalue().splitlines()


def test_a_plain_line_worked_by_hand():
    progress, clock, out = capture("plain", width=40)  # a long line stays one line
    with progress:
        progress.begin(total=1200, first_step=200)  # 100 steps in 50 s: 900 more take 450 s
        clock.now += 50
        values = {"loss": 0.61234, "rewards/accuracies": 0.7126, "rewards/margins": 0.25}
        progress.advance(300, values | {"tokens_per_second": 3210.4, "lr": 1e-6})
    assert lines(out) == [
        "train 300/1,200  25%  0:00:50  eta 0:07:30  "
        "loss 0.6123  accuracy 71.3%  margin 0.250  3,210 tok/s"
    ]


def test_slow_steps_print_every_thirty_seconds():
    progress, clock, out = capture("plain")
    with progress:
        progress.begin(total=100_000)
        for step in range(1, 101):
            clock.now += 1
            progress.advance(step, {})
    assert len(lines(out)) == 1 + 99 // 30


def test_held_out_metrics_get_their_own_line():
    progress, _, out = capture("plain")
    with progress:
        progress.begin(total=100)
        progress.advance(1, {"loss": 0.7})
        progress.advance(1, {"eval/loss": 0.65, "eval/rewards/accuracies": 0.5, "eval/n": 3})
    assert lines(out)[1:] == ["step 1  held-out loss 0.6500  accuracy 50.0%"]


def test_an_objective_is_not_called_a_loss():
    """Where samples are scored, the held-out loss is not the training loss."""
    progress, _, out = capture("plain")
    with progress:
        progress.begin(total=100)
        progress.advance(1, {"eval/loss": -0.5, "eval/score": 0.6, "eval/kl": 1.0})
    assert lines(out)[1:] == ["step 1  held-out score 0.600  KL 1.00"]


def test_a_loop_of_unknown_length_has_no_eta():
    progress, _, out = capture("plain")
    with progress:
        progress.advance(8, {"loss": None})
    assert lines(out) == ["train 8  0:00:00"]


def test_a_phase_reports_when_it_ends_and_every_thirty_seconds():
    progress, clock, out = capture("plain")
    with progress, progress.phase("reference log-probs", 4000) as tick:
        clock.now += 10
        tick(1000)
        clock.now += 20
        tick(1000)
        clock.now += 20
        tick(2000)
    assert lines(out) == [
        "reference log-probs 2,000/4,000  50%  0:00:30  eta 0:00:30",
        "reference log-probs: 4,000 in 0:00:50",
    ]


def test_a_failed_phase_is_not_reported_as_done():
    progress, _, out = capture("plain")
    with pytest.raises(KeyError), progress, progress.phase("encode"):
        raise KeyError
    assert out.getvalue() == ""


def test_off_prints_nothing():
    progress, clock, out = capture("off", terminal=True)
    with progress:
        with progress.phase("encode", 10) as tick:
            clock.now += 60
            tick(10)
        progress.begin(10)
        progress.advance(10, {"loss": 1.0, "eval/loss": 1.0})
        progress.note("line")
        progress.show(summary_table("t", [("a", 1)]))
    assert out.getvalue() == ""


def test_auto_is_plain_outside_a_terminal_and_live_in_one():
    for terminal in (False, True):
        progress, _, out = capture("auto", terminal=terminal)
        with progress:
            progress.begin(10)
            progress.advance(5, {"loss": 0.25})
        assert ("\x1b[" in out.getvalue()) == terminal
        assert ("━" in out.getvalue()) == terminal
        assert "loss 0.2500" in out.getvalue()


def test_the_live_bar_fits_eighty_columns_and_gives_the_cursor_back():
    progress, clock, out = capture("rich", terminal=True)
    values = {"loss": 0.6, "rewards/accuracies": 0.7, "rewards/margins": 0.1}

    def interrupted_run():
        with progress:
            with progress.phase("reference log-probs", 10) as tick:
                tick(10)
            progress.begin(1000)
            clock.now += 10
            progress.advance(100, values | {"tokens_per_second": 3210.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")
    shown = ANSI.sub("", out.getvalue()).replace("\r", "\n").splitlines()
    bar, figures = [line for line in shown if line.strip()][-2:]
    assert "reference log-probs: 10 in 0:00:00" in shown
    assert bar.startswith("train")
    assert bar.rstrip().endswith("eta 0:01:30")
    assert " 100/1000 " in bar
    assert figures.strip() == "loss 0.6000  accuracy 70.0%  margin 0.100  3,210 tok/s"


@pytest.mark.parametrize("mode", ["plain", "rich"])
def test_user_text_is_shown_and_never_obeyed(mode):
    evil = "[red]x[/red] [/] :smile: \x1b]0;title\x07 \x1b[2J \r\u202e"
    progress, _, out = capture(mode, terminal=mode == "rich", width=200)
    with progress, progress.phase(evil, 1) as tick:
        tick(1)
        progress.note(evil)
        progress.show(summary_table(evil, [(evil, evil)]))
    text = out.getvalue()
    assert text.count(r"[red]x[/red] [/] :smile: \x1b]0;title\x07 \x1b[2J \r\u202e") >= 5
    assert not [control for control in ("\x1b]", "\x07", "\x1b[2J ", "\u202e") if control in text]


def test_printable_keeps_text_and_layout():
    assert printable("né\n\t🙂 \u200d") == "né\n\t🙂 \u200d"
    assert printable("\ud800\x9b") == r"\ud800\x9b"


def test_an_unknown_mode_is_a_config_error():
    with pytest.raises(ConfigError, match=r"logger\.progress=fancy.*plain"):
        Progress("fancy")


def test_summary_table_shows_every_row():
    console = Console(file=io.StringIO(), width=40)
    console.print(summary_table("Run", [("loss", 0.123456), ("folder", "/x" * 40), ("best", None)]))
    text = console.file.getvalue()
    assert "0.1235" in text
    assert text.replace("│", "").replace("\n", "").replace(" ", "").count("/x") == 40
    assert re.search(r"best +│ ?- ", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (True, "True"), (12345, "12,345"), (12345.6, "12,346"), (1e-6, "1e-06")],
)
def test_brief(value, text):
    assert brief(value) == text
