"""Small complete runs for tests: configuration made through the real composition."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from dpo_cli.config import RunConfig
from dpo_cli.config.literals import as_override
from dpo_cli.config.paths import conf_dir
from dpo_cli.config.read import prepare
from dpo_cli.run import run
from dpo_cli.train import loop

TINY = (
    "model=tiny", "model.architecture.layers=2", "model.architecture.hidden=32",
    "model.architecture.heads=2", "data.rows=48", "data.eval_rows=12", "train.batch_size=8",
    "logger.progress=off", "logger.tensorboard=false", "logger.plots=false", "hardware=cpu",
    "train.sample_max_new_tokens=8", "train.sample_prompts=2",
)  # fmt: skip


def configure(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(conf_dir()), version_base=None):
        cfg = compose("config", overrides=list(overrides))
    return prepare(cfg)  # TINY has words that only some stages read


def train(run_dir: Path, *overrides: str) -> dict[str, Any]:
    """A run in this process; returns its summary."""
    config = configure(*TINY, as_override("run_dir", str(run_dir)), *overrides)
    return run(config, ["dpo-run", *overrides])


def train_on_rows(run_dir: Path, *overrides: str) -> dict[str, Any]:
    """`train` on rows of files, without the keys of the generated reviews."""
    words = [w for w in TINY if not w.startswith("data.")]
    config = configure(*words, as_override("run_dir", str(run_dir)), *overrides)
    return run(config, ["dpo-run", *overrides])


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """The body's run ends without saving, as if killed, when it has taken so many steps."""
    real = loop._train_step

    def dies(run: Any) -> Any:
        if run.step == step:
            raise KeyboardInterrupt
        return real(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            yield


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
