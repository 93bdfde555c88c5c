"""The content of the weights under an adapter or at the start of a run, which must not change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dpo_cli.config import ModelConfig
from dpo_cli.distributed.ranks import current
from dpo_cli.durable.provenance import BASE, load_provenance
from dpo_cli.errors import ConfigError
from dpo_cli.model.digest import NOT_THE_FUNCTION, FileDigest, hash_files
from dpo_cli.model.source import Origin, loading, origin_of, source_of
from dpo_cli.model.stored import weight_files

CONTENT = "dpo_base"  # attribute of a loaded model: its `Content`
OTHER_BASE = "model.other_base"


@dataclass(frozen=True)
class Content:
    """files: of the base, followed by those of an adapter merged into it, being hashed; the base
    has `count` of them. shape: the entries of its config.json that affect the function."""

    files: FileDigest
    count: int
    shape: str

    def digest(self, key: str, count: int | None = None) -> str:
        """sha256 of the first `count` files (default: all) and the shape; a collective. ConfigError
        if they changed while being read."""
        known = current().from_first(lambda: self.files.value(count))
        if known is None:
            raise ConfigError(f"{key}: its files changed while they were read: start again")
        return hashlib.sha256(f"{known} {self.shape}".encode()).hexdigest()


def content_of(files: Sequence[Path], adapter: Sequence[Path] = ()) -> Content | None:
    """Start hashing weight files; None if there are none."""
    hashed = hash_files([*files, *adapter]) if files else None
    return None if hashed is None else Content(hashed, len(files), _shape(files[0].parent))


def _shape(folder: Path) -> str:
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        named = facts.items()
    except (OSError, ValueError, AttributeError):  # reported when the model is built
        return ""
    return json.dumps({k: v for k, v in named if k not in NOT_THE_FUNCTION}, sort_keys=True)


def content_at(config: ModelConfig, key: str = "model.path") -> Content | None:
    """Content of a folder or hub id that is not loaded; None for a model from scratch."""
    if config.path is None and config.architecture is not None:
        return None
    origin, (source, options) = origin_of(config, key), source_of(config, key)
    with loading(source, key):
        return content_of(weight_files(source, options), origin.adapter_files)


def content_in(model: PreTrainedModel) -> Content | None:
    """Content of the files that a model was loaded from."""
    content: Content | None = getattr(model, CONTENT, None)
    return content


def refuse_other_base(
    content: Content | None,
    origin: Origin,
    config: ModelConfig,
    key: str,
    note: Callable[[str], Any],
) -> None:
    """ConfigError for an adapter trained on a base with other content, or a note if
    `model.other_base` allows it. An adapter without a record of its base is accepted."""
    trained_over = load_provenance(origin.adapter).get(BASE) if origin.adapter else None
    if trained_over is None or content is None:
        return
    now = content.digest(key, content.count)
    if now == trained_over:
        return
    named = origin.base.path or origin.base.hub_id
    line = (
        f"{key}={origin.adapter}: was trained over weights that {named} no longer has "
        f"(base: {str(trained_over)[:12]} -> {now[:12]})"
    )
    if not config.other_base:
        raise ConfigError(
            f"{line}: restore them, or set {OTHER_BASE}=true to use it on these anyway"
        )
    note(line)
