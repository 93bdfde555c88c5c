"""dpo_run.json beside saved weights: how they were trained."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from dpo_cli.durable.stored import stored_json
from dpo_cli.errors import DataError

PROVENANCE = "dpo_run.json"
BASE = "base_sha256"  # its entry of an adapter: the content of the weights under it (model/base.py)
TEXTS = ("stage", "loss", "reference", "date", "data", BASE)  # of its entries


def load_provenance(folder: Path) -> dict[str, Any]:
    """How the weights in a folder were trained; empty for models not from dpo-run. Raises DataError
    for what dpo-run cannot have written."""
    path = folder / PROVENANCE
    facts = stored_json(path)
    try:
        if facts.get("date"):
            datetime.date.fromisoformat(facts["date"])
        wrong = [name for name in TEXTS if not isinstance(facts.get(name), str | None)]
    except (ValueError, TypeError):
        wrong = ["date"]
    if wrong:
        told = f"{wrong[0]}={str(facts[wrong[0]])[:80]}"
        raise DataError(f"{path}: {told} is nothing that dpo-run writes; restore or remove it")
    return facts
