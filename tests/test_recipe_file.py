"""Recipe files: mistakes in them, and references between steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_cli.errors import ConfigError
from dpo_cli.workflow.expand import Task, expand, resolve
from dpo_cli.workflow.file import Recipe, Repeat, load_recipe

PLAIN = "steps: [{name: a}]"
STEPS = "steps: [{name: a, overrides: {seed: '${repeat.seed}'}}]"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "more than 20,000 values, with its aliases expanded"),
        (f"steps: {'[' * 100_000}", "nested more than 32 deep"),
        ("steps: &a [*a]", "the alias *a is undefined or recursive"),
        (f"# {'x' * 300_000}", "larger than 256 KB, the limit for configuration files"),
        ("\x00", "control characters are not allowed"),
        ("3", "expected the keys"),
        ("!!set {a}", "expected the keys"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("steps: 3", "steps: expected a list of steps"),
        ("steps: [3]", "step 1: expected the keys"),
        ("vars: [1]\nsteps: [{name: a}]", "vars: expected names and values"),
        ("vars: {1: 2}\nsteps: [{name: a}]", "vars: 1: a name must be text"),
        ("steps: [{name: a, overrides: 5}]", "overrides: expected keys and values, or a list"),
        ("steps: [{name: a, overrides: [{x: 1}]}]", "overrides are written key=value"),
        ("steps: [{name: a, minutes: .nan}]", "minutes=nan: expected a number above 0"),
        ("steps: [{name: a, minutes: 1e400}]", "minutes=inf: expected a number above 0"),
        ("report: x\nsteps: [{name: a}]", "report: expected a list such as"),
        ("report: [{step: a}]\nsteps: [{name: a}]", "report 1: label: expected text"),
        ("description: [x]\nsteps: [{name: a}]", "description: expected text"),
        (f"steps: [{{name: a, overrides: {{seed: {'9' * 5000}}}}}]", "Exceeds the limit"),
        ("steps: []", "has no steps"),
        ("stepps: []", "stepps: unknown key; did you mean steps?"),
        ("[1]", "expected the keys description, repeat, report, steps, vars"),
        ("steps: [{name: A}]", "step 1: name=A: must be of a-z, 0-9 and -"),
        ("steps: [{name: ../x}]", "step 1: name=../x: must be of"),
        ("steps: [{name: a}, {name: a}]", "two steps have the name a"),
        ("steps: [{name: a, overides: {}}]", "step 1: overides: unknown key; did you mean over"),
        ("steps: [{name: a, overrides: [x]}]", "step 1: x: overrides are written key=value"),
        ("steps: [{name: a, overrides: {run_dir: x}}]", "step a: run_dir: each step has its own"),
        (
            "steps: [{name: a, overrides: ['+model.trust_remote_code=true']}]",
            "step a: model.trust_remote_code: a file may not allow foreign code to run",
        ),
        (
            "steps: [{name: a, overrides: ['+hydra.job.env_set.PYTHONPATH=/tmp']}]",
            "step a: hydra.job.env_set.PYTHONPATH: a recipe may set no key of Hydra except those",
        ),
        ("steps: [{name: a, overrides: {hydra: {searchpath: [x]}}}]", "hydra.searchpath: a recipe"),
        ("steps: [{name: a, overrides: ['hydra/callbacks=x']}]", "hydra/callbacks: a recipe may"),
        (
            "steps: [{name: a, sweep: true, overrides: ['hydra.launcher._target_=os.system']}]",
            "hydra.launcher._target_: a recipe may set no",
        ),
        ("steps: [{name: a, sweep: true, overrides: {seed: 1}}]", "step 1: a sweep's overrides"),
        (
            "steps: [{name: a}]\nreport: [{label: x, step: b}]",
            "report 1: step=b: no such step",
        ),
        ("steps: [", "small.yaml: "),
        ("steps: [{name: a, onse: true}]", "step 1: onse: unknown key; did you mean once?"),
        ("steps: [{name: a, once: 1}]", "step 1: once=1: expected true or false"),
        ("steps: [{name: a, sweep: 'yes'}]", "step 1: sweep=yes: expected true or false"),
        ("steps: [{name: a, minutes: 0}]", "step 1: minutes=0: expected a number above 0"),
        ("steps: [{name: a, minutes: true}]", "step 1: minutes=True: expected a number above 0"),
        ("steps: [{name: a, once: true}]", "step a: once: needs repeat: in"),
        (
            "vars: {a: 1, b: 2}\nsteps: [{name: x, overrides: ['n=${vars.a}']}]",
            "vars.b: not used by any step; remove it",
        ),
        (f"repeat: {{seed: [0]}}\n{PLAIN}", "repeat: no repeated step uses its value"),
        (f"repeat: [seed]\n{STEPS}", "repeat: expected one key, such as {seed: "),
        (f"repeat: {{a: [0], b: [1]}}\n{STEPS}", "repeat: expected one key"),
        (f"repeat: {{Seed: [0]}}\n{STEPS}", "repeat: Seed: must be of a-z, 0-9 and _"),
        (f"repeat: {{seed: []}}\n{STEPS}", "repeat: seed=[]: expected a list of values"),
        (f"repeat: {{seed: 3}}\n{STEPS}", "repeat: seed=3: expected a list of values"),
        (f"repeat: {{seed: [[0]]}}\n{STEPS}", "repeat: seed: [0]: a value must be a number or"),
        (f"repeat: {{seed: ['']}}\n{STEPS}", "repeat: seed: '': a folder name"),
        (f"repeat: {{seed: [a b, A/B]}}\n{STEPS}", "repeat: seed: a b and A/B would both"),
        (
            f"vars: {{seeds: [0]}}\nrepeat: {{seed: '${{vars.seds}}'}}\n{STEPS}",
            "repeat: seed: ${vars.seds} is not a variable; did you mean vars.seeds?",
        ),
    ],
)
def test_a_mistake_in_the_file(text: str, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path / "small.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_steps_than_can_be_checked_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "small.yaml", f"repeat: {{seed: {list(range(1001))}}}\n{STEPS}")
    with pytest.raises(ConfigError, match="recipe small: 1,001 steps; at most 1,000"):
        expand(load_recipe(path))


@pytest.mark.parametrize(
    "reference", ["steps.dpo.dir", "steps.b.dir", "steps.a.out", "vars.no", "oc.env:HOME", "seed"]
)
def test_a_reference_to_nothing_is_refused(reference: str, tmp_path: Path) -> None:
    text = f"steps: [{{name: a}}, {{name: b, overrides: {{model.path: '${{{reference}}}'}}}}]"
    small = load_recipe(written(tmp_path / "small.yaml", text))
    with pytest.raises(ConfigError, match="recipe small, step b: "):
        resolve(small, Task(small.steps[1]), {"a": {"": Path("x")}})


def test_references_keep_their_type_and_are_remembered(tmp_path: Path) -> None:
    text = (
        "vars: {n: 3, flag: true, none: null, text: '3', list: [1, x]}\n"
        "steps:\n  - name: a\n    overrides: {n: '${vars.n}', f: '${vars.flag}', z: '${vars.none}',"
        " t: '${vars.text}', l: '${vars.list}', p: '${steps.s.dir}/x y', q: '${steps.r.dir}'}\n"
    )
    small = load_recipe(written(tmp_path / "small.yaml", text), ["n=4"])
    folders = {name: {"": Path(f"/{name}")} for name in ("s", "r", "unused")}
    assert resolve(small, Task(small.steps[0]), folders) == (
        ["n=4", "f=true", "z=null", "t='3'", "l=[1,x]", "p='/s/x y'", "q=/r"],
        {"r": Path("/r"), "s": Path("/s")},
    )


def test_a_required_variable_must_be_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "vars: {a: '???', b: 1, c: '???'}\n"
        "steps: [{name: x, overrides: ['x=[${vars.a},${vars.b},${vars.c}]']}]\n"
    )
    with pytest.raises(ConfigError, match=r"recipe=mine: needs vars\.c=\.\.\.$"):
        load_recipe(path, ["a=5"])
    assert load_recipe(path, ["a=5", "c=6"]).variables == {"a": 5, "b": 1, "c": 6}


@pytest.mark.parametrize(
    ("given", "betas"), [("0.1,1", [0.1, 1]), ("3", [3]), ("[2,x]", [2, "x"]), ("a,b", ["a", "b"])]
)
def test_a_list_of_the_recipe_stays_one(given: str, betas: list[object], tmp_path: Path) -> None:
    steps = "steps: [{name: a, overrides: ['b=${vars.betas}', 'n=${vars.name}']}]"
    path = written(tmp_path / "small.yaml", f"vars: {{betas: [5], name: x}}\n{steps}\n")
    found = load_recipe(path, [f"betas={given}", "name=0,1"]).variables
    assert found == {"betas": betas, "name": "0,1"}


# ---------------------------------------------------------------- repeat


def repeated(path: Path, *settings: str, steps: str = STEPS, complete: bool = True) -> Recipe:
    text = f"vars: {{seeds: [0]}}\nrepeat: {{seed: '${{vars.seeds}}'}}\n{steps}\n"
    return load_recipe(written(path / "small.yaml", text), settings, complete)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("[0,1,2]", {"0": 0, "1": 1, "2": 2}),
        ("0,1", {"0": 0, "1": 1}),
        ("7", {"7": 7}),
        ("gpt2,models/My_One", {"gpt2": "gpt2", "models-my-one": "models/My_One"}),
        ("[0.1,1e-5]", {"0.1": 0.1, "1e-05": 1e-5}),
    ],
)
def test_values_on_the_command_line(given: str, values: dict[str, object], tmp_path: Path) -> None:
    small = repeated(tmp_path, f"seeds={given}")
    assert small.repeat == Repeat("seed", values)
    assert small.variables == {"seeds": list(values.values())}
    assert [task.label for task in expand(small)] == [f"01-a-{slug}" for slug in values]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[]", "vars.seeds=[]: expected a list of values, such as [0]"),
        ("1,1", "vars.seeds: 1 and 1 would both use folders ending in -1"),
        ("-1,1", "vars.seeds: -1 and 1 would both use folders ending in -1"),
        ("", "vars.seeds=: expected a list of values, such as [0]"),
        ("[0", "vars.seeds=[0: cannot be parsed; expected a number, text, or a list as [a,b]"),
    ],
)
def test_values_that_cannot_be(given: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        repeated(tmp_path, f"seeds={given}")
    assert str(caught.value) == expected


def test_values_that_must_be_given(tmp_path: Path) -> None:
    text = f"vars: {{seeds: '???'}}\nrepeat: {{seed: '${{vars.seeds}}'}}\n{STEPS}\n"
    path = written(tmp_path / "small.yaml", text)
    assert load_recipe(path, complete=False).variables == {"seeds": "???"}
    with pytest.raises(ConfigError, match=r"recipe=small: needs vars\.seeds=\.\.\.$"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("once", "reference", "expected"),
    [
        (True, "steps.a.dir", "is different for each seed; use the list ${steps.a.dirs}"),
        (True, "repeat.seed", "has no value in a step with once: true"),
        (True, "steps.a.dirs/x", "is neither a variable nor the folder of an earlier step"),
        (False, "steps.a.dirs", "is only available in steps with once: true"),
        (False, "repeat.sed", "is neither a variable nor the folder of an earlier step; did you"),
    ],
)
def test_a_reference_across_values_is_refused(
    once: bool, reference: str, expected: str, tmp_path: Path
) -> None:
    steps = (
        "steps: [{name: a, overrides: {seed: '${repeat.seed}'}}, "
        f"{{name: b, once: {str(once).lower()}, overrides: {{x: '${{{reference}}}'}}}}]"
    )
    small = repeated(tmp_path, "seeds=0,1", steps=steps)
    places = {"a": {"0": Path("/0"), "1": Path("/1")}}
    title = "b" if once else r"b \(seed=1\)"
    with pytest.raises(ConfigError, match=f"^recipe small, step {title}: ") as caught:
        resolve(small, expand(small)[-1], places)
    assert f"${{{reference}}} {expected}" in str(caught.value)


def test_a_list_of_folders_is_not_part_of_a_text(tmp_path: Path) -> None:
    small = repeated(tmp_path, steps=STEPS[:-1] + ", {name: b, once: true, "
                     "overrides: ['x=[${steps.a.dirs},y]']}]")  # fmt: skip
    with pytest.raises(ConfigError, match="is a list, which cannot be part of a string"):
        resolve(small, expand(small)[-1], {"a": {"0": Path("/0")}})


def test_folders_in_lists_are_quoted_as_hydra_needs(tmp_path: Path) -> None:
    small = repeated(tmp_path, "seeds=0,1", steps=STEPS[:-1] + ", {name: b, once: true, "
                     "overrides: ['x=${steps.a.dirs}', 'y=1']}]")  # fmt: skip
    places = {"a": {"0": Path("/my runs/0"), "1": Path("/my runs/1")}}
    assert resolve(small, expand(small)[-1], places) == (
        ["x=['/my runs/0','/my runs/1']", "y=1"],
        {"a (seed=0)": Path("/my runs/0"), "a (seed=1)": Path("/my runs/1")},
    )


def test_a_recipe_may_choose_how_its_sweep_is_made(tmp_path: Path) -> None:
    text = "steps: [{name: a, sweep: true, overrides: ['hydra/sweeper=optuna', 'seed=0,1', "
    path = written(tmp_path / "r.yaml", text + "'hydra.sweeper.n_trials=3']}]")
    assert load_recipe(path, []).steps[0].overrides[0] == "hydra/sweeper=optuna"
