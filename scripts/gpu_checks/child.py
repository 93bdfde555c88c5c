"""One check in a separate process: `-m scripts.gpu_checks.child MODULE:FUNCTION SETUP ANSWER`.

The answer is rewritten with every fact, so that the facts of a process that is killed or crashes
are kept.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from scripts.common import versions, write_atomic
from scripts.gpu_checks.facts import Setup, Skip


def main(argv: list[str]) -> int:
    place, setup, path = argv[0], Setup(**json.loads(argv[1])), Path(argv[2])
    answer: dict[str, Any] = {"versions": versions(), "facts": {}, "skipped": None, "error": None}

    def save() -> None:
        write_atomic(path, json.dumps(answer, default=str))

    try:
        module, _, name = place.partition(":")
        for fact, value in getattr(importlib.import_module(module), name)(setup):
            print(f"{fact}: {value}", flush=True)
            answer["facts"][fact] = value
            save()
    except Skip as why:
        answer["skipped"] = str(why)
    except BaseException as error:  # noqa: BLE001 - summarized in the answer, complete in the log
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        answer["error"] = f"{type(error).__name__}: {lines[0]}"[:400]
        save()
        return 1
    save()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
