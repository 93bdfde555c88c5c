"""Progress of a run: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Self, cast

from rich import progress
from rich.console import Console, NewLine, RenderableType
from rich.control import Control
from rich.table import Column
from rich.text import Text

from dpo_cli.errors import ConfigError
from dpo_cli.escapes import printable
from dpo_cli.report.numbers import duration
from dpo_cli.report.output import Copied

MODES = ("auto", "rich", "plain", "off")

# Metrics shown beside the bar, where a run has them: name, label, format.
FIGURES = (
    ("loss", "loss ", "{:.4f}"),
    ("rewards/accuracies", "accuracy ", "{:.1%}"),
    ("rewards/margins", "margin ", "{:.3f}"),
    ("score", "score ", "{:.3f}"),
    ("kl", "KL ", "{:.2f}"),
    ("finished", "finished ", "{:.0%}"),
    ("rollout/finished", "finished ", "{:.0%}"),
    ("tokens_per_second", "", "{:,.0f} tok/s"),
)

_PLAIN_EVERY_SECONDS = 30.0
COPY_WIDTH = 120  # columns of tables in console.log


@dataclass
class _Task:
    """One bar: the training loop or a phase. Times are in seconds of the progress clock."""

    name: str
    total: int | None
    first: int  # done before this process: not counted for the ETA
    done: int
    began: float
    last_line: float  # when a plain line was last printed
    bar: progress.TaskID | None = None


class Progress:
    """Shows the progress of a run; a context manager.

        with Progress(logger.progress) as progress:
            with progress.phase("reference log-probs", rows) as tick:
                tick(32)
            progress.begin(total_steps, first_step=resume_step)
            progress.advance(step, {"loss": 0.69, "tokens_per_second": 3200.0})

    mode: `rich` is a live bar; `plain` prints a line at the first step, at every tenth of all steps
    and every 30 s; `off` prints nothing; `auto` is `rich` in a terminal, else `plain`.
    Raises ConfigError for another mode. Writes to stderr unless given a console.
    """

    def __init__(
        self,
        mode: str = "auto",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"logger.progress={mode}: choose one of {', '.join(MODES)}")
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._silent = mode == "off"
        self._training: _Task | None = None
        self._latest: dict[str, float] = {}
        self._live: _Bars | None = None
        self._copy: Console | None = None  # of what is printed above the bar
        if mode == "rich" or (mode == "auto" and self._console.is_interactive):
            if console is None and isinstance(sys.stderr, Copied):
                self._copy = Console(file=cast(IO[str], sys.stderr.copy), width=COPY_WIDTH)
                self._console = _Above(self._copy, cast(IO[str], sys.stderr.terminal))
            self._live = _live_bars(self._console)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, total: int | None, first_step: int = 0, name: str = "train") -> None:
        """Start timing the training loop of `total` steps, `first_step` of them done before."""
        self._training = self._open(name, total, first_step)

    def advance(self, step: int, values: Mapping[str, float]) -> None:
        """`step` optimizer steps are done; `eval/` metrics get a separate line."""
        if self._training is None:
            self.begin(total=None, first_step=step - 1)
        assert self._training is not None
        held_out = {
            name.removeprefix("eval/"): value
            for name, value in values.items()
            if name.startswith("eval/")
        }
        self._latest |= {name: v for name, v in values.items() if not name.startswith("eval/")}
        self._show(self._training, step, _figures(self._latest), every_tenth=True)
        if "score" in held_out:  # its loss is an objective, not the training loss
            held_out.pop("loss", None)
        if shown := _figures(held_out):
            self.note(f"step {step:,}  held-out {shown}")

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A named phase of the run; call the yielded `tick(n)` when `n` more are done."""
        task = self._open(name, total, first=0)

        def tick(n: int = 1) -> None:
            self._show(task, task.done + n, figures="", every_tenth=False)

        try:
            yield tick
            took = duration(self._clock() - task.began)
            self.note(f"{name}: {task.done:,} in {took}" if task.done else f"{name}: {took}")
        finally:
            if self._live is not None and task.bar is not None:
                self._live.remove_task(task.bar)

    def note(self, line: str) -> None:
        """Print a line of text above the bar."""
        if not self._silent:
            _print_line(self._console, line)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or another rich renderable above the bar."""
        if not self._silent:
            self._console.print(renderable)

    def _open(self, name: str, total: int | None, first: int) -> _Task:
        now = self._clock()
        task = _Task(name, total, first, done=first, began=now, last_line=now)
        if self._live is not None:
            task.bar = self._live.add_task(printable(name), total=total, completed=first, eta="")
        return task

    def _show(self, task: _Task, done: int, figures: str, every_tenth: bool) -> None:
        before, task.done = task.done, done
        now = self._clock()
        eta = _eta(task, now)
        if self._live is not None and task.bar is not None:
            self._live.figures = figures or self._live.figures
            self._live.update(task.bar, completed=done, eta=eta)
        console = self._console if self._live is None else self._copy
        if console and not self._silent and _line_due(task, before, now, every_tenth):
            task.last_line = now
            _print_line(console, _line(task, now, eta, figures))


def _print_line(console: Console, line: str) -> None:
    # soft_wrap: a log file's lines are not broken at 80 columns
    console.print(Text(printable(line)), soft_wrap=True)


class _Above(Console):
    """A terminal with a bar, which prints what comes above the bar to a second console, too."""

    def __init__(self, copy: Console, terminal: IO[str]) -> None:
        super().__init__(file=terminal)
        self._copy = copy

    def print(self, *objects: Any, **options: Any) -> None:
        if objects and not isinstance(objects[0], Control | NewLine):  # those of the bar
            self._copy.print(*objects, **options)
        super().print(*objects, **options)


class _Bars(progress.Progress):
    """Bars with the figures on a line below: beside a bar they do not fit 80 columns."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(f"  {self.figures}", no_wrap=True, overflow="ellipsis")


def _live_bars(console: Console) -> _Bars:
    return _Bars(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=40)),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[eta]}", markup=False, style="progress.remaining"),
        console=console,
        refresh_per_second=4,
        # else rich sends what the program prints to a redirected stdout to the terminal
        redirect_stdout=sys.stdout.isatty(),
    )


def _line_due(task: _Task, before: int, now: float, every_tenth: bool) -> bool:
    if now - task.last_line >= _PLAIN_EVERY_SECONDS:
        return True
    if not every_tenth or task.done == before:
        return False
    tenth = task.total is not None and task.done * 10 // task.total > before * 10 // task.total
    return tenth or before == task.first


def _line(task: _Task, now: float, eta: str, figures: str) -> str:
    where = f"{task.name} {task.done:,}"
    if task.total:
        where += f"/{task.total:,} {task.done / task.total:4.0%}"
    return "  ".join(filter(None, (where, duration(now - task.began), eta, figures)))


def _eta(task: _Task, now: float) -> str:
    """Time left at the mean pace of this process, evaluations and compilation included."""
    fresh = task.done - task.first
    if task.total is None or fresh <= 0:
        return ""
    left = max(task.total - task.done, 0) * (now - task.began) / fresh
    return f"eta {duration(left)}"


def _figures(values: Mapping[str, float]) -> str:
    return "  ".join(
        label + form.format(float(values[name]))
        for name, label, form in FIGURES
        if values.get(name) is not None
    )
