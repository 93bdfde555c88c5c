"""`dpo-run --help`: written for people, built without importing Hydra or torch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from dpo_cli import __version__
from dpo_cli.paths import conf_dir, recipes_dir

WIDTH = 92

INTRO = """\
dpo-run trains language models on preferences: supervised fine-tuning, DPO and its kin, reward
models, PPO, and the sampling, labelling and evaluation around them. Every run is one command of
key=value words.

  dpo-run recipe=quickstart                             the whole road on a CPU, in minutes
  dpo-run stage=sft model=gpt2 data=hh                  fine-tune on the preferred answers
  dpo-run stage=dpo model=gpt2 model.path=runs/my-sft data=hh stage.beta=0.1
  dpo-run stage=reward model=gpt2 model.path=runs/my-sft data=hh        a reward model
  dpo-run stage=ppo-baseline model=gpt2 model.path=runs/my-sft data=hh \\
      reward_fn=reward_model reward_fn.path=runs/my-reward              PPO, to compare with
  dpo-run stage=dpo data=jsonl data.path=pairs.jsonl model.path=my-model dry_run=true
  dpo-run stage=dpo data=hh preset=qwen3-8b-qlora-24gb dry_run=true     a model, set for a GPU
  dpo-run -m stage=dpo stage.beta=0.05,0.1,0.5 optim.lr=1e-6,5e-6      a sweep of 6 runs
"""

KEYS = """\
Keys used most (all of them with their values: dpo-run --cfg job, also after stage=... data=...)
  model.path=DIR            start from local weights or from a finished run folder
  data.path=FILE            local rows instead of the hub
  stage.loss= stage.beta=   the preference loss and its strength
  stage.reference=DIR       the frozen reference (default: the policy as loaded)
  reward_fn= judge=         what scores a completion; what compares two
  lora=lora                 train an adapter instead of all weights; qlora: over 4 bits
  optim.lr=                 default: the stage's rate, stage.default_lr
  train.epochs= train.max_steps= train.batch_size=
  hardware=cpu              and seed=0, logger=wandb, ...

Ways to run
  dry_run=true              print the plan, write nothing
  resume=DIR                continue a run from its newest checkpoint
  -m                        sweep over values separated by commas; on Slurm: hydra/launcher=slurm
  recipe=NAME vars.x=...    ordered steps; run again, it goes on where it stopped
  --config-dir DIR          your own YAML files: DIR/model/mine.yaml is then model=mine
  --cfg job | --info | --hydra-help | --shell-completion | --version

Results go to runs/<stage>-<model>-<data>-<time>-<id>/, or run_dir=DIR: final/ (the model),
metrics.jsonl, summary.json, checkpoints/, plots/, report.html. A used folder is never overwritten.

Exit codes: 0 done, 2 configuration, 3 data, 4 not finite, 5 no valid checkpoint,
            6 folder in use, 74 disk, 75 stopped by a signal and saved (resume to go on),
            130 interrupted, else 128 + the signal that ended it
"""


def quick_answer(argv: Sequence[str]) -> str | None:
    """The answer to `--version`, `--help` and to no words at all; None for anything else."""
    if "--version" in argv:
        return f"dpo-run {__version__}"
    if not argv or "--help" in argv or "-h" in argv:
        return help_text()
    return None


def help_text() -> str:
    return f"{INTRO}\nChoices (group=option)\n{_choices()}\n{KEYS}".rstrip()


def _choices() -> str:
    folders = [path for path in sorted(conf_dir().iterdir()) if path.is_dir()]
    rows = {path.name: _options(path) for path in folders if path.name != "hydra"}
    rows["recipe"] = _options(recipes_dir())
    return "".join(
        textwrap.fill(
            ", ".join(options),
            WIDTH,
            initial_indent=f"  {group:<10}",
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
        )
        + "\n"
        for group, options in rows.items()
    )


def _options(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))
