"""Statistics of the code's structure: `python scripts/house.py [checkout ...]`, one column each.

git worktree add /tmp/before ebad7ea && python scripts/house.py /tmp/before .
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

STAGES = ("sft", "dpo", "kto", "reward", "online-dpo", "ppo-baseline", "sample", "label",
          "evaluate", "frontier", "export", "inspect")  # fmt: skip
STAGE_NAMED = re.compile(
    r"stage(?:\.name)? (?:==|!=|in|not in) [\"(A-Z]|isinstance\([\w.]*stage, "
    r"|^ +\"(?:" + "|".join(STAGES) + r")\": "
)


def sources(root: Path, folder: str) -> list[Path]:
    return sorted((root / folder).rglob("*.py"))


def lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def room(parts: tuple[str, ...]) -> str:
    """The top-level entry of the package that a module belongs to."""
    return parts[1] if len(parts) > 1 else parts[0]


def imported(root: Path) -> set[tuple[str, str]]:
    """(importing, imported) entry of every import between two entries, anywhere in a file."""
    pairs = set()
    for path in sources(root, "dpo_cli"):
        here = room(path.relative_to(root).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "dpo_cli"
            ):
                continue
            parts = tuple(str(node.module).split("."))
            names = [parts] if len(parts) > 1 else [(*parts, alias.name) for alias in node.names]
            pairs |= {(here, room(name)) for name in names if room(name) != here}
    return pairs


def functions(paths: Iterable[Path]) -> list[int]:
    """Number of lines of every function."""
    return [
        node.end_lineno - node.lineno + 1
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]


def knowing_a_stage(root: Path) -> list[Path]:
    """Files outside the stages' folders that check which stage runs, or have a table by stage."""
    excluded = {root / "dpo_cli" / folder for folder in ("stages", "config/stages")}
    return [
        path
        for path in sources(root, "dpo_cli")
        if not excluded & set(path.parents)
        and any(map(STAGE_NAMED.search, path.read_text(encoding="utf-8").splitlines()))
    ]


def figures(root: Path) -> dict[str, int]:
    package = sources(root, "dpo_cli")
    entries = {room(path.relative_to(root).with_suffix("").parts) for path in package}
    sizes = functions(package)
    return {
        "modules of dpo_cli": len(package),
        "lines of dpo_cli": lines(package),
        "lines of scripts": lines(sources(root, "scripts")),
        "lines of tests": lines(sources(root, "tests")),
        "entries at the top of dpo_cli": len(entries),
        "imports between entries (arrows)": len(imported(root)),
        "files that know a stage": len(knowing_a_stage(root)),
        "lines of conf/*/*.yaml": lines(sorted((root / "conf").glob("*/*.yaml"))),
        "functions over 40 lines": sum(size > 40 for size in sizes),
        "files over 300 lines": sum(lines([path]) > 300 for path in package),
    }


def main() -> None:
    roots = [Path(word) for word in sys.argv[1:]] or [Path(__file__).resolve().parent.parent]
    columns = [figures(root) for root in roots]
    for name in columns[0]:
        print(f"{name:32}", *(f"{column[name]:9,}" for column in columns))


if __name__ == "__main__":
    main()
