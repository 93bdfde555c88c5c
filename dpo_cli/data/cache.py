"""Cache of encoded rows: flat arrays in one safetensors file, written atomically."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from dpo_cli.durable import disk_errors
from dpo_cli.durable.cache import keep
from dpo_cli.durable.temporary import remove_leftovers
from dpo_cli.errors import DiskError
from dpo_cli.records import EncodedExample

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def save(path: Path, lists: Mapping[str, Sequence[EncodedExample]], meta: dict[str, Any]) -> None:
    """Replace the file atomically. A disk that refuses only logs a warning."""
    arrays = {
        f"{name}.{key}": array
        for name, examples in lists.items()
        for key, array in _flatten(examples).items()
    }
    text = json.dumps(meta)
    content = to_safetensors(arrays, {"meta": text, "sha256": _checksum(arrays, text)})
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        keep(path, content)
    except DiskError as error:
        log.warning("encoded rows are not cached: %s", error)


def load(path: Path) -> tuple[dict[str, list[EncodedExample]], dict[str, Any]] | None:
    """(lists, meta) as saved; None if there is none, and with a warning if it is damaged.

    Read at once, as the file may be replaced at any moment.
    """
    remove_leftovers(path.parent, of="rows-")
    try:
        content = path.read_bytes()
        arrays: Arrays = from_safetensors(content)
        header = _metadata(content)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError) as error:
        log.warning("cache file %s is damaged (%s): encoding the rows again", path, error)
        return None
    text = header.get("meta", "")
    if header.get("sha256") != _checksum(arrays, text):
        log.warning("cache file %s is damaged (wrong sha256): encoding the rows again", path)
        return None
    names = sorted({key.split(".")[0] for key in arrays})
    return {name: _restore(arrays, name) for name in names}, json.loads(text)


def _metadata(content: bytes) -> dict[str, str]:
    """A safetensors file's metadata: its header is 8 bytes of length, followed by JSON."""
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size]).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _checksum(arrays: Arrays, meta: str) -> str:
    total = hashlib.sha256(meta.encode())
    for key in sorted(arrays):
        total.update(f"{key} {arrays[key].dtype}".encode())
        total.update(arrays[key].tobytes())
    return total.hexdigest()


def _flatten(examples: Sequence[EncodedExample]) -> Arrays:
    """All ids concatenated, prompt before responses, and the counts to split them again."""
    pieces = [ids for e in examples for ids in (e.prompt_ids, *e.response_ids)]
    scores = [e.scores or () for e in examples]
    return {
        "ids": np.concatenate([np.zeros(0, np.int32), *pieces]),
        "lengths": np.array([len(ids) for ids in pieces], np.int32),
        "responses": np.array([len(e.response_ids) for e in examples], np.int32),
        "rows": np.array([e.row for e in examples], np.int64),
        "keys": np.array([e.key for e in examples], np.uint64),
        "prompts": np.frombuffer(b"".join(e.prompt_json for e in examples), np.uint8),
        "prompt_bytes": np.array([len(e.prompt_json) for e in examples], np.int64),
        "scores": np.array([s for group in scores for s in group], np.float64),
        "terms": np.array([e.terms or () for e in examples], np.float64),
        "scored": np.array([len(group) for group in scores], np.int32),
    }


def _restore(arrays: Arrays, name: str) -> list[EncodedExample]:
    ids, rows = arrays[f"{name}.ids"], arrays[f"{name}.rows"].tolist()
    keys = arrays[f"{name}.keys"].tolist()
    lengths = arrays[f"{name}.lengths"].tolist()
    pieces = iter([ids[end - n : end] for n, end in zip(lengths, accumulate(lengths), strict=True)])
    texts, sizes = arrays[f"{name}.prompts"].tobytes(), arrays[f"{name}.prompt_bytes"].tolist()
    prompts = iter([texts[end - n : end] for n, end in zip(sizes, accumulate(sizes), strict=True)])
    values = iter(arrays[f"{name}.scores"].tolist())
    terms = iter(arrays[f"{name}.terms"].tolist())
    counts = arrays[f"{name}.responses"].tolist(), arrays[f"{name}.scored"].tolist()
    return [
        EncodedExample(
            prompt_ids=next(pieces),
            response_ids=tuple(next(pieces) for _ in range(responses)),
            row=row,
            scores=tuple(next(values) for _ in range(scored)) or None,
            key=key,
            prompt_json=next(prompts),
            terms=tuple(next(terms)) or None,
        )
        for row, key, responses, scored in zip(rows, keys, *counts, strict=True)
    ]
