"""Errors of the operating system as one line: the file, the reason, and a remedy."""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import sys
import threading
from pathlib import Path

from dpo_cli.errors import ConfigError, DiskError, UserError
from dpo_cli.escapes import say

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    _FULL: "make room or choose another disk, then resume the run",
    (errno.EACCES, errno.EPERM): "check its permissions and those of its parent folders (ls -ld), "
    "or choose another path",
    (errno.EROFS,): "choose a folder on a file system that is not read-only",
    (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS): "this file system does not support the file "
    "locks that prevent two runs in one folder; choose a folder on a local disk",
    (errno.ENAMETOOLONG,): "choose a shorter name",
    (errno.EFBIG,): "raise the file size limit (ulimit -f), or choose another file system, then "
    "resume the run",
    (errno.EMFILE, errno.ENFILE): "raise the limit on open files (ulimit -n)",
    (errno.ENOENT,): "it was removed, or the path is wrong",
    (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY): "something else has this name; "
    "choose another path",
    (errno.ELOOP,): "its symbolic links are circular; choose another path",
    (errno.ENOMEM,): "free memory, then resume the run",
    (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EREMOTEIO): "the "
    "disk or network share is failing; check it (dmesg), then resume the run",
}  # fmt: skip
REMEDIES = {number: text for numbers, text in _REMEDIES.items() for number in numbers}
OTHERWISE = "check the path and its disk"
_RUST = re.compile(r"os error (\d+)")  # in errors of safetensors and tokenizers
_OVERLONG = 300  # characters; longer paths are shortened in messages


def as_refusal(error: BaseException, path: Path | None = None) -> UserError | None:
    """An error of the operating system as a UserError; None for any other error.

    path: shown instead of the error's own file name, if that says less. A DiskError, but a
    ConfigError for a name that is too long, as the user chose it.
    """
    number, why = _refused(error)
    if number is None:
        return None
    file = path or _named(error)
    free = _free_space(file) if number in _FULL else ""
    prefix = f"{_shown(file)}: " if file else ""
    kind = ConfigError if number == errno.ENAMETOOLONG else DiskError
    return kind(f"{prefix}{why}{free}: {REMEDIES.get(number, OTHERWISE)}")


def reason(error: OSError) -> str:
    """The system's reason, for messages with a remedy of their own."""
    return error.strerror or str(error) or type(error).__name__


@functools.cache
def warn_outside_calls() -> None:
    """Warn in one line about system errors that no caller catches: in a library's thread (whose
    caller gets an error later), or when a file is flushed at the end of the process."""
    in_thread, ignored = threading.excepthook, sys.unraisablehook

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if not _warned(args.exc_value):
            in_thread(args)

    def of_end(args: sys.UnraisableHookArgs) -> None:
        if not _warned(args.exc_value):
            ignored(args)

    threading.excepthook, sys.unraisablehook = of_thread, of_end


def _warned(error: BaseException | None) -> bool:
    refusal = as_refusal(error) if error else None
    if refusal is not None:
        say(f"warning: {refusal}", error=True)
    return refusal is not None


def _refused(error: BaseException) -> tuple[int | None, str]:
    """The error's errno and text; (None, ...) for other errors."""
    if isinstance(error, OSError):
        # negative: of name resolution, whose numbers are not errnos
        return (error.errno if (error.errno or 0) > 0 else None), reason(error)
    if match := _RUST.search(str(error)):
        return int(match[1]), os.strerror(int(match[1]))
    return None, ""


def _named(error: BaseException) -> Path | None:
    name = getattr(error, "filename", None)
    return Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) and name else None


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= _OVERLONG else f"{text[: _OVERLONG // 2]}...{text[-20:]}"


def _free_space(path: Path | None) -> str:
    """Free space of the path's disk, for a message; "" if unknown."""
    for folder in path.parents if path else ():
        try:
            return f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MB free)"
        except OSError:
            continue
    return ""
