"""A patched layer under the file system: something happens before the n-th operation of a save.

Python tells an audit hook of each `open`, `mkdir`, `rename`, `remove` and `rmdir` before it is
done; `fsync` and the writer of safetensors, which is not Python, are wrapped. Installed in the
process that is to fail, see `Lab.forked`.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WATCHED = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir",
           "os.link": "link", "os.truncate": "truncate"}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SCOPES = {"save": "_save", "prune": "prune", "final": "save_final"}  # of loop, or checkpoint

Operation = tuple[str, str]  # what is about to be done, and to which path
Fault = Callable[[Operation, list[Operation]], None]


class Watch:
    """Calls `fault(operation, earlier ones)` before each operation while the `call`-th call of a
    scope runs: save (a whole save with its prune), prune, or final."""

    def __init__(self, fault: Fault, scope: str = "save", call: int = 2) -> None:
        self.fault, self.scope, self.call = fault, scope, call
        self.calls, self.inside = 0, False
        self.done: list[Operation] = []

    def install(self) -> None:
        import safetensors.torch

        sys.addaudithook(self._hear)
        real_sync, real_write = os.fsync, safetensors.torch.serialize_file

        def fsync(handle: int) -> None:
            self._before("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            real_sync(handle)

        def serialize_file(tensors: Any, filename: Any, *rest: Any, **named: Any) -> None:
            self._before("write", str(filename))
            real_write(tensors, filename, *rest, **named)

        os.fsync, safetensors.torch.serialize_file = fsync, serialize_file
        self._wrap_scope()

    def _wrap_scope(self) -> None:
        from dpo_cli.train import checkpoint, loop

        place: Any = loop if self.scope == "save" else checkpoint
        name = SCOPES[self.scope]
        real = getattr(place, name)

        def watched(*args: Any, **named: Any) -> Any:
            self.calls += 1
            self.inside = self.calls == self.call
            try:
                return real(*args, **named)
            finally:
                self.inside = False

        setattr(place, name, watched)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.inside:
            return
        if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITING:
            self._before("open", os.fsdecode(args[0]))
        elif event in WATCHED:
            self._before(WATCHED[event], " -> ".join(os.fsdecode(a) for a in args if _path(a)))

    def _before(self, kind: str, path: str) -> None:
        if not self.inside:
            return
        operation = (kind, path)
        self.inside = False  # what the fault itself does is none
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
    """Leaves the list of operations in a file."""

    def record(operation: Operation, earlier: list[Operation]) -> None:
        target.write_text(json.dumps([*earlier, operation]))

    return record


def killer(at: int, half: bool = False) -> Fault:
    """kill -9 before operation `at`; half: the file written last is left at half its length."""

    def kill(operation: Operation, earlier: list[Operation]) -> None:
        if len(earlier) != at:
            return
        written = [Path(path) for kind, path in earlier if kind in ("open", "write")]
        if half and written and written[-1].is_file():
            os.truncate(written[-1], written[-1].stat().st_size // 2)
        die()

    return kill


def full_disk(at: int) -> Fault:
    """From operation `at` on, nothing can be written; renames and removals work."""

    def refuse(operation: Operation, earlier: list[Operation]) -> None:
        if len(earlier) >= at and operation[0] in ("open", "write", "mkdir", "fsync"):
            raise OSError(errno.ENOSPC, "No space left on device", operation[1])

    return refuse


def signaller(at: int, number: signal.Signals) -> Fault:
    """A signal comes before operation `at`."""

    def send(operation: Operation, earlier: list[Operation]) -> None:
        if len(earlier) == at:
            os.kill(os.getpid(), number)

    return send
