#!/usr/bin/env python
"""Measure dpo-run on this machine, by default against TRL; `--help` after each command.

python scripts/bench.py [compare] ...  against TRL (decoding: transformers' generate)
python scripts/bench.py profile ...    where a training step spends its time
python scripts/bench.py scale ...      how cost grows with length, batch and model
python scripts/bench.py memory ...     the estimate of dry_run=true, and a run's peak
python scripts/bench.py save ...       what saving costs
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

COMMANDS = ("compare", "profile", "scale", "memory", "save")


def main(argv: list[str]) -> int:
    """Run a command; its exit code."""
    if argv == ["--help"]:
        print(__doc__)
    name, words = (argv[0], argv[1:]) if argv[:1] and argv[0] in COMMANDS else ("compare", argv)
    code: int = import_module(f"scripts.bench.{name}").main(words)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
