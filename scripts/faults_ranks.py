"""Cases of two processes on this machine (Gloo): killed, raising, hanging, counted anew."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

from faults_lab import ROOT, SFT, Lab, check, children, final_digest, rows_of, same_final, until

TWO = (*SFT, "hardware.devices=2", "train.eval_every_steps=0", "train.save_every_steps=2")
SCRIPT = str(ROOT / "scripts" / "faults_rank.py")


def two_ranks(lab: Lab) -> Path:
    """An uninterrupted run of two ranks."""
    if "two" not in lab.made:
        run = lab.fresh("whole-two")
        done = lab.dpo(*TWO, "train.max_steps=40", f"run_dir={run}")
        check(done.code == 0, f"two ranks, no fault: exit {done.code}: {done.last}")
        lab.made["two"] = run
    return lab.made["two"]


def killed_rank(lab: Lab) -> str:
    """Case 23."""
    truth, run = two_ranks(lab), lab.fresh("one-dies")
    child = lab.start(*TWO, "train.max_steps=40", f"run_dir={run}")
    until(lambda: len(rows_of(run)) >= 5, child)
    ranks = children(child.pid)
    check(len(ranks) == 2, f"{len(ranks)} ranks were running")
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    done = lab.wait(child, 120)
    took = time.monotonic() - killed
    check(done.code not in (0, -9) and took < 30, f"exit {done.code} after {took:.0f} s")
    again = lab.dpo(f"resume={run}")
    check(again.code == 0, f"resume: exit {again.code}: {again.last}")
    check(same_final(run, truth), "final weights differ")
    return f"exit {done.code} after {took:.1f} s: `{done.last}`; resumed identical"


def raising_rank(lab: Lab) -> str:
    """Case 24."""
    run = lab.fresh("one-raises")
    words = [SCRIPT, "launch", "raise", *TWO, "train.max_steps=40", f"run_dir={run}"]
    done = lab.wait(lab.python(words), 120)
    took = time.time() - fault_time(done.told)
    check(done.code not in (0, -9), f"exit {done.code}")
    check("ValueError: injected into rank 1" in done.told, f"cause not shown: {done.last}")
    check(not (run / "final").exists(), "a final model was published")
    return f"exit {done.code} within {took:.1f} s, `ValueError: injected into rank 1` shown"


def hanging_rank(lab: Lab) -> str:
    """Case 25."""
    run = lab.fresh("one-hangs")
    words = [SCRIPT, "launch", "hang", *TWO, "train.max_steps=40", "hardware.timeout_seconds=20"]
    done = lab.wait(lab.python([*words, f"run_dir={run}"]), 150)
    took = time.time() - fault_time(done.told)
    check(done.code not in (0, -9), f"exit {done.code} after {took:.0f} s")
    check(took < 40, f"exit {done.code}, but {took:.0f} s after the fault")
    check("never_answers" in done.told, f"no stack of the rank that hangs: {done.last}")
    stacks = len(re.findall(r"stacks of rank \d", done.told))
    threads = len(re.findall(r"(?m)^(?:Current thread|Thread) 0x", done.told))
    check(stacks == 2, f"stacks of {stacks} ranks")
    return f"exit {done.code} {took:.0f} s after the hang, stacks of 2 ranks, {threads} threads"


def fault_time(told: str) -> float:
    """When the fault came, on time.time()'s clock."""
    found = re.search(r"fault at ([\d.]+)", told)
    check(found, f"the fault was never reached: {told.strip()[-200:]}")
    assert found
    return float(found[1])


def other_ranks(lab: Lab) -> str:
    """Case 27: the finished run's checkpoint publishes its final weights again."""
    truth, digests = two_ranks(lab), {}
    for count in (1, 2, 3, 4):
        run = lab.copy(truth, f"by-{count}")
        shutil.rmtree(run / "final")
        done = lab.dpo(f"resume={run}", f"hardware.devices={count}")
        check(done.code == 0, f"{count} ranks: exit {done.code}: {done.last}")
        digests[count] = final_digest(run)
    same = [count for count, found in digests.items() if found == final_digest(truth)]
    check(same == [1, 2, 3, 4], f"identical with {same} only")
    return "read by 1, 2, 3 and 4 ranks: final weights' sha256 identical"


def clean_exits(lab: Lab) -> str:
    """Case 28."""
    codes = []
    for _ in range(lab.kills):
        done = lab.dpo(*TWO, "train.max_steps=2", f"run_dir={lab.fresh('exits')}")
        codes.append(done.code)
    check(not any(codes), f"exit codes {codes}")
    return f"{len(codes)} starts of 2 processes: {len(codes)} times exit 0"
