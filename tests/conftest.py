"""What every test gets: offline, one thread, a cache of its own. Fixtures: `shared`, `cli`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).resolve().parent.parent
HF_HOME = tempfile.TemporaryDirectory(prefix="dpo-run-tests-")  # removed at exit

TEST_ENV = {
    "HF_HOME": HF_HOME.name,  # never the user's own cache: a test must not depend on it
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # one order of summation, and xdist's workers share the cores
    "MPLBACKEND": "Agg",
    "WANDB_MODE": "disabled",
}
# The libraries read these when they are first imported, so before any test module is.
os.environ.update(TEST_ENV)
if "DPO_RUN_SHARED" not in os.environ and (ROOT.parent / "shared").is_dir():
    os.environ["DPO_RUN_SHARED"] = str(ROOT.parent / "shared")

KEPT_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")


def import_path() -> str:
    """PYTHONPATH of a child: this checkout, then the caller's, which may hold what it imports."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


class Cli(Protocol):
    """See the fixture `cli`."""

    def __call__(
        self, *args: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(autouse=True)
def isolation(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what another test may have set in this process."""
    # A command sets it for its children; set first, so that it is gone after the test, too.
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.delenv("PYTHONSAFEPATH")
    monkeypatch.setenv("DPO_RUN_CACHE", str(tmp_path_factory.mktemp("cache")))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `cuda` where there is no GPU."""
    if item.get_closest_marker("cuda") is None or os.environ.get("DPO_RUN_TEST_DEVICE") == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def shared() -> Path:
    """Folder of real data and small real weights, which the repository does not hold."""
    folder = os.environ.get("DPO_RUN_SHARED", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DPO_RUN_SHARED names no folder")
    return Path(folder)


@pytest.fixture
def clean_env() -> dict[str, str]:
    """An environment for subprocesses: of the caller's, only what a program needs to start."""
    kept = {name: os.environ[name] for name in KEPT_ENV if name in os.environ}
    wide = {"COLUMNS": "200"}  # messages stay on one line
    return kept | TEST_ENV | wide | {"DPO_RUN_CACHE": os.environ["DPO_RUN_CACHE"]}


@pytest.fixture
def cli(tmp_path: Path, clean_env: dict[str, str]) -> Cli:
    """`cli("stage=sft", "dry_run=true")`: this checkout's `dpo-run`, as a process of its own.

    It runs in `tmp_path`; `env` is added to a clean environment. Nothing is checked:
    look at `returncode`, `stdout` and `stderr`.
    """

    def run(
        *args: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        seconds: float = 110,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dpo_cli", *args],
            cwd=cwd or tmp_path,
            env=clean_env | {"PYTHONPATH": import_path()} | dict(env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    return run
