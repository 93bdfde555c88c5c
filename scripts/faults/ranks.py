"""Cases with two processes on this machine (Gloo): killed, raising, hanging, resumed with another
number of ranks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

from scripts.common import ROOT, metrics_of
from scripts.faults.lab import SFT, Done, Lab, check, final_digest, same_final, until

TWO = (*SFT, "hardware.devices=2", "train.eval_every_steps=0", "train.save_every_steps=2")
FORTY = (*TWO, "train.max_steps=40")
SCRIPT = str(ROOT / "scripts" / "faults" / "rank.py")


def two_ranks(lab: Lab) -> Path:
    """An uninterrupted run of two ranks."""
    return lab.once("two", FORTY, lab.dpo)


def children(pid: int) -> list[int]:
    """Child processes, in the order they were started."""
    results = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = stat.read_text().partition(" ")
        except OSError:  # it has ended
            continue
        if int(rest.rpartition(")")[2].split()[1]) == pid:
            results.append(int(number))
    return sorted(results)


def killed_rank(lab: Lab) -> str:
    """Case 23."""
    truth, run = two_ranks(lab), lab.fresh("one-dies")
    child = lab.start(*FORTY, f"run_dir={run}")
    until(lambda: len(metrics_of(run)) >= 5, child)
    ranks = children(child.popen.pid)
    check(len(ranks) == 2, f"{len(ranks)} ranks were running")
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    done = lab.wait(child, 120)
    took = time.monotonic() - killed
    check(done.code not in (0, -9) and took < 30, f"exit {done.code} after {took:.0f} s")
    lab.dpo(f"resume={run}", what="resume")
    check(same_final(run, truth), "final weights differ")
    return f"exit {done.code} after {took:.1f} s: `{done.last}`; resumed identical"


def failing(lab: Lab, how: str, run: Path, seconds: float, *words: str) -> tuple[Done, float]:
    """How a run whose rank 1 raises or hangs ended, and the seconds from the fault to the end."""
    child = lab.python(SCRIPT, "launch", how, *FORTY, *words, f"run_dir={run}")
    done = lab.wait(child, seconds)
    ended = time.time()
    match = re.search(r"fault at ([\d.]+)", done.output)  # by time.time()
    check(match, f"the fault was never reached: {done.output.strip()[-200:]}")
    check(done.code not in (0, -9), f"exit {done.code}: {done.last}")
    assert match
    return done, ended - float(match[1])


def raising_rank(lab: Lab) -> str:
    """Case 24."""
    run = lab.fresh("one-raises")
    done, took = failing(lab, "raise", run, 120)
    done.must(None, "cause", "ValueError: injected into rank 1")
    check(not (run / "final").exists(), "a final model was published")
    return f"exit {done.code} within {took:.1f} s, `ValueError: injected into rank 1` shown"


def hanging_rank(lab: Lab) -> str:
    """Case 25."""
    run = lab.fresh("one-hangs")
    done, took = failing(lab, "hang", run, 150, "hardware.timeout_seconds=20")
    check(took < 40, f"exit {done.code}, but {took:.0f} s after the fault")
    done.must(None, "stack of the rank that hangs", "never_answers")
    stacks = len(re.findall(r"stacks of rank \d", done.output))
    threads = len(re.findall(r"(?m)^(?:Current thread|Thread) 0x", done.output))
    check(stacks == 2, f"stacks of {stacks} ranks")
    return f"exit {done.code} {took:.0f} s after the hang, stacks of 2 ranks, {threads} threads"


def other_ranks(lab: Lab) -> str:
    """Case 27: the checkpoint of a finished run publishes the same final weights on another number
    of ranks."""
    truth, same = two_ranks(lab), []
    for count in (1, 2, 3, 4):
        run = lab.copy(truth, f"by-{count}")
        shutil.rmtree(run / "final")
        lab.dpo(f"resume={run}", f"hardware.devices={count}", what=f"{count} ranks")
        same += [count] if final_digest(run) == final_digest(truth) else []
    check(same == [1, 2, 3, 4], f"identical with {same} only")
    return "read by 1, 2, 3 and 4 ranks: final weights' sha256 identical"


def clean_exits(lab: Lab) -> str:
    """Case 28."""
    codes = [
        lab.dpo(*TWO, "train.max_steps=2", f"run_dir={lab.fresh('exits')}", code=None).code
        for _ in range(lab.kills)
    ]
    check(not any(codes), f"exit codes {codes}")
    return f"{len(codes)} starts of 2 processes: all exit 0"
