"""dpo_run.json beside saved weights: how they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_cli.durable.stored import stored_json

PROVENANCE = "dpo_run.json"
BASE = "base_sha256"  # its entry of an adapter: the content of the weights under it (model/base.py)


def load_provenance(folder: Path) -> dict[str, Any]:
    """How the weights in a folder were trained; empty for models not from dpo-run."""
    return stored_json(folder / PROVENANCE)
