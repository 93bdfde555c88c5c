"""Atomic files and folders: written to a temporary name, synced, renamed, verified by sha256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_cli.durable.redact import redact
from dpo_cli.durable.refusals import OTHERWISE, as_refusal, reason
from dpo_cli.durable.temporary import REPLACED, held, temporary_file, temporary_folder
from dpo_cli.errors import DiskError

Entry = dict[str, str | int]  # a file's entry in a manifest: sha256, bytes

MANIFEST = "MANIFEST.json"
CHECKSUM = ".sha256"  # suffix of a file's checksum, in the format of `sha256sum`


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert an error of a read or write to a DiskError that names `path` and a remedy."""
    try:
        yield
    except OSError as error:
        raise as_refusal(error, path) or DiskError(f"{path}: {error}: {OTHERWISE}") from error
    except Exception as error:
        # safetensors reports a full disk with an exception type of its own.
        refusal = as_refusal(error, path)
        if refusal is None:
            raise
        raise refusal from error


def publish_folder(
    target: Path,
    write: Callable[[Path], object],
    facts: Mapping[str, Any] | None = None,
    mode: int | None = None,
) -> None:
    """Write a temporary sibling folder with `write`, sync it, and rename it to `target`.

    write: may return manifest entries of files that it hashed while writing; the others are read
    again. facts: additional JSON for the manifest. mode: permissions; None: by the umask.

    An existing target is replaced once the new folder is complete on disk, and restored if that
    fails. Raises DiskError.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target) as temporary:
            if mode is not None:
                temporary.chmod(mode)
            written = write(temporary)
            _write_manifest(temporary, facts or {}, written if isinstance(written, dict) else {})
            _swap(temporary, target)
        _sync(target.parent)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = target.parent / f"{REPLACED}{target.name}"
    shutil.rmtree(old, ignore_errors=True)
    with held(target):
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)


def _write_manifest(folder: Path, facts: Mapping[str, Any], written: Mapping[str, Entry]) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries, allowed = {}, folder.stat().st_mode & 0o666  # mkdir has applied the umask
    for path in files:
        if (mode := path.stat().st_mode) != mode | allowed:
            path.chmod(mode | allowed)  # safetensors creates files with mode 600
        _sync(path)
        name = path.relative_to(folder).as_posix()
        entries[name] = written.get(name) or _entry(path)
        if (size := path.stat().st_size) != entries[name]["bytes"]:
            raise OSError(errno.EIO, f"{name} has {size} bytes after the write")
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**facts, "files": entries}, indent=1), encoding="utf-8")
    manifest.chmod(allowed)
    _sync(manifest)
    _sync(folder)


def _entry(path: Path) -> Entry:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def replace_json(folder: Path, name: str, value: object) -> None:
    """Replace a JSON file of a published folder, and its entry in the manifest.

    A crash in between leaves the file without a manifest entry rather than with a wrong one.
    Raises DiskError.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"].pop(name, None)
    _write_exact(folder / MANIFEST, manifest)
    write_json(folder / name, value)
    manifest["files"][name] = _entry(folder / name)
    _write_exact(folder / MANIFEST, manifest)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """The sha256 of a file, as hex. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damage(folder: Path) -> str | None:
    """Why a published folder is damaged, or None if every file matches its manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(n): (int(e["bytes"]), str(e["sha256"])) for n, e in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    if not expected:
        return f"{MANIFEST} lists no files"
    for name, (size, digest) in expected.items():
        try:
            if (actual := (folder / name).stat().st_size) != size:
                return f"{name} has {actual} bytes instead of {size}"
            if file_digest(folder / name) != digest:
                return f"{name} does not match its sha256"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {reason(error)}"
    return None


def write_bytes(path: Path, data: bytes, mode: int | None = None) -> None:
    """Replace a file atomically. mode: permissions; None: by the umask. Raises DiskError."""
    with disk_errors(path), temporary_file(path) as temporary:
        temporary.write_bytes(data)
        if mode is not None:
            temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)


def encode(text: str) -> bytes:
    """UTF-8, with lone surrogates as backslash escapes, which are equivalent in JSON."""
    return text.encode("utf-8", errors="backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically, in UTF-8 (see `encode`), with secrets redacted."""
    write_bytes(path, encode(redact(text)))


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically, with secrets redacted."""
    _write_exact(path, redact(value))


def _write_exact(path: Path, value: object) -> None:
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_checked_text(path: Path, text: str) -> None:
    """Replace a text file atomically, and write its checksum to `<name>.sha256`."""
    checksum = path.with_name(path.name + CHECKSUM)
    with disk_errors(path):
        checksum.unlink(missing_ok=True)  # a crash must not leave a wrong checksum
    write_text(path, text)
    write_text(checksum, f"{file_digest(path)}  {path.name}\n")


def mismatch(path: Path) -> str | None:
    """Why a file does not match its checksum file; None if it does or there is none."""
    checksum = path.with_name(path.name + CHECKSUM)
    if not checksum.is_file():
        return None
    if checksum.read_text(encoding="utf-8", errors="replace").split()[:1] == [file_digest(path)]:
        return None
    return (
        f"{path}: truncated or changed since it was written (sha256 differs from {checksum.name}): "
        f"write it again, or remove {checksum.name} if you changed it"
    )
