"""UTF-8 whatever the locale, and users without a home."""

from __future__ import annotations

import ast
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Cli
from dpo_cli import cli, surroundings

ROOT = Path(cli.__file__).parent
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LANG": "C"}


def without_encoding(path: Path) -> Iterator[str]:
    """Calls that would read or write text in the locale's encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or "encoding" in {k.arg for k in node.keywords}:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        texts = [ast.unparse(a) for a in [*node.args, *(k.value for k in node.keywords)]]
        binary = any("b" in text for text in texts if text[:1] in "'\"")
        low = ast.unparse(node.func) in ("os.open", "self._opener.open")
        if (name == "read_text" and not node.args) or (name == "open" and not (binary or low)):
            yield f"{path.name}:{node.lineno}"
        if name == "write_text" and len(node.args) == 1:  # two: of `durable`
            yield f"{path.name}:{node.lineno}"


def test_every_text_file_has_its_encoding() -> None:
    assert [call for path in ROOT.rglob("*.py") for call in without_encoding(path)] == []


def test_files_and_arguments_are_utf8_in_any_locale(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "é.yaml"
    recipe.write_text("steps: [{name: ü, overrides: {stage: sft}}]", encoding="utf-8")
    done = cli("recipe=é.yaml", "dry_run=true", env=PLAIN)
    assert done.returncode == 2
    assert done.stderr == ("error: \\xe9.yaml: step 1: name=\\xfc: must be of a-z, 0-9 and -\n")


def test_a_user_without_a_home_gets_no_folder_named_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setenv("HOME", "/home/somebody")
    surroundings.ensure_home()
    assert os.environ["HOME"] == "/home/somebody"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "")
    surroundings.ensure_home()
    assert Path(os.environ["HOME"]).parent == tmp_path
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert os.path.expanduser("~/a") == "~/a"
    surroundings.ensure_home()
    assert Path("~").expanduser().parent == tmp_path
    assert Path("~").expanduser().stat().st_mode & 0o777 == 0o700
