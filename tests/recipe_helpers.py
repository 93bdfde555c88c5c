"""What tests of recipes share: a stub in the place of `dpo-run`, a recipe, how it is run."""

from __future__ import annotations

from pathlib import Path

from dpo_cli import cli

# Stands in for `dpo-run`. A file `fail-<step>` makes a step fail, `stop-<step>` stops it after
# its first checkpoint, `kill-<step>` kills it, `value-<step>` changes what it writes; starts.txt
# tells what was run.
STUB = """
import json, os, pathlib, signal, sys
words = sys.argv[1:]
values = dict(word.split("=", 1) for word in words if "=" in word)
resume = "resume" in values
folder = pathlib.Path(values.get("resume") or values.get("run_dir") or values["hydra.sweep.dir"])
name = folder.name[3:]
with open("starts.txt", "a") as file:
    print("resume" if resume else "run", name, file=file)
assert resume or not folder.exists()
if not resume:
    folder.mkdir(parents=True)
(folder / "words.json").write_text(json.dumps(words))
if pathlib.Path(f"fail-{name}").exists():
    sys.exit(3)
if pathlib.Path(f"kill-{name}").exists():
    os.kill(os.getpid(), signal.SIGKILL)
if pathlib.Path(f"stop-{name}").exists():
    (folder / "checkpoints/step-1").mkdir(parents=True)
    sys.exit(75)
value = pathlib.Path(f"value-{name}")
reward = float(value.read_text()) if value.exists() else 0.5
(folder / "summary.json").write_text(json.dumps({"stage": "x", "reward": reward, "ok": True}))
row = {"prompt": "The film", "completion": f" by {name}", "reward": reward}
(folder / "samples.jsonl").write_text(json.dumps(row))
"""

RECIPE = """
description: a small one
vars: {rows: 8, lr: 1e-3, note: "it's, so"}
steps:
  - name: sft
    overrides: {stage: sft, train: {max_steps: "${vars.rows}"}, optim.lr: "${vars.lr}"}
  - name: dpo
    overrides: ["stage=dpo", "model.path=${steps.sft.dir}", "logger.wandb_project=${vars.note}"]
  - name: score
    overrides:
      stage: evaluate
      model.path: ${steps.dpo.dir}
      stage.reference: ${steps.sft.dir}
report:
  - {label: ours, step: score}
"""


def run_cli(*words: str) -> int:
    try:
        cli.main(["recipe=small.yaml", *words])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def starts(folder: Path) -> list[str]:
    """What was started since the last call."""
    path = folder / "starts.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines
