"""Temporary files and folders beside what they will replace, and what killed processes left.

A writer holds a lock on what it writes, which the kernel releases however the process ends: what
can be locked has no writer any more.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX, REPLACED = ".tmp-", ".old-"  # of what is being written, and of what it replaces


def is_leftover(name: str, of: str = "") -> bool:
    """Whether a file of this name is there only while something whose name begins with `of` is
    written, or after a crash."""
    return name.startswith((f"{PREFIX}{of}", f"{REPLACED}{of}"))


@contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """An empty sibling of `target`, locked; removed at the end if it is still there."""
    with _sibling(target, lambda path: path.open("xb").close()) as path:
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """As `temporary_file`, a folder."""
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
            if path.exists():  # else another process took it for a leftover before it was locked
                yield path
                return


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder, if the disk has locks; it stays through a rename."""
    handle = _locked(path, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _locked(path: Path, wait: bool) -> int | None:
    """An open handle with the lock. None: the path is gone, another process holds the lock, or the
    disk has none."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError:
            os.close(handle)
    return None


def remove_folder(path: Path) -> None:
    """Remove a folder; killed in between, what is left of it is a leftover, not a damaged folder.
    Raises OSError."""
    leaving = path.with_name(f"{PREFIX}{path.name}-{secrets.token_hex(4)}")
    path.rename(leaving)
    shutil.rmtree(leaving)


def remove_leftovers(folder: Path, of: str = "", alone: bool = False) -> None:
    """Remove what killed writers left in a folder, and put back what they were replacing.

    of: how the names of what they wrote begin. alone: nobody else writes there, so nothing needs to
    be locked. What cannot be removed stays.
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
