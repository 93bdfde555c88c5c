"""What users have built on stays as it is: configurations, error lines, files, seeded losses.

The values are those of the program itself at an earlier commit, so these tests say that something
changed, not what is right; tests with an oracle of their own say that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from dpo_cli import cli
from dpo_cli.config.hints import groups
from dpo_cli.config.hydra import composed
from dpo_cli.config.paths import conf_dir
from golden_files import golden
from small_runs import metrics, train

Flat = dict[str, Any]

ERRORS = [  # commands that end in a line or several
    "stage=dpo stage.beta=0",
    "stage=dpo stage.loss=sigmiod",
    "stage=dop",
    "stage=dpo stage.bta=1",
    "stage=dpo stage.beta=much",
    "stage=sft stage.beta=0.1",
    "stage=dpo data=jsonl",
    "stage=dpo data=jsonl data.path=/no/such",
    "stage=dpo data=imdb data.path=.",
    "stage=dpo stage.loss=hinge stage.label_smoothing=0.1",
    "stage=reward data.responses=1",
    "stage=label",
    "stage=frontier",
    "stage=export",
    "stage=evaluate stage.opponent=chosen judge=http",
    "stage=evaluate stage.opponent=me",
    "stage=evaluate reward_fn=none stage.opponent=chosen",
    "stage=evaluate judge=http",
    "stage=ppo-baseline reward_fn=none",
    "stage=ppo-baseline train.batch_size=24",
    "stage=ppo-baseline stage.temperature=0",
    "stage=online-dpo train.batch_size=24 stage.rollout_prompts=32",
    "stage=online-dpo stage.by=judge",
    "stage=sample stage.prompts=0 stage.eval_prompts=0",
    "model=custom",
    "model.path=/no/such",
    "model.architecture.heads=3",
    "lora=lora",
    "lora.r=8",
    "stage=sample optim.lr=1",
    "optim.lr=0",
    "optim=rmsprop optim.betas=[0.5,0.5]",
    "train.batch_size=0",
    "train.best_metric=accuracy",
    "hardware.precision=fp16",
    "hardware.weights=bf16 hardware.precision=fp32",
    "hardware.sharding=hybrid",
    "hardware.device=2",
    "stage=frontier hardware.devices=2",
    "data.max_length=8 data.max_prompt_length=8",
    "data.chat_template=no.jinja",
    "data.date=yesterday",
    "logger.progress=loud",
    "judge.api_key=x",
    "lora.rank=8",
    "seed=-1",
    "resume=runs/nothing",
    "--config-path=x",
    "--experimental-rerun=x",
    "recipe=nothing",
    "recipe=preferences",
    "recipe=quickstart seed=1",
    "-m stage=dpo stage.beta=0,1 run_dir=x",
    "dry_run=true data=hh data.path=.",
]


def flat(node: Any, path: str = "") -> Flat:
    """{a: {b: 1}} -> {"a.b": 1}; interpolations stay as they are written."""
    if isinstance(node, dict) and node:
        return {
            key: value
            for name, child in node.items()
            for key, value in flat(child, f"{path}.{name}" if path else str(name)).items()
        }
    return {path: node}


def job(*overrides: str) -> Flat:
    """What `dpo-run --cfg job <overrides>` prints, key by key."""
    cfg = composed(overrides)
    values = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(cfg, DictConfig)
    assert isinstance(values, dict)
    del values["hydra"]
    return flat(values)


def test_configurations_are_those_of_before() -> None:
    """The default in full, and what every option of every group makes of it."""
    default = job()
    found: dict[str, Flat] = {"default": default}
    for path in sorted(path for group in groups() for path in conf_dir().glob(f"{group}/*.yaml")):
        word = f"{path.parent.name}={path.stem}"
        values = job(word)
        changed = {k: v for k, v in values.items() if k not in default or default[k] != v}
        found[word] = changed | {k: "absent" for k in default if k not in values}
    for path in sorted(conf_dir().glob("preset/*.yaml")):
        values = job(f"preset={path.stem}")
        found[path.stem] = {k: v for k, v in values.items() if default.get(k, "absent") != v}
    assert found == golden("configurations", found)


def test_errors_are_those_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it: have it undone
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    found: dict[str, Any] = {}
    for command in ERRORS:
        with pytest.raises(SystemExit) as caught:
            cli.main(command.split())
        found[command] = {
            "code": caught.value.code, "lines": capsys.readouterr().err.splitlines()
        }  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    assert found == golden("errors", found)


RUNS = {
    "sft": ["stage=sft"],
    "dpo": ["stage=dpo"],
    "reward": ["stage=reward", "stage.normalize_prompts=8"],
    "ppo-baseline": [
        "stage=ppo-baseline", "stage.rollout_samples=16", "stage.ppo_epochs=1",
        "stage.max_new_tokens=8", "stage.normalize_prompts=8", "stage.eval_prompts=4",
        "train.max_steps=4",
    ],
    "online-dpo": [
        "stage=online-dpo", "stage.rollout_prompts=16", "stage.max_new_tokens=8",
        "stage.eval_prompts=4", "train.max_steps=4",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that adapters are trained on."""
    folder = tmp_path_factory.mktemp("base") / "run"
    train(folder, "train.max_steps=2")
    return folder


def test_seeded_losses_and_files_are_those_of_before(base: Path, tmp_path: Path) -> None:
    """Losses to float32's rounding, as CPUs differ; on one machine they agree bit for bit."""
    found: dict[str, Any] = {}
    for name, words in RUNS.items():
        for lora in (False, True):
            folder = tmp_path / f"{name}-{lora}"
            adapter = ["lora=lora", "lora.r=4", f"model.path={base}"] if lora else []
            train(folder, "train.max_steps=3", "train.save_every_steps=0", *words, *adapter)
            losses = [row["loss"] for row in metrics(folder) if "loss" in row]
            assert len(losses) >= 3
            files = sorted(
                str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
            )
            found[f"{name}{' lora' if lora else ''}"] = {"losses": losses, "files": files}
    stored = golden("runs", found)
    assert found.keys() == stored.keys()
    for name, run in stored.items():
        assert found[name]["files"] == run["files"], name
        assert found[name]["losses"] == pytest.approx(run["losses"], rel=1e-4, abs=1e-6), name
