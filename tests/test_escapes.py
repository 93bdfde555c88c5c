"""Text from outside reaches no terminal, page or picture as it is."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest

from cli_helpers import fails
from dpo_cli.escapes import escape_messages, in_one_line, printable, printable_values, say
from dpo_cli.report.frontier import Cloud, draw_frontier

EVIL = "a\x1b]0;PWN\x07\x1b[31m\u202eb\u2028c\x9b\ud800"
SHOWN = "a\\x1b]0;PWN\\x07\\x1b[31m\\u202eb\\u2028c\\x9b\\ud800"


def test_controls_are_escaped_everywhere(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert printable(EVIL) == SHOWN
    assert (
        printable("é 文 \U0001f468\u200d\U0001f469 \t\n") == "é 文 \U0001f468\u200d\U0001f469 \t\n"
    )
    assert printable_values({EVIL: [EVIL, (1, EVIL)]}) == {SHOWN: [SHOWN, [1, SHOWN]]}
    say(EVIL, error=True)
    assert capsys.readouterr().err == f"{SHOWN}\n"
    escape_messages()
    logging.getLogger("of a library").warning("%s", EVIL)
    assert caplog.messages == [SHOWN]
    assert SHOWN in warnings.formatwarning(EVIL, UserWarning, "x.py", 1)


def test_a_line_is_one_line_and_not_endless() -> None:
    assert in_one_line("a\nb\tc") == "a\\nb\\tc"
    long = in_one_line("a" * 50_000 + "end")
    assert len(long) < 2100
    assert (long[:3], long[-3:]) == ("aaa", "end")


@pytest.mark.parametrize("words", ["data=jsonl data.path='{}'", "model={}", "{}=1", "resume={}"])
def test_error_lines(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, *words.format("e\x1b]0;PWN\x07").split(" ", 1))
    assert "\x1b" not in said
    assert "\x07" not in said


def test_a_methods_name_is_no_formula(tmp_path: Path) -> None:
    point = np.array([1.0])
    cloud = Cloud(f"$\\frac{{$ {EVIL}", point, point, point, point, np.array([True]))
    draw_frontier(tmp_path, [cloud], None, None)
    assert (tmp_path / "plots" / "frontier.png").stat().st_size > 1000
