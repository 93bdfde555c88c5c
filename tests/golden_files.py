"""Golden values: what must not change while the house is rebuilt.

`DPO_RUN_GOLDEN=write make test PYTEST_ARGS="-k golden"` writes them anew, where a change is meant:
look at the diff before committing it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "golden"


def golden(name: str, current: dict[str, Any]) -> dict[str, Any]:
    """The stored values of `name`; `current` becomes them where they are to be written."""
    path = FOLDER / f"{name}.json"
    if os.environ.get("DPO_RUN_GOLDEN") == "write":
        path.write_text(json.dumps(current, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored
