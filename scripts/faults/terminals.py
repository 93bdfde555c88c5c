"""Cases of a changed base model, and of a terminal or output that goes away."""

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
    """Case B21: an adapter whose base weights have changed since its training."""
    import torch
    from safetensors.torch import load_file, save_file

    base = lab.copy(lab.base() / "final", "swapped-base")
    words, checked = (*ADAPTER, f"model.path={base}"), []
    trained = lab.uninterrupted("adapter-of-base", *words)
    evaluated = ("stage=evaluate", "stage.prompts=2", "stage.max_new_tokens=4")
    starts = {
        "resume": lambda: (f"resume={lab.cut(trained, 'resumed', 3)}",),
        "evaluate": lambda: (*UNTRAINED, *evaluated, f"model.path={trained}"),
        "export": lambda: (*UNTRAINED, "stage=export", f"model.path={trained}"),
        "merge": lambda: (*OVER, "stage=sft", "train.max_steps=1", f"model.path={trained}"),
    }
    weights = load_file(base / "model.safetensors")
    changed = {k: v + 0.3 * torch.ones_like(v) if v.dim() == 2 else v for k, v in weights.items()}
    save_file(changed, base / "model.safetensors", {"format": "pt"})
    refusal = ["(base: ", "model.other_base=true"]
    for name, start in starts.items():
        run_dir = () if name == "resume" else (f"run_dir={lab.fresh('other-base')}",)
        lab.forked(*start(), *run_dir, code=2, what=name, output=refusal)
        run_dir = () if name == "resume" else (f"run_dir={lab.fresh('other-base')}",)
        lab.forked(*start(), *run_dir, "model.other_base=true", what=name, output=["(base: "])
        checked.append(name)
    return f"exit 2 with `base: a -> b` for {', '.join(checked)}; a note with model.other_base=true"


def gone(lab: Lab) -> str:
    """Case B22: real processes whose output cannot be written."""
    cases = [*output_closed(lab), *terminal_closed(lab)]
    return f"{', '.join(cases)}: nothing lost, console.log complete, final sha256 identical"


def output_closed(lab: Lab) -> Iterator[str]:
    """A run, a recipe and a sweep continue to the end."""
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
    for name, (template, (arguments, result, expected)) in words.items():
        lab.fresh("gone")
        line = template.format(shlex.join([sys.executable, "-m", "dpo_cli", *arguments]))
        command = ["bash", "-c", f"set -o pipefail; {line}"]
        done = subprocess.run(command, cwd=lab.folder, check=False, timeout=300)
        check(done.returncode == 0, f"{name}: exit {done.returncode}")
        check(same(lab.folder / result, expected), f"{name}: final weights differ")
        log = (lab.folder / result / "console.log").read_text()
        check("results in" in log, f"{name}: console.log ends with {log[-80:]!r}")
        check((lab.folder / "gone" / "console.log").stat().st_size, f"{name}: console.log is empty")
        yield name


def terminal_closed(lab: Lab) -> Iterator[str]:
    """A run saves and stops, or continues if it was started by nohup."""
    truth, run = lab.uninterrupted("signals", *LONG), lab.folder / "gone"
    words = [word for word in LONG if not word.startswith("logger.progress=")]  # progress bar
    cases = {"terminal closed": ([], False, 75), "under nohup": ([], True, 0),
             "over 2 ranks": (["hardware.devices=2"], False, 75)}  # fmt: skip
    for name, (extra, ignored, code) in cases.items():
        lab.fresh("gone")
        command = [sys.executable, "-m", "dpo_cli", *words, *extra, f"run_dir={run}"]
        exit_code = in_a_terminal(command, lab.folder, run, ignored)
        check(exit_code == code, f"{name}: exit {exit_code} instead of {code}")
        log = (run / "console.log").read_text()
        check("\x1b" not in log and "\r" not in log, f"{name}: console.log has terminal codes")
        if code:
            check("stopped by SIGHUP" in log, f"{name}: console.log does not say why")
            lab.forked(f"resume={run}", "hardware.devices=1", what=f"{name}: resume")
        check(same(run, None if extra else truth), f"{name}: final weights differ")
        yield f"{name} (exit {code})"


def same(run: Path, truth: Path | None) -> bool:
    """Whether the final weights are those of another run. None: any weights are accepted, as two
    ranks sum in another order."""
    return (run / "final").is_dir() if truth is None else same_final(run, truth)


def in_a_terminal(command: Sequence[str], cwd: Path, run: Path, ignored: bool) -> int:
    """The exit code of a command whose terminal is closed during training. ignored: whether SIGHUP
    is ignored, as with nohup."""
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
