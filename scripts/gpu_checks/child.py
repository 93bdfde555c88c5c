"""One check in a process of its own: `python -m gpu_checks.child MODULE:FUNCTION SETUP ANSWER`.

The answer is written anew with every fact, so that a process which is killed or crashes leaves
what it has found out.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_checks.facts import Setup, Skip

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "peft", "bitsandbytes", "liger-kernel", "trl",
    "accelerate", "datasets", "kernels", "flash-attn", "hydra-core", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of this process, which is what is measured."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(path: Path, answer: dict[str, Any]) -> None:
    half = path.with_suffix(".half")
    half.write_text(json.dumps(answer, default=str))
    half.replace(path)


def main(argv: list[str]) -> int:
    place, setup, path = argv[0], Setup(**json.loads(argv[1])), Path(argv[2])
    answer: dict[str, Any] = {"versions": versions(), "facts": {}, "skipped": None, "error": None}
    try:
        module, _, name = place.partition(":")
        for fact, value in getattr(importlib.import_module(module), name)(setup):
            print(f"{fact}: {value}", flush=True)
            answer["facts"][fact] = value
            write(path, answer)
    except Skip as why:
        answer["skipped"] = str(why)
    except BaseException as error:  # noqa: BLE001 - told in the answer, whole in the log
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        answer["error"] = f"{type(error).__name__}: {lines[0]}"[:400]
        write(path, answer)
        return 1
    write(path, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
