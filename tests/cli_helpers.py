"""What tests of the command line share."""

from __future__ import annotations

import pytest

from dpo_cli import cli
from dpo_cli.config import RunConfig

Starts = list[tuple[RunConfig, list[str]]]  # what would have been run, with which words


def fails(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The message with which `dpo-run <words>` ends."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    assert caught.value.code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err.removeprefix("error: ").removesuffix("\n")
