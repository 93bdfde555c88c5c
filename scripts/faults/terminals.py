"""Cases of what a run stands on: its base, and the terminal that it prints to."""

from __future__ import annotations

import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.common import metrics_of
from scripts.faults.beyond import finished_recipe, words_of
from scripts.faults.lab import OVER, UNTRAINED, Lab, check, same_final
from scripts.faults.runs import LONG

ADAPTER = (*OVER, "stage=sft", "lora=lora", "train.max_steps=3", "train.save_every_steps=1")


def other_base(lab: Lab) -> str:
    """Case B21: the weights under an adapter are others than those it was trained over."""
    import torch
    from safetensors.torch import load_file, save_file

    base = lab.copy(lab.base() / "final", "swapped-base")
    words, told = (*ADAPTER, f"model.path={base}"), []
    whole = lab.uninterrupted("adapter", *words)
    evaluated = ("stage=evaluate", "stage.prompts=2", "stage.max_new_tokens=4")
    ways = {
        "resume": lambda: (f"resume={lab.cut(whole, 'resumed', 3)}",),
        "evaluate": lambda: (*UNTRAINED, *evaluated, f"model.path={whole}"),
        "export": lambda: (*UNTRAINED, "stage=export", f"model.path={whole}"),
        "merge": lambda: (*OVER, "stage=sft", "train.max_steps=1", f"model.path={whole}"),
    }
    weights = load_file(base / "model.safetensors")
    changed = {k: v + 0.3 * torch.ones_like(v) if v.dim() == 2 else v for k, v in weights.items()}
    save_file(changed, base / "model.safetensors", {"format": "pt"})
    for name, start in ways.items():
        own = () if name == "resume" else (f"run_dir={lab.fresh('other-base')}",)
        lab.forked(*start(), *own, code=2, what=name, output=["(base: ", "model.other_base=true"])
        own = () if name == "resume" else (f"run_dir={lab.fresh('other-base')}",)
        lab.forked(*start(), *own, "model.other_base=true", what=name, output=["(base: "])
        told.append(name)
    return f"exit 2 with `base: a -> b` for {', '.join(told)}; told with model.other_base=true"


def gone(lab: Lab) -> str:
    """Case B22: real processes whose output has nowhere to go."""
    told = [*nobody_reads(lab), *terminal_closed(lab)]
    return f"{', '.join(told)}: nothing lost, console.log goes on, final sha256 identical"


def nobody_reads(lab: Lab) -> Iterator[str]:
    """A run, a recipe and a sweep train on to the end."""
    truth, recipe = lab.uninterrupted("signals", *LONG), finished_recipe(lab) / "02-dpo"
    run = ([*LONG, "run_dir=gone"], "gone", truth)
    two = ([*LONG, "hardware.devices=2", "run_dir=gone"], "gone", None)
    words: dict[str, tuple[str, tuple[list[str], str, Path | None]]] = {
        "closed pipe": ("{} 2>&1 | head -n 1 > /dev/null", run),
        "full disk": ("{} > /dev/full 2>&1", run),
        "closed streams": ("{} >&- 2>&-", run),
        "closed pipe of 2 ranks": ("{} 2>&1 | head -n 1 > /dev/null", two),
        "of a recipe": ("{} 2>&1 | true", ([words_of(lab), "run_dir=gone"], "gone/02-dpo", recipe)),
        "of a sweep": (
            "{} 2>&1 | true",
            (["-m", *LONG, "seed=0", "hydra.sweep.dir=gone"], "gone/0", truth),
        ),
    }
    for name, (shell, (given, result, wanted)) in words.items():
        lab.fresh("gone")
        line = shell.format(shlex.join([sys.executable, "-m", "dpo_cli", *given]))
        command = ["bash", "-c", f"set -o pipefail; {line}"]
        done = subprocess.run(command, cwd=lab.folder, check=False, timeout=300)
        check(done.returncode == 0, f"{name}: exit {done.returncode}")
        check(same(lab.folder / result, wanted), f"{name}: final weights differ")
        log = (lab.folder / result / "console.log").read_text()
        check("results in" in log, f"{name}: console.log ends with {log[-80:]!r}")
        check((lab.folder / "gone" / "console.log").stat().st_size, f"{name}: nothing was kept")
        yield name


def terminal_closed(lab: Lab) -> Iterator[str]:
    """A run saves, or trains on where it was started by nohup."""
    truth, run = lab.uninterrupted("signals", *LONG), lab.folder / "gone"
    words = [word for word in LONG if not word.startswith("logger.progress=")]  # a bar, if it can
    cases = {"terminal closed": ([], False, 75), "under nohup": ([], True, 0),
             "over 2 ranks": (["hardware.devices=2"], False, 75)}  # fmt: skip
    for name, (own, ignored, code) in cases.items():
        lab.fresh("gone")
        command = [sys.executable, "-m", "dpo_cli", *words, *own, f"run_dir={run}"]
        found = in_a_terminal(command, lab.folder, run, ignored)
        check(found == code, f"{name}: exit {found} instead of {code}")
        log = (run / "console.log").read_text()
        check("\x1b" not in log and "\r" not in log, f"{name}: console.log has terminal codes")
        if code:
            check("stopped by SIGHUP" in log, f"{name}: console.log does not say why")
            lab.forked(f"resume={run}", "hardware.devices=1", what=f"{name}: resume")
        check(same(run, None if own else truth), f"{name}: final weights differ")
        yield f"{name} (exit {code})"


def same(run: Path, truth: Path | None) -> bool:
    """Whether the final weights are those of another run; None: any, as two ranks add in another
    order."""
    return (run / "final").is_dir() if truth is None else same_final(run, truth)


def in_a_terminal(command: Sequence[str], cwd: Path, run: Path, ignored: bool) -> int:
    """The exit code of a command whose terminal is closed while it trains. ignored: SIGHUP is, as
    by nohup."""
    pid, screen = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.chdir(cwd)
        os.execv(command[0], command)
    deadline = time.monotonic() + 180
    while len(metrics_of(run)) < 3 and time.monotonic() < deadline:
        if select.select([screen], [], [], 0.05)[0]:
            os.read(screen, 65536)
    os.close(screen)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
