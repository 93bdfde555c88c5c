"""Cases of system errors, and of a locale without UTF-8."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

from scripts.faults.lab import SFT, Fault, Lab, around, check


def by_the_system(lab: Lab) -> str:
    """Case B23: each error gives one line with a specific remedy, and exit 74."""
    seen = []
    for name, (fault, remedy) in _refusals().items():
        run = lab.fresh("refused")
        done = lab.forked(*SFT, "train.max_steps=1", f"run_dir={run}", fault=fault, code=None)
        done.must(74, name, remedy)
        errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
        check(len(errors) == 1 and "Traceback" not in done.output, f"{name}: {done.output[-300:]}")
        seen.append(name)
    return f"{', '.join(seen)}: exit 74, one line with a specific remedy"


def _refusals() -> dict[str, tuple[Fault, str]]:
    """Name -> fault, and text that must be printed."""
    return {
        "no locks": (lambda: around(fcntl, "flock", _raising(errno.ENOLCK)), "file locks"),
        "a file of 200 kB": (_small_files, "ulimit -f"),
        "renames fail": (lambda: around(os, "replace", _raising(errno.EIO)), "is failing"),
        "a full disk": (lambda: around(os, "fsync", _raising(errno.ENOSPC)), "make room"),
        "a quota": (lambda: around(os, "fsync", _raising(errno.EDQUOT)), "make room"),
        "a read-only disk": (lambda: around(os, "mkdir", _raising(errno.EROFS)), "not read-only"),
    }


def _raising(number: int) -> Callable[..., None]:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def other_locale(lab: Lab) -> str:
    """Case B24: a run with non-ASCII text resumes in an ASCII locale."""
    run = lab.fresh("locale") / "\u00e9"
    words = (*SFT, "train.max_steps=2", "train.save_every_steps=1", "logger.wandb_project='\u6587'")
    lab.dpo(*words, f"run_dir='{run}'")
    for path in (run / "final", run / "checkpoints" / "step-2"):
        shutil.rmtree(path)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    before = {name: os.environ.get(name) for name in plain}
    os.environ.update(plain)
    try:
        lab.dpo(f"resume={run}", what="the resume").must(0, "the resume", "resuming after step 1 ")
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    check(sorted(p.name for p in Path(lab.folder, "locale").iterdir()) == ["\u00e9"], "other names")
    return "LC_ALL=C without UTF-8 mode: resumed with the same settings, in the same folder"
