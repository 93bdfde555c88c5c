"""dpo_run.json, saved with weights: how they were trained."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from dpo_cli.durable.stored import stored_json
from dpo_cli.errors import DataError

PROVENANCE = "dpo_run.json"
BASE = "base_sha256"  # in an adapter's: the content of its base weights (model/base.py)
TEXTS = ("stage", "loss", "reference", "date", "data", BASE)  # entries that are strings or null


def load_provenance(folder: Path) -> dict[str, Any]:
    """How the weights in a folder were trained; empty for models not from dpo-run. Raises DataError
    for invalid entries."""
    path = folder / PROVENANCE
    facts = stored_json(path)
    try:
        if facts.get("date"):
            datetime.date.fromisoformat(facts["date"])
        wrong = [name for name in TEXTS if not isinstance(facts.get(name), str | None)]
    except (ValueError, TypeError):
        wrong = ["date"]
    if wrong:
        entry = f"{wrong[0]}={str(facts[wrong[0]])[:80]}"
        raise DataError(f"{path}: {entry} is invalid; restore or remove the file")
    return facts
