"""Hooks under the file system: inject a fault before the n-th operation of a save, or of a whole
command in one folder.

Python reports each `open`, `mkdir`, `rename`, `remove` and `rmdir` to an audit hook before
executing it; `fsync` is wrapped. Operations of other threads are ignored: a save runs in its own
thread. Installed in the process under test, see `Lab.forked`.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

WATCHED = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir",
           "os.link": "link", "os.truncate": "truncate"}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SCOPES = {"save": "publish", "prune": "prune", "final": "save_final"}  # functions to watch

Operation = tuple[str, str]  # kind and path of an operation that is about to run
Fault = Callable[[Operation, list[Operation]], None]


class Watch:
    """Calls `fault(operation, earlier operations)` before each operation during the `call`-th call
    of a scope: save (a complete save with its prune), prune, final, or the whole command.

    under: operations on other folders are ignored.
    """

    def __init__(
        self, fault: Fault, scope: str = "save", call: int = 2, under: Path | None = None
    ) -> None:
        self.fault, self.scope, self.call = fault, scope, call
        self.under = "" if under is None else str(under)
        self.calls, self.inside = 0, scope == "command"
        self.thread = threading.get_ident()
        self.done: list[Operation] = []

    def install(self) -> None:
        sys.addaudithook(self._on_event)
        real_sync = os.fsync

        def fsync(handle: int) -> None:
            self._before("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            real_sync(handle)

        os.fsync = fsync
        if self.scope != "command":
            self._wrap_scope()

    def _wrap_scope(self) -> None:
        from dpo_cli.train import checkpoint, saving

        module: Any = saving if self.scope == "save" else checkpoint
        name = SCOPES[self.scope]
        real = getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            self.calls += 1
            self.inside = self.calls == self.call
            self.thread = threading.get_ident()
            try:
                return real(*args, **options)
            finally:
                self.inside = False

        setattr(module, name, watched)

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._is_watched():
            return
        if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITING:
            self._before("open", os.fsdecode(args[0]))
        elif event in WATCHED:
            self._before(WATCHED[event], " -> ".join(os.fsdecode(a) for a in args if _path(a)))

    def _is_watched(self) -> bool:
        return self.inside and threading.get_ident() == self.thread

    def _before(self, kind: str, path: str) -> None:
        if not (self._is_watched() and path.startswith(self.under)):
            return
        operation = (kind, path)
        self.inside = False  # operations of the fault itself do not count
        try:
            self.fault(operation, self.done)
        finally:
            self.inside = True
            self.done.append(operation)


def _path(value: Any) -> bool:
    return isinstance(value, (str, bytes))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def recorder(target: Path) -> Fault:
    """Write the list of operations to a file."""

    def record(operation: Operation, earlier: list[Operation]) -> None:
        target.write_text(json.dumps([*earlier, operation]))

    return record


def killer(at: int, half: bool = False) -> Fault:
    """kill -9 before operation `at`; half: with the last written file truncated to half."""

    def kill(operation: Operation, earlier: list[Operation]) -> None:
        if len(earlier) != at:
            return
        written = [Path(path) for kind, path in earlier if kind == "open"]
        if half and written and written[-1].is_file():
            os.truncate(written[-1], written[-1].stat().st_size // 2)
        die()

    return kill


def full_disk(at: int) -> Fault:
    """Fail all writes from operation `at` on; renames and removals succeed."""

    def refuse(operation: Operation, earlier: list[Operation]) -> None:
        if len(earlier) >= at and operation[0] in ("open", "mkdir", "fsync"):
            raise OSError(errno.ENOSPC, "No space left on device", operation[1])

    return refuse


def signaller(at: int, number: signal.Signals) -> Fault:
    """Send a signal before operation `at`."""

    def send(operation: Operation, earlier: list[Operation]) -> None:
        if len(earlier) == at:
            os.kill(os.getpid(), number)

    return send
