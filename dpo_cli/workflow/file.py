"""recipes/*.yaml: ordered steps, each a set of overrides for one `dpo-run` command.

    description: one line
    vars: {rows: 1000, path: "???", seeds: [0, 1]}  vars.rows=... on the command line changes it;
                                                    ??? is required
    repeat: {seed: "${vars.seeds}"}  the steps run once per value; vars.seeds=0,1,2 changes it
    steps:
      - name: sft
        overrides: {stage: sft, data.rows: "${vars.rows}", seed: "${repeat.seed}"}
        minutes: 3                  estimate on two CPU cores, for the plan
      - name: dpo
        overrides: [stage=dpo, "model.path=${steps.sft.dir}"]   as on the command line
        sweep: false                true: run with -m; comma-separated values, or a list of vars
      - name: together
        once: true                  run once, not per value; before, between or after repeated steps
        overrides: {stage: frontier, stage.evaluations: "${steps.dpo.dirs}"}
    report: [{label: SFT, step: evaluate-sft}, ...]   summaries to compare at the end

The only interpolations are `${vars.x}`, `${repeat.x}`, `${steps.x.dir}` (of the same value) and, in
a step that runs once, `${steps.x.dirs}` (of all values).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_cli.config.paths import recipes_dir
from dpo_cli.config.spelling import did_you_mean
from dpo_cli.errors import ConfigError
from dpo_cli.run_folder import key_of
from dpo_cli.workflow.shape import expect_keys, listed, minutes_of, overrides_of, read_body

RESERVED = {
    "run_dir": "each step has its own folder",
    "hydra.run.dir": "each step has its own folder",
    "hydra.sweep.dir": "each step has its own folder",
    "resume": "unfinished steps are always resumed",
    "dry_run": "set it on the command line, with recipe=",
    **dict.fromkeys(
        ("model.trust_remote_code", "stage.loss_file", "reward_fn.file"),
        "a file may not allow foreign code to run",
    ),
}
HYDRA, SWEEPS = re.compile(r"hydra(?![a-z])"), re.compile(r"hydra[./](?:sweeper|launcher)(?![a-z])")
REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_KEY = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Step:
    """One command; references in `overrides` are unresolved."""

    number: int
    name: str
    overrides: Sequence[str] | Mapping[str, Any]
    sweep: bool = False
    once: bool = False
    minutes: float | None = None

    @property
    def label(self) -> str:
        return f"{self.number:02d}-{self.name}"


@dataclass(frozen=True)
class Repeat:
    """The values that the steps are repeated for. values: slug in folder names -> value."""

    key: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    name: str
    description: str
    variables: dict[str, Any]
    steps: list[Step]
    report: list[dict[str, str]]  # {label, step}
    repeat: Repeat | None = None


def find_recipe(name: str) -> Path:
    """The file of a recipe, by its name or path. Raises ConfigError."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"recipe={name}: no such file")
        return path
    known = sorted(path.stem for path in recipes_dir().glob("*.yaml"))
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConfigError(f"recipe={name}: unknown recipe{hint} (available: {', '.join(known)})")
    return recipes_dir() / f"{name}.yaml"


def load_recipe(path: Path, settings: Sequence[str] = (), complete: bool = True) -> Recipe:
    """Read a recipe. settings: `x=1` for every `vars.x=1` of the command line.

    complete: ConfigError if required variables (`???`) are missing; otherwise they may be, and
    the recipe has no `repeat`.

    Raises ConfigError that names the file and the key.
    """
    body = read_body(path)
    variables = body["vars"]
    changed = _changed(settings)
    for name in changed:
        if name not in variables:
            hint = did_you_mean(str(name), variables)
            raise ConfigError(
                f"vars.{name}: not a variable of this recipe{hint} (known: {listed(variables)})"
            )
    variables |= {name: _like(variables[name], name, value) for name, value in changed.items()}
    missing = [f"vars.{name}=..." for name, value in variables.items() if value == "???"]
    given = body.get("repeat") if complete and not missing else None
    if given is not None:
        variables = _with_repeated_list(path, given, variables)
    _refuse_unread(path, body, variables)
    recipe = Recipe(
        name=path.stem,
        description=body["description"],
        variables=variables,
        steps=[_step(path, number, step) for number, step in enumerate(body["steps"], 1)],
        report=body["report"],
        repeat=_repeat(path, given, variables) if given is not None else None,
    )
    _check(path, recipe, repeats=body.get("repeat") is not None)
    if missing and complete:
        raise ConfigError(f"recipe={path.stem}: needs {' '.join(missing)}")
    return recipe


def _refuse_unread(path: Path, body: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """ConfigError for a variable that no step uses."""
    read = set(REFERENCE.findall(f"{body.get('repeat')} {body.get('steps')}"))
    for name in variables:
        if f"vars.{name}" not in read:
            raise ConfigError(f"{path}: vars.{name}: not used by any step; remove it")


def _changed(settings: Sequence[str]) -> dict[str, Any]:
    """Name -> value of the command line's variables."""
    changed: dict[str, Any] = {}
    for word in settings:
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([word]))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"vars.{word}: cannot be parsed; expected a number, text, or a list as [a,b]"
            ) from error
        changed |= parsed
    return changed


def _like(default: Any, name: str, value: Any) -> Any:
    """`value`, as a list if the recipe's default is one: from `0.1,0.3` or `0.1`."""
    if not isinstance(default, list):
        return value
    values = _as_list(value)
    if not values or None in values:
        shown = "" if value is None else value
        raise ConfigError(f"vars.{name}={shown}: expected a list of values, such as {default}")
    return values


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, str) and "," in value:
        return [yaml.safe_load(part) for part in value.split(",")]
    return value if isinstance(value, list) else [value]


def _with_repeated_list(path: Path, body: Any, variables: dict[str, Any]) -> dict[str, Any]:
    """The variables, with the one of `repeat` as a list: from `0,1,2` or `0`."""
    where = f"{path}: repeat"
    if not isinstance(body, dict) or len(body) != 1:
        raise ConfigError(f'{where}: expected one key, such as {{seed: "${{vars.seeds}}"}}')
    ((key, value),) = body.items()
    if not _KEY.fullmatch(str(key)):
        raise ConfigError(f"{where}: {key}: must be of a-z, 0-9 and _")
    match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return variables
    kind, _, name = match[1].partition(".")
    if kind != "vars" or name not in variables:
        hint = did_you_mean(match[1], [f"vars.{known}" for known in variables])
        raise ConfigError(f"{where}: {key}: {value} is not a variable{hint}")
    return {**variables, name: _as_list(variables[name])}


def _repeat(path: Path, body: dict[str, Any], variables: Mapping[str, Any]) -> Repeat:
    ((key, value),) = body.items()
    where, values = f"{path}: repeat: {key}", value
    if isinstance(value, str) and (match := REFERENCE.fullmatch(value)):
        name = match[1].removeprefix("vars.")
        where, values = f"vars.{name}", variables[name]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}={values}: expected a list of values, such as [0, 1, 2]")
    by_slug: dict[str, Any] = {}
    for value in values:
        if not isinstance(value, (bool, int, float, str)) or REFERENCE.search(str(value)):
            raise ConfigError(f"{where}: {value}: a value must be a number or plain text")
        slug = re.sub(r"[^a-z0-9.]+", "-", str(value).lower()).strip("-.")
        if not slug:
            raise ConfigError(f"{where}: '{value}': a folder name needs characters of a-z or 0-9")
        if slug in by_slug:
            raise ConfigError(
                f"{where}: {by_slug[slug]} and {value} would both use folders ending in -{slug}"
            )
        by_slug[slug] = value
    return Repeat(str(key), by_slug)


def _step(path: Path, number: int, body: Any) -> Step:
    where = f"{path}: step {number}"
    expect_keys(body, {"name", "overrides", "sweep", "once", "minutes"}, where)
    name, overrides = body.get("name"), overrides_of(body, where)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: name={name}: must be of a-z, 0-9 and -")
    sweep, once = (body.get(key, False) for key in ("sweep", "once"))
    for key, value in (("sweep", sweep), ("once", once)):
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {key}={value}: expected true or false")
    if isinstance(overrides, dict) and sweep:
        raise ConfigError(f"{where}: a sweep's overrides must be a list of key=a,b")
    return Step(number, name, overrides, sweep, once, minutes_of(body, where))


def _check(path: Path, recipe: Recipe, repeats: bool) -> None:
    names = [step.name for step in recipe.steps]
    if not names:
        raise ConfigError(f"{path}: has no steps")
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{path}: two steps have the name {duplicates[0]}")
    for step in recipe.steps:
        for word in step.overrides:
            if reason := RESERVED.get(key_of(word)) or _of_hydra(word):
                raise ConfigError(f"{path}: step {step.name}: {key_of(word)}: {reason}")
        if step.once and not repeats:
            raise ConfigError(f"{path}: step {step.name}: once: needs repeat: in the recipe")
    if repeats and not any("${repeat." in str(s.overrides) for s in recipe.steps if not s.once):
        raise ConfigError(f"{path}: repeat: no repeated step uses its value, ${{repeat.<key>}}")
    _check_report(path, recipe.report, names)


def _check_report(path: Path, rows: Sequence[Any], names: Sequence[str]) -> None:
    for number, row in enumerate(rows, 1):
        expect_keys(row, {"label", "step"}, f"{path}: report {number}")
        if not isinstance(row.get("label"), str):
            raise ConfigError(f"{path}: report {number}: label: expected text")
        if row.get("step") not in names:
            wrong = str(row.get("step"))
            hint = did_you_mean(wrong, names)
            raise ConfigError(f"{path}: report {number}: step={wrong}: no such step{hint}")


def _of_hydra(override: str) -> str | None:
    """Why a recipe may not set this key of Hydra, some of which name code to run, or None."""
    key = key_of(override)
    if "_target_" not in override and (not HYDRA.match(key) or SWEEPS.match(key)):
        return None
    return "a recipe may set no key of Hydra except those of hydra.sweeper and hydra.launcher"
