"""Models on the Hugging Face hub: which commit, or that it cannot be had."""

from __future__ import annotations

from functools import cache
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

HUB_TIMEOUT_SECONDS = 5.0


@cache
def hub_commit(hub_id: str, revision: str | None) -> str | None:
    """The commit `revision` (default: main) points to, or None where the hub does not answer.

    One request: from_pretrained alone repeats its own for most of a minute.
    """
    try:
        return HfApi().model_info(hub_id, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
    except (OSError, ValueError, HTTPError):
        return None


def hub_options(hub_id: str, revision: str | None) -> dict[str, Any]:
    """Arguments of from_pretrained: the commit, or the local cache alone without a network."""
    commit = hub_commit(hub_id, revision)
    if commit is None:
        return {"revision": revision, "local_files_only": True}
    return {"revision": commit}
