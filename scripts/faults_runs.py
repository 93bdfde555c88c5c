"""Cases of starting again: after each step, after signals, twice, with other settings."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from faults_crash import Watch, signaller
from faults_lab import OVER, SFT, Failed, Lab, check, kill_all, rows_of, same_final, steps_of, until
from faults_saves import SAVES, operations

EPOCHS = (
    *OVER, "model.dropout=0.1", "train.max_steps=8", "train.batch_size=16", "optim.lr=1e-3",
    "train.save_every_steps=1", "train.keep_checkpoints=20",
)  # fmt: skip
LONG = (*SFT, "train.max_steps=400", "train.save_every_steps=0", "train.eval_every_steps=0")


def every_step(lab: Lab) -> str:
    """Case 4: 48 rows, 16 a step: an epoch ends after steps 2 or 3 (8 rows are held out)."""
    told = []
    for stage in ("sft", "dpo"):
        words = (*EPOCHS, f"stage={stage}", f"model.path={lab.base()}")
        truth = lab.whole(f"epochs-{stage}", *words)
        steps = steps_of(truth)
        for step in steps[:-1]:
            run = lab.copy(truth, "again")
            shutil.rmtree(run / "final")
            for later in steps:
                if later > step:
                    shutil.rmtree(run / "checkpoints" / f"step-{later}")
            done = lab.forked(f"resume={run}")
            check(done.code == 0, f"{stage} after step {step}: exit {done.code}: {done.last}")
            check(f"resuming after step {step} " in done.told, f"{stage}: not after {step}")
            check(same_final(run, truth), f"{stage} after step {step}: final weights differ")
        told.append(f"{stage} {len(steps) - 1}/{len(steps) - 1}")
    return f"resumed after every step: {', '.join(told)} identical"


def signals(lab: Lab) -> str:
    """Case 14: real processes, told to stop while they train."""
    told, truth = [], None
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        run = lab.fresh("signalled")
        child = lab.start(*LONG, f"run_dir={run}")
        until(lambda run=run: len(rows_of(run)) >= 3, child)
        os.kill(child.pid, number)
        sent = time.monotonic()
        done = lab.wait(child)
        took = time.monotonic() - sent
        check(done.code == 75, f"{number.name}: exit {done.code}: {done.last}")
        check(not (run / "final").exists(), f"{number.name}: a final model was published")
        (step,) = steps_of(run)
        resumed = lab.forked(f"resume={run}")
        check(resumed.code == 0, f"{number.name}: resume: exit {resumed.code}: {resumed.last}")
        truth = truth or lab.whole("signals", *LONG)
        check(same_final(run, truth), f"{number.name}: final weights differ")
        told.append(f"{number.name} after step {step} in {took:.1f} s")
    return f"saved and exit 75: {', '.join(told)}; resumed, final sha256 identical"


def mid_step(lab: Lab) -> str:
    """Case 15: the signal comes after the backward, before the optimiser."""
    words = (*SAVES, "train.save_every_steps=0", "train.eval_every_steps=0")

    def fault() -> None:
        from dpo_cli.train import loop

        real = loop.take_step

        def take_step(*args: Any) -> float:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        loop.take_step = take_step

    run = lab.fresh("mid-step")
    done = lab.forked(*words, f"run_dir={run}", fault=fault)
    check(done.code == 75, f"exit {done.code}: {done.last}")
    check(not (run / "final").exists(), "a half-trained model was published as final")
    check(steps_of(run) == [1], f"saved {steps_of(run)}, not the step that was under way")
    resumed = lab.forked(f"resume={run}")
    check(resumed.code == 0, f"resume: exit {resumed.code}: {resumed.last}")
    check(same_final(run, lab.whole("mid-step", *words)), "final weights differ")
    return "the step was finished and saved, exit 75, no final/; resumed identical"


def second_signal(lab: Lab) -> str:
    """Case 16."""
    places = range(0, len(operations(lab, "save")), 6)
    truth, bad, codes = lab.whole("saves", *SAVES), [], set()
    for at in places:
        for number in (signal.SIGTERM, signal.SIGINT):
            run = lab.fresh("twice")
            watch = Watch(signaller(at, number), "save")

            def fault(watch: Watch = watch) -> None:
                watch.install()
                _signal_at_step(2)

            done = lab.forked(*SAVES, f"run_dir={run}", fault=fault)
            codes.add(done.code)
            resumed = lab.forked(f"resume={run}")
            if resumed.code or not steps_of(run) or not same_final(run, truth):
                bad.append(f"{number.name} at operation {at}: exit {done.code}, {resumed.last}")
    check(not bad, f"{len(bad)}: {'; '.join(bad[:3])}")
    check(codes == {75}, f"exit codes {sorted(codes)} instead of 75")
    return f"{2 * len(places)} second signals at {len(places)} places of the save: it ends, exit 75"


def _signal_at_step(step: int) -> None:
    from dpo_cli.train import loop

    real = loop._train_step

    def train_step(run: Any) -> dict[str, float]:
        if run.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run)

    loop._train_step = train_step


def two_runs(lab: Lab) -> str:
    """Case 17. The second start is timed three times: the machine may be busy."""
    run = lab.fresh("locked")
    child = lab.start(*LONG, f"run_dir={run}")
    try:
        until(lambda: rows_of(run), child)
        took = []
        for words in ([*LONG, f"run_dir={run}"], [f"resume={run}"], [*LONG, f"run_dir={run}"]):
            done = Lab.dpo(_beside(lab), *words)
            check(done.code == 6, f"the second exits {done.code}: {done.last}")
            took.append(done.seconds)
    finally:
        kill_all(child)
        lab.wait(child)
    check(min(took) <= 2, f"exit 6, but after {min(took):.1f} s")
    return f"exit 6 after {min(took):.1f} s (of three starts), the first is not disturbed"


def _beside(lab: Lab) -> Lab:
    """Another lab for a second process, whose output has a file of its own."""
    return Lab(lab.folder / "beside", lab.kills, lab.seed)


def stale_lock(lab: Lab) -> str:
    """Case 18."""
    run = lab.fresh("stale")
    child = lab.start(*LONG, f"run_dir={run}")
    until(lambda: rows_of(run), child)
    kill_all(child)
    lab.wait(child)
    check((run / ".lock").read_text() == str(child.pid), "no lock was left")
    words = (*LONG, "train.max_steps=2")
    done = lab.forked(*words, f"run_dir={run}", "resume=true")
    said = f"process {child.pid}" in done.told
    check(said, f"nothing about process {child.pid}: {done.told.strip()[:200]}")
    check(done.code in (0, 2), f"exit {done.code}: {done.last}")
    again = lab.forked(f"resume={run}", "train.log_every_steps=50")
    check(again.code == 0, f"exit {again.code}: {again.last}")
    check(f"process {child.pid}" not in again.told, "told again, though the lock was clean")
    return f"{next(line for line in done.told.splitlines() if str(child.pid) in line)[-120:]}"


def used_folder(lab: Lab) -> str:
    """Case 19."""
    run = lab.copy(lab.whole("saves", *SAVES), "used")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    done = lab.forked(*SAVES, f"run_dir={run}")
    check(done.code == 2 and "is not empty" in done.told, f"exit {done.code}: {done.last}")
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    check(before == after, "files of the used folder were touched")
    asked = lab.forked(*SAVES, f"run_dir={run}", "resume=true")
    check(asked.code == 0, f"resume=true: exit {asked.code}: {asked.last}")
    return "refused with exit 2, no file touched; with resume=true it goes on"


def other_settings(lab: Lab) -> str:
    """Case 20."""
    words = (*OVER, "stage=dpo", f"model.path={lab.base()}", "train.max_steps=3",
             "train.save_every_steps=1")  # fmt: skip
    truth, told = lab.whole("settings", *words), []
    for change in ("seed=1", "train.shuffle=false", "data.rows=47", "stage.beta=0.7",
                   "data.max_length=64"):  # fmt: skip
        run = lab.copy(truth, "changed")
        done = lab.forked(f"resume={run}", change)
        key, _, value = change.partition("=")
        shown = f"{key}: " in done.told and f"-> {value}" in done.told.replace("False", "false")
        check(done.code == 2 and shown, f"{change}: exit {done.code}: {done.last}")
        told.append(key)
    return f"exit 2 with `key: old -> new` for {', '.join(told)}"


def other_rate(lab: Lab) -> str:
    """Case 21."""
    run = lab.copy(lab.whole("saves", *SAVES), "rate")
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-3")
    done = lab.forked(f"resume={run}", "optim.lr=1e-4", "optim.warmup_steps=0")
    if done.code == 2:  # the warm-up is part of the run, the rate is not
        done = lab.forked(f"resume={run}", "optim.lr=1e-4")
    check(done.code == 0, f"exit {done.code}: {done.last}")
    rates = {row["step"]: row["lr"] for row in rows_of(run) if "lr" in row}
    was = {row["step"]: row["lr"] for row in rows_of(lab.made["saves"]) if "lr" in row}
    ratio = rates[3] / was[3]
    check(abs(ratio - 1e-4 / 3e-3) < 1e-9, f"step 3 at {rates[3]:g}, uninterrupted {was[3]:g}")
    return f"applied: step 3 at {rates[3]:g} instead of {was[3]:g}"


def own_reference(lab: Lab) -> str:
    """Case 22."""
    words = (*OVER, "stage=dpo", f"model.path={lab.base()}", "train.max_steps=3",
             "train.save_every_steps=1")  # fmt: skip
    tuned = lab.whole("settings", *words) / "checkpoints" / "step-3"
    again = (*OVER, "stage=dpo", f"model.path={tuned}", "train.max_steps=1")
    run = lab.fresh("own")
    done = lab.forked(*again, f"run_dir={run}")
    check(done.code == 2 and "stage.reference=" in done.told, f"exit {done.code}: {done.last}")
    named = lab.forked(*again, f"stage.reference={lab.base()}", f"run_dir={lab.fresh('named')}")
    check(named.code == 0, f"named: exit {named.code}: {named.last}")
    first = rows_of(lab.folder / "named")
    ratio = next(row["logratios/chosen"] for row in first if "logratios/chosen" in row)
    if abs(ratio) < 1e-6:
        raise Failed("the policy's own weights were taken for the reference")
    return f"exit 2, asks for stage.reference; named, the first log-ratio is {ratio:.3g}, not 0"


def not_finite(lab: Lab) -> str:
    """Case 29."""
    import torch
    from safetensors.torch import load_file, save_file

    bad = lab.copy(lab.base() / "final", "not-a-number")
    weights = load_file(bad / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    run = lab.fresh("nan")
    done = lab.forked(*OVER, "stage=sft", f"model.path={bad}", f"run_dir={run}")
    check(done.code == 4, f"NaN weight: exit {done.code}: {done.last}")
    check(not steps_of(run) and not (run / "final").exists(), "something was saved of it")
    blown = lab.copy(lab.whole("saves", *SAVES), "blown")
    shutil.rmtree(blown / "final")
    shutil.rmtree(blown / "checkpoints" / "step-3")
    kept = digest_of(blown / "checkpoints" / "step-2")
    lost = lab.forked(f"resume={blown}", "optim.lr=1e20")
    check(lost.code == 4, f"rate 1e20: exit {lost.code}: {lost.last}")
    check(steps_of(blown) == [2] and digest_of(blown / "checkpoints" / "step-2") == kept,
          f"checkpoints left: {steps_of(blown)}")  # fmt: skip
    check(not (blown / "final").exists(), "a final model was published")
    return f"NaN in {name}: exit 4, nothing saved; rate 1e20: exit 4, step-2 as it was"


def digest_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
