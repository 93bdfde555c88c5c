"""A digest of the function that a model computes: of its values, or of the files they came from."""

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
from dpo_cli.model.adapters import active as adapters

# Entries of a model's configuration that do not change what it computes.
NOT_THE_FUNCTION = ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache")
PIECE = 2**28  # bytes
MOST_THREADS = 8
FILES = "dpo_files"  # the attribute of a loaded model that holds its `FileDigest`


def model_digest(model: PreTrainedModel) -> str:
    """sha256 over the configuration and over names, shapes, dtypes and values of all weights: of
    a model with adapters, those that are switched on."""
    digest = _of_shape(model)
    for name, value in sorted(adapters.function_state(model).items()):
        _add(digest, name, value)
    return digest.hexdigest()


def loaded_digest(model: PreTrainedModel) -> str:
    """As `model_digest`, of a model whose base nobody has trained since it was loaded: of the
    files of the base and the dtypes it is held in, and of the values of the adapter that is on.

    Files are read while the model is loaded, so this costs next to nothing, where values of a
    sharded model are gathered and those on a GPU copied first. Nothing is remembered from run to
    run: a size and a time of change do not prove that a file is the same. All ranks must call it.
    """
    files: FileDigest | None = getattr(model, FILES, None)
    known = None if files is None else current().from_first(files.value)
    if known is None:
        return model_digest(model)
    digest = _of_shape(model)
    base, own = adapters.function_parts(model)
    held = sorted({str(value.dtype) for value in base.values()})
    digest.update(f"files {known} {held}".encode())
    for name, value in sorted(own.items()):
        _add(digest, name, value)
    return digest.hexdigest()


class FileDigest:
    """sha256 of the sha256 of every `PIECE` of files, worked out from now on by a few threads, on
    the first rank: in pieces, since one thread takes 10 seconds for 16 GB."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)
        self._before = _states(files)
        self._pieces = [
            (path, start) for path in files if path.is_file()
            for start in range(0, max(1, path.stat().st_size), PIECE)
        ]  # fmt: skip
        self._found: dict[tuple[Path, int], bytes] = {}
        self._left = iter(self._pieces)  # its `next` is one step of the interpreter
        # Daemons: a run that fails early does not wait for 16 GB to be read.
        threads = min(MOST_THREADS, os.cpu_count() or 1, len(self._pieces)) * current().first
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def __deepcopy__(self, memo: Any) -> FileDigest:
        return self

    def _work(self) -> None:
        for path, start in self._left:
            try:
                self._found[path, start] = _piece(path, start)
            except OSError:  # `value` sees that it is missing
                return

    def value(self) -> str | None:
        """None where the files have changed meanwhile, or could not be read."""
        for thread in self._threads:
            thread.join()
        missing = not all(os.path.lexists(path) for path in self._files)
        if missing or self._before != _states(self._files):
            return None
        if len(self._found) < len(self._pieces):
            return None
        found = [f"{self._files.index(path)} {start} {self._found[path, start].hex()}"
                 for path, start in self._pieces]  # fmt: skip
        return hashlib.sha256("\n".join(found).encode()).hexdigest()


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
    """Begin to hash them, once a process for the same files. None of none."""
    if not files:
        return None
    states = tuple(_states(files))
    if states not in _known:
        _known[states] = FileDigest(files)
    return _known[states]


def keep_digest(model: PreTrainedModel, files: FileDigest | None) -> None:
    """files: all that the model's weights were made of."""
    setattr(model, FILES, files)


def _states(files: Sequence[Path]) -> list[tuple[Any, ...]]:
    """What a file that is written to has another of: the time of the last change to its entry
    cannot be set back, as that to its contents can."""
    found: list[os.stat_result | None] = []
    for path in files:
        try:
            found.append(path.stat())
        except OSError:
            found.append(None)
    return [
        (str(path), *((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) if s else ()))
        for path, s in zip(files, found, strict=True)
    ]


def _of_shape(model: PreTrainedModel) -> Any:
    shape = {k: v for k, v in model.config.to_dict().items() if k not in NOT_THE_FUNCTION}
    if scales := adapters.scalings(model):
        shape["adapter_scalings"] = scales
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())


def _add(digest: Any, name: str, value: torch.Tensor) -> None:
    digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
    raw: Any = full_tensor(value.detach()).cpu().reshape(-1).contiguous().view(torch.uint8)
    digest.update(memoryview(raw.numpy()))
