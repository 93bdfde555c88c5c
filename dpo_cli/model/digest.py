"""Digests that identify the function a model computes: of its weights, or of their files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_cli.distributed.fsdp import full_tensor
from dpo_cli.distributed.ranks import current
from dpo_cli.model.adapters.active import function_parts, function_state, scalings

# Configuration entries that do not change what a model computes.
NOT_THE_FUNCTION = (
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
)  # fmt: skip
PIECE = 2**28  # bytes
MAX_THREADS = 8
FILES = "dpo_files"  # attribute of a loaded model: its `FileDigest`


def model_digest(model: PreTrainedModel) -> str:
    """sha256 over the configuration and the names, shapes, dtypes and values of all weights,
    including the active adapters."""
    digest = _of_shape(model)
    for name, value in sorted(function_state(model).items()):
        _add(digest, name, value)
    return digest.hexdigest()


def loaded_digest(model: PreTrainedModel) -> str:
    """As `model_digest`, for a model whose base has not been trained since it was loaded: from the
    base's files and dtypes, and the values of the active adapter. A collective.

    Files are hashed while the model is loaded, so this is almost free; values would have to be
    gathered or copied from the GPU. Nothing is cached between runs, as size and modification time
    do not prove that a file is unchanged.
    """
    files: FileDigest | None = getattr(model, FILES, None)
    files_digest = None if files is None else current().from_first(files.value)
    if files_digest is None:
        return model_digest(model)
    digest = _of_shape(model)
    base, own = function_parts(model)
    dtypes = sorted({str(value.dtype) for value in base.values()})
    digest.update(f"files {files_digest} {dtypes}".encode())
    for name, value in sorted(own.items()):
        _add(digest, name, value)
    return digest.hexdigest()


class FileDigest:
    """sha256 of the sha256 of every `PIECE` of files, computed in the background by threads of
    rank 0 (a single thread takes 10 seconds for 16 GB)."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)
        self._before = _states(files)
        self._pieces = [
            (path, start) for path in files if path.is_file()
            for start in range(0, max(1, path.stat().st_size), PIECE)
        ]  # fmt: skip
        self._found: dict[tuple[Path, int], bytes] = {}
        self._whole = False  # whether the files were the same before and after
        self._left = iter(self._pieces)  # `next` is atomic under the GIL
        # Daemon threads: a run that fails early does not wait for 16 GB to be read.
        threads = min(MAX_THREADS, os.cpu_count() or 1, len(self._pieces)) * current().first
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def __deepcopy__(self, memo: Any) -> FileDigest:
        return self

    def _work(self) -> None:
        for path, start in self._left:
            try:
                self._found[path, start] = _piece(path, start)
            except OSError:  # `value` returns None
                return

    def value(self, count: int | None = None) -> str | None:
        """The digest of the first `count` files (default: all); None if files have changed
        before the first call, or could not be read."""
        for thread in self._threads:
            thread.join()
        if not self._whole:
            there = all(os.path.lexists(path) for path in self._files)
            self._whole = there and self._before == _states(self._files)
        if not self._whole or len(self._found) < len(self._pieces):
            return None
        first = self._files[:count]
        lines = [f"{first.index(path)} {start} {self._found[path, start].hex()}"
                 for path, start in self._pieces if path in first]  # fmt: skip
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _piece(path: Path, start: int) -> bytes:
    digest, left = hashlib.sha256(), PIECE
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (read := file.read(min(left, 2**20))):
            digest.update(read)
            left -= len(read)
    return digest.digest()


_known: dict[tuple[Any, ...], FileDigest] = {}


def hash_files(files: Sequence[Path]) -> FileDigest | None:
    """Start hashing files, once per process for the same files. None if there are none."""
    if not files:
        return None
    states = tuple(_states(files))
    if states not in _known:
        _known[states] = FileDigest(files)
    return _known[states]


def keep_digest(model: PreTrainedModel, files: FileDigest | None) -> None:
    """Attach a digest of all files that the model's weights come from."""
    setattr(model, FILES, files)


def _states(files: Sequence[Path]) -> list[tuple[Any, ...]]:
    """Stats that change when a file is written; unlike mtime, ctime cannot be set back."""
    stats: list[os.stat_result | None] = []
    for path in files:
        try:
            stats.append(path.stat())
        except OSError:
            stats.append(None)
    return [
        (str(path), *((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) if s else ()))
        for path, s in zip(files, stats, strict=True)
    ]


def _of_shape(model: PreTrainedModel) -> Any:
    shape = {k: v for k, v in model.config.to_dict().items() if k not in NOT_THE_FUNCTION}
    if scales := scalings(model):
        shape["adapter_scalings"] = scales
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())


def _add(digest: Any, name: str, value: torch.Tensor) -> None:
    digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
    raw: Any = full_tensor(value.detach()).cpu().reshape(-1).contiguous().view(torch.uint8)
    digest.update(memoryview(raw.numpy()))
