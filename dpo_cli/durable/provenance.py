"""dpo_run.json beside saved weights: how they were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PROVENANCE = "dpo_run.json"
BASE = "base_sha256"  # its entry of an adapter: the content of the weights under it (model/base.py)


def load_provenance(folder: Path) -> dict[str, Any]:
    """How the weights in a folder were trained; empty for models not from dpo-run."""
    path = folder / PROVENANCE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
