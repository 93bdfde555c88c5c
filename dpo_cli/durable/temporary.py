"""Temporary files and folders next to their targets, and cleanup after killed processes.

A writer holds a lock on its temporary file, which the kernel releases however the process ends: a
file that can be locked has no writer.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX, REPLACED = ".tmp-", ".old-"  # of names being written, and of those being replaced


def is_leftover(name: str, of: str = "") -> bool:
    """Whether a name is that of a temporary file, which exists during a write or after a crash.
    of: prefix of its target's name."""
    return name.startswith((f"{PREFIX}{of}", f"{REPLACED}{of}"))


@contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """An empty, locked sibling of `target`; removed at the end if it still exists."""
    with _sibling(target, lambda path: path.open("xb").close()) as path:
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """As `temporary_file`, for a folder."""
    with _sibling(target, Path.mkdir) as path:
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _sibling(target: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    while True:
        path = target.with_name(f"{PREFIX}{target.name}-{secrets.token_hex(4)}")
        make(path)
        with held(path):
            if path.exists():  # else another process removed it as a leftover before it was locked
                yield path
                return


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder, if the disk supports locks; a rename keeps it."""
    handle = _locked(path, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _locked(path: Path, wait: bool) -> int | None:
    """An open, locked handle. None: the path does not exist, another process holds the lock, or
    the disk does not support locks."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError:
            os.close(handle)
    return None


def remove_folder(path: Path) -> None:
    """Remove a folder; if killed in between, a leftover remains instead of a damaged folder.
    Raises OSError."""
    leftover = path.with_name(f"{PREFIX}{path.name}-{secrets.token_hex(4)}")
    path.rename(leftover)
    shutil.rmtree(leftover)


def remove_leftovers(folder: Path, of: str = "", alone: bool = False) -> None:
    """Remove leftovers of killed writers in a folder, and restore what they were replacing.

    of: prefix of the targets' names. alone: no other process writes there, so locks are not
    required. Errors of the removal are ignored.
    """
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if is_leftover(path.name, of)]:
            handle = _locked(path, wait=False)
            try:
                if handle is not None or alone:
                    _remove(path)
            finally:
                if handle is not None:
                    os.close(handle)


def _remove(path: Path) -> None:
    target = path.with_name(path.name.removeprefix(REPLACED))
    with suppress(OSError):
        if target != path and not target.exists():
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
