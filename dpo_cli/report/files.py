"""The files that record a run: configuration, command, versions, samples.

Every write replaces a file atomically or appends complete lines, and every text is redacted.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import yaml

from dpo_cli.durable import disk_errors, encode, write_bytes
from dpo_cli.durable.redact import redact

PACKAGES = (
    "dpo-run", "torch", "transformers", "tokenizers", "datasets", "safetensors",
    "huggingface_hub", "peft", "accelerate", "bitsandbytes", "numpy", "hydra-core", "omegaconf",
    "tensorboard", "wandb",
)  # fmt: skip

TOLD = {"python", *PACKAGES}  # when they change between two starts of a run
EARLIER = " (earlier)"  # after a name in versions.json
_SEPARATORS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # of str.splitlines


def without_home(value: Any) -> Any:
    """`value` with the home folder written `~`, inside mappings and lists too."""
    if isinstance(value, str):
        home = os.path.expanduser("~")  # Path.home() raises for a user without a home
        return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", value)
    if isinstance(value, Mapping):
        return {key: without_home(item) for key, item in value.items()}
    return [without_home(item) for item in value] if isinstance(value, list) else value


# An absolute path, or one of ~, . or .., inside a text; not the path of a URL.
_PATH = re.compile(r"""(?<![\w/:.~-])(?:~[\w.-]*|\.{1,2})?/[^\s'",\[\]{}()|]*""")
_PATH_KEY = re.compile(r"(^|[._])(path|dir)$")


def without_paths(value: Any) -> Any:
    """`value` with local paths reduced to their last part, inside mappings and lists too.

    A path is a text that is the name of a file here, that begins like one (`/`, `~`, `./`, `../`),
    or that follows the name of a path in an override (`run_dir=runs/1`). Hub ids and URLs stay.
    """
    if isinstance(value, Mapping):
        return {key: _without_paths(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    key, sign, text = value.partition("=")
    if sign and " " not in key:
        return f"{key}={_without_paths(key, text)}"
    if value.startswith(("/", "~", "./", "../")) or _is_file(value):
        return short_path(value)
    return _PATH.sub(lambda match: short_path(match[0]), value)


def _without_paths(key: str, value: Any) -> Any:
    named = isinstance(value, str) and "/" in value and _PATH_KEY.search(key)
    return short_path(value) if named else without_paths(value)


def _is_file(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or with a null character
        return False


def short_path(path: str) -> str:
    """The last part of a path; of a run's `final/` or `checkpoints/step-8`, the run's name too."""
    place = PurePath(path)
    if place.name == "final" and place.parent.name:
        return place.parent.name
    if place.parent.name == "checkpoints" and place.parent.parent.name:
        return "/".join(place.parts[-3:])
    return place.name or path.strip("/") or path


def to_json(value: Any, indent: int | None = None) -> str:
    """Redacted, strictly valid JSON: NaN and infinities become null, scalars of numpy numbers."""
    return json.dumps(redact(_plain(value)), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_redacted_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as redacted JSON (see `to_json`). Raises DiskError."""
    write_bytes(path, encode(to_json(value, indent=2) + "\n"))


def drop_rows_after(path: Path, step: int) -> int:
    """Truncate a JSON-lines file to its rows with `"step"` <= `step`; returns how many it lost.

    Rows of later steps belong to work that was lost with the process. A row truncated by a crash
    is removed too. The file is replaced atomically, and left alone if nothing is to be removed.
    """
    if not path.exists():
        return 0
    with disk_errors(path):
        *rows, torn = path.read_bytes().split(b"\n")  # not splitlines: text may hold U+2028
    remaining = [row for row in rows if _row_step(row) <= step]
    removed = len(rows) - len(remaining) + bool(torn)
    if removed:
        write_bytes(path, b"".join(row + b"\n" for row in remaining))
    return removed


def _row_step(row: bytes) -> float:
    """Step of a JSON row; infinity for one that cannot be read."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def append_samples(run_dir: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows (`prompt`, `completion`, ...) of `step` to samples.jsonl. Raises DiskError.

    On resume, `sinks.open_sinks` first removes the rows of lost steps.
    """
    path = run_dir / "samples.jsonl"
    lines = "".join(to_json({"step": step, **row}) + "\n" for row in rows)
    with disk_errors(path), path.open("ab") as stream:
        stream.write(encode(lines))


class _Dumper(yaml.SafeDumper):
    """Quotes texts that other YAML readers parse as numbers: PyYAML writes '1e8' unquoted."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
        style = "'"
    except ValueError:
        style = None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def to_yaml(value: Any) -> str:
    """Redacted YAML in the order given."""
    return yaml.dump(redact(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def command_line(argv: Sequence[str]) -> str:
    """`argv` quoted for a shell, without secrets, in one line: what separates lines is escaped."""
    return shlex.join(_in_a_line(word) for word in redact(list(argv)))  # quoting hides a secret


def _in_a_line(word: str) -> str:
    return _SEPARATORS.sub(lambda match: match[0].encode("unicode_escape").decode(), word)


def first_command(run_dir: Path) -> list[str]:
    """The command that started a run, as words; empty if its folder does not say."""
    path = run_dir / "command.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    first = text.partition("\n")[0]
    try:
        return shlex.split(first)
    except ValueError:  # an older version's, with a line separator in a word
        return [first]


def write_run_files(run_dir: Path, config: dict[str, Any], argv: Sequence[str]) -> str:
    """Write config.yaml and versions.json, and add this start to command.txt.

    config: the resolved configuration. A resumed run has one line per start in command.txt, and
    keeps the versions of earlier starts. Returns a line on versions that changed since the last
    one, or "". Raises DiskError.
    """
    with disk_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    write_bytes(run_dir / "config.yaml", encode(to_yaml(config)))
    changes = _write_versions(run_dir / "versions.json")
    commands = run_dir / "command.txt"
    with disk_errors(commands):
        earlier = commands.read_bytes() if commands.exists() else b""
    write_bytes(commands, earlier + encode(command_line(argv) + "\n"))
    return changes


def _write_versions(path: Path) -> str:
    now = versions()
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = {name: before[name] for name in now if before.get(name, now[name]) != now[name]}
    except (OSError, ValueError, AttributeError):  # the first start, or a torn file
        before, changed = {}, {}
    earlier = {name: value for name, value in before.items() if name.endswith(EARLIER)}
    for name, old in changed.items():
        earlier[name + EARLIER] = ", ".join(filter(None, (earlier.get(name + EARLIER), old)))
    write_redacted_json(path, now | earlier)
    parts = [f"{n} {now[n]} (before: {old})" for n, old in changed.items() if n in TOLD]
    return f"other versions than before, so results may differ: {', '.join(parts)}" if parts else ""


def versions() -> dict[str, str]:
    """Versions of Python and the installed packages, and the commit of a git checkout.

    A commit with uncommitted changes ends in "-dirty". Imports none of the packages.
    """
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _git_commit(Path(__file__).resolve().parents[2])
    return versions | ({"git_commit": commit} if commit else {})


def _git_commit(checkout: Path) -> str | None:
    # An installed package may lie inside somebody else's repository: ask only at our own root.
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, not our repository
        return None
    return answer.stdout.strip()
