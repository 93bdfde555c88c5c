"""Cases of resuming: after each step, after signals, twice, with other settings."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from scripts.common import metrics_of
from scripts.faults.crash import Watch, signaller
from scripts.faults.lab import (
    OVER,
    SAVES,
    SFT,
    Lab,
    around,
    check,
    checkpoint,
    same_final,
    steps_of,
    until,
)
from scripts.faults.saves import operations

EPOCHS = (
    *OVER, "model.dropout=0.1", "train.max_steps=8", "train.batch_size=16", "optim.lr=1e-3",
    "train.save_every_steps=1", "train.keep_checkpoints=20",
)  # fmt: skip
LONG = (*SFT, "train.max_steps=400", "train.save_every_steps=0", "train.eval_every_steps=0")


def settings(lab: Lab) -> Path:
    """Overrides of a DPO run of three steps, each saved."""
    return lab.uninterrupted("settings", *OVER, "stage=dpo", f"model.path={lab.base()}",
                     "train.max_steps=3", "train.save_every_steps=1")  # fmt: skip


def every_step(lab: Lab) -> str:
    """Case 4: 48 rows, 16 per step: an epoch ends after steps 2 or 3 (8 rows are held out)."""
    output = []
    for stage in ("sft", "dpo"):
        words = (*EPOCHS, f"stage={stage}", f"model.path={lab.base()}")
        truth = lab.uninterrupted(f"epochs-{stage}", *words)
        steps = steps_of(truth)
        for step in steps[:-1]:
            run = lab.cut(truth, "again", *(later for later in steps if later > step))
            lab.resumes(run, truth, what=f"{stage} after step {step}", after=step)
        output.append(f"{stage} {len(steps) - 1}/{len(steps) - 1}")
    return f"resumed after every step: {', '.join(output)} identical"


def signals(lab: Lab) -> str:
    """Case 14: signals to real processes during training."""
    output = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        run = lab.fresh("signalled")
        child = lab.start(*LONG, f"run_dir={run}")
        until(lambda run=run: len(metrics_of(run)) >= 3, child)
        os.kill(child.popen.pid, number)
        sent = time.monotonic()
        lab.wait(child).must(75, number.name)
        took = time.monotonic() - sent
        check(not (run / "final").exists(), f"{number.name}: a final model was published")
        (step,) = steps_of(run)
        lab.resumes(run, lab.uninterrupted("signals", *LONG), what=f"{number.name}: resume")
        output.append(f"{number.name} after step {step} in {took:.1f} s")
    return f"saved and exit 75: {', '.join(output)}; resumed, final sha256 identical"


def mid_step(lab: Lab) -> str:
    """Case 15: a signal after the backward, before the optimizer's step."""
    words = (*SAVES, "train.save_every_steps=0", "train.eval_every_steps=0")

    def signalled(real: Any, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    def fault() -> None:
        from dpo_cli.train import loop

        around(loop, "take_step", signalled)

    run = lab.fresh("mid-step")
    lab.forked(*words, f"run_dir={run}", fault=fault, code=75)
    check(not (run / "final").exists(), "a half-trained model was published as final")
    check(steps_of(run) == [1], f"saved {steps_of(run)}, not the current step")
    lab.resumes(run, lab.uninterrupted("mid-step", *words))
    return "the step was finished and saved, exit 75, no final/; resumed identical"


def second_signal(lab: Lab) -> str:
    """Case 16."""
    places = range(0, len(operations(lab, "save")), 6)
    bad, codes = [], set()
    for at in places:
        for number in (signal.SIGTERM, signal.SIGINT):
            run = lab.fresh("twice")
            watch = Watch(signaller(at, number), "save")

            def fault(watch: Watch = watch) -> None:
                watch.install()
                _signal_at_step(2)

            done = lab.forked(*SAVES, f"run_dir={run}", fault=fault, code=None)
            codes.add(done.code)
            resumed = lab.forked(f"resume={run}", code=None)
            if resumed.code or not steps_of(run) or not same_final(run, lab.saves()):
                bad.append(f"{number.name} at operation {at}: exit {done.code}, {resumed.last}")
    check(not bad, f"{len(bad)}: {'; '.join(bad[:3])}")
    check(codes == {75}, f"exit codes {sorted(codes)} instead of 75")
    return f"{2 * len(places)} second signals at {len(places)} places of the save: all exit 75"


def _signal_at_step(step: int) -> None:
    from dpo_cli.train import loop

    def train_step(real: Any, run: Any) -> Any:
        if run.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run)

    around(loop, "_train_step", train_step)


def two_runs(lab: Lab) -> str:
    """Case 17. Starts the second run three times, as the machine may be busy."""
    run, took = lab.fresh("locked"), []
    second = Lab(lab.folder / "beside", lab.kills, lab.seed)  # with its own output file
    child = lab.start(*LONG, f"run_dir={run}")
    try:
        until(lambda: metrics_of(run), child)
        for words in ([*LONG, f"run_dir={run}"], [f"resume={run}"], [*LONG, f"run_dir={run}"]):
            took.append(second.dpo(*words, code=6, what="the second").seconds)
    finally:
        child.end()
    check(min(took) <= 2, f"exit 6, but after {min(took):.1f} s")
    return f"exit 6 after {min(took):.1f} s (of three starts), the first is not disturbed"


def stale_lock(lab: Lab) -> str:
    """Case 18."""
    run = lab.fresh("stale")
    child = lab.start(*LONG, f"run_dir={run}")
    until(lambda: metrics_of(run), child)
    child.end()
    pid = child.popen.pid
    check((run / ".lock").read_text() == str(pid), "no lock remained")
    words = (*LONG, "train.max_steps=2", f"run_dir={run}", "resume=true")
    done = lab.forked(*words, code=None, output=[f"process {pid}"])
    check(done.code in (0, 2), f"exit {done.code}: {done.last}")
    second = lab.forked(f"resume={run}", "train.log_every_steps=50")
    check(f"process {pid}" not in second.output, "reported again, though the lock was clean")
    return f"{next(line for line in done.output.splitlines() if str(pid) in line)[-120:]}"


def used_folder(lab: Lab) -> str:
    """Case 19."""
    run = lab.copy(lab.saves(), "used")

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}

    before = times()
    lab.forked(*SAVES, f"run_dir={run}", code=2, output=["is not empty"])
    check(before == times(), "files of the used folder were touched")
    lab.forked(*SAVES, f"run_dir={run}", "resume=true", what="resume=true")
    return "refused with exit 2, no file touched; with resume=true it continues"


def other_settings(lab: Lab) -> str:
    """Case 20."""
    output = []
    for change in ("seed=1", "train.shuffle=false", "data.rows=47", "stage.beta=0.7",
                   "data.max_length=64"):  # fmt: skip
        key, _, value = change.partition("=")
        done = lab.forked(f"resume={lab.copy(settings(lab), 'changed')}", change, code=2,
                          what=change, output=[f"{key}: "])  # fmt: skip
        shown = f"-> {value}" in done.output.replace("False", "false")
        check(shown, f"{change}: exit {done.code}: {done.last}")
        output.append(key)
    return f"exit 2 with `key: old -> new` for {', '.join(output)}"


def other_rate(lab: Lab) -> str:
    """Case 21."""
    run = lab.cut(lab.saves(), "rate", 3)
    done = lab.forked(f"resume={run}", "optim.lr=1e-4", "optim.warmup_steps=0", code=None)
    if done.code == 2:  # the warm-up is part of the run, the rate is not
        done = lab.forked(f"resume={run}", "optim.lr=1e-4", code=None)
    done.must(0)
    now, was = ({row["step"]: row["lr"] for row in metrics_of(folder) if "lr" in row}[3]
                for folder in (run, lab.saves()))  # fmt: skip
    check(abs(now / was - 1e-4 / 3e-3) < 1e-9, f"step 3 at {now:g}, uninterrupted {was:g}")
    return f"applied: step 3 at {now:g} instead of {was:g}"


def own_reference(lab: Lab) -> str:
    """Case 22."""
    tuned = checkpoint(settings(lab), 3)
    again = (*OVER, "stage=dpo", f"model.path={tuned}", "train.max_steps=1")
    lab.forked(*again, f"run_dir={lab.fresh('own')}", code=2, output=["stage.reference="])
    given = lab.fresh("named")
    lab.forked(*again, f"stage.reference={lab.base()}", f"run_dir={given}", what="named")
    ratio = next(r["logratios/chosen"] for r in metrics_of(given) if "logratios/chosen" in r)
    check(abs(ratio) >= 1e-6, "the policy itself was used as the reference")
    return f"exit 2, requires stage.reference; with it, the first log-ratio is {ratio:.3g}, not 0"


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
    words = (*OVER, "stage=sft", f"model.path={bad}", f"run_dir={run}")
    lab.forked(*words, code=4, what="NaN weight")
    check(not steps_of(run) and not (run / "final").exists(), "something was saved")
    blown = lab.cut(lab.saves(), "blown", 3)
    digest = digest_of(checkpoint(blown, 2))
    lab.forked(f"resume={blown}", "optim.lr=1e20", code=4, what="rate 1e20")
    check(steps_of(blown) == [2] and digest_of(checkpoint(blown, 2)) == digest,
          f"checkpoints left: {steps_of(blown)}")  # fmt: skip
    check(not (blown / "final").exists(), "a final model was published")
    return f"NaN in {name}: exit 4, nothing saved; rate 1e20: exit 4, step-2 unchanged"


def digest_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
