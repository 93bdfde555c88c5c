"""Cases of damaged checkpoints and full disks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from scripts.faults.crash import Watch, full_disk, recorder
from scripts.faults.lab import SFT, Lab, check, checkpoint, final_digest, same_final, steps_of

LONG = (*SFT, "train.max_steps=6", "train.save_every_steps=1", "train.eval_every_steps=0")
Harm = Callable[[Path], object]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_bit(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


HARMS: dict[str, Harm] = {"missing": Path.unlink, "truncated": truncate, "zeroed": zero}


def falls_back(lab: Lab, harms: Iterable[tuple[str, str, Harm]]) -> str:
    """Apply each kind of damage to the newest checkpoint: the earlier one must be used, with a
    report, and lead to the same result."""
    bad, count = [], 0
    for what, name, harm in harms:
        run = lab.cut(lab.saves(), "damaged")
        harm(checkpoint(run, 3) / name)
        done, count = lab.forked(f"resume={run}", code=None), count + 1
        of = "" if name == "MANIFEST.json" else name
        output = f"checkpoint not used: step-3: {of}" in done.output
        after = "resuming after step 2" in done.output
        if done.code or not output or not after or not same_final(run, lab.saves()):
            bad.append(f"{name} {what}: exit {done.code}, reported: {output}, step 2: {after}")
    check(count and not bad, f"{len(bad)} of {count}: {'; '.join(bad[:3])}")
    return (
        f"{count}/{count} fell back to step 2, reported which file and why, final sha256 identical"
    )


def damaged_files(lab: Lab) -> str:
    """Case 6."""
    names = sorted(path.name for path in checkpoint(lab.saves(), 3).iterdir())
    return falls_back(lab, [(k, n, h) for n in names for k, h in HARMS.items()])


def flipped_bits(lab: Lab) -> str:
    """Case 7."""
    return falls_back(lab, [
        (f"bit flipped at {place:.0%}", name, lambda path, place=place: flip_bit(path, place))
        for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
        for place in (0.1, 0.5, 0.9)
    ])  # fmt: skip


def leftovers(lab: Lab) -> str:
    """Case 8."""
    run = lab.cut(lab.saves(), "damaged", 3)
    checkpoint(run, 9).mkdir()
    folder, half = run / "checkpoints", run / "checkpoints" / ".tmp-step-3-0badcafe"
    shutil.copytree(checkpoint(run, 2), half)
    (half / "MANIFEST.json").unlink()
    lab.resumes(run, lab.saves(), after=2)
    left = sorted(path.name for path in folder.iterdir())
    check(left == ["step-2", "step-3"], f"left in checkpoints/: {left}")
    return "empty step-9 and an incomplete .tmp-step-3: ignored, then removed; final identical"


def prune_with_skewed_times(lab: Lab) -> str:
    """Case 12."""
    run = lab.cut(lab.saves(), "skewed", 3)
    os.utime(checkpoint(run, 2), (0, 0))
    shutil.copytree(checkpoint(run, 2), checkpoint(run, 1))
    os.utime(checkpoint(run, 1), (4e9, 4e9))
    lab.forked(f"resume={run}")
    check(steps_of(run) == [2, 3], f"kept {steps_of(run)} of 1, 2, 3")
    return "step-1 dated to 2096, step-2 to 1970, keep 2: steps 2 and 3 kept"


# ---------------------------------------------------------------- full disks

MOUNTED = """
mount -t tmpfs -o size=$SIZE dpo-run "$DISK" || exit 99
"$PYTHON" -m dpo_cli "$@" > "$OUT.1" 2>&1; echo $? > "$OUT.codes"
ls "$DISK/run/checkpoints" >> "$OUT.codes"
mount -o remount,size=64m "$DISK"
"$PYTHON" -m dpo_cli resume="$DISK/run" > "$OUT.2" 2>&1; echo $? > "$OUT.resumed"
cp -r "$DISK/run/final" "$OUT.final"
"""


def disk_full(lab: Lab) -> str:
    """Case 10, on a tmpfs in a mount namespace; needs root or user namespaces."""
    truth, output = lab.uninterrupted("long", *LONG), []
    one = sum(path.stat().st_size for path in checkpoint(truth, 6).iterdir())
    for share in (2.15, 2.5, 2.9):
        disk, out = lab.fresh("disk"), lab.folder / "disk-out"
        disk.mkdir()
        for stale in lab.folder.glob("disk-out*"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        # a tmpfs allocates pages of 4 KiB; the run's other files need some, too
        env = {"SIZE": str((int(share * one / 4096) + 12) * 4096), "DISK": str(disk),
               "OUT": str(out), "PYTHON": sys.executable}  # fmt: skip
        words = [*LONG, "train.keep_checkpoints=5", f"run_dir={disk / 'run'}"]
        done = subprocess.run(
            ["unshare", "--mount", "--map-root-user", "sh", "-c", MOUNTED, "sh", *words],
            cwd=lab.folder, env={**os.environ, **env}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        check(done.returncode != 99 and out.with_suffix(".codes").exists(),
              f"no small disk could be mounted: {done.stderr.strip()}")  # fmt: skip
        code, *remaining = out.with_suffix(".codes").read_text().split()
        text = out.with_suffix(".1").read_text()
        check(code == "74", f"{share} checkpoints: exit {code}: {text.strip()[-160:]}")
        check("No space left" in text and "MB free" in text, f"printed: {text.strip()[-160:]}")
        resume_code = out.with_suffix(".resumed").read_text().strip()
        check(resume_code == "0", f"resume with room: exit {resume_code}")
        resumed = lab.fresh("from-disk")
        shutil.copytree(out.with_suffix(".final"), resumed / "final")
        check(same_final(resumed, truth), "final weights differ")
        output.append(f"{share}: exit 74 with {len(remaining)} complete")
    return f"tmpfs of {'; '.join(output)}; resumed with room: 3/3, final sha256 identical"


def disk_full_at_the_end(lab: Lab) -> str:
    """Case 11: publish a finished run again, with a full disk from each operation on."""
    from dpo_cli.durable import damage

    run, results = lab.copy(lab.saves(), "finished"), lab.folder / "operations.json"
    good = final_digest(run)
    lab.forked(f"resume={run}", fault=Watch(recorder(results), "final", 1).install)
    count, bad, codes = len(json.loads(results.read_text())), [], []
    for at in range(count):
        fault = Watch(full_disk(at), "final", call=1)
        codes.append(lab.forked(f"resume={run}", fault=fault.install, code=None).code)
        if not (run / "final").is_dir() or final_digest(run) != good or damage(run / "final"):
            bad.append(f"full from operation {at}: final/ is incomplete (exit {codes[-1]})")
    check(not bad, f"{len(bad)} of {count}: {'; '.join(bad[:3])}")
    check(set(codes) <= {0, 74} and codes[0] == 74, f"exit codes {sorted(set(codes))}")
    left = [path.name for path in run.iterdir() if path.name.startswith((".tmp", ".old"))]
    check(not left, f"left behind: {left}")
    return f"full from each of {count} operations on: exit 74 {codes.count(74)} times, final/ valid"
