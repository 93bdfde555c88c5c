"""Cache folders, which several users may share; all entries can be recomputed.

Entries have the permissions of the cache folder, so that its users can read and replace each
other's.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from dpo_cli.durable import MANIFEST, disk_errors, publish_folder, write_bytes

READ_WRITE = 0o666


def subfolder(root: Path, name: str) -> Path:
    """`root/name`, created if it does not exist. Raises DiskError."""
    folder = root / name
    with disk_errors(folder):
        root.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            return folder
        folder.chmod(_mode(root))
    return folder


def keep(path: Path, data: bytes) -> None:
    """Write or replace a file in an existing folder of a cache. Raises DiskError."""
    with disk_errors(path):
        mode = _mode(path.parent) & READ_WRITE
    write_bytes(path, data, mode)


def keep_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Write or replace a folder in an existing folder of a cache. Raises DiskError."""
    with disk_errors(folder):
        mode = _mode(folder.parent)
    publish_folder(folder, write, mode=mode)


def read_folder(folder: Path) -> Mapping[str, bytes] | None:
    """Files of an entry written by `keep_folder`; None if it is missing, damaged or unreadable.

    The checksums are those of the returned bytes: another process may change an entry meanwhile.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        expected = {str(name): str(entry["sha256"]) for name, entry in manifest["files"].items()}
        files = {name: (folder / name).read_bytes() for name in expected}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return files if digests == expected else None


def _mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode) & ~stat.S_ISUID
