"""The text of `dpo-run --help`, built without importing Hydra or torch."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli import __version__
from dpo_cli.config import RunConfig
from dpo_cli.config.hints import TABLES, groups, option_schema, unknown_key
from dpo_cli.config.keys import Fact
from dpo_cli.config.paths import conf_dir, recipes_dir
from dpo_cli.errors import ConfigError

WIDTH = 92
GROUPS = groups()

INTRO = """\
dpo-run trains language models on preferences: supervised fine-tuning, DPO and related
losses, reward models, PPO, and the sampling, labeling and evaluation around them. Every run
is one command with key=value overrides.

  dpo-run recipe=quickstart                             the full pipeline on a CPU, in minutes
  dpo-run stage=sft model=gpt2 data=hh                  fine-tune on the preferred responses
  dpo-run stage=dpo model=gpt2 model.path=runs/my-sft data=hh stage.beta=0.1
  dpo-run stage=reward model=gpt2 model.path=runs/my-sft data=hh        a reward model
  dpo-run stage=online-dpo model=gpt2 model.path=runs/my-sft data=hh \\
      reward_fn=reward_model reward_fn.path=runs/my-reward              DPO on its own samples
  dpo-run stage=ppo-baseline model=gpt2 model.path=runs/my-sft data=hh \\
      reward_fn=reward_model reward_fn.path=runs/my-reward              PPO, the baseline
  dpo-run stage=dpo data=jsonl data.path=pairs.jsonl model.path=my-model dry_run=true
  dpo-run stage=dpo data=hh preset=qwen3-8b-qlora-24gb dry_run=true     a model on a given GPU
  dpo-run -m stage=dpo stage.beta=0.05,0.1,0.5 optim.lr=1e-6,5e-6      a sweep of 6 runs
"""

KEYS = """\
Common keys (all keys with their values: dpo-run --cfg job, also after stage=... data=...)
  model.path=DIR            start from local weights or from a finished run folder
  data.path=FILE            local rows instead of the hub
  stage.loss= stage.beta=   the preference loss and its beta
  stage.reference=DIR       the frozen reference (default: the policy as loaded)
  reward_fn= judge=         the reward of a completion; the judge between two
  lora=lora                 train an adapter instead of all weights; qlora: on 4-bit weights
  optim.lr=                 learning rate (default: stage.default_lr)
  train.epochs= train.max_steps= train.batch_size=
  hardware=cpu              and seed=0, logger=wandb, ...

Ways to run
  dry_run=true              print the plan, write nothing
  resume=DIR                continue a run from its newest checkpoint
  -m                        sweep over values separated by commas; on Slurm: hydra/launcher=slurm
  recipe=NAME vars.x=...    a sequence of steps; the same command again resumes it
  --config-dir DIR          your own YAML files: DIR/model/mine.yaml is then model=mine
  runs [FOLDER]             the runs below a folder: state, main figure, disk
  convert FILE              the command for a file of TRL, axolotl or LLaMA-Factory
  stage=dpo --help          the keys of an option (any group: optim=adamw --help)
  --cfg job | --info | --hydra-help | --shell-completion | --version

Results go to runs/<stage>-<model>-<data>-<time>-<id>/, or run_dir=DIR: final/ (the model),
metrics.jsonl, summary.json, checkpoints/, plots/, report.html. It never overwrites a run.

Exit codes: 0 done, 2 configuration, 3 data, 4 non-finite values, 5 no valid checkpoint,
            6 folder locked, 74 disk, 75 preempted after saving a checkpoint (resume=DIR),
            130 interrupted, else 128 + the signal that ended it
"""


def quick_answer(argv: Sequence[str]) -> str | None:
    """The output of `--version`, `--help` and of no arguments; None for anything else."""
    if "--version" in argv:
        return f"dpo-run {__version__}"
    if argv[:1] == ["help"] and len(argv) > 1:
        return "\n\n".join(map(help_of_key, argv[1:]))
    if not argv or argv[0] == "help" or "--help" in argv or "-h" in argv:
        chosen = [word for word in argv if _is_choice(word)]
        return "\n\n".join(map(key_help, chosen)) if chosen else help_text()
    return None


def _is_choice(word: str) -> bool:
    """Whether a word is group=option with an existing option."""
    group, _, option = word.partition("=")
    return group in GROUPS and (conf_dir() / group / f"{option}.yaml").is_file()


def key_help(word: str) -> str:
    """Help text of `group=option`: the value, meaning, choices and type of every key.

    The value is that of the option's YAML, else the schema's default.
    """
    group, _, option = word.partition("=")
    text = (conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8")
    about = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    schema = option_schema(group, option)
    lines = [*textwrap.wrap(f"{word}: {' '.join(about)}", WIDTH), ""]
    in_yaml = dict(re.findall(r"^(\w+): *([^#\n]+?) *(?:#.*)?$", text, re.MULTILINE))
    for field in dataclasses.fields(schema):
        if field.name == "name":  # the option itself
            continue
        lines += _key_lines(group, field, in_yaml.get(field.name))
    return "\n".join(lines)


def _key_lines(group: str, field: dataclasses.Field[Any], value: str | None) -> list[str]:
    """`key=value`, then meaning, choices, bounds and type. value: None for the schema's default."""
    fact = field.metadata.get("fact", Fact())
    default = field.default_factory() if callable(field.default_factory) else field.default
    listed = all(choice in fact.meaning for choice in fact.choices)
    details = [fact.meaning, *([] if listed else [" | ".join(fact.choices)])]
    details += [fact.bound.says] if fact.bound else []
    text = f"{'; '.join(details)} ({field.type})"
    key = f"{group}.{field.name}" if group else field.name
    return [
        f"  {key}={_yaml(default) if value is None else value}",
        *textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]


def help_of_key(word: str) -> str:
    """Help text of one key, for each meaning that options of its group give it, or of a name
    without a group. Raises ConfigError for an unknown key."""
    key = word.partition("=")[0]
    named, _, name = key.rpartition(".")
    found: dict[str, list[str]] = {}
    groups_of_key = [named] if named in GROUPS else [] if named else [*GROUPS, ""]
    for group in groups_of_key:
        for option in TABLES.get(group, [""]):
            schema = option_schema(group, option) if group else RunConfig
            for field in dataclasses.fields(schema):
                if field.name == name and field.metadata.get("fact"):
                    text = "\n".join(_key_lines(group, field, None))
                    found.setdefault(text, []).append(f"{group}={option}" if option else "")
    if not found:
        raise ConfigError(unknown_key(key, {}))
    return "\n".join(
        f"{text}\n      of {', '.join(options)}" if options[0] else text
        for text, options in found.items()
    )


def _yaml(value: object) -> str:
    """A default value in YAML."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return str(value).replace("'", "") if isinstance(value, list) else str(value)


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
