"""The command line: help, messages, exit codes, run folders, resume."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cli_helpers import Starts, fails
from conftest import Cli
from dpo_cli import __version__, cli
from dpo_cli.config import DpoConfig
from dpo_cli.config.hints import groups, option_schema
from dpo_cli.config.paths import conf_dir
from dpo_cli.errors import DataError

pytest_plugins = ["cli_fixtures"]
HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib")


# ---------------------------------------------------------------- help


def test_help_lists_what_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    text = capsys.readouterr().out
    cli.main(["--help", "stage.beta=1"])
    assert capsys.readouterr().out == text
    for folder in conf_dir().iterdir():
        if folder.is_dir():
            for option in folder.glob("*.yaml"):
                assert option.stem in text
    assert "quickstart" in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_explains_every_key_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    for path in conf_dir().glob("*/*.yaml"):
        group, option = path.parent.name, path.stem
        if group not in groups():
            continue
        cli.main([f"{group}={option}", "--help"])
        text = capsys.readouterr().out
        schema = option_schema(group, option)
        for field in dataclasses.fields(schema):
            assert f"  {group}.{field.name}=" in text or field.name == "name", field
        assert max(map(len, text.splitlines())) <= 110
    cli.main(["stage=dpo", "--help"])
    assert "stage.beta=0.1\n      strength of the KL penalty" in capsys.readouterr().out


def test_keys_of_earlier_versions_are_taken_and_told(
    empty: Path, starts: Starts, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["stage=dpo", "stage.length_normalised=true"])
    assert capsys.readouterr().err == (
        "note: stage.length_normalised is now called stage.length_normalized\n"
    )
    assert starts[0][0].stage == DpoConfig(length_normalized=True)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"dpo-run {__version__}\n"


def imported(*commands: str) -> set[str]:
    """Modules in a process after `dpo-run <command>` for each of the commands."""
    code = "import sys\nfrom dpo_cli.cli import main\n"
    for command in commands:
        code += f"try: main({command.split()!r})\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('MODULES', *sys.modules)"],
        cwd=Path(cli.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_neither_hydra_nor_torch() -> None:
    assert not imported("", "--help", "--version") & {*HEAVY, "hydra", "omegaconf", "rich"}


def test_mistakes_are_found_without_torch() -> None:
    mistakes = ["seed=-1", "recipe=none", "recipe=quickstart dry_run=true", "modle=x", "resume=/no"]
    modules = imported(*mistakes)
    assert "hydra" in modules
    assert not modules & set(HEAVY)


def test_a_mistake_is_told_within_two_seconds(cli: Cli) -> None:
    began = time.monotonic()
    done = cli("stage=dpo", "stage.beta=-1")
    assert time.monotonic() - began < 2.0
    assert done.returncode == 2
    assert done.stderr == "error: stage.beta=-1.0: must be above 0\n"
    assert done.stdout == ""


def test_a_closed_pipe_is_no_error(clean_env: dict[str, str]) -> None:
    command = f"{sys.executable} -m dpo_cli --help | true"
    root = Path(cli.__file__).parents[1]
    done = subprocess.run(
        ["bash", "-c", command], cwd=root, env=clean_env, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("model=gpt2-lrge", "model=gpt2-lrge: unknown option; did you mean gpt2-large? (available"),
        ("modle=gpt2", "modle: unknown group or key; did you mean model?"),
        ("+extra=x", "extra: unknown key; see dpo-run --cfg job"),
        ("train.batchsize=3", "train.batchsize: unknown key; did you mean train.batch_size?"),
        ("lr=3", "lr: unknown key; did you mean optim.lr?"),
        ("stage.beta=3", "stage.beta: not a key of stage=sft; it belongs to stage=dpo"),
        ("stage=dpo stage.bta=3", "stage.bta: unknown key; did you mean stage.beta?"),
        (
            "stage=sft stage.reward_model=x",
            "stage.reward_model: unknown key; see dpo-run --cfg job",
        ),
        ("stage=ppo", "stage=ppo: unknown option; did you mean ppo-baseline? (available: dpo, "),
        (
            "judge.tasks=x",
            "judge.tasks: unknown key; did you mean judge.task, a key of judge=http?",
        ),
        (
            "judge.retries=2",
            "judge.retries: not a key of judge=reward_fn; it belongs to judge=http",
        ),
        ("judge.api_key=x", "judge.api_key: unknown key; set the environment variable OPENAI_API_"),
        ("stage=dpo reward_fn=length", "reward_fn=length: has no effect with stage=dpo; remove it"),
        ("judge=http", "judge=http: has no effect with stage=sft; remove it"),
        ("+train.batch_size=3", "+train.batch_size: this key exists already; remove the +"),
        ("~train.nothing", "~train.nothing: there is no such key to remove"),
        ("data.max_rows=3", "data.max_rows=3: has no effect with data=sentiment; remove it"),
        ("train={a:1}", "train: choose an option, train=<name>, or set its keys one by one"),
        ("stage=null", "Config group override must be a string or a list. Got NoneType (in: st"),
        ("hydra.run.dirr=x", "hydra.run.dirr: unknown key; see dpo-run --cfg hydra"),
        ("hydra/launcher=other", "hydra/launcher=other: unknown option (available: "),
        ("hydra.job.env_copy=[NOT_SET]", "'NOT_SET' (in: hydra.job.env_copy=[NOT_SET])"),
        ("seed=1,2", "seed=1,2: several values need a sweep: add -m"),
        ("seed=range(3)", "seed=range(3): several values need a sweep: add -m"),
        ("seed=(", "seed=(: cannot be parsed; quote special characters"),
        ("quickstrat", "quickstrat: overrides are written key=value; did you mean recipe=quicks"),
        ("train", "train: overrides are written key=value; see dpo-run --help"),
        ("--lr 3", "unknown option: --lr"),
        ("--config-dir /no/such", "--config-dir /no/such: no such folder"),
        ("--config-path /tmp", "--config-path: would hide dpo-run's own YAML"),
        ("--experimental-rerun x.pickle", "--experimental-rerun: unpickles a file"),
        ("--config-name other", "other: no such config"),
        ("model@other=gpt2", "model@other: "),
        ("+hydra.callbacks.x._target_=os.system", "hydra.callbacks.x._target_: a config may not"),
        ("resume=true", "resume=true: needs the run to resume; give resume=<run folder>"),
        ("resume=/no/such", "resume=/no/such: no such folder"),
        ("resume=. run_dir=x", "resume=.: names the run folder"),
        ("resume=.", "resume=.: not a run folder"),
        ("-m seed=1,2 run_dir=x", "run_dir: each job of a sweep has its own folder"),
        (
            "-m seed=1,2 resume=true",
            "resume=true: needs the sweep to resume; set hydra.sweep.dir=<its folder>",
        ),
        ("-m train.batchsize=1,2", "train.batchsize: unknown key; did you mean train.batch_size?"),
        ("-m model=tiny,tny", "model=tny: unknown option; did you mean tiny?"),
        ("--cfg job lr=3", "lr: unknown key; did you mean optim.lr?"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: str, expected: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, *words.split())
    assert message.startswith(expected)
    assert "\n" not in message
    assert [path for path in empty.rglob("*") if path.is_file()] == []


def test_several_problems_are_a_list(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "seed=-1", "train.batch_size=0")
    assert message.splitlines() == [
        "2 problems",
        "  seed=-1: must be at least 0",
        "  train.batch_size=0: must be at least 1",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", 'model/mine.yaml", line 1'),
        ("name: a\nname: b\n", "found duplicate key name"),
        ("defaults: [nope]\n", "model/nope: no such YAML file"),
        ("- 1\n", "conf/model/mine.yaml: expected keys and values, such as"),
        ("name: a\nhub_id: b/c\nattentoin: x\n", "model.attentoin: unknown key; did you mean mode"),
        ("name: a\nhub_id: b/c\ntrust_remote_code: true\n", "set it on the command line"),
        ("name: a\nhub_id: {_target_: os.system}\n", "model.hub_id._target_: a config may not"),
    ],
)
def test_mistakes_in_the_users_yaml(
    text: str, expected: str, empty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text(text)
    message = fails(capsys, "--config-dir", str(tmp_path), "model=mine")
    assert expected in message
    assert "\n" not in message


# ---------------------------------------------------------------- Hydra's own flags


def test_cfg_prints_yaml(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--cfg", "job", "--package", "stage", "stage=dpo"])
    assert "beta: 0.1" in capsys.readouterr().out


def test_flags_may_stand_anywhere(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["stage=dpo", "--cfg", "job", "stage.beta=0.3"])
    assert "beta: 0.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "expected"),
    [("dpo-run model=gpt2-l", "model=gpt2-large\n"), ("dpo-run model=tiny train=(", "\n")],
)
def test_shell_completion(
    line: str,
    expected: str,
    empty: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    cli.main(["-sc", "query=bash"])
    out, err = capsys.readouterr()
    assert (out or "\n", err) == (expected, "")


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("raised", "code"), [(DataError("row 3: no text"), 3), (KeyboardInterrupt(), 130)]
)
def test_what_a_run_raises_becomes_its_exit_code(
    raised: BaseException,
    code: int,
    empty: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "dpo_cli.run", SimpleNamespace(run=raiser(raised)))  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as caught:
        cli.main(["seed=0"])
    assert caught.value.code == code
    assert capsys.readouterr().err in ("error: row 3: no text\n", "interrupted\n")


def test_a_bug_keeps_its_traceback(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = raiser(ZeroDivisionError())
    monkeypatch.setitem(sys.modules, "dpo_cli.run", SimpleNamespace(run=run))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        cli.main(["seed=0"])


def raiser(error: BaseException) -> Callable[..., None]:
    def run(*_: object) -> None:
        raise error

    return run


def test_python_m_is_the_same_program(cli: Cli) -> None:
    done = cli("--cfg", "job", "--package", "optim")
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout)["name"] == "adamw"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_the_users_allocator_settings_win(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    cli._let_segments_grow()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("stage.beta", ["  stage.beta=0.1", "      of stage=dpo, stage=online-dpo"]),
        ("lr", ["  optim.lr=null"]),
        ("seed=3", ["  seed=0"]),
    ],
)  # fmt: skip
def test_help_of_one_key(key: str, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["help", key])
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line not in printed] == []


def test_help_of_an_unknown_key_says_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["help", "stage.bta"])
    assert ended.value.code == 2
    assert "did you mean stage.beta" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [["--hydra-help"], ["--cfg", "job"]])
def test_an_odd_option_beside_a_question_is_one_line(
    asked: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dpo-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked, "stage=-1e308"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "must be a string or a list" in line
