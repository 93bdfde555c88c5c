"""Recipe files: mistakes in them, and references between steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_cli.errors import ConfigError
from dpo_cli.recipe_file import load_recipe, resolve


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: []", "has no steps"),
        ("stepps: []", "stepps: unknown key; did you mean steps?"),
        ("[1]", "expected the keys description, report, steps, vars"),
        ("steps: [{name: A}]", "step 1: name=A: must be of a-z, 0-9 and -"),
        ("steps: [{name: ../x}]", "step 1: name=../x: must be of"),
        ("steps: [{name: a}, {name: a}]", "two steps are named a"),
        ("steps: [{name: a, overides: {}}]", "step 1: overides: unknown key; did you mean over"),
        ("steps: [{name: a, overrides: [x]}]", "step 1: x: overrides are written key=value"),
        ("steps: [{name: a, overrides: {run_dir: x}}]", "step a: run_dir: each step has a folder"),
        (
            "steps: [{name: a, overrides: ['+model.trust_remote_code=true']}]",
            "step a: model.trust_remote_code: a file may not allow foreign code to run",
        ),
        ("steps: [{name: a, sweep: true, overrides: {seed: 1}}]", "step 1: a sweep's overrides"),
        (
            "steps: [{name: a}]\nreport: [{label: x, step: b}]",
            "report 1: step=b: no such step",
        ),
        ("steps: [", "small.yaml: "),
    ],
)
def test_a_mistake_in_the_file(text: str, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path / "small.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "reference", ["steps.dpo.dir", "steps.b.dir", "steps.a.out", "vars.no", "oc.env:HOME", "seed"]
)
def test_a_reference_to_nothing_is_refused(reference: str, tmp_path: Path) -> None:
    text = f"steps: [{{name: a}}, {{name: b, overrides: {{model.path: '${{{reference}}}'}}}}]"
    small = load_recipe(written(tmp_path / "small.yaml", text))
    with pytest.raises(ConfigError, match="recipe small, step b: "):
        resolve(small, small.steps[1], {"a": Path("x")})


def test_references_keep_their_type_and_are_remembered(tmp_path: Path) -> None:
    text = (
        "vars: {n: 3, flag: true, none: null, text: '3', list: [1, x]}\n"
        "steps:\n  - name: a\n    overrides: {n: '${vars.n}', f: '${vars.flag}', z: '${vars.none}',"
        " t: '${vars.text}', l: '${vars.list}', p: '${steps.s.dir}/x y', q: '${steps.r.dir}'}\n"
    )
    small = load_recipe(written(tmp_path / "small.yaml", text), ["n=4"])
    folders = {"s": Path("/d"), "r": Path("/e"), "unused": Path("/f")}
    assert resolve(small, small.steps[0], folders) == (
        ["n=4", "f=true", "z=null", "t='3'", "l=[1,x]", "p='/d/x y'", "q=/e"],
        ["r", "s"],
    )


def test_a_required_variable_must_be_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("vars: {a: '???', b: 1, c: '???'}\nsteps: [{name: x, overrides: {seed: 1}}]\n")
    with pytest.raises(ConfigError, match=r"recipe=mine: needs vars\.c=\.\.\.$"):
        load_recipe(path, ["a=5"])
    assert load_recipe(path, ["a=5", "c=6"]).variables == {"a": 5, "b": 1, "c": 6}
